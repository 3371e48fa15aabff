"""What each leaf gets of a chain: made once for a structure, shapes and dtypes, and looked up in every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from gradxform._core import trees
from gradxform._core.compiled import owned_slots, slot_avals
from gradxform._core.encoded import EncodedMoment, decoded
from gradxform._core.leaves import masked
from gradxform._core.masks import Mask
from gradxform._core.rule import NOTHING, Rule
from gradxform._core.stages import TreeStage

Avals = tuple[Any, ...]
"""Shape and dtype of each leaf; see `trees.avals`."""


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What a leaf gets in a pass over the rules of a chain."""

    rules: tuple[Rule, ...]
    """The pass's rules, with `NOTHING` in place of those that leave the leaf alone."""
    acts: bool
    """Whether any of them does something."""
    places: tuple[int, ...]
    """Which of the pass's fields hold the leaf's arrays, in their order."""
    avals: tuple[trees.Aval, ...]
    """Shape and dtype of these arrays."""
    ends: bool
    """Whether nothing after this pass acts on the leaf."""


def opened(plan: LeafPlan, slots: Sequence[Any]) -> list[Any]:
    """The arrays that a leaf keeps, those kept as codes decoded."""
    pairs = zip(slots, plan.avals, strict=True)
    return [slot.decoded(aval) if isinstance(slot, EncodedMoment) else slot for slot, aval in pairs]


@dataclasses.dataclass(frozen=True)
class TreePlan:
    """What the leaves get of a stage that sees whole trees."""

    acts: list[bool]
    sees: list[bool]
    """The leaves it is given: those it acts on, and those it freezes itself."""
    ends: list[bool]
    """Whether nothing after this stage acts on a leaf."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each leaf gets of a chain."""

    frozen: list[bool]
    """Which leaves stay as they are: frozen, or functions."""
    passes: list[Any]
    """For each pass of the chain, a `TreePlan`, or a `LeafPlan` of each leaf."""
    untouched: list[int]
    """The leaves that are not frozen, but on which nothing acts."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves every mask chooses, and which are frozen: by the chain, or by a stage that sees whole trees."""

    chosen: dict[Mask, tuple[bool, ...]]
    frozen: tuple[bool, ...]
    frozen_within: tuple[tuple[bool, ...], ...]
    """For each stage that sees whole trees, the leaves that it freezes itself."""

    @property
    def key(self) -> Any:
        """What is chosen and frozen, to look a plan up."""
        return *self.chosen.values(), self.frozen, self.frozen_within

    @property
    def all_frozen(self) -> list[bool]:
        """The leaves that are frozen, by the chain or within a stage."""
        return [any(each) for each in zip(self.frozen, *self.frozen_within, strict=True)]

    def acting(self, *masks: Mask | None) -> list[bool]:
        """The leaves that are not frozen and that all masks choose."""
        flags = [self.chosen[mask] for mask in masks if mask is not None]
        return [not rests and all(each) for rests, *each in zip(self.all_frozen, *flags, strict=True)]

    def seen_by(self, stages: Sequence[Rule | TreeStage]) -> dict[int, list[bool]]:
        """The leaves that each tree stage, known by its id, is given: those it acts on, and those it freezes itself."""
        trees_of = [stage for stage in stages if isinstance(stage, TreeStage)]
        pairs = zip(trees_of, self.frozen_within, strict=True)
        return {id(s): [act or own for act, own in zip(self.acting(s.mask), w, strict=True)] for s, w in pairs}


def masks_of(stages: Sequence[Rule | TreeStage]) -> list[Mask]:
    """Every mask in a chain, each once."""
    holders = [rule for stage in stages for rule in (stage.parts if isinstance(stage, Rule) else [stage])]
    return list({holder.mask: None for holder in holders if holder.mask is not None})


def select(stages: Sequence[Rule | TreeStage], masks: Sequence[Mask], tree: Any, given: bool) -> Selection:
    """Which leaves are chosen and frozen in these parameters, or in updates, where parameters are not `given`."""
    leaves, structure = jax.tree.flatten(tree)
    shown = [decoded(leaf) for leaf in leaves] if masks else leaves
    params = tree if all(a is b for a, b in zip(shown, leaves, strict=True)) else structure.unflatten(shown)
    chosen = {mask: tuple(mask(params, shown, structure)) for mask in masks}
    frozen = [trees.rests(leaf) for leaf in leaves]
    for stage in stages:
        if isinstance(stage, Rule) and stage.freezes:
            flags = [True] * len(leaves) if stage.mask is None else chosen[stage.mask]
            frozen = [rests or flag for rests, flag in zip(frozen, flags, strict=True)]
    selection = Selection(chosen, tuple(frozen), ())
    within = [
        _frozen_by(stage, selection, tree, leaves, structure) if given else (False,) * len(leaves)
        for stage in stages
        if isinstance(stage, TreeStage)
    ]
    return dataclasses.replace(selection, frozen_within=tuple(within))


def _frozen_by(
    stage: TreeStage, selection: Selection, tree: Any, leaves: Sequence[Any], structure: Any
) -> tuple[bool, ...]:
    """Which leaves a tree stage freezes itself, of those it acts on."""
    acts = selection.acting(stage.mask)
    inner = iter(stage.body.frozen(masked(acts, tree, leaves, structure)))
    return tuple(act and next(inner) for act in acts)


def make_plan(passes: Sequence[Any], selection: Selection, avals: Avals, structure: Any) -> Plan:
    """What each leaf gets in every pass: a tuple of rules, a stage that sees whole trees, or what is beside a rule."""
    frozen = selection.all_frozen
    within = iter(selection.frozen_within)
    drafts: list[Any] = []
    for part in passes:
        if isinstance(part, TreeStage):
            acts, own = selection.acting(part.mask), next(within)
            drafts.append((acts, [act or rests for act, rests in zip(acts, own, strict=True)]))
        elif isinstance(part, Rule):  # with transformations beside it
            acts = [rule is not NOTHING for [rule] in _rules_by_leaf((part,), selection, frozen)]
            drafts.append((acts, acts))
        else:
            rules = _rules_by_leaf(part, selection, frozen)
            drafts.append(([any(rule is not NOTHING for rule in each) for each in rules], rules))
    later = [False] * len(frozen)
    made: list[Any] = []
    for part, (acts, more) in zip(reversed(passes), reversed(drafts), strict=True):
        ends = [act and not after for act, after in zip(acts, later, strict=True)]
        if isinstance(part, TreeStage | Rule):
            made.append(TreePlan(acts, more, ends))
        else:
            made.append(_leaf_plans(part, more, acts, ends, avals, structure))
        later = [act or after for act, after in zip(acts, later, strict=True)]
    untouched = [i for i, (rests, acts) in enumerate(zip(frozen, later, strict=True)) if not rests and not acts]
    return Plan(frozen, made[::-1], untouched)


def _leaf_plans(
    rules: tuple[Rule, ...],
    by_leaf: list[tuple[Rule, ...]],
    acts: list[bool],
    ends: list[bool],
    avals: Avals,
    structure: Any,
) -> list[LeafPlan]:
    known: dict[Any, LeafPlan] = {}
    plans: list[LeafPlan] = []
    for index, (own, act, end, aval) in enumerate(zip(by_leaf, acts, ends, avals, strict=True)):
        key = (id(own), end, aval)
        if key not in known:
            kept = act and trees.trainable(aval[1])
            try:
                avals_of = tuple(slot_avals(own, *aval)) if kept else ()
                places = owned_slots(rules, own, *aval) if kept else ()
            except Exception as error:
                error.add_note(f"for {trees.name_leaf('params', structure, index)}")
                raise
            known[key] = LeafPlan(own, act, places, avals_of, end)
        plans.append(known[key])
    return plans


def _rules_by_leaf(rules: tuple[Rule, ...], selection: Selection, frozen: Sequence[bool]) -> list[tuple[Rule, ...]]:
    """What each leaf gets of these rules; a frozen leaf gets nothing."""
    masks = list({rule.mask: None for outer in rules for rule in outer.parts if rule.mask is not None})
    if not masks and not any(frozen):
        return [rules] * len(frozen)
    variants: dict[tuple[bool, ...], tuple[Rule, ...]] = {}
    by_leaf: list[tuple[Rule, ...]] = []
    for rests, *flags in zip(frozen, *(selection.chosen[mask] for mask in masks), strict=True):
        key = (rests, *flags)
        if key not in variants:
            acts = dict(zip(masks, flags, strict=True)).__getitem__
            variants[key] = tuple(NOTHING if rests or rule.freezes else rule.select(acts) for rule in rules)
        by_leaf.append(variants[key])
    return by_leaf
