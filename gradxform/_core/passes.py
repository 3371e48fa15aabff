"""One step over all leaves: per leaf one compiled call, traced once per rule, shape and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core import meshes, trees
from gradxform._core import rule as one_array
from gradxform._core.arguments import visible_dtype
from gradxform._core.body import Call, Foreign, Report
from gradxform._core.compiled import How, gathered, landed, on_batch, on_leaf, owned_slots, prepared, slot_avals
from gradxform._core.encoded import Encoded
from gradxform._core.leaves import HOLE, Leaves, column, kind_of, masked, widened
from gradxform._core.rule import NOTHING, Rule, Scalars
from gradxform._core.selection import Selection
from gradxform._core.stages import TreeStage
from gradxform.numerics import arithmetic as numerics


@dataclasses.dataclass(frozen=True)
class RulePass:
    """Rules that run in one pass over the leaves, and the state fields they own: per leaf, and for all leaves."""

    rules: tuple[Rule, ...]
    fields: tuple[str, ...]
    memory: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TreePass:
    """A stage that sees whole trees, and the state field that holds its state."""

    stage: TreeStage
    field: str

    @property
    def rounds(self) -> bool:
        """Whether it must get the parameters' dtypes; our own bodies round no earlier than they return."""
        return isinstance(self.stage.body, Foreign)


def initial_fields(segment: RulePass, selection: Selection, leaves: list[Any], structure: Any) -> dict[str, Any]:
    """The segment's part of the state."""
    rules = selection.rules_by_leaf(segment.rules)
    slots = [_initial_slots(some, leaf) for some, leaf in zip(rules, leaves, strict=True)]
    fields = _fields(segment, _owned_by_leaf(segment, rules), slots, structure)
    initial = (jnp.asarray(value, visible_dtype()) for _, value in segment.rules[0].memory)
    return fields | dict(zip(segment.memory, initial, strict=True))


def _initial_slots(rules: tuple[Rule, ...], leaf: Any) -> list[Any]:
    """The state of one leaf, each array its own: a step may be given none twice, nor the parameter, if it donates."""
    slots, known = jax.tree.leaves(one_array.init(rules, widened(leaf))), {id(leaf)}
    for place, slot in enumerate(slots):
        slots[place] = jnp.array(slot) if id(slot) in known else slot
        known.add(id(slot))
    return slots


def run_foreign(
    segment: TreePass, state: Any, leaves: Leaves, selection: Selection, call: Call, taken: Any
) -> tuple[Leaves, Any, Report]:
    """One stage that is no rule: it sees whole trees, with holes where it does not act."""
    body, acts = segment.stage.body, selection.seen_by(segment.stage)
    given = leaves.rounded() if segment.rounds else leaves.structure.unflatten(leaves.updates)
    updates = masked(acts, given, leaves.structure.flatten_up_to(given), leaves.structure)
    params = leaves.whole_params
    if params is not None:
        params = masked(acts, params, leaves.params, leaves.structure)
    new, new_state, report = body.guarded(updates, getattr(state, segment.field), params, call, taken)
    who, remedy = f"{segment.stage!r}: new updates", "every stage must keep the structure"
    new_leaves, structure = trees.flatten(who, new)
    trees.check_same_structure(who, structure, "updates", jax.tree.structure(updates), remedy)
    remaining = iter(new_leaves)
    merged = [
        next(remaining) if act else _untouched("wide", None, old, None, taken)
        for act, old in zip(acts, leaves.updates, strict=True)
    ]
    final = list(leaves.final)
    for index, (act, one) in enumerate(zip(acts, merged, strict=True)):
        trees.check_update(
            who, one, leaves.updates[index], leaves.structure, index, "updates", "real updates must stay real"
        )
        if act and body.lands:
            final[index] = trees.dtype_of(one)
    return dataclasses.replace(leaves, updates=merged, final=final), new_state, report


def run_rules(
    segment: RulePass,
    state: Any,
    leaves: Leaves,
    selection: Selection,
    values: Mapping[str, Any],
    call: Call,
    how: How,
    taken: Any,
) -> tuple[Leaves, dict[str, Any], Report]:
    """One pass over the leaves: every rule of the segment, one compiled call per leaf; see `on_leaf`."""
    rules = selection.rules_by_leaf(segment.rules)
    owned = _owned_by_leaf(segment, rules)
    slots = _slots_by_leaf(segment, rules, owned, state, leaves)
    _check_leaves(segment, rules, leaves)
    scalars, own, memory, report = _scalars(segment, rules, state, values, leaves, call)
    acts = {id(some): _acts(some) for some in rules}
    results: list[Any] = [None] * len(rules)
    for places in _together(rules, leaves, slots):
        place = places[0]
        some, dtype, update, param = rules[place], leaves.arithmetic[place], leaves.updates[place], leaves.params[place]
        kind = how, dtype if how == "wide" else leaves.final[place], dtype, scalars[dtype]
        if not acts[id(some)]:
            results[place] = _untouched(how, dtype, update, param, taken), ()
        elif len(places) > 1:
            columns = [[column[i] for i in places] for column in (own, leaves.updates, slots, leaves.params)]
            for i, *result in zip(places, *on_batch(some)(*kind, *columns, taken), strict=True):
                results[i] = result
        else:
            run = next((slot.on_leaf for slot in slots[place] if isinstance(slot, Encoded)), on_leaf)
            results[place] = run(some)(*kind, own[place], update, slots[place], param, taken)
    fields = _fields(segment, owned, [new for _, new in results], leaves.structure)
    return dataclasses.replace(leaves, updates=[update for update, _ in results]), fields | memory, report


def _check_leaves(segment: RulePass, rules: list[tuple[Rule, ...]], leaves: Leaves) -> None:
    """Raise if a rule gets a leaf that it can't take: one that does not fit, or where it needs whole ones a shard."""
    for place, rule in enumerate(segment.rules):
        if not any(inner.whole or inner.fits for inner in rule.walk()):
            continue
        for index, (some, update) in enumerate(zip(rules, leaves.updates, strict=True)):
            for inner in some[place].walk():
                if inner.fits and (problem := inner.fits(*trees.aval(update))):
                    name = trees.name_leaf("updates", leaves.structure, index)
                    raise ValueError(f"{inner.name}: {name} {problem}")
                if inner.whole:
                    meshes.check_whole(update, rule.name, leaves.structure, index)


def _together(rules: list[tuple[Rule, ...]], leaves: Leaves, slots: list[tuple[Any, ...]]) -> list[list[int]]:
    """The places of leaves, each alone but those whose rules want to be `batched`, or where the backend gains by it."""
    wanted = {id(some): {rule.batched for outer in some for rule in outer.walk()} for some in rules}
    if all(some <= {False} for some in wanted.values()):
        return [[place] for place in range(len(rules))]
    groups: dict[Any, list[int]] = {}
    for place, (some, update, slot) in enumerate(zip(rules, leaves.updates, slots, strict=True)):
        gains = None in wanted[id(some)] and jax.default_backend() != "cpu" and np.size(update) <= _LARGEST_BATCHED
        kind: Any = place
        if (True in wanted[id(some)] or gains) and not any(isinstance(one, Encoded) for one in slot):
            avals = tuple(None if one is None else kind_of(one) for one in (update, leaves.params[place], *slot))
            kind = id(some), leaves.arithmetic[place], leaves.final[place], avals
        groups.setdefault(kind, []).append(place)
    return list(groups.values())


_LARGEST_BATCHED = 1 << 20
"""Elements of a leaf beyond which one matrix keeps a device busy."""


def _untouched(how: How, dtype: Any, update: Any, param: Any, taken: Any) -> Any:
    """What becomes of a leaf on which no rule acts."""
    if how == "land":
        return landed(dtype, param, update, taken)
    return update if taken is None else jnp.where(taken, update, numerics.no_update(jnp.asarray(update)))


def _acts(rules: tuple[Rule, ...]) -> bool:
    """Whether any of the rules does anything."""
    return any(rule is not NOTHING for rule in rules)


def _owned_by_leaf(segment: RulePass, rules: list[tuple[Rule, ...]]) -> list[dict[int, int]]:
    """Which of the segment's fields each leaf has: the place among them to the place among its own arrays."""
    variants = {id(some): owned_slots(segment.rules, some) for some in {id(some): some for some in rules}.values()}
    return [variants[id(some)] for some in rules]


def _fields(segment: RulePass, owned: list[dict[int, int]], slots: list[Any], structure: Any) -> dict[str, Any]:
    """From each leaf's arrays to one tree per field."""
    return {
        field: structure.unflatten([a[o[place]] if place in o else HOLE for a, o in zip(slots, owned, strict=True)])
        for place, field in enumerate(segment.fields)
    }


def _slots_by_leaf(
    segment: RulePass, rules: list[tuple[Rule, ...]], owned: list[dict[int, int]], state: Any, leaves: Leaves
) -> list[tuple[Any, ...]]:
    """The state of each leaf, after checking that it is this transformation's for these parameters."""
    if not segment.fields:
        return [()] * len(leaves.updates)
    columns = [column(f"state.{field}", getattr(state, field), leaves.structure) for field in segment.fields]
    by_leaf: list[tuple[Any, ...]] = []
    expected: dict[Any, list[trees.Aval]] = {}
    for index, (some, own, *slots) in enumerate(zip(rules, owned, *columns, strict=True)):
        shape, dtype = trees.aval(leaves.updates[index])[0], leaves.final[index]
        kind = (id(some), shape, dtype)
        if kind not in expected:
            expected[kind] = slot_avals(some, shape, dtype)
        for place, slot in enumerate(slots):
            field = f"state.{segment.fields[place]}"
            if isinstance(slot, Encoded):
                continue  # `quantize_state` has checked it
            if place in own:
                known = leaves.whole_params is not None
                trees.check_slot(field, slot, expected[kind][own[place]], leaves.structure, index, check_dtype=known)
            elif not isinstance(slot, optax.MaskedNode):
                name = trees.name_leaf(field, leaves.structure, index)
                raise ValueError(f"{name} is {trees.describe(slot)}, but this leaf has no such state; {trees.ANEW}")
        by_leaf.append(tuple(slots[place] for place in own))
    return by_leaf


def _scalars(
    segment: RulePass,
    rules: list[tuple[Rule, ...]],
    state: Any,
    values: Mapping[str, Any],
    leaves: Leaves,
    call: Call,
) -> tuple[dict[Any, Scalars], list[Mapping[str, Any]], dict[str, Any], Report]:
    """The numbers of this step for each dtype of arithmetic and of each leaf, what is remembered, and the report."""
    first = segment.rules[0]
    own: list[Mapping[str, Any]] = [{} for _ in rules]
    dynamic = {name: value for name, value in values.items() if not isinstance(value, float)}
    dtypes = sorted(set(leaves.arithmetic), key=lambda dtype: -dtype.itemsize)
    scalars = {
        dtype: prepared(segment.rules)(numerics.real_dtype(dtype), state.count, dynamic)
        for dtype in dtypes or [np.dtype(np.float32)]
    }
    if first.measure is None:
        return scalars, own, {}, {}
    memory = {name: getattr(state, field) for (name, _), field in zip(first.memory, segment.memory, strict=True)}
    acts = [some[0] is not NOTHING for some in rules]
    numbers, stacked = leaves.measured(first.measure, acts, call, first.name, first.axis_name)
    if first.measure.joint is None:
        remaining = iter(numbers)
        own = [next(remaining) if act else {} for act in acts]
    if not stacked:
        nothing = {name: jnp.zeros((), np.float32) for name in first.reports}
        return scalars, own, dict(zip(segment.memory, memory.values(), strict=True)), nothing
    results = {
        dtype: gathered(first)(numerics.real_dtype(dtype), some, stacked, memory) for dtype, some in scalars.items()
    }
    _, new, report = next(iter(results.values()))
    kept = (new[name] for name, _ in first.memory)
    return {d: some for d, (some, _, _) in results.items()}, own, dict(zip(segment.memory, kept, strict=True)), report
