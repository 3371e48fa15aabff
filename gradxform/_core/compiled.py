"""The functions that run compiled: made once for equal rules, and traced once per shape and dtype."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
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
from gradxform._core.rule import Measure, Rule
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

    `own` are the numbers of the leaf that the first rule measured. Where `accepted` is False nothing changes.
    """

    @compiled
    def leaf_update(
        ending: Ending, dtype: Any, scalars: Scalars, own: Any, update: Any, slots: Any, param: Any, accepted: Any
    ) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            scalars = scalars.with_own({name: value.astype(numerics.real_dtype(dtype)) for name, value in own.items()})
            structure = _slot_structure(rules)
            state = structure.unflatten([_widened(slot, dtype) for slot in slots])
            value = ending.value(param, dtype)
            keep = _Keeper(scalars.seed, accepted)
            new_update, new_state = one_array.run(
                rules, scalars, numerics.widened_apart(update, dtype), state, value, keep
            )
            result = ending.result(numerics.cast(new_update, dtype), value, param, accepted)
            return result, tuple(
                keep.narrow[id(new)][0] if id(new) in keep.narrow else numerics.cast(new, trees.dtype_of(old))
                for new, old in zip(structure.flatten_up_to(new_state), slots, strict=True)
            )

    return leaf_update


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

    def __init__(self, seed: Any, accepted: Any) -> None:
        self._seed, self._accepted = seed, accepted
        self._number = itertools.count()
        self.narrow: dict[int, tuple[jax.Array, jax.Array]] = {}
        """The rounded moment by the id of the wide one that the arithmetic goes on with, which is held for its id."""

    def __call__(self, rule: Rule, new: jax.Array, old: jax.Array) -> jax.Array:
        """The new moment as the state holds it, or the old one where the step is not accepted.

        Below float32 it is rounded stochastically, for rounding to nearest loses small changes.
        """
        index, dtype = next(self._number), rule.state_dtype
        if _narrow(dtype) and jnp.issubdtype(new.dtype, jnp.inexact):
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

    narrow = any(_narrow(inner.state_dtype) for rule in rules for inner in rule.parts)

    @functools.partial(jax.jit, static_argnums=0)
    def step_scalars(dtype: Any, count: Any, dynamic: Mapping[str, Any]) -> Scalars:
        with jax.numpy_dtype_promotion("standard"):
            number = increment(count).astype(dtype)
            seed = rounding.mix(jnp.asarray(count).astype(np.uint32)) if narrow else None
            scalars = Scalars(number, seed, {name: value.astype(dtype) for name, value in dynamic.items()})
            return dataclasses.replace(scalars, prepared=one_array.prepare(rules, scalars))

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
            gathered = dict(rule.gather(numbers, step)) if rule.gather else {}
            report = {name: jnp.asarray(gathered[name], np.float32) for name in rule.reports}
            new = {name: jnp.asarray(gathered.pop(name), old.dtype) for name, old in memory.items()}
            return scalars.with_own({key: jnp.asarray(value, dtype) for key, value in gathered.items()}), new, report

    return all_leaves


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


# What is known of a rule's state before any array is there.


@functools.lru_cache(maxsize=4096)
def _slot_structure(rules: tuple[Rule, ...]) -> Any:
    example = jax.ShapeDtypeStruct((), np.float32)
    return jax.tree.structure(jax.eval_shape(lambda: one_array.init(rules, jnp.zeros_like(example))))


def slot_avals(rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[trees.Aval]:
    """Shape and dtype of the arrays that `rules` keep for a leaf."""
    return _slot_avals(rules, shape, dtype, visible_dtype())  # x64 may change what a rule's init makes


@functools.lru_cache(maxsize=65536)
def _slot_avals(
    rules: tuple[Rule, ...], shape: tuple[int, ...], dtype: np.dtype[Any], visible: Any
) -> list[trees.Aval]:
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
def owned_slots(rules: tuple[Rule, ...], variant: tuple[Rule, ...]) -> dict[int, int]:
    """Where the arrays of `variant`, a leaf's part of `rules`, stand: their places among all, and among its own."""
    own = _slot_paths(variant)
    return {place: own.index(path) for place, path in enumerate(_slot_paths(rules)) if path in own}


def _widened(slot: Any, dtype: np.dtype[Any]) -> jax.Array:
    """A moment in the leaf's arithmetic precision; real moments of complex leaves stay real, counters integers."""
    own = trees.dtype_of(slot)
    if not trees.trainable(own):
        return slot
    return numerics.cast(slot, dtype if trees.is_complex(own) else numerics.real_dtype(dtype))
