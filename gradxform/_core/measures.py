"""What is measured of all leaves before a step, once for each array, whoever asks; norms above all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core import meshes, trees
from gradxform._core.call import Call
from gradxform._core.compiled import measured, measured_jointly, rescaled, stacked
from gradxform._core.leaves import Leaf, Leaves
from gradxform._core.rule import Array, Measure
from gradxform.numerics import norms
from gradxform.numerics.arithmetic import zero_if_finite

Numbers = Mapping[str, Array]


def measure_leaves(
    leaves: Leaves, measure: Measure, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...] | None
) -> tuple[list[Numbers], Numbers]:
    """The numbers of `measure` of every leaf that counts: for each leaf, and stacked; [] and {} if no leaf counts.

    A joint measure takes small leaves of one shape together, and has no numbers of single leaves.

    Args:
      leaves: The leaves of the step, whose updates are measured.
      measure: What to measure, once per array and `call`, whoever asks.
      acts: Whether each leaf counts; those without an update do not.
      call: The step in progress.
      who: Who asks, for messages.
      axis_name: Axes of the mesh over which the leaves are sharded; see `clip_by_global_norm`.
    """
    indices = [i for i, leaf in enumerate(leaves.leaves) if acts[i] and leaf.update is not None]
    if not indices:
        return [], {}
    counted = [leaves.leaves[i] for i in indices]
    axes = [
        meshes.sharded_over(leaf.update, axis_name, who, leaves.structure, i)
        for i, leaf in zip(indices, counted, strict=True)
    ]
    if measure.joint is not None:
        groups: dict[Any, list[Leaf]] = {}
        for leaf, over in zip(counted, axes, strict=True):
            groups.setdefault((over, leaf.arithmetic), []).append(leaf)
        return [], _joined([_whole(measure, _jointly(measure, each, call), over) for (over, _), each in groups.items()])
    numbers = [_alone(measure, leaf, call) for leaf in counted]
    parts = {over: [i for i, own in enumerate(axes) if own == over] for over in dict.fromkeys(axes)}
    wholes = [_whole(measure, stacked([numbers[i] for i in part]), over) for over, part in parts.items()]
    if len(wholes) == 1 and not axes[0]:
        return numbers, wholes[0]
    back = np.argsort([i for part in parts.values() for i in part])
    whole = {key: value[back] for key, value in _joined(wholes).items()}
    return [{key: value[i] for key, value in whole.items()} for i in range(len(numbers))], whole


def _alone(measure: Measure, leaf: Leaf, call: Call) -> Numbers:
    """The numbers of a leaf."""
    if measure is LEAF_NORMS and (known := call.rescaled.get(id(leaf.update))):
        _, source, factor = known
        return rescaled(_alone(measure, leaf._replace(update=source), call), factor)
    key = (measure.of, leaf.arithmetic, id(leaf.update))
    if key not in call.measured:  # the array is held too, so that no other gets its id
        call.measured[key] = (measured(measure)(leaf.arithmetic, leaf.update), leaf.update)
    return call.measured[key][0]


def _jointly(measure: Measure, leaves: list[Leaf], call: Call) -> Numbers:
    """The numbers of leaves of one dtype, put together in groups, stacked; those of single leaves if they are known."""
    if measure is GLOBAL_NORM:
        sources, factor = _sources([leaf.update for leaf in leaves], call)
        if factor is not None:
            pairs = zip(leaves, sources, strict=True)
            return rescaled(_jointly(measure, [leaf._replace(update=source) for leaf, source in pairs], call), factor)
    updates, dtype = [leaf.update for leaf in leaves], leaves[0].arithmetic
    if all((measure.of, dtype, id(update)) in call.measured for update in updates):
        return stacked([_alone(measure, leaf, call) for leaf in leaves])
    key = (measure.joint, dtype, *map(id, updates))
    if key not in call.measured:
        call.measured[key] = (measured_jointly(measure)(dtype, alike(updates)), updates)
    return call.measured[key][0]


def remember_rescaled(
    before: Leaves, after: Leaves, acts: Sequence[bool], factors: Mapping[Any, Any], call: Call
) -> None:
    """Remember which updates are others times a factor, so that their norms are the others' norms times the factor.

    Then nobody reads the new arrays to measure them, and a compiled step need not write them out (X3).
    """
    for old, new, act in zip(before.leaves, after.leaves, acts, strict=True):
        if act and old.update is not None:
            call.rescaled[id(new.update)] = new.update, old.update, factors[old.arithmetic]


def _sources(updates: Sequence[Any], call: Call) -> tuple[list[Any], Any]:
    """The arrays of which all updates are the multiple by one factor, and the factor; else the updates and None."""
    known = [call.rescaled.get(id(update)) for update in updates]
    factors = {id(entry[2]): entry[2] for entry in known if entry is not None}
    if len(factors) != 1 or None in known:
        return list(updates), None
    [factor] = factors.values()
    return [entry[1] for entry in known if entry is not None], factor


def alike(arrays: Sequence[Any]) -> list[list[Any]]:
    """Small arrays of one shape, dtype and sharding together, large ones alone."""
    groups: dict[Any, list[Any]] = {}
    for index, array in enumerate(arrays):
        groups.setdefault(index if np.size(array) > norms.SMALL else type_of(array), []).append(array)
    return list(groups.values())


def type_of(array: Any) -> Any:
    """What arrays must have in common to be put together: shape, dtype and division over a mesh."""
    return (trees.aval(array), getattr(array, "sharding", None)) if trees.concrete(array) else jax.typeof(array)


def _whole(measure: Measure, numbers: Numbers, axes: tuple[str, ...]) -> Numbers:
    """The numbers of whole arrays, from those of their shards over these axes of the mesh."""
    if not axes:
        return numbers
    assert measure.across is not None
    return measure.across(numbers, axes)


def _joined(parts: list[Numbers]) -> dict[str, Array]:
    """Stacked numbers, concatenated."""
    with jax.numpy_dtype_promotion("standard"):
        return {
            key: jnp.concatenate([part[key] for part in parts]) if len(parts) > 1 else parts[0][key] for key in parts[0]
        }


# Norms


def _norm(update: Array) -> Numbers:
    return {"norm": norms.norm(update)}


def _joint_norms(groups: Sequence[Sequence[Array]], dtype: Any) -> Numbers:
    return {"norm": norms.joint_norms(groups, dtype)}


def _norm_across(measured: Numbers, axes: tuple[str, ...]) -> Numbers:
    return {"norm": norms.norm_across(measured["norm"], axes)}


LEAF_NORMS = Measure(_norm, _norm_across)
"""‖x‖₂ of each leaf, in at least float32."""

GLOBAL_NORM = Measure(_norm, _norm_across, _joint_norms)
"""‖x‖₂ of groups that together are all leaves: the small leaves of a shape are a group (X6)."""


def leaf_norms(
    leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...] | None
) -> jax.Array:
    """The norm of each leaf that counts, in float32 at least, 0 without an update; see `measure_leaves`."""
    _, stacked_norms = measure_leaves(leaves, LEAF_NORMS, acts, call, who, axis_name)
    known = stacked_norms.get("norm", jnp.zeros(0, jnp.float32))
    given = [leaf.update is not None for leaf, act in zip(leaves.leaves, acts, strict=True) if act]
    return known if all(given) else jnp.zeros(len(given), known.dtype).at[np.flatnonzero(given)].set(known)


def global_norm(
    leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...] | None
) -> jax.Array:
    """The norm of all leaves that count; see `measure_leaves`."""
    _, stacked_norms = measure_leaves(leaves, GLOBAL_NORM, acts, call, who, axis_name)
    return total(stacked_norms.get("norm", jnp.zeros(0, jnp.float32)))


def all_finite(leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...]) -> jax.Array:
    """Whether the leaves that count are finite, on all shards alike: over `axis_name` and what JAX tracks."""
    finite = jnp.isfinite(global_norm(leaves, acts, call, who, ()))
    varying = meshes.varying_over(finite)
    axes = meshes.tracked(tuple(sorted(varying.union(axis_name))), varying)
    return jax.lax.pmin(finite.astype(jnp.int32), axes) > 0 if axes else finite


def bad_leaves(leaves: Leaves, acts: Sequence[bool], norm: jax.Array, call: Call) -> jax.Array:
    """How many of the leaves that count hold a NaN or an infinity; looked at only if the norm is not finite."""
    pairs = zip(acts, leaves.leaves, strict=True)
    updates, factor = _sources([leaf.update for act, leaf in pairs if act and leaf.update is not None], call)
    return _bad(alike(updates), norm, factor)


@jax.jit
def _bad(groups: list[list[jax.Array]], norm: jax.Array, factor: Any) -> jax.Array:
    def count() -> jax.Array:
        runs = [run for group in groups for run in norms.runs(group)]
        arrays = [jnp.stack(run) if factor is None else jnp.stack(run) * factor for run in runs]
        sums = [jnp.sum(zero_if_finite(array), range(1, array.ndim)) for array in arrays]
        return sum((jnp.sum(jnp.isnan(each), dtype=np.int32) for each in sums), start=nothing)

    nothing = jnp.zeros((), np.int32)
    with jax.numpy_dtype_promotion("standard"):
        return jax.lax.cond(jnp.isfinite(norm), lambda: nothing, count)


def total(of_parts: Any) -> jax.Array:
    """The norm of arrays with these norms."""
    return norms.norm(of_parts)
