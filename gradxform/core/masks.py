"""Which leaves a rule acts on: a tree of booleans, a callable ``(path, leaf) -> bool`` or a path pattern."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import numpy as np

from gradxform.core import trees

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
        return repr(self.expression.pattern)


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
        try:
            parts = self.structure.flatten_up_to(params)
        except ValueError as error:
            raise ValueError(f"mask and params differ in structure: {error}") from None
        sizes = (len(jax.tree.leaves(part)) for part in parts)
        return [value for value, size in zip(self.leaves, sizes, strict=True) for _ in range(size)]

    def __repr__(self) -> str:
        return repr(self.structure.unflatten(self.leaves))


Mask: TypeAlias = Pattern | Predicate | BooleanTree


def mask_of(mask: MaskLike | None) -> Mask | None:
    """The mask that `mask` describes; None acts on every leaf."""
    if mask is None:
        return None
    if isinstance(mask, str | re.Pattern):
        return Pattern(_compiled(mask))
    if callable(mask):
        return Predicate(cast(Callable[[str, Any], bool], mask))
    if isinstance(mask, bool | np.bool_ | jax.Array):
        raise TypeError(
            f"mask is the single value {mask}; give a tree of booleans, a callable or a pattern "
            "(optax.inject_hyperparams calls a mask as if it were a schedule: name it in static_args)"
        )
    leaves, structure = jax.tree.flatten(mask)
    return BooleanTree(structure, tuple(_boolean("every leaf of mask", leaf) for leaf in leaves))


def _compiled(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"mask {pattern!r} is no regular expression: {error}") from None


def _boolean(name: str, value: Any) -> bool:
    known = trees.concrete(value) and isinstance(value, bool | np.bool_ | jax.Array | np.ndarray)
    if known and np.shape(value) == () and np.asarray(value).dtype == bool:
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")
