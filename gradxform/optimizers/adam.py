"""Momentum and normalisation together, both corrected for their start at zero."""

from __future__ import annotations

from typing import Any

from gradxform._core.arguments import flag, float_dtype
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction
from gradxform._core.lift import chain
from gradxform.transforms.momentum import bias_correction, scale_by_momentum
from gradxform.transforms.normalization import normalize_by_rms
from gradxform.transforms.scaling import scale_by_learning_rate


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

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      b1, b2, eps, eps_root, mu_dtype, nesterov, state_dtype: See `scale_by_adam`.

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Dozat 2016, algorithm 2 (nesterov).

    Example:
      >>> import gradxform as gx
      >>> gx.adam(gx.live(0.001)).init({}).hyperparams
      {'learning_rate': Array(0.001, dtype=float32)}
    """
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, state_dtype=state_dtype)
    return chain(direction, scale_by_learning_rate(learning_rate))


def scale_by_adam(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    momentum_decay: Numeric | None = None,
    state_dtype: Any = None,
) -> Transformation:
    """m ← β₁·m + (1 − β₁)·u,  v ← γ·v + (1 − γ)·|u|²,  u ← m̂/(√v̂ + ε)

    m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − γᵗ); ε is added to √v̂, not to √v.

    Args:
      b1: β₁ in [0, 1).
      b2: γ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: ε ≥ 0 inside the root, for gradients through the optimizer.
      mu_dtype: Dtype of the state ``mu``; default ``state_dtype``.
      nesterov: Look one step ahead: NAdam, with a constant β₁.
      momentum_decay: ψ > 0 of NAdam's schedule of momenta; see `scale_by_momentum`.
      state_dtype: Dtype of the states ``mu`` and ``nu``; default float32 (float64 for float64 leaves).

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Dozat 2016, algorithm 2 (nesterov).

    Example:
      >>> import gradxform as gx
      >>> gx.scale_by_adam(eps=0.0)
      normalize_by_rms(0.999, eps=0.0, of=chain(scale_by_momentum(0.9), bias_correction(0.9)), debias=True)
    """
    beta, dtype = fraction(b1, "b1"), float_dtype("mu_dtype", mu_dtype) or state_dtype
    if flag("nesterov", nesterov):  # the two parts of the lookahead are corrected apart, so the momentum does it itself
        options: dict[str, Any] = {"momentum_decay": momentum_decay, "state_dtype": dtype}
        first_moment = scale_by_momentum(beta, nesterov=True, debias=True, **options)
    elif momentum_decay is not None:
        raise ValueError("momentum_decay belongs to NAdam's lookahead: say nesterov=True")
    else:
        first_moment = chain(scale_by_momentum(beta, state_dtype=dtype), bias_correction(beta))
    return normalize_by_rms(
        fraction(b2, "b2"), eps, of=first_moment, debias=True, eps_root=eps_root, state_dtype=state_dtype
    )
