"""The norm of a tree, taken once per update whoever wants it: clipping, guards, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core import meshes
from gradxform._core.body import Call
from gradxform._core.leaves import Leaves, alike
from gradxform._core.rule import Array, Measure
from gradxform.numerics import norms as euclidean
from gradxform.numerics.arithmetic import zero_if_finite


def _norm(update: Array) -> Mapping[str, Array]:
    return {"norm": euclidean.norm(update)}


def _joint(groups: Sequence[Sequence[Array]]) -> Mapping[str, Array]:
    return {"norm": euclidean.joint_norms(groups)}


def _across(measured: Mapping[str, Array], axes: tuple[str, ...]) -> Mapping[str, Array]:
    return {"norm": euclidean.norm_across(measured["norm"], axes)}


LEAF_NORMS = Measure(_norm, _across)
"""‖x‖₂ of each leaf, in at least float32."""

GLOBAL_NORM = Measure(_norm, _across, _joint)
"""‖x‖₂ of groups that make up all leaves: small ones of a shape are a group, for thousands of sums compile slowly."""


def leaf_norms(
    leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...] | None
) -> jax.Array:
    """The norm of each leaf that is acted on, in float32 at least; see `Leaves.measured`."""
    _, norms = leaves.measured(LEAF_NORMS, acts, call, who, axis_name)
    return norms.get("norm", jnp.zeros(0, jnp.float32))


def global_norm(
    leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...] | None
) -> jax.Array:
    """The norm of all leaves that are acted on; see `Leaves.measured`."""
    _, norms = leaves.measured(GLOBAL_NORM, acts, call, who, axis_name)
    return total(norms.get("norm", jnp.zeros(0, jnp.float32)))


def all_finite(leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...]) -> jax.Array:
    """Whether the leaves that are acted on are finite, on all shards alike: over `axis_name` and what JAX tracks."""
    finite = jnp.isfinite(global_norm(leaves, acts, call, who, ()))
    varying = meshes.varying_over(finite)
    axes = meshes.tracked(tuple(sorted(varying.union(axis_name))), varying)
    return jax.lax.pmin(finite.astype(jnp.int32), axes) > 0 if axes else finite


def bad_leaves(leaves: Leaves, acts: Sequence[bool], norm: jax.Array) -> jax.Array:
    """How many of the leaves that are acted on hold a NaN or an infinity; looked at only if the norm is not finite."""
    counted = [leaf for act, leaf in zip(acts, leaves.updates, strict=True) if act]
    return _bad(alike(counted), norm)


@jax.jit
def _bad(kinds: list[list[jax.Array]], norm: jax.Array) -> jax.Array:
    def count() -> jax.Array:
        some = [run for kind in kinds for run in euclidean.runs(kind)]
        sums = [jnp.sum(zero_if_finite(jnp.stack(run)), range(1, run[0].ndim + 1)) for run in some]
        return sum((jnp.sum(jnp.isnan(one), dtype=np.int32) for one in sums), start=nothing)

    nothing = jnp.zeros((), np.int32)
    with jax.numpy_dtype_promotion("standard"):
        return jax.lax.cond(jnp.isfinite(norm), lambda: nothing, count)


def total(norms: Any) -> jax.Array:
    """The norm of arrays with these norms."""
    return euclidean.norm(norms)
