"""Adam that looks one step ahead."""

from __future__ import annotations

from typing import Any

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric
from gradxform._core.lift import chain
from gradxform.optimizers.adam import scale_by_adam
from gradxform.transforms.scaling import scale_by_learning_rate


def nadam(
    learning_rate: Numeric,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: Any = None,
    *,
    momentum_decay: Numeric | None = None,
    state_dtype: Any = None,
) -> Transformation:
    """θ ← θ − α·(βₜ₊₁·m̂ + (1 − βₜ)·ĝ)/(√v̂ + ε),  βₜ = β₁·(1 − ½·0.96^(tψ))

    m and v are Adam's. m̂ = m/(1 − β₁·…·βₜ₊₁) and ĝ = g/(1 − β₁·…·βₜ) are corrected by the products of the momenta.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, state_dtype: See `adam`.
      momentum_decay: ψ > 0, how fast the momenta rise from ½β₁ to β₁; torch has 0.004. None, the default, takes their
        limit, the constant βₜ = β₁ of optax and Keras; it is ``adam(nesterov=True)``.

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2, and section 3 for the schedule.

    Example:
      >>> import gradxform as gx
      >>> gx.nadam(0.1) == gx.adam(0.1, nesterov=True)
      True
    """
    options: dict[str, Any] = {"momentum_decay": momentum_decay, "state_dtype": state_dtype}
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=True, **options),
        scale_by_learning_rate(learning_rate),
    )
