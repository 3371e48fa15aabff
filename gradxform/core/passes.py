"""One step over all leaves: per leaf one compiled call, traced once per rule, shape and dtype."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import numerics
from gradxform.core import rules as one_array
from gradxform.core import trees
from gradxform.core.body import Body, Call, Report
from gradxform.core.hyperparameters import visible_dtype
from gradxform.core.masks import Mask
from gradxform.core.rules import NOTHING, Measure, Rule, Scalars
from gradxform.core.stages import Foreign

HOLE = optax.MaskedNode()
"""What a tree has in place of a leaf that is left out: no leaf of JAX's."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rules that run in one pass over the leaves, and the state fields they own: per leaf, and for all leaves."""

    rules: tuple[Rule, ...]
    fields: tuple[str, ...]
    memory: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ForeignSegment:
    """A stage that sees whole trees, the leaves it acts on, and the state field that holds its state."""

    body: Body
    mask: Mask | None
    field: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves every mask chooses, and which are frozen."""

    chosen: Mapping[Mask, list[bool]]
    frozen: list[bool]

    @classmethod
    def of(cls, stages: Iterable[Rule | Foreign], params: Any, leaves: list[Any], structure: Any) -> Selection:
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
        return cls(masks, frozen)

    def acting(self, *masks: Mask | None) -> list[bool]:
        """The leaves that are not frozen and that all of `masks` choose."""
        flags = [self.chosen[mask] for mask in masks if mask is not None]
        return [not frozen and all(some) for frozen, *some in zip(self.frozen, *flags, strict=True)]

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


def masked(acts: list[bool], tree: Any, leaves: list[Any], structure: Any) -> Any:
    """The tree with a hole in place of each leaf that is not acted on."""
    if all(acts):
        return tree
    return structure.unflatten([leaf if act else HOLE for leaf, act in zip(leaves, acts, strict=True)])


def trained_leaves(body: Body, params: Any, updates: Any) -> list[bool]:
    """Which leaves a transformation does not freeze; `updates` stand for the parameters where there are none."""
    return [not frozen for frozen in body.frozen(updates if params is None else params)]


def trained(body: Body, params: Any) -> Any:
    """The parameters with holes where a transformation freezes them."""
    leaves, structure = trees.flatten("params", params)
    return masked(trained_leaves(body, params, params), params, leaves, structure)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The leaves of one update, and what is known of each before anything is computed."""

    updates: list[Any]
    params: list[Any]
    structure: Any
    arithmetic: list[np.dtype[Any]]
    """The dtype each leaf is computed in."""
    final: list[np.dtype[Any]]
    """The dtype each update is returned in: the parameter's."""
    whole_params: Any

    @classmethod
    def of(cls, updates: Any, params: Any) -> Leaves:
        """Flatten and check: same structure and shapes, no complex update for a real parameter."""
        leaves, structure = trees.flatten("updates", updates)
        if params is None:
            dtypes = [trees.dtype_of(leaf) for leaf in leaves]
            return cls(leaves, [None] * len(leaves), structure, [trees.compute_dtype(d) for d in dtypes], dtypes, None)
        param_leaves, param_structure = trees.flatten("params", params)
        remedy = "pass gradients or updates of these params"
        trees.check_same_structure("updates", structure, "params", param_structure, remedy)
        arithmetic, final = [], []
        for index, (leaf, param) in enumerate(zip(leaves, param_leaves, strict=True)):
            trees.check_update("updates", leaf, param, structure, index)
            final.append(trees.dtype_of(param))
            arithmetic.append(trees.compute_dtype(trees.dtype_of(leaf), final[-1]))
        return cls(leaves, param_leaves, structure, arithmetic, final, params)

    def measured(
        self, measure: Measure, acts: Iterable[bool], call: Call, name: str, axis_name: tuple[str, ...] | None
    ) -> dict[str, jax.Array]:
        """The numbers of `measure` of every leaf that is acted on, stacked; {} if there is none.

        Args:
          measure: What to measure; once per array and `call`, whoever asks.
          acts: Whether each leaf counts.
          call: The update in progress.
          name: Who asks, for messages.
          axis_name: Axes of the mesh over which the leaves are sharded; see `clip_by_global_norm`.
        """
        numbers: list[Mapping[str, jax.Array]] = []
        axes: list[tuple[str, ...]] = []
        for index, (act, leaf, dtype) in enumerate(zip(acts, self.updates, self.arithmetic, strict=True)):
            if act:
                axes.append(trees.sharded_over(leaf, axis_name, name, self.structure, index))
                key = (measure, id(leaf), dtype)  # the leaf is kept beside, so that no other gets its id
                call.measured.setdefault(key, None)
                if call.measured[key] is None:
                    call.measured[key] = (_measured(measure)(dtype, leaf), leaf)
                numbers.append(call.measured[key][0])
        if not numbers:
            return {}
        if not any(axes):
            return _stacked(numbers)
        assert measure.across is not None
        order = [i for some in dict.fromkeys(axes) for i, own in enumerate(axes) if own == some]
        parts = [
            measure.across(_stacked([one for one, own in zip(numbers, axes, strict=True) if own == some]), some)
            for some in dict.fromkeys(axes)
        ]
        back = np.argsort(order)
        return {key: jnp.concatenate([part[key] for part in parts])[back] for key in parts[0]}

    def rounded(self) -> Any:
        """The whole tree of updates, in the parameters' dtypes."""
        pairs = zip(self.updates, self.final, strict=True)
        return self.structure.unflatten([u if trees.strong(u, dtype) else _cast(u, dtype) for u, dtype in pairs])


def initial_fields(segment: Segment, selection: Selection, leaves: list[Any], structure: Any) -> dict[str, Any]:
    """The segment's part of the state."""
    rules = selection.rules_by_leaf(segment.rules)
    slots = [jax.tree.leaves(one_array.init(some, widened(leaf))) for some, leaf in zip(rules, leaves, strict=True)]
    fields = _fields(segment, _owned_by_leaf(segment, rules), slots, structure)
    initial = (jnp.asarray(value, visible_dtype()) for _, value in segment.rules[0].memory)
    return fields | dict(zip(segment.memory, initial, strict=True))


def run_foreign(
    segment: ForeignSegment, state: Any, leaves: Leaves, selection: Selection, call: Call
) -> tuple[Leaves, Any, Report]:
    """One foreign stage: it sees whole trees in the parameters' dtypes, with holes where it does not act."""
    acts = selection.acting(segment.mask)
    rounded = leaves.rounded()
    updates = masked(acts, rounded, leaves.structure.flatten_up_to(rounded), leaves.structure)
    params = leaves.whole_params
    if params is not None:
        params = masked(acts, params, leaves.params, leaves.structure)
    new, new_state, report = segment.body.step(updates, getattr(state, segment.field), params, call)
    new_leaves, structure = trees.flatten("updates", new)
    remedy = "every stage must keep the structure of its updates"
    trees.check_same_structure("updates", structure, "params", jax.tree.structure(updates), remedy)
    remaining = iter(new_leaves)
    merged = [next(remaining) if act else old for act, old in zip(acts, leaves.updates, strict=True)]
    final = list(leaves.final)
    for index, (act, one) in enumerate(zip(acts, merged, strict=True)):
        trees.check_update("updates", one, leaves.updates[index], leaves.structure, index)
        if act and segment.body.lands:
            final[index] = trees.dtype_of(one)
    return dataclasses.replace(leaves, updates=merged, final=final), new_state, report


def run_rules(
    segment: Segment,
    state: Any,
    leaves: Leaves,
    selection: Selection,
    values: Mapping[str, Any],
    call: Call,
    rounded: bool,
) -> tuple[Leaves, dict[str, Any], Report]:
    """One pass over the leaves: every rule of the segment, one compiled call per leaf."""
    rules = selection.rules_by_leaf(segment.rules)
    owned = _owned_by_leaf(segment, rules)
    slots = _slots_by_leaf(segment, rules, owned, state, leaves)
    scalars, memory, report = _scalars(segment, rules, state, values, leaves, call)
    compiled = {id(some): _on_leaf(some) for some in {id(some): some for some in rules}.values() if _acts(some)}
    places = _places(segment.rules, len(rules))
    results = [
        compiled[id(some)](final if rounded else dtype, dtype, scalars[dtype], update, slot, param, place)
        if id(some) in compiled
        else (update, ())
        for some, final, dtype, update, slot, param, place in zip(
            rules, leaves.final, leaves.arithmetic, leaves.updates, slots, leaves.params, places, strict=True
        )
    ]
    fields = _fields(segment, owned, [new for _, new in results], leaves.structure)
    return dataclasses.replace(leaves, updates=[update for update, _ in results]), fields | memory, report


def _acts(rules: tuple[Rule, ...]) -> bool:
    """Whether any of the rules does anything."""
    return any(rule is not NOTHING for rule in rules)


def _owned_by_leaf(segment: Segment, rules: list[tuple[Rule, ...]]) -> list[dict[int, int]]:
    """Which of the segment's fields each leaf has: the place among them to the place among its own arrays."""
    variants = {id(some): _owned(segment.rules, some) for some in {id(some): some for some in rules}.values()}
    return [variants[id(some)] for some in rules]


def _fields(segment: Segment, owned: list[dict[int, int]], slots: list[Any], structure: Any) -> dict[str, Any]:
    """From each leaf's arrays to one tree per field."""
    return {
        field: structure.unflatten([a[o[place]] if place in o else HOLE for a, o in zip(slots, owned, strict=True)])
        for place, field in enumerate(segment.fields)
    }


def _slots_by_leaf(
    segment: Segment, rules: list[tuple[Rule, ...]], owned: list[dict[int, int]], state: Any, leaves: Leaves
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
            expected[kind] = _slot_avals(some, shape, dtype)
        for place, slot in enumerate(slots):
            field = f"state.{segment.fields[place]}"
            if place in own:
                known = leaves.whole_params is not None
                trees.check_slot(field, slot, expected[kind][own[place]], leaves.structure, index, check_dtype=known)
            elif not isinstance(slot, optax.MaskedNode):
                name = trees.name_leaf(field, leaves.structure, index)
                raise ValueError(f"{name} is {trees.describe(slot)}, but this leaf has no such state; {_ANEW}")
        by_leaf.append(tuple(slots[place] for place in own))
    return by_leaf


_ANEW = "call init(params) again"


def column(name: str, tree: Any, structure: Any) -> list[Any]:
    """One value per leaf of `structure`, a hole where `tree` leaves one out."""
    slots, own = jax.tree.flatten(tree)
    if own == structure:
        return slots
    remedy = "this state belongs to other parameters; call init(params) for these"
    try:
        parts = structure.flatten_up_to(tree)
    except ValueError:
        trees.check_same_structure(name, own, "updates", structure, remedy)
        raise
    if not all(isinstance(part, optax.MaskedNode) or jax.tree_util.all_leaves([part]) for part in parts):
        trees.check_same_structure(name, own, "updates", structure, remedy)
    return parts


def _scalars(
    segment: Segment,
    rules: list[tuple[Rule, ...]],
    state: Any,
    values: Mapping[str, Any],
    leaves: Leaves,
    call: Call,
) -> tuple[dict[Any, Scalars], dict[str, Any], Report]:
    """The numbers of this step for each dtype of arithmetic, with what the first rule gathers from all leaves."""
    first = segment.rules[0]
    dynamic = {name: value for name, value in values.items() if not isinstance(value, float)}
    dtypes = sorted(set(leaves.arithmetic), key=lambda dtype: -dtype.itemsize)
    scalars = {
        dtype: _prepared(segment.rules)(numerics.real_dtype(dtype), state.count, dynamic)
        for dtype in dtypes or [np.dtype(np.float32)]
    }
    if first.measure is None:
        return scalars, {}, {}
    memory = {name: getattr(state, field) for (name, _), field in zip(first.memory, segment.memory, strict=True)}
    acts = [some[0] is not NOTHING for some in rules]
    stacked = leaves.measured(first.measure, acts, call, first.name, first.axis_name)
    if not stacked:
        nothing = {name: jnp.zeros((), np.float32) for name in first.reports}
        return scalars, dict(zip(segment.memory, memory.values(), strict=True)), nothing
    gathered = {
        dtype: _gathered(first)(numerics.real_dtype(dtype), some, stacked, memory) for dtype, some in scalars.items()
    }
    _, new, report = next(iter(gathered.values()))
    kept = (new[name] for name, _ in first.memory)
    return {d: some for d, (some, _, _) in gathered.items()}, dict(zip(segment.memory, kept, strict=True)), report


# What runs compiled. Each function is made once per rule, by value, and traced once per shape and dtype.


@functools.lru_cache(maxsize=4096)
def _on_leaf(rules: tuple[Rule, ...]) -> Callable[..., tuple[jax.Array, tuple[Any, ...]]]:
    @functools.partial(jax.jit, static_argnums=(0, 1))
    def leaf_update(final, dtype, scalars, update, slots, param, place):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        with jax.numpy_dtype_promotion("standard"):
            structure = _slot_structure(rules)
            state = structure.unflatten([_widened(slot, dtype) for slot in slots])
            param = None if param is None else numerics.cast(param, dtype)
            new_update, new_state = one_array.run(rules, scalars, numerics.cast(update, dtype), state, param)
            new_slots = structure.flatten_up_to(new_state)
            return numerics.cast(new_update, final), tuple(
                _stored(new, trees.dtype_of(old), scalars.seed, place, index)
                for index, (new, old) in enumerate(zip(new_slots, slots, strict=True))
            )

    return leaf_update


def _stored(new: jax.Array, dtype: np.dtype[Any], seed: Any, place: Any, index: int) -> jax.Array:
    """A moment as the state keeps it: below float32 rounded stochastically, for to nearest small changes are lost."""
    if place is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        bits = numerics.random_bits(numerics.seed_for(numerics.seed_for(seed, place), index), new.shape)
        new = numerics.round_to(new, dtype, bits)
    return numerics.cast(new, dtype)


def _places(rules: tuple[Rule, ...], leaves: int) -> Iterable[Any]:
    """The number of each leaf, where states are rounded stochastically and must differ by it."""
    low = any(rule.state_dtype is not None and rule.state_dtype.itemsize < 4 for r in rules for rule in r.walk())
    return map(np.uint32, range(leaves)) if low else [None] * leaves


@functools.lru_cache(maxsize=4096)
def _prepared(rules: tuple[Rule, ...]) -> Callable[..., Scalars]:
    @functools.partial(jax.jit, static_argnums=0)
    def step_scalars(dtype, count, dynamic):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        with jax.numpy_dtype_promotion("standard"):
            number = increment(count).astype(dtype)
            seed = numerics.mix(jnp.asarray(count).astype(np.uint32))
            scalars = Scalars(number, seed, {name: value.astype(dtype) for name, value in dynamic.items()})
            return dataclasses.replace(scalars, prepared=one_array.prepare(rules, scalars))

    return step_scalars


@functools.lru_cache(maxsize=256)
def _measured(measure: Measure) -> Callable[..., Mapping[str, jax.Array]]:
    @functools.partial(jax.jit, static_argnums=0)
    def leaf_measure(dtype, update):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        with jax.numpy_dtype_promotion("standard"):
            return measure.of(numerics.cast(update, dtype))

    return leaf_measure


@functools.lru_cache(maxsize=4096)
def _gathered(rule: Rule) -> Callable[..., tuple[Scalars, dict[str, jax.Array], Report]]:
    @functools.partial(jax.jit, static_argnums=0)
    def all_leaves(dtype, scalars, measured, memory):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        assert rule.gather is not None
        with jax.numpy_dtype_promotion("standard"):
            remembered = {name: value.astype(dtype) for name, value in memory.items()}
            gathered = dict(rule.gather(measured, one_array.step_of(rule, scalars, scalars.prepared[0], remembered)))
            report = {name: jnp.asarray(gathered[name], np.float32) for name in rule.reports}
            new = {name: jnp.asarray(gathered.pop(name), old.dtype) for name, old in memory.items()}
            own = {**scalars.prepared[0], **{key: jnp.asarray(value, dtype) for key, value in gathered.items()}}
            return dataclasses.replace(scalars, prepared=(own, *scalars.prepared[1:])), new, report

    return all_leaves


@jax.jit
def increment(count: jax.Array) -> jax.Array:
    """One more, but never more than an int32 holds."""
    return jnp.asarray(optax.safe_increment(count))


_cast = jax.jit(numerics.cast, static_argnums=1)


@jax.jit
def _stacked(numbers: list[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    return {key: jnp.stack([one[key] for one in numbers]) for key in numbers[0]}


# What is known of a rule's state before any array is there.


@functools.lru_cache(maxsize=4096)
def _slot_structure(rules: tuple[Rule, ...]) -> Any:
    example = jax.ShapeDtypeStruct((), np.float32)
    return jax.tree.structure(jax.eval_shape(lambda: one_array.init(rules, jnp.zeros_like(example))))


@functools.lru_cache(maxsize=65536)
def _slot_avals(rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[trees.Aval]:
    param = jax.ShapeDtypeStruct(shape, trees.compute_dtype(dtype))
    slots = jax.eval_shape(functools.partial(one_array.init, rules), param)
    return [trees.aval(slot) for slot in jax.tree.leaves(slots)]


def slot_names(rules: tuple[Rule, ...]) -> list[str]:
    """What the rules call their arrays, in the order of the leaves of their state."""
    return [path[-1].key for path in _slot_paths(rules)]


@functools.lru_cache(maxsize=4096)
def _slot_paths(rules: tuple[Rule, ...]) -> list[Any]:
    structure = _slot_structure(rules)
    paths, _ = jax.tree_util.tree_flatten_with_path(structure.unflatten(range(structure.num_leaves)))
    return [path for path, _ in paths]


@functools.lru_cache(maxsize=4096)
def _owned(rules: tuple[Rule, ...], variant: tuple[Rule, ...]) -> dict[int, int]:
    """Where the arrays of `variant`, what one leaf gets of `rules`, stand among theirs: place there to place here."""
    own = _slot_paths(variant)
    return {place: own.index(path) for place, path in enumerate(_slot_paths(rules)) if path in own}


def _widened(slot: Any, dtype: np.dtype[Any]) -> jax.Array:
    """A moment at the leaf's arithmetic precision; real moments of complex leaves stay real, counters whole."""
    own = trees.dtype_of(slot)
    if not trees.trainable(own):
        return slot
    return numerics.cast(slot, dtype if trees.is_complex(own) else numerics.real_dtype(dtype))


def widened(leaf: Any) -> Any:
    """A parameter in the dtype of its arithmetic, strongly typed, as the `init` of a rule sees it."""
    dtype = trees.compute_dtype(trees.dtype_of(leaf))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return leaf if trees.strong(leaf, dtype) else numerics.cast(leaf, dtype)
