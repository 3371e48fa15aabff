"""Who acts where: the leaves that every mask chooses, those that are frozen, and what each leaf gets of some rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from gradxform._core.leaves import masked
from gradxform._core.masks import Mask
from gradxform._core.rule import NOTHING, Rule
from gradxform._core.stages import TreeStage


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves every mask chooses, and which are frozen."""

    chosen: Mapping[Mask, list[bool]]
    frozen: list[bool]
    within: Mapping[int, list[bool]]
    """Which leaves a stage that is no rule freezes itself, and so must see."""

    @classmethod
    def of(cls, stages: Iterable[Rule | TreeStage], params: Any, leaves: list[Any], structure: Any) -> Selection:
        masks: dict[Mask, list[bool]] = {}
        frozen = [False] * len(leaves)
        for stage in stages:
            for rule in stage.walk() if isinstance(stage, Rule) else [stage]:
                if params is None and (rule.mask or (isinstance(rule, Rule) and rule.needs_params)):
                    name = rule.name if isinstance(rule, Rule) else repr(rule)
                    raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")
                if rule.mask is not None and rule.mask not in masks:
                    masks[rule.mask] = rule.mask(params, leaves, structure)
            if isinstance(stage, Rule) and stage.freezes:
                chosen = [True] * len(leaves) if stage.mask is None else masks[stage.mask]
                frozen = [one or other for one, other in zip(frozen, chosen, strict=True)]
        selection = cls(masks, frozen, {})
        within = {
            id(stage): selection.frozen_by(stage, params, leaves, structure)  # another library's may have no hash
            for stage in stages
            if isinstance(stage, TreeStage) and params is not None
        }
        return cls(masks, [any(some) for some in zip(frozen, *within.values(), strict=True)], within)

    def frozen_by(self, stage: TreeStage, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        """Which of the leaves it acts on a stage that is no rule freezes itself."""
        acts = self.acting(stage.mask)
        inner = iter(stage.body.frozen(masked(acts, params, leaves, structure)))
        return [act and next(inner) for act in acts]

    def acting(self, *masks: Mask | None) -> list[bool]:
        """The leaves that are not frozen and that all of `masks` choose."""
        flags = [self.chosen[mask] for mask in masks if mask is not None]
        return [not frozen and all(some) for frozen, *some in zip(self.frozen, *flags, strict=True)]

    def seen_by(self, stage: TreeStage) -> list[bool]:
        """The leaves that a stage that is no rule acts on, and those that it freezes itself."""
        own = self.within.get(id(stage), [False] * len(self.frozen))
        return [act or freezes for act, freezes in zip(self.acting(stage.mask), own, strict=True)]

    def rules_by_leaf(self, rules: tuple[Rule, ...]) -> list[tuple[Rule, ...]]:
        """What each leaf gets of `rules`; a frozen one what freezes it."""
        masks = list({rule.mask: None for outer in rules for rule in outer.walk() if rule.mask is not None})
        if not masks and not any(self.frozen):
            return [rules] * len(self.frozen)
        by_leaf = list(zip(self.frozen, *(self.chosen[mask] for mask in masks), strict=True))
        variants: dict[tuple[bool, ...], tuple[Rule, ...]] = {}
        for frozen, *flags in set(by_leaf):
            acts = dict(zip(masks, flags, strict=True)).__getitem__
            variants[frozen, *flags] = tuple(
                NOTHING if frozen and not rule.freezes else rule.select(acts) for rule in rules
            )
        return [variants[flags] for flags in by_leaf]
