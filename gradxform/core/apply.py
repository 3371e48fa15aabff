"""The last line of every training step: θ ← θ + u."""

from __future__ import annotations

from typing import Any

import jax

from gradxform import numerics
from gradxform.core import trees
from gradxform.core.leaves import Leaves


def apply_updates(params: Any, updates: Any) -> Any:
    """θ ← θ + u, in the parameters' dtypes.

    Args:
      params: A tree of floating-point or complex arrays.
      updates: A tree of the same structure and shapes, as ``update`` returns it.

    Returns:
      The new parameters. The sum is rounded once, from at least float32.

    Raises:
      ValueError: if a leaf is missing, left over or of another shape.
      TypeError: if a leaf is no floating-point or complex array, or an update is complex for a real parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> print(gx.apply_updates({"w": jnp.ones(2)}, {"w": jnp.array([0.5, -0.5])}))
      {'w': Array([1.5, 0.5], dtype=float32)}
    """
    leaves = Leaves.of(updates, params)
    triples = zip(leaves.params, leaves.updates, leaves.arithmetic, strict=True)
    return leaves.structure.unflatten([_add(dtype, param, update) for param, update, dtype in triples])


def _add(dtype: Any, param: Any, update: Any) -> jax.Array:
    return numerics.cast(numerics.cast(param, dtype) + numerics.cast(update, dtype), trees.dtype_of(param))
