"""Against gradients of every size: divide by how large they have been."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from gradxform._core.arguments import flag, square_dtype
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction, non_negative
from gradxform._core.lift import branch, lift
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics.arithmetic import (
    abs_squared,
    clamp,
    is_constant,
    largest_square,
    lerp,
    one_minus_power,
    plus,
    real_dtype,
    root,
    smallest_normal,
    zero_if_finite,
)


def normalize_by_rms(
    decay: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    of: Transformation | None = None,
    debias: bool = False,
    eps_root: Numeric = 0.0,
    centered: bool = False,
    initial_scale: Numeric = 0.0,
    state_dtype: Any = None,
) -> Transformation:
    """v ← γ·v + (1 − γ)·|u|²,  u ← of(u) / (√v + ε)

    A quotient with two branches on one input: the numerator is what ``of`` makes of the update, the
    denominator is the root mean square of the same update. 0/0 is 0, so ε = 0 is allowed. |u| counts as at
    most half the root of the largest float (9.2e18 in float32), so that no finite update overflows v; where u
    is infinite, it becomes NaN.

    Args:
      decay: γ in [0, 1); 0 divides each element by its own magnitude.
      eps: ε ≥ 0, outside the root.
      of: The numerator, made of transformations that act on one array at a time; default the update itself.
      debias: Divide v, and the average of ``centered``, by 1 − γᵗ, the sum of its weights.
      eps_root: ε ≥ 0 inside the root: √(v + ε).
      centered: Subtract the square of the moving average of u (state ``mu``): the standard deviation in
        place of the RMS.
      initial_scale: What v starts from, at the first update.
      state_dtype: Dtype of the state ``nu``, shaped like the parameters and real for complex ones; default
        float32 (float64 for float64 leaves). bfloat16 is rounded stochastically, since v rounded to nearest
        would not change (0.1 % is less than half a step); the range of float16 is too small.

    Raises:
      TypeError, ValueError: if a number is out of its range, or ``of`` needs every leaf at once.

    References:
      Tieleman & Hinton 2012 (RMSProp); Graves 2013, arXiv 1308.0850, equations 38 to 45 (centered, ε inside);
      Kingma & Ba 2015, arXiv 1412.6980, algorithm 1 (debias).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.normalize_by_rms(decay=0.0, eps=0.0)
      >>> print(tx.update(jnp.array([5.0, -0.001, 0.0]), tx.init(jnp.zeros(3)))[0])
      [ 1. -1.  0.]
    """
    return lift(
        _variance_and_mean if centered else _variance,
        _divide_by_rms,
        constructor=normalize_by_rms,
        prepare=_prepare_rms,
        decay=fraction(decay),
        eps=non_negative(eps),
        eps_root=non_negative(eps_root),
        of=branch("of", of),
        debias=flag("debias", debias),
        centered=flag("centered", centered),
        initial_scale=non_negative(initial_scale),
        state_dtype=square_dtype("state_dtype", state_dtype),
    )


def normalize_by_rss(
    eps: Numeric = 1e-7,
    *,
    of: Transformation | None = None,
    eps_root: Numeric = 0.0,
    initial_accumulator_value: Numeric = 0.0,
    state_dtype: Any = None,
) -> Transformation:
    """v ← v + |u|²,  u ← of(u) / (√v + ε): the root of the sum of squares, which AdaGrad divides by.

    0/0 is 0. |u| counts as at most 1.4e14 in float32, so that no sum of finite updates overflows.

    Args:
      eps: ε ≥ 0, outside the root.
      of: See `normalize_by_rms`.
      eps_root: ε ≥ 0 inside the root.
      initial_accumulator_value: What v starts from, at the first update.
      state_dtype: See `normalize_by_rms`.

    Raises:
      TypeError, ValueError: if a number is negative.

    References:
      Duchi, Hazan & Singer 2011, JMLR 12, figure 1 with diagonal matrices.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.normalize_by_rss(eps=0.0)
      >>> updates, state = tx.update(jnp.full(2, 3.0), tx.init(jnp.zeros(2)))
      >>> print(tx.update(jnp.full(2, 4.0), state)[0])
      [0.8 0.8]
    """
    return lift(
        _variance,
        _divide_by_rss,
        constructor=normalize_by_rss,
        prepare=_prepare_rss,
        eps=non_negative(eps),
        eps_root=non_negative(eps_root),
        initial_accumulator_value=non_negative(initial_accumulator_value),
        of=branch("of", of),
        state_dtype=square_dtype("state_dtype", state_dtype),
    )


_STEPS_ROOT = 2.0**16
"""The sum of squares stays finite over 2³² steps of the largest update."""


def _variance(param: Array) -> RuleState:
    return {"nu": jnp.zeros_like(param, dtype=real_dtype(param.dtype))}


def _variance_and_mean(param: Array) -> RuleState:
    return {**_variance(param), "mu": jnp.zeros_like(param)}


def _prepare_rms(step: Step) -> dict[str, Any]:
    """What v starts from, and the factor that undoes its pull towards zero."""
    factor = {"factor": 1 / one_minus_power(step.decay, step.number)} if step.debias else {}
    return {**_start(step, step.initial_scale), **factor}


def _prepare_rss(step: Step) -> dict[str, Any]:
    return _start(step, step.initial_accumulator_value)


def _start(step: Step, initial: Any) -> dict[str, Any]:
    return {} if is_constant(initial, 0.0) else {"start": jnp.where(step.number == 1, initial, 0.0)}


def _divide_by_rms(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    bounded, squares = _squares(update, largest_square(update.dtype), step)
    direction, of = step.of(bounded, state["of"], param)
    nu = step.keep("nu", lerp(_before(state["nu"], step.initial_scale, step), squares, 1 - step.decay))
    variance = nu * step.factor if step.debias else nu
    if not step.centered:
        return _quotient(direction, variance, step), {"nu": nu, "of": of}
    mu = step.keep("mu", lerp(state["mu"], bounded, 1 - step.decay))
    mean = mu * step.factor if step.debias else mu
    variance = jnp.maximum(variance - abs_squared(mean), 0)
    return _quotient(direction, variance, step), {"nu": nu, "mu": mu, "of": of}


def _divide_by_rss(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    bounded, squares = _squares(update, largest_square(update.dtype) / _STEPS_ROOT, step)
    direction, of = step.of(bounded, state["of"], param)
    nu = step.keep("nu", _before(state["nu"], step.initial_accumulator_value, step) + squares)
    return _quotient(direction, nu, step), {"nu": nu, "of": of}


def _squares(update: Array, limit: float, step: Step) -> tuple[Array, Array]:
    """The update within ±limit, and its squares, NaN where it is not finite."""
    if step.at_most <= limit / 8:  # a clip may let a little more through
        return update, abs_squared(update)
    bounded = clamp(update, limit)
    return bounded, abs_squared(bounded) + zero_if_finite(update)


def _before(nu: Array, initial: Any, step: Step) -> Array:
    """v before this step; before the first step it is the initial value."""
    return nu if is_constant(initial, 0.0) else nu + step.start


def _quotient(direction: Array, variance: Array, step: Step) -> Array:
    """direction / (√(variance + eps_root) + eps), with 0/0 = 0."""
    divisor = plus(step.eps, root(plus(step.eps_root, variance)))
    if isinstance(step.eps, float) and step.eps >= smallest_normal(variance.dtype):
        return direction / divisor
    return jnp.where(divisor == 0, 0, direction / jnp.where(divisor == 0, 1, divisor))
