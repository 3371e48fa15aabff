"""A pass over all leaves: one compiled call per leaf, traced once for each tuple of rules, shape and dtype."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from gradxform._core import meshes, one_array, trees
from gradxform._core.arguments import visible_dtype
from gradxform._core.body import Foreign
from gradxform._core.call import Call, Report
from gradxform._core.compiled import (
    Ending,
    by_shape,
    gathered,
    in_dtype,
    on_batch,
    on_leaf,
    prepared,
    slot_facts,
    slots_in,
    viewed,
)
from gradxform._core.encoded import EncodedMoment, EncodedParam, arrays_of
from gradxform._core.inventory import Role
from gradxform._core.keys import Seed, leaf_keys, of_shards
from gradxform._core.leaves import HOLE, Leaf, Leaves, column, masked, widened
from gradxform._core.measures import measure_leaves, remember_rescaled, type_of
from gradxform._core.one_array import Own, Scalars
from gradxform._core.plan import LeafPlan, TreePlan, opened
from gradxform._core.rule import NOTHING, Rule
from gradxform._core.stages import TreeStage
from gradxform._core.totals import plain, total_of_leaves
from gradxform._core.values import changing
from gradxform.numerics import arithmetic as numerics


@dataclasses.dataclass(frozen=True)
class RulePass:
    """Rules that run in one pass over the leaves, and the state fields they own: per leaf, and for all leaves."""

    rules: tuple[Rule, ...]
    fields: tuple[str, ...]
    memory: tuple[str, ...]
    seeds: tuple[str, ...]
    stage: int
    """The place of its first rule with a seed among all in the chain."""

    @functools.cached_property
    def drawing(self) -> list[int]:
        """The places of the rules that draw random numbers."""
        return [place for place, rule in enumerate(self.rules) if rule.seed is not None]

    def initial(
        self, plans: Sequence[LeafPlan], leaves: Sequence[Any], structure: Any, given: Sequence[Seed]
    ) -> dict[str, Any]:
        """The pass's part of the state; `given` are the seeds of the rules that draw."""
        slots = [
            _initial_slots(plan.rules, leaf, trees.name_leaf("params", structure, index)) if plan.places else []
            for index, (plan, leaf) in enumerate(zip(plans, leaves, strict=True))
        ]
        acted_on = [leaf for plan, leaf in zip(plans, leaves, strict=True) if plan.rules[0] is not NOTHING]
        initial = (self._remembered(name, value, acted_on) for name, value in self.rules[0].memory)
        seeds = (seed.array(self.stage + place) for place, seed in enumerate(given))
        shared = zip((*self.memory, *self.seeds), (*initial, *seeds), strict=True)
        return self._fields(plans, slots, structure) | dict(shared)

    def _remembered(self, name: str, value: Any, params: Sequence[Any]) -> jax.Array:
        """The first value of what is remembered of all leaves: an array of its own, for it may be donated."""
        if callable(value):
            try:
                value = meshes.partitioned(value, PartitionSpec(), list(map(widened, params)))
            except Exception as error:
                error.add_note(f"in memory {name!r} of {self.rules[0].name}")
                raise
        return jnp.array(value, visible_dtype())

    def run(
        self,
        state: Any,
        leaves: Leaves,
        plans: Sequence[LeafPlan],
        values: Mapping[str, Any],
        extra: Mapping[str, Any],
        call: Call,
        rounds: bool,
        beside: Sequence[Own] | None = None,
    ) -> tuple[Leaves, dict[str, Any], Report]:
        """Every rule on every leaf.

        Args:
          state, leaves, plans, values, extra, call: The step, and what each leaf gets in this pass.
          rounds: Whether the next pass gets updates in the parameters' dtypes.
          beside: What the first rule gets for each leaf of the transformations beside it.
        """
        slots = self._slots(plans, state, leaves.structure, leaves.has_params)
        self._check_leaves(plans, leaves)
        scalars, own, shared, report = self._scalars(plans, state, values, extra, leaves, slots, call)
        if self.seeds:
            own = self._with_keys(own, plans, state, leaves)
            shared |= {field: getattr(state, field) for field in self.seeds}
        if beside is not None:
            own = [
                {**numbers, 0: {**numbers.get(0, {}), **more.get(0, {})}}
                for numbers, more in zip(own, beside, strict=True)
            ]
        results: list[Any] = [leaf.update for leaf in leaves.leaves]
        for places in self._together(plans, leaves, slots):
            place = places[0]
            leaf, plan = leaves.leaves[place], plans[place]
            fixed = _ending(plan, leaf, call, rounds), leaf.arithmetic, scalars[leaf.arithmetic]
            try:
                if len(places) > 1:
                    batch = [leaves.leaves[i] for i in places]
                    columns = [own[i] for i in places], [x.update for x in batch], [slots[i] for i in places]
                    params = [arrays_of(x.param) for x in batch]
                    ran = zip(*on_batch(plan.rules)(*fixed, *columns, params, call.accepted), strict=True)
                else:
                    run = next((slot.on_leaf for slot in slots[place] if isinstance(slot, EncodedMoment)), on_leaf)
                    arrays = arrays_of(leaf.param)
                    ran = [run(plan.rules)(*fixed, own[place], leaf.update, slots[place], arrays, call.accepted)]
            except Exception as error:
                error.add_note(f"for {trees.name_leaf('updates', leaves.structure, place)}")
                raise
            for i, (result, new) in zip(places, ran, strict=True):
                param = leaves.leaves[i].param
                stored = fixed[0].gives == "param" and isinstance(param, EncodedParam)
                results[i], slots[i] = param.renewed(result) if stored else result, new
        after = leaves.updated(results)
        first = self.rules[0]
        if first.rescales is not None and len(self.rules) == 1:
            gathered_as = {dtype: each.prepared[0] for dtype, each in scalars.items()}  # nothing where no leaf counts
            factors = {d: each[first.rescales] for d, each in gathered_as.items() if first.rescales in each}
            acts = [plan.acts and not plan.ends for plan in plans]
            remember_rescaled(leaves, after, acts, factors, call)
        return after, self._fields(plans, slots, leaves.structure) | shared, report

    def roles(self, plans: Sequence[LeafPlan], leaves: Sequence[Any]) -> dict[tuple[str, int | None], Role]:
        """What arrays hold, where their rules say it: by field and leaf."""
        roles: dict[tuple[str, int | None], Role] = {}
        for index, (plan, leaf) in enumerate(zip(plans, leaves, strict=True)):
            shape, dtype = trees.aval(leaf)
            for place, fact in zip(
                plan.places, slot_facts(plan.rules, shape, dtype) if plan.places else (), strict=True
            ):
                # the factor of a square matrix has its shape, and is no moment of it
                apart = fact.axes is not None and fact.axes != tuple(range(len(shape)))
                if role := "kept" if apart else fact.role:
                    roles[self.fields[place], index] = role
        return roles

    def view(
        self, state: Any, params: list[Any], plans: Sequence[LeafPlan], values: Mapping[str, Any], structure: Any
    ) -> list[Any]:
        """The parameters to evaluate, where a rule of the pass tells them from those that are trained."""
        if all(rule.view is None for rule in self.rules):
            return params
        slots = self._slots(plans, state, structure, True)
        memory = {
            name: getattr(state, field) for (name, _), field in zip(self.rules[0].memory, self.memory, strict=True)
        }
        seen = list(params)
        for i, (plan, param) in enumerate(zip(plans, params, strict=True)):
            if any(rule.view is not None for rule in plan.rules):
                dtype, final = trees.compute_dtype(trees.dtype_of(param)), trees.dtype_of(param)
                own = tuple([memory if place == 0 else {} for place in range(len(plan.rules))])
                scalars = Scalars(state.count, None, changing(values), {}, own)
                scalars = in_dtype(numerics.real_dtype(dtype), scalars)
                try:
                    seen[i] = viewed(plan.rules)(dtype, final, scalars, opened(plan, slots[i]), param)
                except Exception as error:
                    error.add_note(f"for {trees.name_leaf('params', structure, i)}")
                    raise
        return seen

    def _fields(self, plans: Sequence[LeafPlan], slots: Sequence[Any], structure: Any) -> dict[str, Any]:
        """From each leaf's arrays to one tree per field."""
        columns: list[list[Any]] = [[HOLE] * len(plans) for _ in self.fields]
        for index, (plan, own) in enumerate(zip(plans, slots, strict=True)):
            for place, slot in zip(plan.places, own, strict=True):
                columns[place][index] = slot
        return {field: structure.unflatten(each) for field, each in zip(self.fields, columns, strict=True)}

    def _slots(
        self, plans: Sequence[LeafPlan], state: Any, structure: Any, check_dtypes: bool
    ) -> list[tuple[Any, ...]]:
        """The state of each leaf, after checking that it is this transformation's for these parameters."""
        if not self.fields:
            return [()] * len(plans)
        columns = [column(f"state.{field}", getattr(state, field), structure) for field in self.fields]
        rows = list(zip(*columns, strict=True))
        for index, (plan, row) in enumerate(zip(plans, rows, strict=True)):
            for place, slot in enumerate(row):
                if place not in plan.places and not isinstance(slot, optax.MaskedNode):
                    name = trees.name_leaf(f"state.{self.fields[place]}", structure, index)
                    raise ValueError(f"{name} is {trees.describe(slot)}, but this leaf has no such state; {trees.ANEW}")
            for place, aval in zip(plan.places, plan.avals, strict=True):
                if not isinstance(row[place], EncodedMoment):  # `quantize_state` has checked it
                    field = f"state.{self.fields[place]}"
                    trees.check_slot(field, row[place], aval, structure, index, check_dtype=check_dtypes)
        return [tuple([row[place] for place in plan.places]) for plan, row in zip(plans, rows, strict=True)]

    def _check_leaves(self, plans: Sequence[LeafPlan], leaves: Leaves) -> None:
        """Raise if a rule can't take a leaf: one that does not fit, or a shard where the rule needs whole arrays."""
        for place, rule in enumerate(self.rules):
            if not rule.picky:
                continue
            for index, (plan, leaf) in enumerate(zip(plans, leaves.leaves, strict=True)):
                for inner in plan.rules[place].parts if leaf.update is not None else ():
                    if inner.fits and (problem := inner.fits(*trees.aval(leaf.update))):
                        name = trees.name_leaf("updates", leaves.structure, index)
                        raise ValueError(f"{inner.name}: {name} {problem}")
                    if inner.whole:
                        meshes.check_whole(leaf.update, rule.name, leaves.structure, index)

    def _together(self, plans: Sequence[LeafPlan], leaves: Leaves, slots: Sequence[tuple[Any, ...]]) -> list[list[int]]:
        """The places of the leaves on which rules act: each alone, or several whose rules want to be `batched`."""
        acting = [i for i, plan in enumerate(plans) if plan.acts and leaves.leaves[i].update is not None]
        wanted = {inner.batched for rule in self.rules for inner in rule.parts}
        if wanted <= {False}:
            return [[i] for i in acting]
        groups: dict[Any, list[int]] = {}
        for i in acting:
            leaf, plan = leaves.leaves[i], plans[i]
            own = {inner.batched for rule in plan.rules for inner in rule.parts}
            gains = None in own and jax.default_backend() != "cpu" and np.size(leaf.update) <= _LARGEST_BATCHED
            key: Any = i
            if (True in own or gains) and not any(isinstance(slot, EncodedMoment) for slot in slots[i]):
                arrays = (leaf.update, *jax.tree.leaves(arrays_of(leaf.param)), *slots[i])
                form = leaf.param.form if isinstance(leaf.param, EncodedParam) else None
                key = id(plan), leaf.arithmetic, leaf.final, form, tuple(map(type_of, arrays))
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _scalars(
        self,
        plans: Sequence[LeafPlan],
        state: Any,
        values: Mapping[str, Any],
        extra: Mapping[str, Any],
        leaves: Leaves,
        slots: Sequence[tuple[Any, ...]],
        call: Call,
    ) -> tuple[dict[Any, Scalars], list[Own], dict[str, Any], Report]:
        """This step's numbers for each dtype of arithmetic and of each leaf, what is remembered, and the report."""
        first = self.rules[0]
        own: list[Own] = [{}] * len(plans)
        dynamic = changing(values)
        dtypes = {leaf.arithmetic for leaf in leaves.leaves if leaf.update is not None} or {np.dtype(np.float32)}
        scalars = {
            dtype: prepared(self.rules)(numerics.real_dtype(dtype), state.count, dynamic, extra)
            for dtype in sorted(dtypes, key=lambda dtype: -dtype.itemsize)
        }
        if not first.gathers:
            return scalars, own, {}, {}
        memory = {name: getattr(state, field) for (name, _), field in zip(first.memory, self.memory, strict=True)}
        acts = [plan.rules[0] is not NOTHING for plan in plans]
        counted = [act and leaf.update is not None for act, leaf in zip(acts, leaves.leaves, strict=True)]
        if first.measures and not any(counted):
            nothing = {name: jnp.zeros((), np.float32) for name in first.reports}
            return scalars, own, dict(zip(self.memory, memory.values(), strict=True)), nothing
        of_all: Mapping[str, Any] = {}
        if first.totals is not None:
            of_all = plain(total_of_leaves(plans, leaves, slots, scalars, memory))
        elif first.measure is not None:
            numbers, of_all = measure_leaves(leaves, first.measure, acts, call, first.name, first.axis_name)
            if first.measure.joint is None:
                remaining = iter(numbers)
                own = [{0: next(remaining)} if counts else {} for counts in counted]
        results = {
            dtype: gathered(first)(numerics.real_dtype(dtype), each, of_all, memory) for dtype, each in scalars.items()
        }
        _, new, report = next(iter(results.values()))
        kept = [
            new[name] if call.accepted is None else jnp.where(call.accepted, new[name], memory[name]) for name in memory
        ]
        return {d: each for d, (each, _, _) in results.items()}, own, dict(zip(self.memory, kept, strict=True)), report

    def _with_keys(self, own: Sequence[Own], plans: Sequence[LeafPlan], state: Any, leaves: Leaves) -> list[Own]:
        """The leaves' numbers, and for each rule that draws a random key of the leaf."""
        with_keys: list[Own] = list(own)
        for field, place in zip(self.seeds, self.drawing, strict=True):
            keys = leaf_keys(getattr(state, field), state.count, len(plans))
            for i, (plan, leaf, key) in enumerate(zip(plans, leaves.leaves, keys, strict=True)):
                if plan.rules[place] is not NOTHING and leaf.update is not None:
                    drawn = of_shards(key, leaf.update, self.rules[place].axis_name)
                    with_keys[i] = {**with_keys[i], place: {**with_keys[i].get(place, {}), "key": drawn}}
        return with_keys


_LARGEST_BATCHED = 1 << 20
"""Elements of a leaf beyond which one matrix keeps a device busy."""


def _initial_slots(rules: tuple[Rule, ...], leaf: Any, name: str) -> list[Any]:
    """The state of one leaf: no array twice, nor the parameter, for a step that donates must get no buffer twice."""
    wide = widened(leaf)
    typed = not isinstance(wide, jax.ShapeDtypeStruct) and meshes.divided_by_type(wide)
    facts = slot_facts(rules, *trees.aval(leaf)) if typed else ()
    if any(by_shape(rules) or fact.axes is not None for fact in facts):
        specs = tuple([meshes.spec_along(leaf, fact.axes, fact.array.shape, name) for fact in facts])
        arrays = _divided_slots(rules, specs, wide)
        slots = [dataclasses.replace(fact, array=array) for fact, array in zip(facts, arrays, strict=True)]
    else:
        slots = slots_in(one_array.slots(rules, wide))
    made, known = list[Any](), {id(leaf)}
    for slot in slots:
        array = slot.array
        made.append(jnp.array(array) if id(array) in known else meshes.beside(leaf, array, slot.axes, name))
        known.add(id(array))
    return made


@functools.partial(jax.jit, static_argnums=(0, 1))
def _divided_slots(rules: tuple[Rule, ...], specs: tuple[PartitionSpec, ...], leaf: Any) -> tuple[Any, ...]:
    """The state of one leaf, where the compiler divides the work of making it.

    A selection that never selects the leaf ties what is made from nothing to the devices of the leaf.
    """

    def made(x: jax.Array) -> tuple[Any, ...]:
        unlike = jnp.sum(jnp.ravel(x)[:1].real)
        slots = [slot.array for slot in slots_in(one_array.slots(rules, x))]
        return tuple([jnp.where(False, unlike.astype(slot.dtype), slot) for slot in slots])

    return meshes.partitioned(made, specs, leaf)


def _ending(plan: LeafPlan, leaf: Leaf, call: Call, rounds: bool) -> Ending:
    form = leaf.param.form if isinstance(leaf.param, EncodedParam) else None
    if plan.ends and (call.wants == "params" or form is not None):
        return Ending("param", leaf.final, form)
    return Ending("update" if plan.ends or rounds else "wide", leaf.final, form)


@dataclasses.dataclass(frozen=True)
class TreePass:
    """A stage that sees whole trees, and the state field that holds its state."""

    stage: TreeStage
    field: str

    @property
    def rounds(self) -> bool:
        """Whether it must get the parameters' dtypes, as other libraries' do; our own round when they return."""
        return isinstance(self.stage.body, Foreign)

    @property
    def bodies(self) -> list[tuple[str, Any]]:
        """The state field, and the body whose state it holds."""
        return [(self.field, self.stage.body)]

    def initial(self, plan: TreePlan, leaves: Sequence[Any], structure: Any) -> dict[str, Any]:
        """The pass's part of the state."""
        return {self.field: self.stage.body.init(masked(plan.sees, structure.unflatten(leaves), leaves, structure))}

    def view(self, state: Any, params: list[Any], plan: TreePlan, structure: Any) -> list[Any]:
        """The parameters to evaluate, where the stage tells them from those that are trained."""
        seen = masked(plan.sees, structure.unflatten(params), params, structure)
        parts = structure.flatten_up_to(self.stage.body.view(getattr(state, self.field), seen))
        return [new if sees else old for old, new, sees in zip(params, parts, plan.sees, strict=True)]

    def run(self, state: Any, leaves: Leaves, plan: TreePlan, call: Call) -> tuple[Leaves, dict[str, Any], Report]:
        """The stage on the trees of the leaves that it sees, with holes in place of the others."""
        lands = all(end for act, end in zip(plan.acts, plan.ends, strict=True) if act)
        asked = call if lands else call.but(wants="updates")
        updates, params = leaves.seen(plan.sees, encoded=lands)
        new, new_state, report = self.stage.body.step(updates, getattr(state, self.field), params, asked)
        results = leaves.structure.flatten_up_to(new)
        for i, leaf in enumerate(leaves.leaves):
            if leaf.update is None or not plan.acts[i]:
                results[i] = leaf.update
            elif not lands and plan.ends[i] and leaf.gives_param(call.wants):
                results[i] = leaf._replace(update=results[i]).moved(call.accepted)
        return leaves.updated(results), {self.field: new_state}, report
