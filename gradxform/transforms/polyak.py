"""Against a learning rate that must be guessed: as long a step as the loss is high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gradxform._core.arguments import one_of
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, bound, finite, non_negative
from gradxform._core.lift import lift
from gradxform._core.measures import GLOBAL_NORM
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics import norm


def scale_by_polyak(
    f_min: Numeric = 0.0,
    max_learning_rate: Numeric = 1.0,
    eps: Numeric = 0.0,
    variant: str = "sps",
    *,
    axis_name: str | Sequence[str] | None = None,
) -> Transformation:
    """u ← u·min((f − f*)/(‖u‖² + ε), c): the step after which a loss that were linear would be f*.

    The loss f is an extra argument: ``update(grads, state, params, value=loss)``.

    Args:
      f_min: f*, the least loss that can be reached; 0 for a model that can fit every batch.
      max_learning_rate: c > 0, the longest step; infinity for no bound.
      eps: ε ≥ 0. A gradient of zero gives no step, whatever ε is.
      variant: ``"sps"``, or ``"sps+"``, which takes no step where f < f*; ``"sps"`` goes uphill there.
      axis_name: See `clip_by_global_norm`.

    Raises:
      TypeError, ValueError: if a number is out of its range, or ``update`` gets no ``value``.

    References:
      Loizou et al. 2021, arXiv 2002.10542, equation 3 (SPS_max); Garrigos et al. 2023, arXiv 2307.14528 (sps+).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.scale_by_polyak()
      >>> print(tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)), value=5.0)[0])
      [0.6 0.8]
    """
    return lift(
        None,
        _scale,
        constructor=scale_by_polyak,
        measure=GLOBAL_NORM,
        gather=_length,
        extra=("value",),
        axis_name=axis_name,
        f_min=finite(f_min),
        max_learning_rate=bound(max_learning_rate),
        eps=non_negative(eps),
        variant=one_of("variant", variant, "sps", "sps+"),
    )


def _length(measured: Any, step: Step) -> dict[str, Any]:
    gap, size = step.value - step.f_min, norm(measured["norm"])
    gap = jnp.maximum(gap, 0) if step.variant == "sps+" else gap
    safe = jnp.where(size > 0, size, 1)
    divisor = size + step.eps / safe
    # of the unit vector, for the square of a norm may overflow where the norm does not
    length = jnp.minimum(gap / jnp.where(divisor > 0, divisor, 1), step.max_learning_rate * safe)
    # gradients near 0 are multiplied by c if the loss is high, so 0 is too: the step has this derivative there
    at_zero = jnp.where(gap > 0, step.max_learning_rate, 0)
    length = jnp.where(divisor > 0, length, at_zero)
    return {"size": safe, "length": jnp.where((size > 0) | jnp.isfinite(length), length, 0)}


def _scale(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return update / step.size * step.length, state
