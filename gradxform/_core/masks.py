"""Which leaves a rule acts on.

A mask is a path pattern, a tree of booleans, a function ``(path, leaf) -> bool`` that is called for each leaf, or a
function ``(params) -> tree of booleans`` that is called once. `mask_of` tells which. What it makes can be hashed, and
is equal for equal masks.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from gradxform._core import trees
from gradxform._core.differences import difference
from gradxform._core.folding import listed
from gradxform._core.patterns import Pattern, Table, compiled

MaskLike: TypeAlias = "str | re.Pattern[str] | Callable[[str, Any], bool] | Callable[[Any], Any] | Any"

FORMS = (
    "a mask is a path pattern, a tree of booleans, a function (path, leaf) -> bool that is called for each leaf, or a "
    "function (params) -> tree of booleans that is called once"
)


@dataclasses.dataclass(frozen=True)
class Predicate:
    """Leaves for which ``function(path, leaf)`` is true."""

    function: Callable[[str, Any], bool]

    @property
    def label(self) -> str:
        """What a group of these leaves is called."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def unmatched(self, who: str, paths: tuple[str, ...]) -> str:
        """The message for a predicate that takes no leaf."""
        return f"{who} {self!r} takes none of the leaves {listed(paths)}"

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        return [self.takes(path, leaf) for path, leaf in zip(trees.paths(structure), leaves, strict=True)]

    def takes(self, path: str, leaf: Any) -> bool:
        try:
            return _boolean(f"mask({path!r}, leaf)", self.function(path, leaf))
        except Exception as error:
            error.add_note(
                f"{self!r} has two arguments, so gradxform calls mask(path, leaf) -> bool once per leaf, with a path "
                "like 'dense/kernel'"
            )
            raise

    def __repr__(self) -> str:
        return _name(self.function)


@dataclasses.dataclass(frozen=True)
class BooleanTree:
    """Leaves where a tree of booleans, or a prefix of one, is true."""

    structure: Any
    leaves: tuple[bool, ...]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        if not leaves:  # such as the placeholder of optax.tree_map_params, which has no structure to compare
            return []
        try:
            parts = self.structure.flatten_up_to(params)
        except ValueError:
            tree = self.structure.unflatten(self.leaves)
            what = difference("mask", tree, "params", params, prefix=True) or "mask and params differ in structure"
            raise ValueError(f"{what}; the mask must be a tree like the parameters, or a prefix of it") from None
        sizes = (len(jax.tree.leaves(part)) for part in parts)
        return [value for value, size in zip(self.leaves, sizes, strict=True) for _ in range(size)]

    def __repr__(self) -> str:
        text = repr(self.structure.unflatten(self.leaves))
        few = len(text) <= 200
        return text if few else f"<a tree of {len(self.leaves)} booleans, {sum(self.leaves)} of them True>"


@dataclasses.dataclass(frozen=True)
class WholeTree:
    """Leaves where ``function(params)`` is true, a tree of booleans of the same structure as the parameters."""

    function: Callable[[Any], Any]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        if not leaves:  # as in `BooleanTree`
            return []
        try:
            return self._checked(self.function(params), params, structure)
        except Exception as error:
            error.add_note(
                f"{self!r} has one argument, so gradxform calls mask(params) once, with the whole tree; a mask that is "
                "called for each leaf has two arguments, (path, leaf)"
            )
            raise

    def _checked(self, answer: Any, params: Any, structure: Any) -> list[bool]:
        values, own = jax.tree.flatten(answer)
        if own != structure:
            what = difference("mask(params)", answer, "params", params) or "mask(params) and params differ in structure"
            raise ValueError(f"{what}; the answer of {self!r} must be a tree of booleans like the parameters")
        return [
            _boolean(trees.name_leaf("mask(params)", structure, index), value) for index, value in enumerate(values)
        ]

    def __repr__(self) -> str:
        return _name(self.function)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))


@dataclasses.dataclass(frozen=True)
class Members:
    """Leaves in one of these groups of a table, which sorts all leaves or those of a group of another table."""

    table: Table[Any]
    groups: frozenset[int]
    within: Members | None = None

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        if self.within is None:
            self.table.check(self.groups, leaves, structure)
            return [group in self.groups for group in self.table(structure, leaves)]
        inside = self.within(params, leaves, structure)
        alone = dataclasses.replace(self, within=None)
        answers = iter(alone(*part_of(inside, leaves, structure)))
        return [taken and next(answers) for taken in inside]

    def inside(self, outer: Members) -> Members:
        """The same, in a group of another table."""
        return dataclasses.replace(self, within=outer if self.within is None else self.within.inside(outer))


def part_of(taken: Sequence[bool], leaves: Sequence[Any], structure: Any) -> tuple[Any, list[Any], Any]:
    """The tree of some of the leaves, with nothing in place of the others; these leaves, and its structure."""
    part = structure.unflatten([leaf if take else _GONE for leaf, take in zip(leaves, taken, strict=True)])
    return part, *jax.tree.flatten(part)


_GONE = optax.MaskedNode()


@dataclasses.dataclass(frozen=True)
class Both:
    """Leaves that both of two masks choose."""

    first: Mask
    second: Mask

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        pairs = zip(self.first(params, leaves, structure), self.second(params, leaves, structure), strict=True)
        return [first and second for first, second in pairs]


@dataclasses.dataclass(frozen=True)
class Either:
    """Leaves that one of several masks chooses."""

    masks: tuple[Mask, ...]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        return [any(each) for each in zip(*(mask(params, leaves, structure) for mask in self.masks), strict=True)]


Mask: TypeAlias = Pattern | Predicate | BooleanTree | WholeTree | Members | Both | Either


def own_part(mask: Mask | None) -> Mask | None:
    """What a mask says besides the groups that its stage is in."""
    if isinstance(mask, Members):
        return None
    if isinstance(mask, Both):
        first, second = own_part(mask.first), own_part(mask.second)
        return Both(first, second) if first and second else first or second
    if isinstance(mask, Either):
        return None if all(own_part(each) is None for each in mask.masks) else mask
    return mask


def inside(mask: Mask | None, outer: Members) -> Mask:
    """The leaves of a mask that are in a group; tables in it sort the leaves of that group only."""
    if mask is None:
        return outer
    if isinstance(mask, Members):
        return mask.inside(outer)
    if isinstance(mask, Both):
        return Both(inside(mask.first, outer), inside(mask.second, outer))
    if isinstance(mask, Either):
        return Either(tuple(inside(each, outer) for each in mask.masks))
    return Both(outer, mask)


def mask_of(mask: MaskLike | None) -> Mask | None:
    """The mask that `mask` describes; None acts on every leaf."""
    if mask is None:
        return None
    if isinstance(mask, str | re.Pattern):
        return compiled("mask", mask)
    leaves, structure = jax.tree.flatten(mask)
    if callable(mask) and not _holds_booleans(mask, leaves, structure):
        return _function_of(mask)
    if jax.tree_util.treedef_is_leaf(structure):
        raise TypeError(
            f"mask is the single value {_shown(mask)}; {FORMS} "
            "(optax.inject_hyperparams calls a mask as if it were a schedule: name it in static_args)"
        )
    named = ((trees.name_leaf("mask", structure, index), leaf) for index, leaf in enumerate(leaves))
    return BooleanTree(structure, tuple(_boolean(name, leaf) for name, leaf in named))


def _holds_booleans(mask: Any, leaves: list[Any], structure: Any) -> bool:
    """Whether a mask that can be called is nevertheless a tree of booleans, such as an Equinox module of them."""
    is_tree = bool(leaves) and not jax.tree_util.treedef_is_leaf(structure)
    return is_tree and not isinstance(mask, jax.tree_util.Partial) and all(map(_is_boolean, leaves))


def _function_of(mask: Callable[..., Any]) -> Predicate | WholeTree:
    """The mask that a function stands for, told by the number of its arguments; raises if that does not tell."""
    try:
        hash(mask)
    except TypeError:
        raise TypeError(
            f"mask is a {type(mask).__name__} without a hash, so equal optimizers could not be known; make it a frozen "
            "dataclass, or pass a function"
        ) from None
    try:
        parameters = list(inspect.signature(mask).parameters.values())
    except (TypeError, ValueError):
        parameters = None
    if parameters is not None:
        required = [p for p in parameters if p.default is p.empty and p.kind not in _VARIADIC]
        positional = all(p.kind is not p.KEYWORD_ONLY for p in required)
        if positional and len(required) == 2:
            return Predicate(mask)
        if positional and len(required) == len(parameters) == 1:
            return WholeTree(mask)
    name = _name(mask)
    signature = "(…)" if parameters is None else f"({', '.join(map(_bare, parameters))})"
    raise TypeError(
        f"mask {name}{signature} does not say by its arguments how to call it: {FORMS}. Wrap it: lambda params: "
        f"{name}(params), or lambda path, leaf: {name}(path, leaf)"
    )


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _bare(parameter: inspect.Parameter) -> str:
    """A parameter as text, without its annotation and with its default cut short."""
    plain = parameter.replace(annotation=parameter.empty, default=parameter.empty)
    return str(plain) if parameter.default is parameter.empty else f"{plain}={parameter.default!r:.20}"


def _boolean(name: str, value: Any) -> bool:
    if not _is_boolean(value):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return bool(value)


def _is_boolean(value: Any) -> bool:
    known = trees.concrete(value) and isinstance(value, bool | np.bool_ | jax.Array | np.ndarray)
    return known and np.shape(value) == () and np.asarray(value).dtype == bool


def _shown(value: Any) -> str:
    return trees.describe(value) if isinstance(value, jax.Array | np.ndarray) else f"{value!r:.60}"
