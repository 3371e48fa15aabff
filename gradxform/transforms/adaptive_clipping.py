"""Against steps that are too large: bounds that follow the parameters or the past."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gradxform._core.arguments import count_of
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, bound, fraction, non_negative, positive
from gradxform._core.lift import lift
from gradxform._core.masks import MaskLike
from gradxform._core.measures import GLOBAL_NORM, LEAF_NORMS
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics.arithmetic import clamp, is_constant, largest_square, lerp, root
from gradxform.numerics.norms import factor_to, norm


def clip_by_param_norm(
    max_ratio: Numeric = 0.01, eps: Numeric = 1e-3, *, axis: int | Sequence[int] = -1, mask: MaskLike | None = None
) -> Transformation:
    """uᵢ ← uᵢ·min(1, c·max(‖θᵢ‖, ε)/‖uᵢ‖) for every unit i: adaptive gradient clipping, AGC.

    A unit is all the weights of one output: a column of a Dense kernel, a filter of a convolution. A vector or a scalar
    is one unit.

    Args:
      max_ratio: c > 0; infinity changes nothing.
      eps: ε ≥ 0, the least norm of a unit of parameters, so that those starting at zero can move.
      axis: The axes that number the units: −1 for kernels of shape (…, in, out), as Flax and Haiku have them, 0 for
        (out, in, …), as Equinox and torch have them, (−2, −1) for (in, heads, out).
      mask: Which leaves are clipped; see `add_decoupled_weight_decay`. The paper leaves the last layer out.

    Raises:
      TypeError, ValueError: if a number is out of its range, ``update`` is called without params, or inside
        `jax.shard_map` a leaf is a shard.

    References:
      Brock et al. 2021, arXiv 2102.06171, equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_param_norm(0.5)
      >>> kernel = jnp.array([[3.0, 0.3], [4.0, 0.4]])
      >>> print(tx.update(jnp.ones((2, 2)), tx.init(kernel), kernel)[0])
      [[1.         0.17677669]
       [1.         0.17677669]]
    """
    return lift(
        None,
        _clip_units,
        constructor=clip_by_param_norm,
        mask=mask,
        whole=True,
        needs_params=True,
        max_ratio=bound(max_ratio),
        eps=non_negative(eps),
        axis=_axes(axis),
    )


def clip_by_zscore(
    threshold: Numeric = 2.5,
    decay: Numeric = 0.97,
    warmup: int = 25,
    max_norm: Numeric | None = 1.0,
    eps: Numeric = 1e-6,
    *,
    axis_name: str | Sequence[str] | None = None,
) -> Transformation:
    """n = ‖u‖, z = (n − μ)/(σ + ε);  n* = μ + c²·σ/z if z > c else n;  u ← u·min(1, min(n*, b)/n): ZClip.

    μ and σ² are the mean and variance of the norms: of the first ``warmup`` norms as they are, then moving averages of
    n*. Norms that are not finite do not enter them. If the norms were constant, σ is 0, and a norm above μ becomes μ.

    Args:
      threshold: c > 0, in standard deviations.
      decay: Of the moving averages, in [0, 1).
      warmup: How many steps are only recorded, and clipped to ``max_norm``, at least 1.
      max_norm: b > 0, a bound on every norm; None or infinity for no such bound.
      eps: ε ≥ 0.
      axis_name: See `clip_by_global_norm`.

    Returns:
      A transformation with ``norm_mean``, ``norm_variance`` and ``norm_count`` in its state, for all leaves.

    Raises:
      TypeError, ValueError: if a number is out of its range; see `clip_by_global_norm`.

    References:
      Kumar et al. 2025, arXiv 2504.02507, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_zscore(warmup=2, max_norm=None)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 3.0, 1000.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(updates)
      [2.0062625]
    """
    return lift(
        None,
        _rescale,
        constructor=clip_by_zscore,
        measure=GLOBAL_NORM,
        gather=_gather_zscore,
        rescales="factor",
        memory={"norm_mean": 0.0, "norm_variance": 0.0, "norm_count": 0.0},
        reports=("clipped",),
        axis_name=axis_name,
        threshold=positive(threshold),
        decay=fraction(decay),
        warmup=count_of("warmup", warmup),
        max_norm=None if max_norm is None else bound(max_norm),
        eps=non_negative(eps),
    )


def clip_by_average_norm(
    max_ratio: Numeric = 1.05,
    decay: Numeric = 0.98,
    warmup: int = 100,
    max_norm: Numeric = 1.0,
    eps: Numeric = 1e-8,
    *,
    axis_name: str | Sequence[str] | None = None,
) -> Transformation:
    """uᵢ ← uᵢ·min(1, c·γᵢ/‖uᵢ‖),  γᵢ ← β·γᵢ + (1 − β)·‖uᵢ‖ for every leaf i: AdaGC.

    In the first ``warmup`` − 1 steps, and while a leaf has been zero, u is clipped by its global norm, and γᵢ is the
    least norm of the leaf so far, not counting zeros. Norms that are not finite do not enter γ.

    Args:
      max_ratio: c > 0, how much longer than usual a leaf may be; infinity for no bound.
      decay: β in [0, 1).
      warmup: Number of the first step that is bounded by the leaf's own norm, at least 1; its first gradient is not.
      max_norm: The bound of the global norm before that, positive; infinity for none.
      eps: The least γ in the bound, ≥ 0.
      axis_name: See `clip_by_global_norm`.

    Returns:
      A transformation with γ in its state, as the scalar ``norm`` of each leaf.

    Raises:
      TypeError, ValueError: if a number is out of its range; see `clip_by_global_norm`.

    References:
      Wang et al. 2025, arXiv 2502.11034, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_average_norm(warmup=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (0.5, 100.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(updates)
      [0.525]
    """
    return lift(
        _average_norm,
        _clip_to_average,
        constructor=clip_by_average_norm,
        measure=LEAF_NORMS,
        gather=_gather_average,
        axis_name=axis_name,
        max_ratio=bound(max_ratio),
        decay=fraction(decay),
        warmup=count_of("warmup", warmup),
        max_norm=bound(max_norm),
        eps=non_negative(eps),
    )


def _axes(axis: Any) -> tuple[int, ...]:
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in axes):
        raise TypeError(f"axis must be a whole number or a sequence of them, got {axis!r}")
    return tuple(axes)


def _clip_units(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    assert param is not None
    axes = None
    if update.ndim > 1:
        if not all(-update.ndim <= axis < update.ndim for axis in step.axis):
            raise ValueError(f"axis {step.axis} of clip_by_param_norm is no axis of a leaf of shape {update.shape}")
        units = {axis % update.ndim for axis in step.axis}
        if len(units) == update.ndim:
            raise ValueError(
                f"axis {step.axis} of clip_by_param_norm leaves no axis of {update.shape} to sum over; "
                "leave such a leaf out with mask="
            )
        axes = tuple(axis for axis in range(update.ndim) if axis not in units)
    if is_constant(step.max_ratio, math.inf):
        return update, state
    limit = step.max_ratio * jnp.maximum(norm(param, axes), step.eps)
    return update * factor_to(norm(update, axes), limit), state


def _rescale(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return update * step.factor, state


def _gather_zscore(measured: Any, step: Step) -> dict[str, Array]:
    size = norm(measured["norm"])
    mean, variance, number = step.norm_mean, step.norm_variance, step.norm_count + 1
    adaptive = number > step.warmup
    deviation = root(variance)
    zscore = (size - mean) / (deviation + step.eps)
    spike = adaptive & (zscore > step.threshold)
    usual = jnp.where(spike, mean + step.threshold**2 * deviation / jnp.where(spike, zscore, 1), size)
    weight = jnp.where(adaptive, 1 - step.decay, 1 / number)
    new_mean = lerp(mean, usual, weight)
    # Welford's recurrence gives the population's variance in the warmup; afterwards ZClip takes the new mean alone
    largest = largest_square(size.dtype)  # a variance that overflowed would never let anything be clipped again
    off, off_before = clamp(usual - new_mean, largest), clamp(usual - mean, largest)
    square = off * jnp.where(adaptive, off, off_before)
    limit = usual if step.max_norm is None else jnp.minimum(usual, step.max_norm)
    finite = jnp.isfinite(size)
    return {
        "factor": factor_to(size, limit),
        "clipped": size > limit,
        "norm_mean": jnp.where(finite, new_mean, mean),
        "norm_variance": jnp.where(finite, lerp(variance, square, weight), variance),
        "norm_count": jnp.where(finite, jnp.minimum(number, step.warmup), step.norm_count),
    }


def _average_norm(param: Array) -> RuleState:
    return {"norm": jnp.zeros((), param.real.dtype)}


def _gather_average(measured: Any, step: Step) -> dict[str, Array]:
    return {"factor": factor_to(norm(measured["norm"]), step.max_norm)}


def _clip_to_average(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    average = state["norm"]
    warming = (step.number < step.warmup) | (average == 0)
    own = factor_to(step.norm, step.max_ratio * jnp.maximum(average, step.eps))
    shrink = jnp.where(warming, step.factor, own)
    clipped = shrink * step.norm
    least = jnp.where((average == 0) | (clipped == 0), jnp.maximum(average, clipped), jnp.minimum(average, clipped))
    new = jnp.where(warming, least, lerp(average, clipped, 1 - step.decay))
    return shrink * update, {"norm": jnp.where(jnp.isfinite(clipped), new, average)}
