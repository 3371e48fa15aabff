"""What a chain is made of: rules, stages that see whole trees, and groups of leaves with stages of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from gradxform._core.body import Body
from gradxform._core.hyperparameters import Hyperparameter
from gradxform._core.masks import Either, Mask, Members, inside, own_part, part_of
from gradxform._core.patterns import Table
from gradxform._core.rule import Rule


@dataclasses.dataclass(frozen=True)
class TreeStage:
    """A stage that is no rule: it sees the trees of all leaves it acts on."""

    body: Body
    mask: Mask | None = None

    def __repr__(self) -> str:
        return repr(self.body)


@dataclasses.dataclass(frozen=True)
class Group:
    """The stages of the leaves that a pattern matches, and how the user wrote them."""

    stages: tuple[Stage, ...]
    written: Any = dataclasses.field(compare=False)

    def __repr__(self) -> str:
        return repr(self.written)


@dataclasses.dataclass(frozen=True)
class Groups:
    """A stage that consists of other stages in each group of leaves."""

    table: Table[Any]
    groups: tuple[Group, ...]
    """In the order of the table; the default is last, if there is one."""
    joint: bool

    def expanded(self) -> list[Rule | TreeStage]:
        """The same as one sequence of stages, each of which acts on some of the groups.

        Every group's stages keep their order. Stages that need all leaves at once, such as a clip by the global norm,
        are lined up, so that the groups which have such a stage share it.
        """
        turns = {index: list(_turns(self.groups[index].stages)) for index in self.table.order()}
        sequence: list[Rule | TreeStage] = []
        for turn in range(max(map(len, turns.values()))):
            now = [(stage, index) for index, runs in turns.items() if turn < len(runs) for stage in runs[turn]]
            merged = self._shared([(stage, index) for stage, index in now if not _measures(stage)])
            for stage, indices in merged:
                self._check_whole(stage, indices)
            sequence += [self._within(stage, *indices) for stage, indices in merged]
            sequence += self._joined([(stage, index) for stage, index in now if _measures(stage)])
        return sequence

    def _check_whole(self, stage: Rule | TreeStage, indices: list[int]) -> None:
        """Raise if a norm is hidden in a tree stage that not all groups with norms share."""
        with_norms = {index for index, group in enumerate(self.groups) if any(map(measures, expanded(group.stages)))}
        if self.joint and isinstance(stage, TreeStage) and measures(stage) and not with_norms <= set(indices):
            raise ValueError(
                f"by_path: {stage!r} in {self.table.label(indices[0])!r} sees the norm of its own leaves only, and "
                "other groups take norms as well; put by_path inside it, or say joint_norm=False"
            )

    def _joined(self, stages: list[tuple[Rule | TreeStage, int]]) -> list[Rule | TreeStage]:
        """The stages of one turn that measure: one for all groups, or one for each."""
        if not self.joint:
            return [self._within(stage, index) for stage, index in stages]
        shared = self._shared([(dataclasses.replace(stage, mask=own_part(stage.mask)), i) for stage, i in stages])
        if len(shared) > 1:
            (stage, [group, *_]), (other, [other_group, *_]), *_ = shared
            raise ValueError(
                f"by_path: {stage!r} in {self.table.label(group)!r} and {other!r} in {self.table.label(other_group)!r} "
                "look at all leaves together; give both the same numbers, or with joint_norm=False each its own leaves"
            )
        if all(stage.mask == own_part(stage.mask) for stage, _ in stages):
            return [self._within(stage, *indices) for stage, indices in shared]
        masks = [self._within(stage, index).mask for stage, index in stages]  # some are groups of groups
        return [dataclasses.replace(stage, mask=Either(tuple(filter(None, masks)))) for stage, _ in shared]

    def _shared(self, stages: list[tuple[Rule | TreeStage, int]]) -> list[tuple[Rule | TreeStage, list[int]]]:
        """Each stage with the groups that share it: equal stages become one where that keeps every group's order."""
        merged: list[tuple[Rule | TreeStage, list[int]]] = []
        last: dict[int, int] = {}  # the place in `merged` of each group's latest stage
        for stage, index in stages:
            start = last.get(index, -1) + 1
            alike = (i for i in range(start, len(merged)) if merged[i][0] == stage)
            place = next(alike, None) if self.joint or isinstance(stage, Rule) else None
            if place is None:
                merged.append((stage, []))
                place = len(merged) - 1
            merged[place][1].append(index)
            last[index] = place
        return merged

    def _within(self, stage: Rule | TreeStage, *groups: int) -> Rule | TreeStage:
        return dataclasses.replace(stage, mask=inside(stage.mask, Members(self.table, frozenset(groups))))

    def shown_in(self, name: str) -> Groups:
        """The same with the name of a group that they are in before those of their hyperparameters."""
        groups = [dataclasses.replace(group, stages=shown_in(name, group.stages)) for group in self.groups]
        return dataclasses.replace(self, groups=tuple(groups))

    def labels(self, leaves: Sequence[Any], structure: Any) -> list[str]:
        """What the group of each leaf is called, and its group in that group."""
        groups = self.table(structure, leaves)
        labels = list(map(self.table.label, groups))
        for index, group in enumerate(self.groups):
            taken = [own == index for own in groups]
            for stage in group.stages:
                if isinstance(stage, Groups):
                    _, part, within = part_of(taken, leaves, structure)
                    inner = iter(stage.labels(part, within))
                    labels = [f"{one}/{next(inner)}" if own else one for one, own in zip(labels, taken, strict=True)]
        return labels

    def __repr__(self) -> str:
        pairs = zip(self.table.keys, self.groups, strict=False)
        parts = [f"{{{', '.join(f'{pattern!r}: {group!r}' for pattern, group in pairs)}}}"]
        if self.table.has_default:
            parts.append(f"default={self.groups[-1]!r}")
        if not self.joint:
            parts.append("joint_norm=False")
        return f"by_path({', '.join(parts)})"


Stage: TypeAlias = Rule | TreeStage | Groups


def expanded(stages: Sequence[Stage]) -> list[Rule | TreeStage]:
    """The stages, with groups resolved into stages that act on some of the leaves."""
    return [flat for stage in stages for flat in (stage.expanded() if isinstance(stage, Groups) else [stage])]


def shown_in(name: str, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages with the name of their group before those of their hyperparameters."""
    return tuple([stage if isinstance(stage, TreeStage) else stage.shown_in(name) for stage in stages])


def hyperparameters_of(stage: Stage) -> list[Hyperparameter]:
    """The hyperparameters of a stage's rules; of `Groups`, those of each group, the default's first."""
    if isinstance(stage, Groups):
        members = (member for index in stage.table.order() for member in stage.groups[index].stages)
        return [h for member in members for h in hyperparameters_of(member)]
    return stage.hyperparameters if isinstance(stage, Rule) else []


def _turns(stages: Sequence[Stage]) -> Iterator[list[Rule | TreeStage]]:
    """The stages in runs, each of which ends with a stage that measures."""
    turn: list[Rule | TreeStage] = []
    for stage in expanded(stages):
        turn.append(stage)
        if _measures(stage):
            yield turn
            turn = []
    yield turn


def measures(stage: Rule | TreeStage) -> bool:
    """Whether a stage, or something in it, depends on all leaves at once."""
    return stage.measures if isinstance(stage, Rule) else stage.body.measures


def _measures(stage: Rule | TreeStage) -> bool:
    """Whether a stage needs numbers of all leaves before it runs."""
    return isinstance(stage, Rule) and measures(stage)
