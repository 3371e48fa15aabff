"""Against steps that low-precision parameters round away: bfloat16 weights that keep learning.

A bfloat16 number has 8 significant bits: adding less than a 512th of it, and often a 256th, changes nothing. Each
wrapper computes the new value in float32, chooses a low-precision number for it, and returns the difference to the old
parameter, exactly, in float32: whoever adds it lands on the number that was chosen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core.body import Transformation, body_of
from gradxform.wrappers.low_precision.forms import RESIDUALS, Compensated, MasterWeights, StochasticRounding
from gradxform.wrappers.low_precision.lifting import LowPrecision


def stochastic_rounding(tx: optax.GradientTransformation, key: jax.Array | int) -> Transformation:
    """θ ← SR(θ + u),  E[SR(x)] = x: round the new parameter up or down at random, so that its mean is right.

    Of the two float16 or bfloat16 neighbours of x the nearer is the likelier, in proportion; a number that float16 or
    bfloat16 has stays. This costs no memory, and some noise.

    Args:
      tx: Any transformation; it sees float32 parameters. Leaves of float32 or wider are trained by it as usual.
      key: A PRNG key or a whole number. The bits are a hash of it, the step, the leaf and the element: the same
        however arrays are sharded, and after a restart. Inside `jax.shard_map` every shard draws the same.

    Returns:
      A transformation whose updates are float32 differences to the numbers chosen: add them with `apply_updates`
      or optax's. The state has ``seed`` and ``inner``.

    Raises:
      TypeError, ValueError: if ``key`` is no key, no parameter is float16 or bfloat16, or ``update`` gets no params.

    References:
      Zamirai et al. 2020, arXiv 2010.06192, section 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> tx = gx.stochastic_rounding(gx.sgd(1e-3), jax.random.key(0))
      >>> updates, _ = tx.update(jnp.ones_like(params), tx.init(params), params)
      >>> params = gx.apply_updates(params, updates)
      >>> print(jnp.unique(params), f"{params.astype(float).mean():.4f}")
      [0.996094 1] 0.9990
    """
    body = body_of("tx of stochastic_rounding", tx)
    return Transformation.of(LowPrecision(body, StochasticRounding(), _seed(key)))


def compensated(tx: optax.GradientTransformation, residual: str = "bfloat16") -> Transformation:
    """θ + r ← θ + r + u: keep beside the parameter what rounding takes from it, and add that again.

    Args:
      tx: See `stochastic_rounding`.
      residual: How r is kept, ``"bfloat16"`` as a number of 2 bytes (Kahan's sum), ``"int8"`` or ``"int16"`` as a
        fraction of half the distance to the next number, which makes 16 or 24 significant bits of a bfloat16
        parameter's 8. What the first two cannot hold is rounded stochastically, so that no step is lost in the
        mean; int16 loses no more than float32 does.

    Returns:
      As `stochastic_rounding`; the state has ``seed``, ``residual`` and ``inner``.

    Raises:
      TypeError, ValueError: if ``residual`` is none of these; see `stochastic_rounding`.

    References:
      Kahan 1965; Zamirai et al. 2020, arXiv 2010.06192, algorithm 3; Ortiz et al. 2026, arXiv 2602.23349 (integers).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = jnp.ones(1, jnp.bfloat16)
      >>> tx = gx.compensated(gx.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = gx.apply_updates(params, updates)
      >>> print(params)
      [0.898438]
    """
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(map(repr, RESIDUALS))}, got {residual!r}")
    return Transformation.of(LowPrecision(body_of("tx of compensated", tx), Compensated(residual)))


def master_weights(tx: optax.GradientTransformation) -> Transformation:
    """w ← w + u,  θ ← round(w): train a float32 copy and give the model its nearest low-precision numbers.

    Where a parameter is not what its copy rounds to, because it was set from outside, the copy starts again from the
    parameter.

    Args:
      tx: See `stochastic_rounding`.

    Returns:
      As `stochastic_rounding`; the state has the copies in ``residual``, 4 bytes per parameter.

    Raises:
      TypeError, ValueError: see `stochastic_rounding`.

    References:
      Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = jnp.ones(1, jnp.bfloat16)
      >>> tx = gx.master_weights(gx.sgd(1e-3))
      >>> updates, state = tx.update(jnp.ones_like(params), tx.init(params), params)
      >>> print(state.residual, gx.apply_updates(params, updates))
      [0.999] [1]
    """
    return Transformation.of(LowPrecision(body_of("tx of master_weights", tx), MasterWeights()))


def _seed(key: Any) -> int:
    """32 bits of a key or a whole number."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return int(key) & 0xFFFFFFFF
    try:
        with jax.ensure_compile_time_eval():
            return int(jax.random.bits(key, (), jnp.uint32))
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(f"key must be a whole number or a concrete PRNG key, got {key!r:.60}") from error
