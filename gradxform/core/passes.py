"""One step over all leaves: per leaf one compiled call, traced once per rule, shape and dtype."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import numerics
from gradxform.core import rules as one_array
from gradxform.core import trees
from gradxform.core.rules import Rule, Scalars


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rules that run in one pass over the leaves, and the state fields they own."""

    rules: tuple[Rule, ...]
    fields: tuple[str, ...]


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

    def rounded(self) -> Any:
        """The whole tree of updates, in the parameters' dtypes."""
        pairs = zip(self.updates, self.final, strict=True)
        return self.structure.unflatten([u if trees.strong(u, dtype) else _cast(u, dtype) for u, dtype in pairs])


def initial_slots(rules: tuple[Rule, ...], params: Any, leaves: list[Any], structure: Any) -> list[list[Any]]:
    """The state of each leaf, in the order of the segment's fields; raises if a mask does not fit the parameters."""
    _rules_by_leaf(rules, params, leaves, structure)
    return [jax.tree.leaves(one_array.init(rules, _for_arithmetic(leaf))) for leaf in leaves]


def run_foreign(
    tx: optax.GradientTransformationExtraArgs, state: Any, leaves: Leaves, extra_args: Mapping[str, Any]
) -> tuple[Leaves, Any]:
    """One foreign stage: it sees whole trees in the parameters' dtypes."""
    updates, new_state = tx.update(leaves.rounded(), state, leaves.whole_params, **extra_args)
    new_leaves, structure = trees.flatten("updates", updates)
    remedy = "every stage must keep the structure of its updates"
    trees.check_same_structure("updates", structure, "params", leaves.structure, remedy)
    for index, (new, old) in enumerate(zip(new_leaves, leaves.updates, strict=True)):
        trees.check_update("updates", new, old, structure, index)
    return dataclasses.replace(leaves, updates=new_leaves), new_state


def run_rules(
    segment: Segment, state: Any, leaves: Leaves, values: Mapping[str, Any], rounded: bool
) -> tuple[Leaves, dict[str, Any]]:
    """One pass over the leaves: every rule of the segment, one compiled call per leaf."""
    slots = _slots_by_leaf(segment, state, leaves)
    scalars = _scalars(segment.rules, state.count, values, leaves)
    rules = _rules_by_leaf(segment.rules, leaves.whole_params, leaves.params, leaves.structure)
    compiled = {key: _on_leaf(some) for key, some in {id(some): some for some in rules}.items()}
    results = [
        compiled[id(some)](final if rounded else dtype, dtype, scalars[dtype], update, slot, param)
        for some, final, dtype, update, slot, param in zip(
            rules, leaves.final, leaves.arithmetic, leaves.updates, slots, leaves.params, strict=True
        )
    ]
    fields = {
        field: leaves.structure.unflatten([slots[index] for _, slots in results])
        for index, field in enumerate(segment.fields)
    }
    return dataclasses.replace(leaves, updates=[update for update, _ in results]), fields


def _slots_by_leaf(segment: Segment, state: Any, leaves: Leaves) -> list[tuple[Any, ...]]:
    """The state of each leaf, after checking that it is this transformation's for these parameters."""
    by_field = []
    for field in segment.fields:
        slots, structure = jax.tree.flatten(getattr(state, field))
        remedy = "this state belongs to other parameters; call init(params) for these"
        trees.check_same_structure(f"state.{field}", structure, "updates", leaves.structure, remedy)
        by_field.append(slots)
    by_leaf = list(zip(*by_field, strict=True)) if by_field else [()] * len(leaves.updates)
    known = leaves.whole_params is not None
    kinds = [(trees.aval(leaf)[0], dtype) for leaf, dtype in zip(leaves.updates, leaves.final, strict=True)]
    expected = {kind: _slot_avals(segment.rules, *kind) for kind in set(kinds)}
    for index, (slots, kind) in enumerate(zip(by_leaf, kinds, strict=True)):
        for field, slot, aval in zip(segment.fields, slots, expected[kind], strict=True):
            trees.check_slot(f"state.{field}", slot, aval, leaves.structure, index, check_dtype=known)
    return by_leaf


def _rules_by_leaf(rules: tuple[Rule, ...], params: Any, leaves: list[Any], structure: Any) -> list[tuple[Rule, ...]]:
    """The rules each leaf gets: one that needs params must have them, one with a mask skips where it is False."""
    every = [inner for rule in rules for inner in rule.walk()]
    for rule in every:
        if params is None and (rule.needs_params or rule.mask):
            raise ValueError(f"{rule.name} needs the parameters: call update(updates, state, params)")
    masks = [rule.mask for rule in every if rule.mask]
    if not masks:
        return [rules] * len(leaves)
    variants: dict[tuple[bool, ...], tuple[Rule, ...]] = {}
    by_leaf = list(zip(*(mask(params, leaves, structure) for mask in masks), strict=True))
    for flags in set(by_leaf):
        acts = dict(zip(masks, flags, strict=True)).__getitem__
        variants[flags] = tuple(rule.select(acts) for rule in rules)
    return [variants[flags] for flags in by_leaf]


def _scalars(rules: tuple[Rule, ...], count: Any, values: Mapping[str, Any], leaves: Leaves) -> dict[Any, Scalars]:
    """The numbers of this step for each dtype of arithmetic, with what the first rule gathers from all leaves."""
    dynamic = {name: value for name, value in values.items() if not isinstance(value, float)}
    scalars = {dtype: _prepared(rules)(numerics.real_dtype(dtype), count, dynamic) for dtype in set(leaves.arithmetic)}
    first = rules[0]
    if first.measure is None or not scalars:
        return scalars
    measure = _measured(first)
    measured = [
        measure(dtype, scalars[dtype], update) for dtype, update in zip(leaves.arithmetic, leaves.updates, strict=True)
    ]
    return {dtype: _gathered(first)(numerics.real_dtype(dtype), some, measured) for dtype, some in scalars.items()}


# What runs compiled. Each function is made once per rule, by value, and traced once per shape and dtype.


@functools.lru_cache(maxsize=4096)
def _on_leaf(rules: tuple[Rule, ...]) -> Callable[..., tuple[jax.Array, tuple[Any, ...]]]:
    @functools.partial(jax.jit, static_argnums=(0, 1))
    def leaf_update(final, dtype, scalars, update, slots, param):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        with jax.numpy_dtype_promotion("standard"):
            structure = _slot_structure(rules)
            state = structure.unflatten([_widened(slot, dtype) for slot in slots])
            param = None if param is None else numerics.cast(param, dtype)
            new_update, new_state = one_array.run(rules, scalars, numerics.cast(update, dtype), state, param)
            new_slots = structure.flatten_up_to(new_state)
            return numerics.cast(new_update, final), tuple(
                numerics.cast(new, trees.dtype_of(old)) for new, old in zip(new_slots, slots, strict=True)
            )

    return leaf_update


@functools.lru_cache(maxsize=4096)
def _prepared(rules: tuple[Rule, ...]) -> Callable[..., Scalars]:
    @functools.partial(jax.jit, static_argnums=0)
    def step_scalars(dtype, count, dynamic):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        with jax.numpy_dtype_promotion("standard"):
            number = increment(count).astype(dtype)
            scalars = Scalars(number, {name: value.astype(dtype) for name, value in dynamic.items()})
            return dataclasses.replace(scalars, prepared=one_array.prepare(rules, scalars))

    return step_scalars


@functools.lru_cache(maxsize=4096)
def _measured(rule: Rule) -> Callable[..., Mapping[str, jax.Array]]:
    @functools.partial(jax.jit, static_argnums=0)
    def leaf_measure(dtype, scalars, update):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        assert rule.measure is not None
        with jax.numpy_dtype_promotion("standard"):
            step = one_array.step_of(rule, scalars, scalars.prepared[0])
            return rule.measure(numerics.cast(update, dtype), step)

    return leaf_measure


@functools.lru_cache(maxsize=4096)
def _gathered(rule: Rule) -> Callable[..., Scalars]:
    @functools.partial(jax.jit, static_argnums=0)
    def all_leaves(dtype, scalars, measured):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        assert rule.gather is not None
        with jax.numpy_dtype_promotion("standard"):
            stacked = {key: jnp.stack([one[key] for one in measured]) for key in measured[0]}
            gathered = rule.gather(stacked, one_array.step_of(rule, scalars, scalars.prepared[0]))
            own = {**scalars.prepared[0], **{key: value.astype(dtype) for key, value in gathered.items()}}
            return dataclasses.replace(scalars, prepared=(own, *scalars.prepared[1:]))

    return all_leaves


@jax.jit
def increment(count: jax.Array) -> jax.Array:
    """One more, but never more than an int32 holds."""
    return jnp.asarray(optax.safe_increment(count))


_cast = jax.jit(numerics.cast, static_argnums=1)


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
    """What the rules call their arrays, in the order in which `initial_slots` gives them."""
    structure = _slot_structure(rules)
    paths, _ = jax.tree_util.tree_flatten_with_path(structure.unflatten(range(structure.num_leaves)))
    return [path[-1].key for path, _ in paths]


def _widened(slot: Any, dtype: np.dtype[Any]) -> jax.Array:
    """A moment at the leaf's arithmetic precision; real moments of complex leaves stay real, counters whole."""
    own = trees.dtype_of(slot)
    if not trees.trainable(own):
        return slot
    return numerics.cast(slot, dtype if trees.is_complex(own) else numerics.real_dtype(dtype))


def _for_arithmetic(leaf: Any) -> Any:
    """A parameter as `init` sees it: strongly typed, in the dtype of its arithmetic."""
    dtype = trees.compute_dtype(trees.dtype_of(leaf))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return leaf if trees.strong(leaf, dtype) else numerics.cast(leaf, dtype)
