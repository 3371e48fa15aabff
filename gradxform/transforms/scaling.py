"""Multiply the update by a number."""

from __future__ import annotations

import math

import jax.numpy as jnp

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, Schedule, finite, non_negative, positive
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics import norm


def scale(factor: Numeric) -> Transformation:
    """u ← c·u

    Args:
      factor: c, any finite number, 0-d array, schedule or `live` value.

    Raises:
      TypeError, ValueError: if ``factor`` is no finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.scale(3.0)
      >>> print(tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0])
      [3. 3.]
    """
    return lift(None, _scale, constructor=scale, factor=finite(factor))


def scale_by_schedule(schedule: Schedule) -> Transformation:
    """u ← c(t)·u, where t = 0 at the first update.

    Args:
      schedule: c, a function of the number of updates done so far, such as those of optax.

    Raises:
      TypeError: if ``schedule`` is not callable.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import gradxform as gx
      >>> tx = gx.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 4))
      >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
      >>> print(tx.update(jnp.ones(2), state)[0])
      [0.75 0.75]
    """
    if not callable(schedule):
        raise TypeError(f"schedule must be a function of the step, got {schedule!r}; for a number use scale")
    return lift(None, _scale, constructor=scale_by_schedule, factor=finite(schedule))


def scale_by_learning_rate(learning_rate: Numeric) -> Transformation:
    """u ← −α·u: the minus sign of descent. What comes out is added to the parameters.

    Args:
      learning_rate: α ≥ 0, a number, 0-d array, schedule or `live` value.

    Raises:
      TypeError, ValueError: if ``learning_rate`` is no number or negative; to ascend, ``scale(-1.0)`` first.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.scale_by_learning_rate(0.5)
      >>> print(tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0])
      [-0.5 -0.5]
    """
    return lift(None, _descend, constructor=scale_by_learning_rate, learning_rate=non_negative(learning_rate))


def scale_by_param_rms(min_scale: Numeric = 1e-3) -> Transformation:
    """u ← u·max(RMS(θ), c), for each leaf: steps in proportion to its parameters.

    Args:
      min_scale: c > 0, for parameters that are near zero.

    Raises:
      TypeError, ValueError: if ``min_scale`` is not positive, or inside `jax.shard_map` a leaf is a shard.

    References:
      Shazeer & Stern 2018, arXiv 1804.04235, section 8 (relative step size).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx, params = gx.scale_by_param_rms(), jnp.array([3.0, -3.0, 3.0, 3.0])
      >>> print(tx.update(jnp.array([1.0, 2.0, 0.0, -1.0]), tx.init(params), params)[0])
      [ 3.  6.  0. -3.]
    """
    return lift(
        None,
        _scale_by_rms,
        constructor=scale_by_param_rms,
        whole=True,
        needs_params=True,
        min_scale=positive(min_scale),
    )


def _scale_by_rms(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    assert param is not None
    rms = norm(param) / math.sqrt(max(param.size, 1))
    return update * jnp.maximum(rms, step.min_scale), state


def _scale(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return step.factor * update, state


def _descend(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return -step.learning_rate * update, state
