"""Against flat and sharp places: random numbers beside the gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Step


def add_noise(eta: Numeric, gamma: Numeric, key: Any = 0) -> Transformation:
    """u ← u + √(η/tᵞ)·z,  z ~ N(0, 1): noise that fades, another for every element, leaf and step.

    Args:
      eta: η ≥ 0, the variance of the first step's noise.
      gamma: γ ≥ 0, how fast it fades; t is 1 at the first update. 0 for noise that stays.
      key: A whole number or one of JAX's keys. It lives in the state as ``seed``, of uint32, so a run that is resumed
        goes on with the same noise, and under `jax.vmap` each member may have its own.

    Raises:
      TypeError, ValueError: if a number is out of its range, or ``key`` is none.

    References:
      Neelakantan et al. 2015, arXiv 1511.06807, equation 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.add_noise(0.01, gamma=0.55, key=1)
      >>> updates, _ = tx.update(jnp.zeros(1000), tx.init(jnp.zeros(1000)))
      >>> print(f"{jnp.std(updates):.2f}")
      0.10
    """
    if key is None:
        raise TypeError("key must be a whole number or a key, as jax.random.key gives it, got None")
    return lift(
        None,
        _add,
        constructor=add_noise,
        prepare=_deviation,
        key=key,
        eta=non_negative(eta),
        gamma=non_negative(gamma),
    )


def _deviation(step: Step) -> dict[str, Any]:
    return {"deviation": jnp.sqrt(step.eta) * step.number ** (-step.gamma / 2)}


def _add(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return update + step.deviation * jax.random.normal(step.key, update.shape, update.dtype), state
