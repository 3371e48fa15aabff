"""Which leaves of a model are matrices: patterns with a layout each, and the transformation of the other leaves."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import optax

from gradxform._core import trees
from gradxform._core.arguments import is_a
from gradxform._core.body import Transformation
from gradxform._core.chain import chain_of
from gradxform._core.folding import listed
from gradxform._core.groups import own_group
from gradxform._core.lift import stages_of
from gradxform._core.patterns import Pattern, Table, patterns_of
from gradxform._core.stages import Group, Groups
from gradxform.optimizers.matrix.hidden import names_of_ends, shape_of_an_end
from gradxform.optimizers.matrix.layouts import Layout, layout_of

_LOG = logging.getLogger("gradxform")

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
    if not is_a(matrices, Mapping) or not matrices:
        raise TypeError(f"matrices must be a pattern or a dict from patterns to layouts, got {matrices!r}")
    layouts = tuple(layout_of(layout) for layout in matrices.values())
    table = MatrixTable(who, patterns_of(who, matrices), other is not None, "other", layouts)
    chains = [on(layout.text) for layout in layouts]
    members = [Group(stages_of(who, chain), chain) for chain in chains]
    if other is not None:
        members.append(own_group("other", other))
    stage = Groups(table, tuple(members), joint=True)
    stage.expanded()  # raises where the groups do not fit together
    return Transformation.of(chain_of((stage,)))


@dataclasses.dataclass(frozen=True)
class MatrixTable(Table[Pattern]):
    """Groups of leaves that are matrices; a pattern that is a leaf's whole path goes before one with wildcards."""

    layouts: tuple[Layout, ...] = ()
    told: set[Any] = dataclasses.field(default_factory=set[Any], compare=False, repr=False)
    """What was logged of this table, so that it is logged once."""

    def matches(self, path: str, leaf: Any) -> list[int]:
        exact = [i for i in range(len(self.keys)) if self._names_whole(i, path)]
        return exact or super().matches(path, leaf)

    def check(self, groups: frozenset[int], leaves: list[Any], structure: Any) -> None:
        """Raise if a leaf does not have its layout, or if a wildcard takes what looks like an embedding or a head."""
        paths = trees.paths(structure)
        by_wildcard: dict[int, list[str]] = {}
        for path, end, leaf, group in zip(paths, names_of_ends(paths), leaves, self(structure, leaves), strict=True):
            if group not in groups or group >= len(self.layouts):
                continue
            shape, dtype = trees.aval(leaf)
            misfit = self.layouts[group].misfit(shape, dtype)
            if not self._names_whole(group, path):
                by_wildcard.setdefault(group, []).append(path)
                self._check_hidden(group, path, end, set() if misfit else self.layouts[group].all_sides(shape))
            if misfit:
                raise ValueError(f"{self.who}: {path!r} {misfit}, or let other= take the leaf")
        for group, matched in by_wildcard.items():
            self._tell(group, tuple(matched), len(paths))

    def _check_hidden(self, group: int, path: str, end: str | None, sides: set[tuple[int, int]]) -> None:
        """Raise if a leaf that a wildcard takes looks like an embedding or a head."""
        reason = None
        if end:
            reason = f"name ({end})"
        elif thin := next((shape for shape in sides if shape_of_an_end(path, shape)), None):
            reason = f"shape ({thin[0]}×{thin[1]})"
        if reason:
            raise ValueError(
                f"{self.who}: {self.keys[group]!r} takes {path!r}, by its {reason} an embedding or a head, which "
                "are no hidden matrices; write the whole path in matrices if you mean it, or let the pattern pass it "
                "over, so that other= takes it"
            )

    def _tell(self, group: int, matched: tuple[str, ...], number: int) -> None:
        """Log which paths a wildcard matched, the first time that it matches them: at `init`."""
        if (group, matched) not in self.told:
            self.told.add((group, matched))
            where = listed(matched)
            _LOG.info("%s: %r takes %d of %d leaves: %s", self.who, self.keys[group], len(matched), number, where)

    def order(self) -> list[int]:
        """The matrices first, so that the numbered names are those of `other`."""
        return sorted(super().order())

    def label(self, group: int) -> str:
        name = super().label(group)
        return f"{name} ({self.who}, {self.layouts[group].text})" if group < len(self.layouts) else name

    def _names_whole(self, pattern: int, path: str) -> bool:
        return self.keys[pattern].expression.pattern in (path, re.escape(path))
