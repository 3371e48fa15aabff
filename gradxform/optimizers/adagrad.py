"""SGD with the gradient divided by the root of the sum of its squares."""

from __future__ import annotations

from typing import Any

from gradxform._core.arguments import flag
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative
from gradxform._core.lift import chain
from gradxform.transforms.normalization import normalize_by_rss
from gradxform.transforms.scaling import scale_by_learning_rate


def adagrad(
    learning_rate: Numeric,
    initial_accumulator_value: Numeric = 0.0,
    eps: Numeric = 1e-7,
    *,
    eps_in_sqrt: bool = False,
    state_dtype: Any = None,
) -> Transformation:
    """v ← v + g²,  θ ← θ − α·g/(√v + ε)

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      initial_accumulator_value: What v starts from; 0 in the paper and in torch, 0.1 in optax.
      eps: ε ≥ 0.
      eps_in_sqrt: Use √(v + ε), as optax does.
      state_dtype: Dtype of the state ``nu``; see `normalize_by_rms`.

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Duchi, Hazan & Singer 2011, JMLR 12, figure 1 with diagonal matrices.

    Example:
      >>> import gradxform as gx
      >>> gx.adagrad(0.1)
      chain(normalize_by_rss(1e-07), scale_by_learning_rate(0.1))
    """
    epsilon = non_negative(eps, "eps")
    outside, inside = (0.0, epsilon) if flag("eps_in_sqrt", eps_in_sqrt) else (epsilon, 0.0)
    normalize = normalize_by_rss(
        outside, eps_root=inside, initial_accumulator_value=initial_accumulator_value, state_dtype=state_dtype
    )
    return chain(normalize, scale_by_learning_rate(learning_rate))
