"""Which leaves of a model are matrices: patterns with a layout each, and what takes the other leaves."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import optax

from gradxform._core import trees
from gradxform._core.body import Transformation
from gradxform._core.chain import Chain
from gradxform._core.groups import own_group
from gradxform._core.lift import stages_of
from gradxform._core.masks import Table, table_of
from gradxform._core.stages import Group, Groups
from gradxform.optimizers.matrix.layouts import Layout, layout_of

Matrices: TypeAlias = "str | re.Pattern[str] | Mapping[str | re.Pattern[str], str]"


def by_layout(
    who: str,
    matrices: Matrices,
    on: Callable[[str], Transformation],
    other: optax.GradientTransformation | None,
) -> Transformation:
    """``on(layout)`` on the leaves that a pattern of `matrices` matches, `other` on all others; see `muon`."""
    if isinstance(matrices, str | re.Pattern):
        matrices = {matrices: "in out"}
    if not isinstance(matrices, Mapping) or not matrices:  # pyright: ignore[reportUnnecessaryIsInstance] (callers are not all checked)
        raise TypeError(f"matrices must be a pattern or a dict from patterns to layouts, got {matrices!r}")
    layouts = tuple(layout_of(layout) for layout in matrices.values())
    table = MatrixTable(who, table_of(who, matrices, False).patterns, other is not None, "other", layouts)
    chains = [on(layout.text) for layout in layouts]
    members = [Group(stages_of(who, chain), chain) for chain in chains]
    if other is not None:
        members.append(own_group("other", other))
    stage = Groups(table, tuple(members), joint=True)
    stage.expanded()  # raises where the groups do not fit together
    return Transformation.of(Chain((stage,)))


@dataclasses.dataclass(frozen=True)
class MatrixTable(Table):
    """Groups of leaves that are matrices, by patterns of which a whole path goes before a wildcard."""

    layouts: tuple[Layout, ...] = ()

    def matches(self, path: str) -> list[int]:
        exact = [i for i in range(len(self.patterns)) if self._names_whole(i, path)]
        return exact or super().matches(path)

    def check(self, groups: frozenset[int], leaves: list[Any], structure: Any) -> None:
        """Raise if a leaf has not its layout, or is an embedding or a head by name and taken by a wildcard only."""
        paths = trees.paths(structure)
        for path, leaf, group in zip(paths, leaves, self(structure), strict=True):
            if group not in groups or group >= len(self.layouts):
                continue
            if (word := _not_hidden(path)) and not self._names_whole(group, path):
                raise ValueError(
                    f"{self.who}: {self.patterns[group]!r} takes {path!r}, by its name ({word}) an embedding or a "
                    "head, which are no hidden matrices; write the whole path in matrices if you mean it, or let the "
                    "pattern pass it over, so that other= takes it"
                )
            if misfit := self.layouts[group].misfit(*trees.aval(leaf)):
                raise ValueError(f"{self.who}: {path!r} {misfit}, or let other= take the leaf")

    def order(self) -> list[int]:
        """The matrices first: `other` has the numbered names."""
        return sorted(super().order())

    def label(self, group: int) -> str:
        name = super().label(group)
        return f"{name} ({self.who}, {self.layouts[group].text})" if group < len(self.layouts) else name

    def _names_whole(self, pattern: int, path: str) -> bool:
        return self.patterns[pattern].expression.pattern in (path, re.escape(path))


_ANYWHERE = re.compile("(un)?embed(s|der|dings?)?|wte|wpe|vocab|logits?")
_LAST = re.compile("head|tokens?|positions?")


@functools.lru_cache(maxsize=65536)
def _not_hidden(path: str) -> str | None:
    """The word in a path that tells an embedding or a head: `head_0` does, `heads` and `multi_head_attention` don't."""
    for part in path.split("/"):
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]
        found = [w for w in words if _ANYWHERE.fullmatch(w)] + [w for w in words[-1:] if _LAST.fullmatch(w)]
        if found:
            return found[0]
    return None
