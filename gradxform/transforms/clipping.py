"""Against steps that are too large: bound the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, bound
from gradxform._core.lift import lift
from gradxform._core.masks import MaskLike
from gradxform._core.measures import GLOBAL_NORM
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics.arithmetic import is_constant
from gradxform.numerics.norms import factor_to, norm


def clip_by_value(max_value: Numeric) -> Transformation:
    """u ← min(max(u, −c), c), element by element; complex elements keep their phase.

    Args:
      max_value: c > 0; infinity changes nothing.

    Raises:
      TypeError, ValueError: if ``max_value`` is not in (0, inf].

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_value(1.0)
      >>> print(tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))[0])
      [ 1.  -0.5]
    """
    return lift(None, _clip, constructor=clip_by_value, at_most="max_value", max_value=bound(max_value))


def clip_by_leaf_norm(max_norm: Numeric) -> Transformation:
    """u ← u·min(1, c/‖u‖₂), for each leaf by its own norm.

    Args:
      max_norm: c > 0; infinity changes nothing.

    Raises:
      TypeError, ValueError: if ``max_norm`` is not in (0, inf], or inside `jax.shard_map` a leaf is a shard.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_leaf_norm(1.0)
      >>> print(tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0])
      [0.6 0.8]
    """
    limit = bound(max_norm)
    return lift(None, _clip_leaf, constructor=clip_by_leaf_norm, whole=True, at_most="max_norm", max_norm=limit)


def clip_by_leaf_rms(max_rms: Numeric) -> Transformation:
    """u ← u·min(1, c/RMS(u)), for each leaf by its own root of the mean square, ‖u‖₂/√n.

    Args:
      max_rms: c > 0; infinity changes nothing.

    Raises:
      TypeError, ValueError: if ``max_rms`` is not in (0, inf], or inside `jax.shard_map` a leaf is a shard.

    References:
      Shazeer & Stern 2018, arXiv 1804.04235, section 6 (update clipping).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_leaf_rms(1.0)
      >>> print(tx.update(jnp.array([2.0, -2.0]), tx.init(jnp.zeros(2)))[0])
      [ 1. -1.]
    """
    return lift(None, _clip_rms, constructor=clip_by_leaf_rms, whole=True, max_rms=bound(max_rms))


def clip_by_global_norm(
    max_norm: Numeric, *, axis_name: str | Sequence[str] | None = None, mask: MaskLike | None = None
) -> Transformation:
    """u ← u·min(1, c/‖u‖₂), with one norm over all leaves, taken in at least float32.

    The norm does not overflow, even where the sum of squares would. If an element is NaN or infinite, so
    are the clipped updates, rather than zero. Frozen leaves do not count.

    Args:
      max_norm: c > 0; infinity changes nothing.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the mesh axes over which leaves are sharded: the norm is
        that of the whole leaves. Leaves that `shard_map` knows to be replicated count once; where JAX does not
        track that (``pmap``, ``check_vma=False``) every leaf counts as sharded, and without ``axis_name`` none does:
        each device takes the norm of what it has. ``()`` takes each shard by itself.
      mask: Which leaves count and are clipped; see `add_decoupled_weight_decay`.

    Raises:
      TypeError, ValueError: if ``max_norm`` is not in (0, inf], or a leaf is sharded over an axis that
        ``axis_name`` does not name.

    References:
      Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.clip_by_global_norm(1.0)
      >>> updates, _ = tx.update({"a": jnp.array(3.0), "b": jnp.array(4.0)}, tx.init({"a": 0.0, "b": 0.0}))
      >>> print(updates["a"], updates["b"])
      0.6 0.8
    """
    return lift(
        None,
        _rescale,
        constructor=clip_by_global_norm,
        measure=GLOBAL_NORM,
        gather=_gather,
        rescales="factor",
        reports=("clipped",),
        axis_name=axis_name,
        mask=mask,
        at_most="max_norm",
        max_norm=bound(max_norm),
    )


def _clip(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    if is_constant(step.max_value, math.inf):
        return update, state
    if jnp.iscomplexobj(update):
        return update * factor_to(jnp.abs(update), step.max_value), state
    return jnp.clip(update, -step.max_value, step.max_value), state


def _clip_leaf(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    if is_constant(step.max_norm, math.inf):
        return update, state
    return update * factor_to(norm(update), step.max_norm), state


def _clip_rms(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    if is_constant(step.max_rms, math.inf):
        return update, state
    return update * factor_to(norm(update), step.max_rms * math.sqrt(max(update.size, 1))), state


def _rescale(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return update * step.factor, state


def _gather(measured: Any, step: Step) -> dict[str, Array]:
    size = norm(measured["norm"])
    return {"factor": factor_to(size, step.max_norm), "clipped": size > step.max_norm}
