"""Momentum and normalisation together, and AdamW's decay beside L2 in the loss."""

from __future__ import annotations

from typing import Any

from gradxform.core.hyperparameters import Hyperparameter, Numeric, fraction
from gradxform.core.lift import Transformation, chain
from gradxform.core.masks import MaskLike
from gradxform.transforms.momentum import bias_correction, scale_by_momentum
from gradxform.transforms.normalization import normalize_by_rms
from gradxform.transforms.scaling import scale_by_learning_rate
from gradxform.transforms.weight_decay import add_decoupled_weight_decay, add_l2_regularization


def adam(
    learning_rate: Numeric,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    state_dtype: Any = None,
) -> Transformation:
    """m ← β₁·m + (1 − β₁)·g,  v ← γ·v + (1 − γ)·g²,  θ ← θ − α·m̂/(√v̂ + ε)

    m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − γᵗ); ε is added to √v̂, not to √v.

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      b1: β₁ in [0, 1).
      b2: γ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: ε ≥ 0 inside the root, for gradients through the optimizer.
      mu_dtype: Dtype of the state ``mu``; default ``state_dtype``.
      nesterov: Look one step ahead: NAdam, with a constant β₁.
      state_dtype: Dtype of the states ``mu`` and ``nu``; default float32 (float64 for float64 leaves).

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Dozat 2016, algorithm 2 (nesterov).

    Example:
      >>> import gradxform as gx
      >>> gx.adam(0.001).init({}).hyperparams
      {'learning_rate': Array(0.001, dtype=float32)}
    """
    return chain(
        _scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov, state_dtype), scale_by_learning_rate(learning_rate)
    )


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
      ('count', 'hyperparams', 'mu', 'nu')
    """
    return chain(
        _scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov, state_dtype),
        add_decoupled_weight_decay(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


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


def _scale_by_adam(
    b1: Numeric, b2: Numeric, eps: Numeric, eps_root: Numeric, mu_dtype: Any, nesterov: bool, state_dtype: Any
) -> Transformation:
    """m̂/(√v̂ + ε)"""
    first_moment = _corrected_momentum(fraction(b1, "b1"), nesterov, mu_dtype or state_dtype)
    return normalize_by_rms(
        fraction(b2, "b2"), eps, of=first_moment, debias=True, eps_root=eps_root, state_dtype=state_dtype
    )


def _corrected_momentum(b1: Hyperparameter, nesterov: bool, dtype: Any) -> Transformation:
    """m̂; Nesterov's lookahead corrects its two parts apart, so there the momentum does it itself."""
    if nesterov:
        return scale_by_momentum(b1, nesterov=True, debias=True, state_dtype=dtype)
    return chain(scale_by_momentum(b1, state_dtype=dtype), bias_correction(b1))
