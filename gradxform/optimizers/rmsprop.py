"""SGD with the gradient divided by the root of the moving average of its squares."""

from __future__ import annotations

from typing import Any

from gradxform._core.arguments import flag
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative
from gradxform._core.lift import chain
from gradxform.optimizers.sgd import sgd
from gradxform.transforms.normalization import normalize_by_rms


def rmsprop(
    learning_rate: Numeric,
    decay: Numeric = 0.9,
    eps: Numeric = 1e-8,
    initial_scale: Numeric = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Numeric | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    state_dtype: Any = None,
) -> Transformation:
    """v ← γ·v + (1 − γ)·g²,  θ ← θ − α·g/√(v + ε)

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      decay: γ in [0, 1).
      eps: ε ≥ 0.
      initial_scale: What v starts from.
      eps_in_sqrt: ε inside the root, as Graves and optax have it; False for g/(√v + ε), as torch has it.
      centered: Subtract the squared mean; see `normalize_by_rms`.
      momentum: β of a heavy ball on the normalised gradient, None for none; see `sgd`.
      nesterov: Look one step ahead; see `sgd`.
      bias_correction: Divide v by 1 − γᵗ.
      state_dtype: Dtype of the state, the momentum's too; see `normalize_by_rms`.

    Raises:
      TypeError, ValueError: if a number is out of its range, or ``nesterov`` lacks ``momentum``.

    References:
      Tieleman & Hinton 2012, lecture 6.5; Graves 2013, arXiv 1308.0850, equations 38 to 45.

    Example:
      >>> import gradxform as gx
      >>> gx.rmsprop(0.1, eps_in_sqrt=False)
      chain(normalize_by_rms(0.9, eps=1e-08), scale_by_learning_rate(0.1))
    """
    epsilon = non_negative(eps, "eps")
    outside, inside = (0.0, epsilon) if flag("eps_in_sqrt", eps_in_sqrt) else (epsilon, 0.0)
    normalize = normalize_by_rms(
        decay,
        outside,
        eps_root=inside,
        debias=flag("bias_correction", bias_correction),
        centered=centered,
        initial_scale=initial_scale,
        state_dtype=state_dtype,
    )
    return chain(normalize, sgd(learning_rate, momentum, nesterov, None if momentum is None else state_dtype))
