"""The functions that run compiled: made once for equal rules, and traced once per shape and dtype."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gradxform._core import one_array, trees
from gradxform._core.arguments import visible_dtype
from gradxform._core.call import Report
from gradxform._core.encoded import EncodedParam, Form
from gradxform._core.meshes import partitioned
from gradxform._core.one_array import Scalars
from gradxform._core.rule import Measure, Rule, Slot
from gradxform.numerics import arithmetic as numerics
from gradxform.numerics import rounding


class Ending(NamedTuple):
    """What a pass makes of the update of a leaf: fixed when it is compiled."""

    gives: Literal["wide", "update", "param"]
    """The update in the dtype of the arithmetic, the update in the parameter's dtype, or the new parameter."""
    final: np.dtype[Any]
    """The dtype of the parameter."""
    form: Form | None = None
    """The form in which the parameter is kept; None if it is kept as itself."""

    def value(self, param: Any, dtype: Any) -> Any:
        """The parameter in the dtype of the arithmetic; None if there is none."""
        if param is None:
            return None
        return numerics.cast(param if self.form is None else self.form.read(param), dtype)

    def result(self, update: Any, value: Any, param: Any, accepted: Any) -> Any:
        if self.gives == "wide":
            return update
        if self.gives == "update":
            update = numerics.cast(update, self.final)
            return update if accepted is None else jnp.where(accepted, update, numerics.no_update(update))
        if self.form is None:
            return trees.unless(accepted, param, numerics.cast(jax.lax.add(value, update), self.final))
        return self.form.write(numerics.cast(value, np.float32), numerics.cast(update, np.float32), param, accepted)


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step(ending, dtype, scalars, own, update, slots, param, …)``, compiled; results are divided as these are."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    @functools.wraps(step)
    def wrapped(
        ending: Ending, dtype: Any, scalars: Any, own: Any, update: Any, slots: Any, param: Any, *more: Any
    ) -> Any:
        like = (param if ending.gives == "param" else update), slots
        return partitioned(functools.partial(step, ending, dtype), like, scalars, own, update, slots, param, *more)

    return wrapped


@functools.lru_cache(maxsize=4096)
def on_leaf(rules: tuple[Rule, ...]) -> Callable[..., tuple[Any, tuple[Any, ...]]]:
    """``leaf_update(ending, dtype, scalars, own, update, slots, param, accepted)``: rules on one leaf.

    `own` is what rules get for this leaf alone: what the first one measured, random keys. Where `accepted` is False
    nothing changes.
    """

    @compiled
    def leaf_update(
        ending: Ending, dtype: Any, scalars: Scalars, own: Any, update: Any, slots: Any, param: Any, accepted: Any
    ) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            structure = slot_structure(rules, update.shape, dtype)
            wide = [widened(slot, dtype) for slot in slots]
            value = ending.value(param, dtype)
            keep = _Keeper(scalars.seed, accepted, zip(wide, slots, strict=True))
            new_update, new_state = one_array.run(
                rules,
                scalars.with_own(_in_real(dtype, own)) if own else scalars,
                numerics.widened_apart(update, dtype),
                structure.unflatten(wide),
                value,
                keep,
            )
            result = ending.result(numerics.cast(new_update, dtype), value, param, accepted)
            return result, tuple(
                keep.narrow[id(new)][0] if id(new) in keep.narrow else numerics.cast(new, trees.dtype_of(old))
                for new, old in zip(structure.flatten_up_to(new_state), slots, strict=True)
            )

    return leaf_update


def _in_real(dtype: Any, own: one_array.Own) -> one_array.Own:
    """The numbers of a leaf in the real dtype of its arithmetic; keys and counts as they are."""
    return jax.tree.map(
        lambda x: x.astype(numerics.real_dtype(dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x, own
    )


@functools.lru_cache(maxsize=4096)
def on_batch(rules: tuple[Rule, ...]) -> Callable[..., tuple[list[Any], list[tuple[Any, ...]]]]:
    """`on_leaf` for several leaves of one shape, stacked; what differs from leaf to leaf comes in lists."""

    @compiled
    def batch_update(
        ending: Ending, dtype: Any, scalars: Scalars, own: Any, updates: Any, slots: Any, params: Any, accepted: Any
    ) -> Any:
        def single(own: Any, update: Any, slots: Any, param: Any) -> Any:
            return on_leaf(rules)(ending, dtype, scalars, own, update, slots, param, accepted)

        stacks = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in (own, updates, slots, params))
        results = jax.vmap(single)(*stacks)
        parts = [jax.tree.map(lambda whole, place=place: whole[place], results) for place in range(len(updates))]
        return [update for update, _ in parts], [new for _, new in parts]

    return batch_update


@functools.lru_cache(maxsize=4096)
def viewed(rules: tuple[Rule, ...]) -> Callable[..., Any]:
    """``leaf_view(dtype, final, scalars, slots, param)``: the parameter to evaluate, by the rule that has a `view`."""
    place = next(place for place, rule in enumerate(rules) if rule.view is not None)
    rule = rules[place]
    assert rule.view is not None
    view = rule.view

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def leaf_view(dtype: Any, final: Any, scalars: Scalars, slots: Any, param: Any) -> Any:
        def on_whole(scalars: Scalars, slots: Any, param: Any) -> Any:
            state = slot_structure(rules, param.shape, dtype).unflatten([widened(slot, dtype) for slot in slots])
            step = one_array.step_of(rule, scalars, scalars.prepared[place])
            try:
                return numerics.cast(view(state[place], numerics.cast(param, dtype), step), final)
            except Exception as error:
                error.add_note(f"in view of {rule.name}")
                raise

        with jax.numpy_dtype_promotion("standard"):
            return partitioned(on_whole, param, scalars, slots, param)

    return leaf_view


def _moved(dtype: Any, param: Any, update: Any, accepted: Any) -> jax.Array:
    """θ + u, rounded once, from the precision of the arithmetic."""
    ending = Ending("param", trees.dtype_of(param))
    return ending.result(numerics.cast(update, dtype), numerics.cast(param, dtype), param, accepted)


_moved_alone = jax.jit(_moved, static_argnums=0)


def moved(dtype: Any, param: Any, update: Any, accepted: Any) -> Any:
    """The parameter after an update, outside a pass."""
    if isinstance(param, EncodedParam):
        return param.moved(update, accepted)
    # compiled by itself only outside jit: inside, to trace one more call takes longer than to trace what it does
    return (_moved_alone if trees.concrete(update) else _moved)(dtype, param, update, accepted)


class _Keeper:
    """What the state keeps of the moments of one leaf."""

    def __init__(self, seed: Any, accepted: Any, slots: Iterable[tuple[Any, Any]]) -> None:
        self._seed, self._accepted = seed, accepted
        self._number = itertools.count()
        self._dtypes = {id(wide): trees.dtype_of(slot) for wide, slot in slots if wide is not slot}
        self.narrow: dict[int, tuple[jax.Array, jax.Array]] = {}
        """The rounded moment by the id of the wide one that the arithmetic goes on with, which is held for its id."""

    def __call__(self, rule: Rule, new: jax.Array, old: jax.Array) -> jax.Array:
        """The new moment as the state holds it, or the old one where the step is not accepted.

        Below float32 it is rounded stochastically, for rounding to nearest loses small changes.
        """
        index, dtype = next(self._number), self._dtypes.get(id(old))
        if dtype is not None and _narrow(dtype) and jnp.issubdtype(new.dtype, jnp.inexact):
            # the same seed for every leaf (X7)
            narrow = rounding.rounded_at_random(new, dtype, rounding.seed_for(self._seed, index))
            if self._accepted is not None:
                narrow = jnp.where(self._accepted, narrow, old.astype(dtype))
            wide = narrow.astype(new.dtype)
            self.narrow[id(wide)] = narrow, wide
            return wide
        return new if self._accepted is None else jnp.where(self._accepted, new, old)


def _narrow(dtype: np.dtype[Any] | None) -> bool:
    """Whether a state of this dtype is rounded at random."""
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize < 4


@functools.lru_cache(maxsize=4096)
def prepared(rules: tuple[Rule, ...]) -> Callable[..., Scalars]:
    """``step_scalars(dtype, count, dynamic)``: what is the same for all leaves whose arithmetic has this real dtype."""

    narrow = by_shape(rules) or any(_narrow(inner.state_dtype) for rule in rules for inner in rule.parts)

    @functools.partial(jax.jit, static_argnums=0)
    def step_scalars(dtype: Any, count: Any, dynamic: Mapping[str, Any], extra: Mapping[str, Any]) -> Scalars:
        with jax.numpy_dtype_promotion("standard"):
            now = increment(count)
            seed = rounding.mix(jnp.asarray(count).astype(np.uint32)) if narrow else None
            known, given = (
                {name: value.astype(dtype) for name, value in values.items()} for values in (dynamic, extra)
            )
            asked = Scalars(now.astype(dtype), seed, known, given, count=now)
            return dataclasses.replace(asked, prepared=one_array.prepare(rules, asked), count=None)

    return step_scalars


@functools.lru_cache(maxsize=256)
def measured(measure: Measure) -> Callable[..., Mapping[str, jax.Array]]:
    """``leaf_measure(dtype, update)``: the numbers of one leaf."""

    @functools.partial(jax.jit, static_argnums=0)
    def leaf_measure(dtype: Any, update: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return partitioned(lambda x: measure.of(numerics.cast(x, dtype)), PartitionSpec(), update)

    return leaf_measure


@functools.lru_cache(maxsize=256)
def measured_jointly(measure: Measure) -> Callable[..., Mapping[str, jax.Array]]:
    """``joint_measure(dtype, groups)``: the numbers of groups of leaves, stacked."""
    assert measure.joint is not None
    joint = measure.joint

    def on_whole(dtype: Any, groups: Any) -> Mapping[str, jax.Array]:
        return joint(groups, dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def joint_measure(dtype: Any, groups: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return partitioned(functools.partial(on_whole, dtype), PartitionSpec(), groups)

    return joint_measure


@functools.lru_cache(maxsize=4096)
def gathered(rule: Rule) -> Callable[..., tuple[Scalars, dict[str, jax.Array], Report]]:
    """``all_leaves(dtype, scalars, numbers, memory)``: scalars with what a rule makes of the numbers of all leaves."""

    @functools.partial(jax.jit, static_argnums=0)
    def all_leaves(dtype: Any, scalars: Scalars, numbers: Any, memory: Mapping[str, Any]) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            remembered = {name: value.astype(dtype) for name, value in memory.items()}
            step = one_array.step_of(rule, scalars, scalars.prepared[0], remembered)
            if rule.totals is not None:  # leaves of float32 beside some of float64 get what all of them add up to
                numbers = in_dtype(dtype, numbers)
            gathered = _gathered(rule, numbers, step) if rule.gather else {}
            report = {name: jnp.asarray(gathered[name], np.float32) for name in rule.reports}
            new = {name: jnp.asarray(gathered[name], old.dtype) for name, old in memory.items()}
            own = {key: jnp.asarray(value, dtype) for key, value in gathered.items()}
            return scalars.with_own({0: own}), new, report

    return all_leaves


def _gathered(rule: Rule, numbers: Any, step: Any) -> dict[str, Any]:
    """What `gather` of a rule returned, if it has all that the rule remembers and reports."""
    assert rule.gather is not None
    try:
        gathered = dict(rule.gather(numbers, step))
        for name in (*dict(rule.memory), *rule.reports):
            if name not in gathered:
                raise KeyError(f"gather must return {name!r}, which the rule remembers or reports")
        for name, _ in rule.memory:
            shape, new = np.shape(getattr(step, name)), np.shape(gathered[name])
            if new != shape:
                raise ValueError(f"{name!r} has the shape {shape} in memory, now {new}")
    except Exception as error:
        error.add_note(f"in gather of {rule.name}")
        raise
    return gathered


@jax.jit
def increment(count: jax.Array) -> jax.Array:
    """One more, but never more than its dtype holds."""
    return jax.lax.min(count, np.asarray(np.iinfo(count.dtype).max - 1, count.dtype)) + 1


@jax.jit
def stacked(numbers: list[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """The numbers of all leaves, each stacked into an array."""
    with jax.numpy_dtype_promotion("standard"):
        return {key: jnp.stack([of_leaf[key] for of_leaf in numbers]) for key in numbers[0]}


@jax.jit
def rescaled(numbers: Mapping[str, jax.Array], factor: jax.Array) -> dict[str, jax.Array]:
    """The norms of arrays times a factor, from the norms of the arrays."""
    with jax.numpy_dtype_promotion("standard"):
        return {name: (value * jnp.abs(factor)).astype(value.dtype) for name, value in numbers.items()}


cast = jax.jit(numerics.cast, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def in_dtype(dtype: Any, numbers: Any) -> Any:
    """Every number of a tree in this dtype."""
    return jax.tree.map(lambda number: number.astype(dtype), numbers)


# What is known of a rule's state before any array is there.


def slot_structure(rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: Any) -> Any:
    """The tree of the arrays that `rules` keep for a leaf."""
    if by_shape(rules):
        return _slot_structure(rules, shape, trees.compute_dtype(dtype))
    return _any_structure(rules)


@functools.lru_cache(maxsize=4096)
def by_shape(rules: tuple[Rule, ...]) -> bool:
    """Whether the names of what `rules` keep depend on the shape of the leaf."""
    return any(part.slots is not None for rule in rules for part in rule.parts)


@functools.lru_cache(maxsize=65536)
def _slot_structure(rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    param = jax.ShapeDtypeStruct(shape, dtype)
    return jax.tree.structure(jax.eval_shape(functools.partial(one_array.init, rules), param))


@functools.lru_cache(maxsize=4096)
def _any_structure(rules: tuple[Rule, ...]) -> Any:
    """The tree of all arrays that `rules` keep for some leaf."""
    return jax.tree.structure(one_array.names(rules))


@functools.lru_cache(maxsize=4096)
def slot_facts(rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Slot, ...]:
    """What is known of the arrays that `rules` keep for a leaf, each a `Slot` with its shape in place of the array."""
    facts: list[Slot] = []

    def asked(param: Any) -> list[Any]:
        made = slots_in(one_array.slots(rules, param))
        facts.extend(dataclasses.replace(slot, array=None) for slot in made)  # a tracer must not be kept
        return [slot.array for slot in made]

    shapes = jax.eval_shape(asked, jax.ShapeDtypeStruct(shape, trees.compute_dtype(dtype)))
    return tuple(dataclasses.replace(slot, array=aval) for slot, aval in zip(facts, shapes, strict=True))


def slots_in(tree: Any) -> list[Slot]:
    """The slots in a tree of them."""
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Slot))


def slot_avals(rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[trees.Aval]:
    """Shape and dtype of the arrays that `rules` keep for a leaf."""
    return _slot_avals(rules, shape, dtype, visible_dtype())  # x64 may change what a rule's init makes


@functools.lru_cache(maxsize=65536)
def _slot_avals(
    rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: np.dtype[Any], visible: Any
) -> list[trees.Aval]:
    param = jax.ShapeDtypeStruct(shape, trees.compute_dtype(dtype))
    slots, structure = jax.tree.flatten(jax.eval_shape(functools.partial(one_array.init, rules), param))
    if structure != slot_structure(rules, shape, param.dtype):
        usual = ", ".join(slot_names(rules))
        raise ValueError(f"init gives other names than {usual} for a leaf of shape {shape}; name all: lift(slots=(…))")
    return [trees.aval(slot) for slot in slots]


def slot_names(rules: tuple[Rule, ...]) -> list[str]:
    """What the rules call their arrays, in the order of the leaves of their state."""
    return [path[-1].key for path in _slot_paths(rules)]


def _slot_paths(rules: tuple[Rule, ...]) -> tuple[Any, ...]:
    return _paths(_any_structure(rules))


@functools.lru_cache(maxsize=4096)
def _paths(structure: Any) -> tuple[Any, ...]:
    paths, _ = jax.tree_util.tree_flatten_with_path(structure.unflatten(range(structure.num_leaves)))
    return tuple([path for path, _ in paths])


def owned_slots(
    rules: tuple[Rule, ...], variant: tuple[Rule, ...], shape: tuple[int, ...], dtype: Any
) -> tuple[int, ...]:
    """The places of the arrays of `variant`, a leaf's part of `rules`, among all that `rules` keep for some leaf."""
    own = _paths(slot_structure(variant, shape, dtype))
    return tuple([place for place, path in enumerate(_slot_paths(rules)) if path in own])


def widened(slot: Any, dtype: np.dtype[Any]) -> jax.Array:
    """A moment in the leaf's arithmetic precision; real moments of complex leaves stay real, counters integers."""
    own = trees.dtype_of(slot)
    if not trees.trainable(own):
        return slot
    return numerics.cast(slot, dtype if trees.is_complex(own) else numerics.real_dtype(dtype))
