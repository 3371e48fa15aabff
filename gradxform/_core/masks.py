"""Which leaves a rule acts on: a tree of booleans, a callable ``(path, leaf) -> bool`` or a path pattern."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import jax
import numpy as np

from gradxform._core import trees

MaskLike: TypeAlias = "str | re.Pattern[str] | Callable[[str, Any], bool] | Any"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Leaves whose whole ``a/b/0/c`` path a regular expression matches."""

    expression: re.Pattern[str]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        paths = trees.paths(structure)
        chosen = [self.expression.fullmatch(path) is not None for path in paths]
        if paths and not any(chosen):
            raise ValueError(
                f"mask {self!r} matches none of the paths {', '.join(paths[:20])}; it must match a whole path"
            )
        return chosen

    def __repr__(self) -> str:
        plain = self.expression == re.compile(self.expression.pattern)
        return repr(self.expression.pattern if plain else self.expression)


@dataclasses.dataclass(frozen=True)
class Predicate:
    """Leaves for which ``function(path, leaf)`` is true."""

    function: Callable[[str, Any], bool]

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        return [self._ask(path, leaf) for path, leaf in zip(trees.paths(structure), leaves, strict=True)]

    def _ask(self, path: str, leaf: Any) -> bool:
        try:
            return _boolean(f"mask({path!r}, leaf)", self.function(path, leaf))
        except TypeError as error:
            error.add_note("gradxform calls mask(path, leaf) -> bool once per leaf, with path like 'dense/kernel'")
            raise

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


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
        except ValueError as error:
            raise ValueError(f"mask and params differ in structure: {error}") from None
        sizes = (len(jax.tree.leaves(part)) for part in parts)
        return [value for value, size in zip(self.leaves, sizes, strict=True) for _ in range(size)]

    def __repr__(self) -> str:
        return repr(self.structure.unflatten(self.leaves))


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
            raise ValueError(
                f"{table.who}: no pattern matches {path!r}, of {', '.join(map(repr, table.patterns))}; "
                f"add one or give {table.default}="
            )
        groups.append(matches[0] if matches else len(table.patterns))
    for i, pattern in enumerate(table.patterns):
        if paths and i not in groups:
            raise ValueError(
                f"{table.who}: pattern {pattern!r} matches none of the paths {', '.join(paths[:20])}; "
                "it must match a whole path"
            )
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


Mask: TypeAlias = Pattern | Predicate | BooleanTree | Members | Both


def mask_of(mask: MaskLike | None) -> Mask | None:
    """The mask that `mask` describes; None acts on every leaf."""
    if mask is None:
        return None
    if isinstance(mask, str | re.Pattern):
        return _compiled("mask", mask)
    if callable(mask):
        return Predicate(cast(Callable[[str, Any], bool], mask))
    if isinstance(mask, bool | np.bool_ | jax.Array):
        raise TypeError(
            f"mask is the single value {mask}; give a tree of booleans, a callable or a pattern "
            "(optax.inject_hyperparams calls a mask as if it were a schedule: name it in static_args)"
        )
    leaves, structure = jax.tree.flatten(mask)
    return BooleanTree(structure, tuple(_boolean("every leaf of mask", leaf) for leaf in leaves))


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
    if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance] (callers are not all checked)
        raise TypeError(f"pattern must be a string, got {pattern!r}")
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"((?:^|(?<=/))\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))


def _boolean(name: str, value: Any) -> bool:
    known = trees.concrete(value) and isinstance(value, bool | np.bool_ | jax.Array | np.ndarray)
    if known and np.shape(value) == () and np.asarray(value).dtype == bool:
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")
