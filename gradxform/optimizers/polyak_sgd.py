"""Gradient descent whose steps are as long as the loss is high."""

from __future__ import annotations

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative
from gradxform._core.lift import chain
from gradxform.transforms.polyak import scale_by_polyak
from gradxform.transforms.scaling import scale_by_learning_rate


def polyak_sgd(
    max_learning_rate: Numeric = 1.0,
    scaling: Numeric = 1.0,
    f_min: Numeric = 0.0,
    eps: Numeric = 0.0,
    variant: str = "sps",
) -> Transformation:
    """θ ← θ − α·min((f − f*)/(‖g‖² + ε), c)·g: no learning rate to search, if the least loss is known.

    The loss f is an extra argument: ``update(grads, state, params, value=loss)``.

    Args:
      max_learning_rate, f_min, eps, variant: See `scale_by_polyak`.
      scaling: α ≥ 0, which every step is multiplied by. optax takes the norm of α·g, so there a larger α makes shorter
        steps; with 1, the default, both are the same.

    Raises:
      TypeError, ValueError: see `scale_by_polyak`.

    References:
      Loizou et al. 2021, arXiv 2002.10542, equation 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx, params = gx.polyak_sgd(), jnp.array([3.0, 4.0])
      >>> loss, grads = jax.value_and_grad(jnp.linalg.norm)(params)
      >>> print(params + tx.update(grads, tx.init(params), params, value=loss)[0])
      [2.4 3.2]
    """
    return chain(
        scale_by_polyak(f_min, max_learning_rate, eps, variant),
        scale_by_learning_rate(non_negative(scaling, "scaling")),
    )
