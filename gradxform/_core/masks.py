"""Which leaves a rule acts on, and path patterns.

A mask is a path pattern, a tree of booleans, a function ``(path, leaf) -> bool`` that is asked of each leaf, or a
function ``(params) -> tree of booleans`` that is asked once. `mask_of` tells which; what it makes has a hash, and
equals what it makes of an equal mask.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, cast

import jax
import numpy as np

from gradxform._core import trees
from gradxform._core.arguments import is_a
from gradxform._core.differences import difference
from gradxform._core.folding import listed

MaskLike: TypeAlias = "str | re.Pattern[str] | Callable[[str, Any], bool] | Callable[[Any], Any] | Any"

FORMS = (
    "a mask is a path pattern, a tree of booleans, a function (path, leaf) -> bool that is asked of each leaf, or a "
    "function (params) -> tree of booleans that is asked once"
)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Leaves whose whole ``a/b/0/c`` path a regular expression matches."""

    expression: re.Pattern[str]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        paths = trees.paths(structure)
        chosen = [self.expression.fullmatch(path) is not None for path in paths]
        if paths and not any(chosen):
            raise ValueError(self.unmatched("mask", paths))
        return chosen

    def unmatched(self, who: str, paths: tuple[str, ...]) -> str:
        """What to say where it matches no path."""
        meant = _meant(self.expression, paths)
        remedy = f": did you mean {meant}?" if meant else ""
        return f"{who} {self!r} matches none of the paths {listed(paths)}; it must match a whole path{remedy}"

    def __repr__(self) -> str:
        plain = self.expression == re.compile(self.expression.pattern)
        return repr(self.expression.pattern if plain else self.expression)


def _meant(expression: re.Pattern[str], paths: tuple[str, ...]) -> str | None:
    """The pattern nearest to one that matches nothing, written as Python; only one that matches a path."""
    for text, written in _candidates(expression.pattern, paths):
        try:
            candidate = re.compile(text, expression.flags)
        except re.error:
            continue
        if any(map(candidate.fullmatch, paths)):
            return written
    return None


def _candidates(text: str, paths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Patterns that a user may have meant by one, the likely ones first, and how to write them."""
    names = list(dict.fromkeys(name for path in paths for name in path.split("/")))
    near = [difflib.get_close_matches(text, texts, n=1) for texts in (paths, names)]
    parts = "/".join(re.findall(r"\w+", text)), text.partition("/")[2]
    likely = [text, parts[0], *map(re.escape, near[0]), parts[1], *map(re.escape, near[1])]
    for pattern in filter(None, likely):
        whole = f"(?:{pattern})" if "|" in pattern else pattern
        for wider in (pattern, f"{whole}/.*", f".*/{whole}", f".*/{whole}/.*"):
            yield wider, repr(wider)
        if set("*?") & set(pattern):
            yield glob(pattern).pattern, f"gx.glob({pattern!r})"
        yield f"(?i:{pattern})", repr(f"(?i:{pattern})")
    if text:
        yield f".*(?:{text}).*", repr(f".*{text}.*" if "|" not in text else f".*(?:{text}).*")


@dataclasses.dataclass(frozen=True)
class Predicate:
    """Leaves for which ``function(path, leaf)`` is true."""

    function: Callable[[str, Any], bool]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        return [self._ask(path, leaf) for path, leaf in zip(trees.paths(structure), leaves, strict=True)]

    def _ask(self, path: str, leaf: Any) -> bool:
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
        if not leaves:  # the placeholder of optax.tree_map_params has no structure either
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
                f"{self!r} has one argument, so gradxform calls mask(params) once, with the whole tree; to be asked of "
                "each leaf, a mask has two arguments, (path, leaf)"
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
class Table:
    """Groups of leaves by the pattern that matches their paths; what none matches is in the last group, if any may."""

    who: str
    """What the groups belong to, for messages."""
    patterns: tuple[Pattern, ...]
    has_default: bool
    default: str = "default"
    """What the group of the others is called, and the argument that gives it."""

    def __call__(self, structure: Any) -> tuple[int, ...]:
        """The group of each leaf; raises if a pattern matches no leaf, or a leaf has no group or two."""
        return _groups(self, structure)

    def matches(self, path: str) -> list[int]:
        """The patterns that claim a path."""
        return [i for i, pattern in enumerate(self.patterns) if pattern.expression.fullmatch(path)]

    def check(self, groups: frozenset[int], leaves: list[Any], structure: Any) -> None:
        """Raise if a leaf of these groups is not what the table says; where it says only paths, any leaf is."""

    def order(self) -> list[int]:
        """The default first: what a group shares with it has its name."""
        groups = list(range(len(self.patterns)))
        return [len(groups), *groups] if self.has_default else groups

    def names(self) -> list[str]:
        return [pattern.expression.pattern for pattern in self.patterns]

    def label(self, group: int) -> str:
        """What the group is called."""
        return (*self.names(), self.default)[group]


@functools.lru_cache(maxsize=256)
def _groups(table: Table, structure: Any) -> tuple[int, ...]:
    paths = trees.paths(structure)
    groups = []
    for path in paths:
        matches = table.matches(path)
        if len(matches) > 1:
            both = " and ".join(repr(table.patterns[i]) for i in matches)
            raise ValueError(f"{table.who}: {both} both match {path!r}; make the patterns exclude one another")
        if not matches and not table.has_default:
            shown = [*map(repr, table.patterns[:6]), *(["…"] if len(table.patterns) > 6 else [])]
            raise ValueError(
                f"{table.who}: no pattern matches {path!r}, of {', '.join(shown)}; add one or give {table.default}="
            )
        groups.append(matches[0] if matches else len(table.patterns))
    for i, pattern in enumerate(table.patterns):
        if paths and i not in groups:
            raise ValueError(pattern.unmatched(f"{table.who}: pattern", paths))
    return tuple(groups)


@dataclasses.dataclass(frozen=True)
class Members:
    """Leaves in one of these groups of a table."""

    table: Table
    groups: frozenset[int]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        self.table.check(self.groups, leaves, structure)
        return [group in self.groups for group in self.table(structure)]


@dataclasses.dataclass(frozen=True)
class Both:
    """Leaves that two masks choose."""

    one: Mask
    other: Mask

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        pairs = zip(self.one(params, leaves, structure), self.other(params, leaves, structure), strict=True)
        return [one and other for one, other in pairs]


Mask: TypeAlias = Pattern | Predicate | BooleanTree | WholeTree | Members | Both


def mask_of(mask: MaskLike | None) -> Mask | None:
    """The mask that `mask` describes; None acts on every leaf."""
    if mask is None:
        return None
    if isinstance(mask, str | re.Pattern):
        return _compiled("mask", mask)
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
    """Whether something callable is a tree of booleans all the same, such as an Equinox module of them."""
    is_tree = bool(leaves) and not jax.tree_util.treedef_is_leaf(structure)
    return is_tree and not isinstance(mask, jax.tree_util.Partial) and all(map(_is_boolean, leaves))


def _function_of(mask: Callable[..., Any]) -> Predicate | WholeTree:
    """The mask that a function is, by how many arguments it takes; raises if that does not tell."""
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
        f"mask {name}{signature} does not say by its arguments how to ask it: {FORMS}. Wrap it: lambda params: "
        f"{name}(params), or lambda path, leaf: {name}(path, leaf)"
    )


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _bare(parameter: inspect.Parameter) -> str:
    """A parameter without its annotation, and with a default that is not long."""
    plain = parameter.replace(annotation=parameter.empty, default=parameter.empty)
    return str(plain) if parameter.default is parameter.empty else f"{plain}={parameter.default!r:.20}"


def _compiled(name: str, pattern: str | re.Pattern[str]) -> Pattern:
    try:
        return Pattern(re.compile(pattern))
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no regular expression: {error}; for globs use gx.glob") from None


def table_of(who: str, patterns: Iterable[Any], has_default: bool) -> Table:
    """The groups that `patterns` make."""

    def one(pattern: Any) -> Pattern:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"{who}: a pattern must be a string or a compiled regular expression, got {pattern!r}")
        return _compiled(f"{who}: pattern", cast("str | re.Pattern[str]", pattern))

    return Table(who, tuple(map(one, patterns)), has_default)


def glob(pattern: str) -> re.Pattern[str]:
    """A path pattern with wildcards: ``*`` and ``?`` within one name, ``**`` across ``/``, ``**/`` any number of names.

    For every argument that takes a regular expression over paths.

    Args:
      pattern: Such as ``encoder/*/kernel``.

    Raises:
      TypeError: if ``pattern`` is no string.

    Example:
      >>> import gradxform as gx
      >>> gx.glob("encoder/*/kernel").fullmatch("encoder/layer_0/kernel") is not None
      True
    """
    if not is_a(pattern, str):
        raise TypeError(f"pattern must be a string, got {pattern!r}")
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"((?:^|(?<=/))\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))


def _boolean(name: str, value: Any) -> bool:
    if not _is_boolean(value):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return bool(value)


def _is_boolean(value: Any) -> bool:
    known = trees.concrete(value) and isinstance(value, bool | np.bool_ | jax.Array | np.ndarray)
    return known and np.shape(value) == () and np.asarray(value).dtype == bool


def _shown(value: Any) -> str:
    return trees.describe(value) if isinstance(value, jax.Array | np.ndarray) else f"{value!r:.60}"
