"""Against steps that are too large: bound the update."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from gradxform.core.hyperparameters import Numeric, positive
from gradxform.core.lift import Transformation, lift
from gradxform.core.rules import Array, Slots, Step, no_slots
from gradxform.numerics import norm


def clip_by_value(max_value: Numeric) -> Transformation:
    """u ← min(max(u, −c), c), element by element; complex elements keep their phase.

    Args:
      max_value: c > 0.

    Raises:
      TypeError, ValueError: if ``max_value`` is no positive number.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_value(1.0)
      >>> print(tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))[0])
      [ 1.  -0.5]
    """
    return lift(no_slots, _clip, constructor=clip_by_value, max_value=positive(max_value))


def clip_by_leaf_norm(max_norm: Numeric) -> Transformation:
    """u ← u·min(1, c/‖u‖₂), for each leaf by its own norm.

    Args:
      max_norm: c > 0.

    Raises:
      TypeError, ValueError: if ``max_norm`` is no positive number.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_leaf_norm(1.0)
      >>> print(tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0])
      [0.6 0.8]
    """
    return lift(no_slots, _clip_leaf, constructor=clip_by_leaf_norm, max_norm=positive(max_norm))


def clip_by_global_norm(max_norm: Numeric) -> Transformation:
    """u ← u·min(1, c/‖u‖₂), with one norm over all leaves, taken in at least float32.

    The norm does not overflow, even where the sum of squares would. If an element is NaN or infinite, so
    are the clipped updates, rather than zero.

    Args:
      max_norm: c > 0.

    Raises:
      TypeError, ValueError: if ``max_norm`` is no positive number.

    References:
      Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_global_norm(1.0)
      >>> updates, _ = tx.update({"a": jnp.array(3.0), "b": jnp.array(4.0)}, tx.init({"a": 0.0, "b": 0.0}))
      >>> print(updates["a"], updates["b"])
      0.6 0.8
    """
    return lift(
        no_slots,
        _rescale,
        constructor=clip_by_global_norm,
        measure=_measure,
        gather=_gather,
        max_norm=positive(max_norm),
    )


def _clip(update: Array, state: Slots, param: Array | None, step: Step) -> tuple[Array, Slots]:
    if jnp.iscomplexobj(update):
        return update * _factor(jnp.abs(update), step.max_value), state
    return jnp.clip(update, -step.max_value, step.max_value), state


def _clip_leaf(update: Array, state: Slots, param: Array | None, step: Step) -> tuple[Array, Slots]:
    return update * _factor(norm(update), step.max_norm), state


def _rescale(update: Array, state: Slots, param: Array | None, step: Step) -> tuple[Array, Slots]:
    return update * step.factor, state


def _measure(update: Array, step: Step) -> dict[str, Array]:
    return {"norm": norm(update)}


def _gather(measured: Any, step: Step) -> dict[str, Array]:
    return {"factor": _factor(norm(measured["norm"]), step.max_norm)}


def _factor(size: Array, limit: Any) -> Array:
    """What brings `size` down to `limit`: min(1, limit/size), NaN where the size is not finite."""
    bounded = jnp.where(size > limit, limit / jnp.where(size > limit, size, 1), 1)
    return jnp.where(jnp.isfinite(size), bounded, jnp.nan)
