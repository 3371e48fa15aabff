"""‖x‖₂ of one array and of many: right at any size, in few kernels, with derivatives in both directions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array, abs_squared, cast, is_constant, largest_part, parts, smallest_normal


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """‖x‖₂ in at least float32, right from the smallest to the largest floats: of all elements, or along `axes`.

    A norm that exceeds the largest float counts as the largest float. The derivative is x/‖x‖, and 0 where ‖x‖ = 0.
    """
    kept = axes is not None
    largest = jnp.max(largest_part(x), axes, initial=0.0, keepdims=kept)
    scale = _scale_for(largest)
    return _saturated(jnp.sqrt(jnp.sum(abs_squared(x, scale), axes, keepdims=kept)) / scale, largest)


@norm.defjvp
def _(axes: tuple[int, ...] | None, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    [x], [way] = primals, tangents
    size = norm(x, axes)
    return size, jnp.sum(_along(x, size, way), axes, keepdims=axes is not None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def joint_norms(groups: Sequence[Sequence[Array]], dtype: Any) -> Array:
    """‖x‖₂ of each group of arrays of one shape, as if they were one array, in this dtype; see `norm`.

    Arrays of ordinary size are read once. Extreme sizes show in the sums of squares: these are then taken again, of
    numbers that are scaled up or down, so what is tiny beside the largest group may count as 0.
    """
    apart = [len(group) == 1 and group[0].size > SMALL for group in groups]
    large, small = [i for i, alone in enumerate(apart) if alone], [i for i, alone in enumerate(apart) if not alone]
    norms = [_norms_one_by_one([groups[i][0] for i in large], dtype)] if large else []
    norms += [_scaled_norms([_few(groups[i]) for i in small], dtype)] if small else []
    return jnp.concatenate(norms)[np.argsort(large + small)] if len(norms) > 1 else norms[0]


@joint_norms.defjvp  # the loop over scales has no derivative in reverse
def _(dtype: Any, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    [groups], [ways] = primals, tangents
    sizes = joint_norms(groups, dtype)
    pairs = [zip(group, way, strict=True) for group, way in zip(groups, ways, strict=True)]
    sums = [
        functools.reduce(jax.lax.add, [jnp.sum(_along(cast(x, dtype), size, cast(way, dtype))) for x, way in group])
        for size, group in zip(sizes, pairs, strict=True)
    ]
    return sizes, jnp.stack(sums)


def _along(x: Array, size: Array, way: Array) -> Array:
    """What each element adds to the derivative of ‖x‖ along `way`: x/‖x‖ times the way, and 0 where ‖x‖ = 0."""
    divisor = jnp.where(size > 0, size, 1)
    return functools.reduce(
        jax.lax.add, [part / divisor * of_way for part, of_way in zip(parts(x), parts(way), strict=True)]
    )


SMALL = 1 << 16
"""Elements up to which arrays of a shape are summed together; beyond, that is slower than one by one."""
_TINY = 1 << 12
"""Elements up to which all arrays of a shape are copied into one: the copies are small, and far less is compiled."""
_RUN = 32
"""How many larger arrays are added up in one kernel."""


def _norms_one_by_one(arrays: Sequence[Array], dtype: Any) -> Array:
    """The norm of each array; all norms are taken again if the largest is extreme."""
    # each array has one reduction in a branch, and a scale of its own: what two share would be written out (X3)
    squares = [jnp.sum(abs_squared(cast(x, dtype))) for x in arrays]
    info, largest = jnp.finfo(squares[0].dtype), jnp.max(jnp.stack(squares))
    up, down = _up_and_down(info.dtype)

    def unusual() -> Array:
        large = float(info.max)
        scales = [jnp.where(s < 1, up, jnp.where(s < large, 1.0, down)).astype(info.dtype) for s in squares]
        pairs = zip(arrays, scales, strict=True)
        sums = jnp.stack([jnp.sum(abs_squared(cast(x, dtype), scale)) for x, scale in pairs])
        sizes = jnp.minimum(jnp.sqrt(sums) / jnp.stack(scales), large)
        return jnp.where(jnp.isfinite(sums), sizes, sums)

    usual = (largest > 2.0 ** (info.minexp // 2)) & (largest < float(info.max))
    return jax.lax.cond(usual, lambda: jnp.sqrt(jnp.stack(squares)), unusual)


def _scaled_norms(groups: Sequence[Sequence[Array]], dtype: Any) -> Array:
    """The norm of each group, with one power of two for all, by which everything is multiplied before it is squared."""
    info = jnp.finfo(dtype)
    lowest, highest = 2.0 ** (info.minexp // 4), 2.0 ** (info.maxexp // 2 - 4)

    def attempt(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, scale, _ = carry
        squares = jnp.stack([sum(_sum_of_squares(run, scale, dtype) for run in runs(group)) for group in groups])
        sizes = jnp.sqrt(squares) / scale
        sizes = jnp.where(jnp.isfinite(squares), jnp.minimum(sizes, float(info.max)), sizes)
        other = jnp.where(jnp.max(sizes) < 1, *_up_and_down(info.dtype))
        return number + 1, other.astype(info.dtype), sizes

    def unusual(carry: tuple[Array, Array, Array]) -> Array:
        number, _, sizes = carry
        largest = jnp.max(sizes)
        return (number == 0) | ((number == 1) & ~((largest > lowest) & (largest < highest)))

    # 0, but inside shard_map one that varies over the mesh as the arrays do: what a loop carries must keep its type
    nothing = sum((jnp.sum(jnp.where(False, group[0].real, 0)) for group in groups), jnp.zeros((), info.dtype))
    start = (jnp.zeros((), np.int32), 1 + nothing, jnp.zeros(len(groups), info.dtype) + nothing)
    return jax.lax.while_loop(unusual, attempt, start)[2]


def runs(group: Sequence[Array]) -> list[Sequence[Array]]:
    """Arrays of one shape in runs that are added up before a sum is taken, for each sum is a kernel (X3)."""
    length = len(group) if group[0].size <= _TINY else _RUN
    return [group[i : i + length] for i in range(0, len(group), length)]


def _few(group: Sequence[Array]) -> Sequence[Array]:
    """A group as one array, if its arrays are tiny and too many to add up in one kernel."""
    return [jnp.stack(group)] if len(group) > _RUN and group[0].size <= _TINY else group


def _sum_of_squares(arrays: Sequence[Array], scale: Array, dtype: Any) -> Array:
    squares = [_squares(dtype, arrays[i : i + 8], scale) for i in range(0, len(arrays), 8)]
    return jnp.sum(functools.reduce(jax.lax.add, squares))


@functools.partial(jax.jit, static_argnums=0)
def _squares(dtype: Any, arrays: Sequence[Array], scale: Array) -> Array:
    """The squares of arrays of one shape, added up; traced once for each number of arrays."""
    wide = jnp.broadcast_to(scale, arrays[0].shape)
    return functools.reduce(jax.lax.add, [abs_squared(cast(x, dtype), wide) for x in arrays])


def _scale_for(largest: Array) -> Array:
    """A power of two by which numbers up to `largest` may be multiplied before they are squared and added up.

    In float32 it is 1 for a largest number from 2⁻²⁰ to 2⁴⁴, and scaled numbers end up between 2⁻⁶³ and 2⁴⁸: the
    squares of 2³⁰ such numbers have a finite sum, and 2³⁰ numbers whose squares are not normal take nothing from it. In
    float64 the exponents are eight times as large.
    """
    half, (up, down) = jnp.finfo(largest.dtype).maxexp // 2, _up_and_down(largest.dtype)
    scale = jnp.where(largest > 2.0 ** (11 * half // 16), down, jnp.where(largest < 2.0 ** (-5 * half // 16), up, 1.0))
    return scale.astype(largest.dtype)


def _up_and_down(dtype: Any) -> tuple[float, float]:
    """The powers of two by which numbers too small, and too large, to be squared are multiplied first."""
    half = jnp.finfo(dtype).maxexp // 2
    # the square of the first is finite: XLA may move it out of the sum of a constant x, and 0·∞ is NaN
    return 2.0 ** (half - 1), 2.0 ** (-5 * half // 4)


def _saturated(size: Array, largest: Array) -> Array:
    """`size`, or the largest float where it overflowed though the `largest` element is finite."""
    return jnp.minimum(size, jnp.where(jnp.isinf(largest), jnp.inf, float(jnp.finfo(size.dtype).max)))


def factor_to(size: Array, limit: Any) -> Array:
    """The factor that brings `size` down to `limit`: min(1, limit/size), NaN if size is not finite; 1 for no limit."""
    if is_constant(limit, math.inf):
        return jnp.ones_like(size)
    over = size > limit
    # not less than the smallest normal number, which would be flushed to zero
    above = jnp.where(over, jnp.maximum(limit, size * smallest_normal(size.dtype)), 1)
    known = jnp.isfinite(size) if isinstance(limit, float) else jnp.isfinite(size) | jnp.isposinf(limit)
    below = jnp.where(known, jnp.where(over, size, 1), jnp.nan)
    return above / below  # the quotient last: what followed would be repeated in the kernels of all leaves (X9)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm_across(norms: Array, axes: tuple[str, ...]) -> Array:
    """‖x‖₂ of arrays whose shards over the mesh axes `axes` have these norms."""
    largest = jax.lax.pmax(norms, axes)
    scale = jnp.where(largest == 0, 1.0, largest)
    return _saturated(scale * jnp.sqrt(jax.lax.psum(jnp.square(norms / scale), axes)), largest)


@norm_across.defjvp
def _(axes: tuple[str, ...], primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    [norms], [way] = primals, tangents
    size = norm_across(norms, axes)
    return size, jax.lax.psum(_along(norms, size, way), axes)
