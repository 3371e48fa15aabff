"""Adam, with weight decay decoupled from the gradient."""

from __future__ import annotations

from typing import Any

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric
from gradxform._core.lift import chain
from gradxform._core.masks import MaskLike
from gradxform.optimizers.adam import scale_by_adam
from gradxform.transforms.scaling import scale_by_learning_rate
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def adamw(
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
    """θ ← θ − α·(m̂/(√v̂ + ε) + λ·θ): Adam with decay that the normalisation does not touch.

    Every weight shrinks by the factor 1 − α·λ, whatever its gradients.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov, state_dtype: See `adam`.
      weight_decay: λ ≥ 0; see `add_decoupled_weight_decay`.
      mask: Which leaves decay; see `add_decoupled_weight_decay`.

    Raises:
      TypeError, ValueError: see `adam` and `add_decoupled_weight_decay`.

    References:
      Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.

    Example:
      >>> import gradxform as gx
      >>> gx.adamw(0.001, mask=".*kernel").init({"kernel": 0.0})._fields
      ('count', 'mu', 'nu')
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, state_dtype=state_dtype),
        add_decoupled_weight_decay(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
