"""Totals: what rules add up over all leaves, and over shards, before they act on any; see `lift`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gradxform._core import meshes, one_array, trees
from gradxform._core.compiled import slot_structure, widened
from gradxform._core.encoded import Encoded, EncodedParam, Form, arrays_of
from gradxform._core.leaves import Leaves
from gradxform._core.measures import type_of
from gradxform._core.one_array import Scalars
from gradxform._core.plan import LeafPlan, opened
from gradxform._core.rule import Array, Rule
from gradxform.numerics import arithmetic as numerics
from gradxform.numerics import norms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A total that is a norm: of all leaves it is √Σ‖xᵢ‖², which does not overflow where Σ‖xᵢ‖² does.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> def normalize_all() -> gx.Transformation:
      ...     def totals(update, state, param, step):
      ...         return {"size": gx.Norm(gx.numerics.norm(update))}
      ...     def gather(total, step):
      ...         return {"size": total["size"]}
      ...     def update(update, state, param, step):
      ...         return update / step.size, state
      ...     return gx.lift(None, update, totals=totals, gather=gather)
      >>> tx = normalize_all()
      >>> large = {"a": jnp.array(3e30), "b": jnp.array(4e30)}
      >>> updates, _ = tx.update(large, tx.init(large))
      >>> print(f"{updates['a']:.2f} {updates['b']:.2f}")
      0.60 0.80
    """

    of: Array
    """‖xᵢ‖ of one leaf, or an array of such norms."""


Totals = Mapping[str, Any]


def total_of_leaves(
    plans: Sequence[LeafPlan],
    leaves: Leaves,
    slots: Sequence[Sequence[Any]],
    scalars: Mapping[Any, Scalars],
    memory: Mapping[str, Any],
) -> Totals:
    """The totals of the first rule of each leaf's plan, over the leaves on which it acts and which have an update."""
    groups: dict[Any, list[int]] = {}
    axes: dict[int, tuple[str, ...]] = {}
    for i, (plan, leaf) in enumerate(zip(plans, leaves.leaves, strict=True)):
        rule = plan.rules[0]
        if rule.totals is None or leaf.update is None:
            continue
        axes[i] = meshes.sharded_over(leaf.update, rule.axis_name, rule.name, leaves.structure, i)
        arrays = (leaf.update, leaf.param, *slots[i])
        small = np.size(leaf.update) <= norms.SMALL and not any(isinstance(array, Encoded) for array in arrays)
        alike = (id(plan.rules), leaf.arithmetic, axes[i], *(None if x is None else type_of(x) for x in arrays))
        groups.setdefault(alike if small else i, []).append(i)
    parts: dict[tuple[str, ...], list[Totals]] = {}
    for places in groups.values():
        try:
            found = _group_totals(plans[places[0]], leaves, places, slots, scalars, memory)
        except Exception as error:
            error.add_note(f"for {trees.name_leaf('updates', leaves.structure, places[0])}")
            raise
        parts.setdefault(axes[places[0]], []).append(found)
    return _added([_across(_added(each), over) for over, each in parts.items()]) if parts else {}


def plain(totals: Totals) -> dict[str, Any]:
    """The totals as `gather` sees them."""
    return {name: value.of if isinstance(value, Norm) else value for name, value in totals.items()}


def _group_totals(
    plan: LeafPlan,
    leaves: Leaves,
    places: list[int],
    slots: Sequence[Sequence[Any]],
    scalars: Mapping[Any, Scalars],
    memory: Mapping[str, Any],
) -> Totals:
    """The totals of leaves that are alike: one, or small ones together, for one sum per leaf compiles slowly."""
    group = [(leaves.leaves[i], slots[i]) for i in places]
    leaf, several = group[0][0], len(group) > 1
    form = leaf.param.form if isinstance(leaf.param, EncodedParam) else None
    columns = [(each.update, opened(plan, own), arrays_of(each.param)) for each, own in group]
    given = [list(column) for column in zip(*columns, strict=True)] if several else columns[0]
    return _totals(plan.rules, form, several)(leaf.arithmetic, scalars[leaf.arithmetic], memory, *given)


@functools.lru_cache(maxsize=4096)
def _totals(rules: tuple[Rule, ...], form: Form | None, several: bool) -> Callable[..., Totals]:
    """``leaf_totals(dtype, scalars, memory, update, slots, param)``: of the first rule, for one leaf or several."""
    rule = rules[0]
    assert rule.totals is not None
    function = rule.totals

    def of_one(dtype: Any, scalars: Scalars, memory: Any, update: Any, slots: Any, param: Any) -> Totals:
        state = slot_structure(rules, update.shape, dtype).unflatten([widened(slot, dtype) for slot in slots])[0]
        value = None if param is None else numerics.cast(param if form is None else form.read(param), dtype)
        remembered = {name: number.astype(numerics.real_dtype(dtype)) for name, number in memory.items()}
        step = one_array.step_of(rule, scalars, scalars.prepared[0], remembered)
        try:
            return dict(function(numerics.cast(update, dtype), state, value, step))
        except Exception as error:
            error.add_note(f"in totals of {rule.name}")
            raise

    def of_several(dtype: Any, scalars: Scalars, memory: Any, updates: Any, slots: Any, params: Any) -> Totals:
        columns = [jax.tree.map(lambda *x: jnp.stack(x), *each) for each in (updates, slots, params)]
        stacked = jax.vmap(lambda *arrays: of_one(dtype, scalars, memory, *arrays))(*columns)
        return {name: _summed(value) for name, value in stacked.items()}

    @functools.partial(jax.jit, static_argnums=0)
    def leaf_totals(dtype: Any, scalars: Scalars, memory: Any, update: Any, slots: Any, param: Any) -> Totals:
        with jax.numpy_dtype_promotion("standard"):
            run = functools.partial(of_several if several else of_one, dtype)
            return meshes.partitioned(run, PartitionSpec(), scalars, memory, update, slots, param)

    return leaf_totals


def _summed(stacked: Any) -> Any:
    """The total of a stack of totals."""
    if isinstance(stacked, Norm):
        return Norm(norms.norm(stacked.of, (0,))[0])
    return jnp.sum(stacked, 0)


@jax.jit
def _added(parts: list[Totals]) -> Totals:
    """The totals of several parts."""
    if len(parts) == 1:
        return parts[0]
    with jax.numpy_dtype_promotion("standard"):
        for part in parts:
            if jax.tree.structure(part) != jax.tree.structure(parts[0]):
                raise ValueError(f"totals must be the same for every leaf, got {sorted(parts[0])} and {sorted(part)}")
        stacked = jax.tree.map(lambda *values: jnp.stack(values), *parts)
        return {name: _summed(value) for name, value in stacked.items()}


def _across(totals: Totals, axes: tuple[str, ...]) -> Totals:
    """The totals of whole arrays, from those of their shards over these axes of the mesh."""
    if not axes:
        return totals

    def whole(value: Any) -> Any:
        return Norm(norms.norm_across(value.of, axes)) if isinstance(value, Norm) else jax.lax.psum(value, axes)

    return {name: whole(value) for name, value in totals.items()}
