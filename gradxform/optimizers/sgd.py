"""θ ← θ − α·g, plain or with momentum."""

from __future__ import annotations

from typing import Any

from gradxform._core.arguments import flag, float_dtype
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction
from gradxform._core.lift import chain
from gradxform.transforms.momentum import scale_by_momentum
from gradxform.transforms.scaling import scale_by_learning_rate


def sgd(
    learning_rate: Numeric,
    momentum: Numeric | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    dampening: Numeric | None = None,
) -> Transformation:
    """θ ← θ − α·g;  with momentum: m ← β·m + (1 − τ)·g,  θ ← θ − α·m

    Stochastic gradient descent, as `torch.optim.SGD` has it. On the gradient of the whole data set it is
    gradient descent; ``accumulate(sgd(α), every=k)`` gets there with k mini-batches.

    Args:
      learning_rate: α ≥ 0, a number, 0-d array, schedule or `live` value.
      momentum: β in [0, 1) of the heavy ball; None for none. For the moving average see `momentum`.
      nesterov: Look one step ahead; see `scale_by_momentum`. Needs ``momentum``.
      accumulator_dtype: Dtype of the momentum; see `scale_by_momentum`.
      dampening: τ in [0, 1], 0 if None; see `scale_by_momentum`. Needs ``momentum``.

    Raises:
      TypeError, ValueError: if a number is out of its range, or an option lacks its ``momentum``.

    References:
      Robbins & Monro 1951; Polyak 1964 (heavy ball); Sutskever et al. 2013 (Nesterov).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.sgd(0.5)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(gx.apply_updates(params, updates))
      [0. 0.]
    """
    if momentum is None:
        if flag("nesterov", nesterov) or accumulator_dtype is not None or dampening is not None:
            raise ValueError("nesterov, accumulator_dtype and dampening act on the momentum: give momentum=")
        return scale_by_learning_rate(learning_rate)
    beta = fraction(momentum, "momentum")
    dtype = float_dtype("accumulator_dtype", accumulator_dtype)
    damped = 0.0 if dampening is None else dampening
    heavy_ball = scale_by_momentum(beta, dampening=damped, nesterov=nesterov, state_dtype=dtype)
    return chain(heavy_ball, scale_by_learning_rate(learning_rate))
