"""The sign of a momentum that blends in the newest gradient."""

from __future__ import annotations

from typing import Any

from gradxform._core.arguments import float_dtype
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction
from gradxform._core.lift import chain
from gradxform._core.masks import MaskLike
from gradxform.transforms.momentum import scale_by_momentum
from gradxform.transforms.scaling import scale_by_learning_rate
from gradxform.transforms.sign import scale_by_sign
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def lion(
    learning_rate: Numeric,
    b1: Numeric = 0.9,
    b2: Numeric = 0.99,
    mu_dtype: Any = None,
    weight_decay: Numeric = 1e-3,
    mask: MaskLike | None = None,
) -> Transformation:
    """θ ← θ − α·(sign(β₁·m + (1 − β₁)·g) + λ·θ),  m ← β₂·m + (1 − β₂)·g

    Every weight moves by α in each step, so α is to be 3 to 10 times smaller than AdamW's, and λ as much larger. It
    keeps half the state of Adam.

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      b1: β₁ in [0, 1), of the momentum that gives the sign.
      b2: β₂ in [0, 1), of the momentum that is kept.
      mu_dtype: Dtype of the state ``mu``; see `scale_by_momentum`.
      weight_decay: λ ≥ 0; see `add_decoupled_weight_decay`.
      mask: Which leaves decay; see `add_decoupled_weight_decay`.

    Raises:
      TypeError, ValueError: if a number is out of its range; see `add_decoupled_weight_decay`.

    References:
      Chen et al. 2023, arXiv 2302.06675, algorithm 2.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.lion(0.5, weight_decay=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> print(tx.update(params, tx.init(params), params)[0])
      [-0.5  0.5]
    """
    blended = scale_by_momentum(
        fraction(b2, "b2"), blend=fraction(b1, "b1"), state_dtype=float_dtype("mu_dtype", mu_dtype)
    )
    return chain(
        blended,
        scale_by_sign(),
        add_decoupled_weight_decay(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
