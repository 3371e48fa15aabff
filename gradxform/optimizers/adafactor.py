"""A second moment in the memory of rows and columns."""

from __future__ import annotations

from typing import Any

from gradxform._core.arguments import count_of, flag, float_dtype
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, bound, fraction, non_negative
from gradxform._core.lift import chain
from gradxform._core.masks import MaskLike
from gradxform.transforms.clipping import clip_by_leaf_rms
from gradxform.transforms.factored import normalize_by_factored_rms
from gradxform.transforms.momentum import scale_by_momentum
from gradxform.transforms.scaling import scale, scale_by_param_rms
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def adafactor(
    learning_rate: Numeric | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Numeric = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Numeric | None = 1.0,
    momentum: Numeric | None = None,
    dtype_momentum: Any = None,
    weight_decay_rate: Numeric | None = None,
    eps: Numeric = 1e-30,
    factored: bool = True,
    weight_decay_mask: MaskLike | None = None,
) -> Transformation:
    """θ ← θ − α·max(RMS(θ), 10⁻³)·clip(g/√v) − λ·θ, with v kept as means of rows and of columns

    For steps like those of `torch.optim.Adafactor`, which takes the last two axes of any size, the rate min(α, 1/√t),
    and decays by α·λ:

        chain(
            normalize_by_factored_rms(min_dim_size_to_factor=1, axes="last"),
            clip_by_leaf_rms(1.0),
            scale_by_param_rms(),
            scale_by_schedule(lambda count: jnp.minimum(α, 1 / jnp.sqrt(count + 1.0))),
            add_decoupled_weight_decay(α * λ),
            scale(-1.0),
        )

    Args:
      learning_rate: α ≥ 0; None for 1. A number, 0-d array, schedule or `live` value.
      min_dim_size_to_factor, decay_rate, eps, factored: See `normalize_by_factored_rms`.
      decay_offset: ``step_offset`` of `normalize_by_factored_rms`.
      multiply_by_parameter_scale: Whether steps are in proportion to the parameters; see `scale_by_param_rms`.
      clipping_threshold: The largest root of the mean square of a leaf's direction; see `clip_by_leaf_rms`. None for no
        bound.
      momentum: β in [0, 1) of a moving average of the steps; None for none. It takes the memory that factors save.
      dtype_momentum: Dtype of the momentum; see `scale_by_momentum`.
      weight_decay_rate: λ ≥ 0, which is not multiplied by α; None for no decay.
      weight_decay_mask: Which leaves decay; see `add_decoupled_weight_decay`.

    Raises:
      TypeError, ValueError: if a number is out of its range; see `normalize_by_factored_rms`.

    References:
      Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}
      >>> print(gx.describe(gx.adafactor(0.01), params, show=False).state_bytes)
      4100
    """
    offset = count_of("decay_offset", decay_offset, least=0)
    parts = [normalize_by_factored_rms(decay_rate, offset, min_dim_size_to_factor, eps, factored=factored)]
    if clipping_threshold is not None:
        parts.append(clip_by_leaf_rms(bound(clipping_threshold, "clipping_threshold")))
    if learning_rate is not None:
        parts.append(scale(non_negative(learning_rate, "learning_rate")))
    if flag("multiply_by_parameter_scale", multiply_by_parameter_scale):
        parts.append(scale_by_param_rms())
    if momentum is not None:
        dtype = float_dtype("dtype_momentum", dtype_momentum)
        parts.append(scale_by_momentum(fraction(momentum, "momentum"), state_dtype=dtype))
    if weight_decay_rate is not None:
        rate = non_negative(weight_decay_rate, "weight_decay_rate")
        parts.append(add_decoupled_weight_decay(rate, weight_decay_mask))
    return chain(*parts, scale(-1.0))
