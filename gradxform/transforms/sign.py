"""Against sizes that differ: keep nothing but the sign."""

from __future__ import annotations

import jax.numpy as jnp

from gradxform._core.body import Transformation
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Step


def scale_by_sign() -> Transformation:
    """u ← sign(u): every element moves by the same amount. 0 stays 0; a complex number keeps its direction, u/|u|.

    Raises:
      Nothing of its own.

    References:
      Bernstein et al. 2018, arXiv 1802.04434, algorithm 1 (signSGD).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.scale_by_sign()
      >>> print(tx.update(jnp.array([3.0, -0.1, 0.0]), tx.init(jnp.zeros(3)))[0])
      [ 1. -1.  0.]
    """
    return lift(None, _sign, constructor=scale_by_sign)


def _sign(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return jnp.sign(update), state
