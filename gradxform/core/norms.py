"""The norm of a tree, taken once per update whoever wants it: clipping, guards, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradxform import numerics
from gradxform.core import trees
from gradxform.core.body import Call
from gradxform.core.leaves import Leaves
from gradxform.core.rules import Array, Measure


def _norm_of_leaf(update: Array) -> Mapping[str, Array]:
    return {"norm": numerics.norm(update)}


def _across(measured: Mapping[str, Array], axes: tuple[str, ...]) -> Mapping[str, Array]:
    return {"norm": numerics.norm_across(measured["norm"], axes)}


LEAF_NORMS = Measure(_norm_of_leaf, _across)
"""‖x‖₂ of each leaf, in at least float32."""


def leaf_norms(
    leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...] | None
) -> jax.Array:
    """The norm of each leaf that is acted on, in float32 at least; see `Leaves.measured`."""
    _, norms = leaves.measured(LEAF_NORMS, acts, call, who, axis_name)
    return norms.get("norm", jnp.zeros(0, jnp.float32))


def all_finite(leaves: Leaves, acts: Sequence[bool], call: Call, who: str, axis_name: tuple[str, ...]) -> jax.Array:
    """Whether the leaves that are acted on are finite, on all shards alike: over `axis_name` and what JAX tracks."""
    finite = jnp.isfinite(total(leaf_norms(leaves, acts, call, who, ())))
    varying = trees.varying_over(finite)
    axes = trees.tracked(tuple(sorted(varying.union(axis_name))), varying)
    return jax.lax.pmin(finite.astype(jnp.int32), axes) > 0 if axes else finite


def total(norms: Any) -> jax.Array:
    """The norm of arrays with these norms."""
    return numerics.norm(norms)
