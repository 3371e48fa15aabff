"""Gradient descent with noise that fades."""

from __future__ import annotations

from typing import Any

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric
from gradxform._core.lift import chain
from gradxform.transforms.noise import add_noise
from gradxform.transforms.scaling import scale_by_learning_rate


def noisy_sgd(learning_rate: Numeric, eta: Numeric = 0.01, gamma: Numeric = 0.55, key: Any = 0) -> Transformation:
    """θ ← θ − α·(g + √(η/tᵞ)·z),  z ~ N(0, 1)

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      eta, gamma, key: See `add_noise`.

    Raises:
      TypeError, ValueError: see `add_noise`.

    References:
      Neelakantan et al. 2015, arXiv 1511.06807, equation 1.

    Example:
      >>> import gradxform as gx
      >>> gx.noisy_sgd(0.1, key=7)
      chain(add_noise(0.01, gamma=0.55, key=7), scale_by_learning_rate(0.1))
    """
    return chain(add_noise(eta, gamma, key), scale_by_learning_rate(learning_rate))
