"""Adam, with L2 regularization in the loss."""

from __future__ import annotations

from typing import Any

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric
from gradxform._core.lift import chain
from gradxform._core.masks import MaskLike
from gradxform.optimizers.adam import adam
from gradxform.transforms.weight_decay import add_l2_regularization


def adam_l2(
    learning_rate: Numeric,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: Any = None,
    weight_decay: Numeric = 1e-4,
    mask: MaskLike | None = None,
    *,
    nesterov: bool = False,
    state_dtype: Any = None,
) -> Transformation:
    """g ← g + λ·θ, then Adam: L2 in the loss, as ``torch.optim.Adam(weight_decay=λ)`` has it.

    The normalisation divides the penalty as well, so weights with large gradients hardly shrink: compare
    `adamw`.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov, state_dtype: See `adam`.
      weight_decay: λ ≥ 0; see `add_l2_regularization`.
      mask: Which leaves are regularised; see `add_l2_regularization`.

    Raises:
      TypeError, ValueError: see `adam` and `add_l2_regularization`.

    References:
      Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2 (the L2 variant).

    Example:
      >>> import gradxform as gx
      >>> gx.adam_l2(0.001) == gx.chain(gx.add_l2_regularization(1e-4), gx.adam(0.001))
      True
    """
    penalty = add_l2_regularization(weight_decay, mask)
    return chain(
        penalty, adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, state_dtype=state_dtype)
    )
