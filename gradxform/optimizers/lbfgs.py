"""Quasi-Newton steps from the last few gradients."""

from __future__ import annotations

import optax

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric
from gradxform._core.lift import chain, identity
from gradxform.transforms.lbfgs import scale_by_lbfgs
from gradxform.transforms.scaling import scale, scale_by_learning_rate


def lbfgs(
    learning_rate: Numeric | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: optax.GradientTransformation | None = None,
) -> Transformation:
    """θ ← θ − α·η·H·∇L: L-BFGS, with η from a line search of optax.

    Args:
      learning_rate: α ≥ 0; None for 1. A number, 0-d array, schedule or `live` value.
      memory_size, scale_init_precond: See `scale_by_lbfgs`.
      linesearch: What finds η, such as `optax.scale_by_zoom_linesearch` or `optax.scale_by_backtracking_linesearch`;
        then ``update`` takes ``value``, ``grad`` and ``value_fn`` as optax has it. None for none, which suits small
        steps near a minimum; optax's default is a zoom line search of 20 steps.

    Raises:
      TypeError, ValueError: see `scale_by_lbfgs`.

    References:
      Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization".

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gradxform as gx
      >>> def loss(x):
      ...     return jnp.sum((x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
      >>> tx, params = gx.lbfgs(linesearch=optax.scale_by_zoom_linesearch(20)), jnp.zeros(4)
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     value, grad = jax.value_and_grad(loss)(params)
      ...     updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
      ...     params = gx.apply_updates(params, updates)
      >>> print(bool(loss(params) < 1e-6))
      True
    """
    descent = scale(-1.0) if learning_rate is None else scale_by_learning_rate(learning_rate)
    search = identity() if linesearch is None else linesearch
    return chain(scale_by_lbfgs(memory_size, scale_init_precond), descent, search)
