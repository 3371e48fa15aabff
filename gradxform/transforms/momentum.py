"""Against noise and slowness: follow a moving average of the gradient."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from gradxform._core.arguments import Range, flag
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction, positive, ranged
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics.arithmetic import is_constant, lerp, one_minus_power


def scale_by_momentum(
    decay: Numeric = 0.9,
    *,
    dampening: Numeric | None = None,
    nesterov: bool = False,
    debias: bool = False,
    blend: Numeric | None = None,
    momentum_decay: Numeric | None = None,
    state_dtype: Any = None,
) -> Transformation:
    """m ← β·m + (1 − β)·u,  u ← m

    Args:
      decay: β in [0, 1).
      dampening: τ in [0, 1] of the heavy ball m ← β·m + (1 − τ)·u, which starts at m = u as PyTorch's does;
        0.0 gives the classical m ← β·m + u. None, the default, gives the moving average above.
      nesterov: Look one step ahead: u ← β·m + (1 − β)·u, for the heavy ball u ← β·m + u.
      debias: Divide m by 1 − βᵗ, the sum of its weights. With ``nesterov`` the two parts of the lookahead are
        corrected apart, m by 1 − βᵗ⁺¹ and u by 1 − βᵗ, as NAdam does. Moving average only.
      blend: β′ in [0, 1): follow u ← β′·m + (1 − β′)·u of the m before this step, in which u counts for more than in
        the new m, as Lion does. Moving average only.
      momentum_decay: ψ > 0 of NAdam's schedule of momenta, with ``nesterov`` and ``debias``: the lookahead weighs with
        βₜ = β·(1 − ½·0.96^(tψ)) in place of β, and divides by 1 − β₁·…·βₜ.
      state_dtype: Dtype of the state ``mu``, shaped like the parameters; default float32 (float64 for
        float64 leaves). float16 and bfloat16 are rounded stochastically.

    Raises:
      TypeError, ValueError: if a number is out of its range, or options meet that exclude one another.

    References:
      Polyak 1964 (heavy ball); Sutskever et al. 2013 (Nesterov's lookahead as it is used here);
      Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2; Chen et al. 2023, arXiv 2302.06675,
      algorithm 2 (blend).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.scale_by_momentum(0.75)
      >>> print(tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0])
      [0.25 0.25]
    """
    if debias is True and dampening is not None:
        raise ValueError("debias corrects the moving average; leave dampening out")
    if blend is not None and (nesterov or debias or dampening is not None):
        raise ValueError("blend is another lookahead of the moving average; leave nesterov, debias and dampening out")
    if momentum_decay is not None and not (nesterov and debias):
        raise ValueError("momentum_decay belongs to NAdam's lookahead: say nesterov=True and debias=True")
    return lift(
        _zeros,
        _average if dampening is None else _heavy_ball,
        constructor=scale_by_momentum,
        prepare=_corrections if dampening is None else _weight,
        decay=fraction(decay),
        dampening=None if dampening is None else ranged(dampening, Range(0.0, 1.0, closed_high=True)),
        nesterov=flag("nesterov", nesterov),
        debias=flag("debias", debias),
        blend=None if blend is None else fraction(blend),
        momentum_decay=None if momentum_decay is None else positive(momentum_decay),
        state_dtype=state_dtype,
    )


def bias_correction(decay: Numeric = 0.9) -> Transformation:
    """u ← u / (1 − βᵗ): undo the pull of a moving average towards the zero it started from.

    Args:
      decay: β in [0, 1) of the moving average before it; t is 1 at the first update.

    Raises:
      TypeError, ValueError: if ``decay`` is no number in [0, 1).

    References:
      Kingma & Ba 2015, arXiv 1412.6980, section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.chain(gx.scale_by_momentum(0.5), gx.bias_correction(0.5))
      >>> print(tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0])
      [1. 1.]
    """
    return lift(None, _correct, constructor=bias_correction, prepare=_correction, decay=fraction(decay))


def _zeros(param: Array) -> RuleState:
    return {"mu": jnp.zeros_like(param)}


def _average(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    weight = 1 - step.decay
    new = lerp(state["mu"], update, weight)
    mu = step.keep("mu", new)
    if step.blend is not None:
        # where nothing was rounded the old m follows from the new one, which is written over it without a copy (X4)
        known = mu is new and isinstance(step.decay, float) and step.decay >= 0.5
        before = (mu - weight * update) / step.decay if known else state["mu"]
        return lerp(before, update, 1 - step.blend), {"mu": mu}
    if step.momentum_decay is not None:
        return step.next * mu + step.now * update, {"mu": mu}
    if step.nesterov:
        return _ahead(mu, weight * update, step), {"mu": mu}
    return mu * step.now if step.debias else mu, {"mu": mu}


def _heavy_ball(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    weighted = update if is_constant(step.dampening, 0.0) else step.weight * update
    mu = step.keep("mu", step.decay * state["mu"] + weighted)
    return _ahead(mu, update, step) if step.nesterov else mu, {"mu": mu}


def _ahead(mu: Array, weighted: Array, step: Step) -> Array:
    """Nesterov's lookahead: the momentum after another step with the same update, `weighted` by its weight."""
    if step.debias:
        mu, weighted = mu * step.next, weighted * step.now
    return step.decay * mu + weighted


def _corrections(step: Step) -> dict[str, Any]:
    if not step.debias:
        return {}
    if step.momentum_decay is not None:
        now, ahead = _scheduled(step, step.number), _scheduled(step, step.number + 1)
        return {
            "now": (1 - now) / -jnp.expm1(_log_momenta(step, step.number)),
            "next": ahead / -jnp.expm1(_log_momenta(step, step.number + 1)),
        }
    return {
        "now": 1 / one_minus_power(step.decay, step.number),
        "next": 1 / one_minus_power(step.decay, step.number + 1),
    }


def _scheduled(step: Step, number: Any) -> Any:
    """βₜ = β·(1 − ½·0.96^(tψ))"""
    return step.decay * (1 - 0.5 * 0.96 ** (number * step.momentum_decay))


def _log_momenta(step: Step, number: Any) -> Any:
    """log(β₁·…·βₜ), by the series of log(1 − x): no product is remembered, so a schedule goes on from the count.

    Σᵢ log(1 − ½qⁱ) = −Σₖ ½ᵏ/k · Σᵢ qᵏⁱ with q = 0.96^ψ, where the inner sum is geometric.
    """
    terms = np.arange(1, 64)
    rate = terms * np.log(0.96) * step.momentum_decay  # log qᵏ
    sums = jnp.exp(rate) * jnp.expm1(number * rate) / jnp.expm1(rate)
    return number * jnp.log(step.decay) - jnp.sum(0.5**terms / terms * sums)


def _weight(step: Step) -> dict[str, Any]:
    return {"weight": jnp.where(step.number == 1, 1.0, 1 - step.dampening)}


def _correction(step: Step) -> dict[str, Any]:
    return {"factor": 1 / one_minus_power(step.decay, step.number)}


def _correct(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return step.factor * update, state
