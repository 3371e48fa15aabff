"""Adam whose learning rate is estimated: how far the parameters have to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gradxform._core.arguments import flag
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction, non_negative, positive
from gradxform._core.lift import branch, lift
from gradxform._core.masks import MaskLike
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics import (
    abs_squared,
    clamp,
    largest_square,
    lerp,
    one_minus_power,
    real_dtype,
    root,
    zero_if_finite,
)
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def prodigy(
    learning_rate: Numeric = 1.0,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    b3: Numeric | None = None,
    eps: Numeric = 1e-8,
    d0: Numeric = 1e-6,
    d_coef: Numeric = 1.0,
    weight_decay: Numeric = 0.0,
    safeguard_warmup: bool = False,
    mask: MaskLike | None = None,
    *,
    then: Transformation | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Transformation:
    """m ← β₁·m + (1 − β₁)·d·g,  v ← β₂·v + (1 − β₂)·(d·g)²,  θ ← θ − d·α̂·(m/(√v + d·ε) + λ·θ)

    d is a lower bound of the distance from θ₀ to a solution, and never falls: d ← max(d, c·r/‖s‖₁) with
    r ← β₃·r + d·α̂·⟨g, θ₀ − θ⟩·d/d₀ and s ← β₃·s + d·α̂·g·d/d₀, where α̂ = α·√(1 − β₂ᵗ)/(1 − β₁ᵗ). The sums are over
    all parameters.

    Args:
      learning_rate: α ≥ 0, which is multiplied by d; 1 times a schedule, such as a cosine with a short warmup.
      b1, b2: β₁ and β₂ in [0, 1).
      b3: β₃ in [0, 1), of the sums; default √β₂.
      eps: ε ≥ 0.
      d0: d₀ > 0, the first d, below any rate that could be right.
      d_coef: c > 0, by which the estimate is multiplied; 0.5 or 2 where it settles too high or too low.
      weight_decay: λ ≥ 0; see `add_decoupled_weight_decay`.
      safeguard_warmup: Leave α̂ out of s, so that the small rates of a long warmup do not drive d up.
      mask: Which leaves decay; see `add_decoupled_weight_decay`.
      then: A transformation of the direction m/(√v + d·ε) in place of ``weight_decay`` and ``mask``.
      axis_name: See `clip_by_global_norm`.

    Returns:
      A transformation whose state has ``mu``, ``nu``, ``gradient_sum`` and ``start`` per parameter, ``distance`` (d)
      and ``progress`` (r).

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx, params = gx.prodigy(), jnp.array([10.0, -10.0])
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     updates, state = tx.update(2 * params, state, params)
      ...     params = params + updates
      >>> print(bool(jnp.abs(params).max() < 1), bool(state.distance > 0.1))
      True True
    """
    return lift(
        _start,
        _step,
        constructor=prodigy,
        prepare=_rates,
        totals=_totals,
        gather=_estimate,
        memory={"distance": 0.0, "progress": 0.0},
        needs_params=True,
        axis_name=axis_name,
        learning_rate=non_negative(learning_rate),
        b1=fraction(b1),
        b2=fraction(b2),
        b3=None if b3 is None else fraction(b3),
        eps=non_negative(eps),
        d0=positive(d0),
        d_coef=positive(d_coef),
        then=branch("then", add_decoupled_weight_decay(weight_decay, mask) if then is None else then),
        safeguard_warmup=flag("safeguard_warmup", safeguard_warmup),
    )


def _start(param: Array) -> RuleState:
    zeros = {name: jnp.zeros_like(param) for name in ("mu", "gradient_sum")}
    return {**zeros, "nu": jnp.zeros_like(param, dtype=real_dtype(param.dtype)), "start": param}


def _rates(step: Step) -> dict[str, Any]:
    correction = jnp.sqrt(one_minus_power(step.b2, step.number)) / one_minus_power(step.b1, step.number)
    return {"rate": step.learning_rate * correction, "forgets": jnp.sqrt(step.b2) if step.b3 is None else step.b3}


def _sums(update: Array, state: RuleState, step: Step, distance: Array) -> Array:
    """s after this step."""
    weight = distance * (1.0 if step.safeguard_warmup else step.rate) * distance / step.d0
    return step.forgets * state["gradient_sum"] + weight * update


def _totals(update: Array, state: RuleState, param: Array | None, step: Step) -> dict[str, Any]:
    distance = jnp.maximum(step.distance, step.d0)
    size = jnp.sum(jnp.abs(_sums(update, state, step, distance)))
    return {"progress": jnp.sum((update.conj() * (state["start"] - param)).real), "size": size}


def _estimate(total: Any, step: Step) -> dict[str, Any]:
    before = jnp.maximum(step.distance, step.d0)
    progress = step.forgets * step.progress + before * step.rate * before / step.d0 * total["progress"]
    estimate = step.d_coef * progress / jnp.where(total["size"] > 0, total["size"], 1)
    known = jnp.isfinite(progress) & jnp.isfinite(total["size"])  # not of sums that overflow
    return {
        "before": before,
        "progress": jnp.where(known, progress, step.progress),
        "distance": jnp.where(known, jnp.maximum(before, estimate), before),
    }


def _step(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    assert param is not None
    limit = largest_square(update.dtype)
    bounded = clamp(update, limit)
    scaled = clamp(step.before * bounded, limit)
    mu = step.keep("mu", lerp(state["mu"], scaled, 1 - step.b1))
    nu = step.keep("nu", lerp(state["nu"], abs_squared(scaled) + zero_if_finite(update), 1 - step.b2))
    sums = step.keep("gradient_sum", _sums(update, state, step, step.before))
    divisor = root(nu) + step.distance * step.eps
    direction, then = step.then(mu / jnp.where(divisor == 0, 1, divisor), state["then"], param)
    new = {"mu": mu, "nu": nu, "gradient_sum": sums, "start": state["start"], "then": then}
    return -step.before * step.rate * direction, new
