"""SGD along a moving average of the gradient."""

from __future__ import annotations

from typing import Any

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric
from gradxform._core.lift import chain
from gradxform.transforms.momentum import scale_by_momentum
from gradxform.transforms.scaling import scale_by_learning_rate


def momentum(
    learning_rate: Numeric, decay: Numeric = 0.9, nesterov: bool = False, *, state_dtype: Any = None
) -> Transformation:
    """m ← β·m + (1 − β)·g,  θ ← θ − α·m

    The average keeps the size of a gradient, so a learning rate that suits `sgd` suits it too. The heavy
    ball, whose steps are 1/(1 − β) times as long, is ``sgd(α, momentum=β)``.

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      decay: β in [0, 1).
      nesterov: Look one step ahead; see `scale_by_momentum`.
      state_dtype: Dtype of the state ``mu``; see `scale_by_momentum`.

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Polyak 1964; see `scale_by_momentum`.

    Example:
      >>> import gradxform as gx
      >>> gx.momentum(0.1)
      chain(scale_by_momentum(0.9), scale_by_learning_rate(0.1))
    """
    average = scale_by_momentum(decay, nesterov=nesterov, state_dtype=state_dtype)
    return chain(average, scale_by_learning_rate(learning_rate))
