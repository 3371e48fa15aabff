"""Rounding to fewer bits, to nearest or at random, and the random bits for it: hashes, so that no key is carried."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array, cast, clamp


def round_to(x: Array, dtype: Any, bits: Array | None = None) -> Array:
    """`x` rounded to the grid of a narrower `dtype`, in its own dtype: to nearest, or at random if `bits` are given.

    Stochastic rounding takes the neighbour above with a probability that is the distance from the one below, so that
    its mean is `x`, and what lies on the grid stays. It is done on the bits (X8).
    """
    info, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if info.bits >= own.bits:
        return x
    x = jnp.where(jnp.isinf(x), x, clamp(x, float(info.max)))
    if x.dtype != np.float32:  # float64, whose last bits are negligible beside those dropped
        return round_to(x.astype(np.float32), dtype, bits).astype(x.dtype)
    dropped = own.nmant - info.nmant
    if bits is None:
        grid = jax.lax.reduce_precision(x, own.nexp, info.nmant)
    else:
        kept = np.uint32((1 << 32) - (1 << dropped))
        raised = jax.lax.bitcast_convert_type(x, np.uint32) + (bits >> np.uint32(32 - dropped))
        grid = jax.lax.bitcast_convert_type(raised & kept, np.float32)
    if info.minexp > own.minexp:  # below the normal numbers the grid is evenly spaced
        steps = x / float(info.smallest_subnormal)
        steps = jnp.round(steps) if bits is None else up_or_down(steps, bits)
        even = steps * float(info.smallest_subnormal)
        grid = jnp.where(jnp.abs(x) < float(info.smallest_normal), even, grid)
    return jnp.where(jnp.isfinite(x) & (x != 0), grid, x)


def own_bits(x: Array, seed: Array) -> Array:
    """32 bits per float32 number, the upper ones random: the bits of the number, times an odd number made of the seed.

    No device needs to know where in the array a number is. Equal numbers of one step get equal bits, which does no harm
    to moments; where it would, use `random_bits`.

    References:
      Dietzfelbinger et al. 1997, J. Algorithms 25 (multiply and shift: pairs collide at most twice as often as by
      chance).
    """
    odd = seed * np.uint32(_GOLDEN) | np.uint32(1)
    return (jax.lax.bitcast_convert_type(x, np.uint32) ^ seed) * odd


def rounded_at_random(x: Array, dtype: Any, seed: Array) -> Array:
    """`x` rounded stochastically to an array of `dtype`, with `own_bits`."""
    if x.dtype != np.float32:  # float64, whose last bits are negligible beside those dropped
        return rounded_at_random(cast(x, np.float32), dtype, seed)
    # in few operations, for a step with bfloat16 moments waits for nothing else
    bits = own_bits(x, seed)
    if dtype != jnp.bfloat16:
        return jax.lax.convert_element_type(round_to(x, dtype, bits), dtype)
    # beyond the largest number the bits are cut off, which gives that number, and keeps infinity and NaN
    pattern = jax.lax.bitcast_convert_type(x, np.uint32)
    raised = jnp.where(jnp.abs(x) < float(jnp.finfo(dtype).max), pattern + (bits >> np.uint32(16)), pattern)
    grid = jax.lax.bitcast_convert_type(raised & np.uint32(0xFFFF0000), np.float32)
    return jax.lax.convert_element_type(grid, dtype)


def half_step(x: Array, dtype: Any) -> Array:
    """Half the distance from a number of `dtype`, widened, to the next one away from zero."""
    info, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    exponent = jax.lax.bitcast_convert_type(x, np.uint32) & np.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent, np.float32)
    halves = jnp.where(jnp.isfinite(x), power * 2.0 ** -(info.nmant + 1), 0)
    smallest = float(info.smallest_subnormal) / 2
    return jnp.maximum(halves, smallest) if info.minexp > own.minexp else halves


def unit(bits: Array) -> Array:
    """Uniform in [0, 1)."""
    return (bits >> np.uint32(8)).astype(np.float32) * 2.0**-24


def up_or_down(x: Array, bits: Array) -> Array:
    """A whole number next to `x`, at random, so that the mean is `x`; whole numbers stay."""
    below = jnp.floor(x)
    return jnp.where(unit(bits) < x - below, below + 1, below)


def mix(x: Any) -> Any:
    """A bijection of uint32 after which every bit depends on every bit (Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def random_bits(seed: Array, shape: tuple[int, ...]) -> Array:
    """32 random bits per element: a hash of `seed` and the element's place, so the same on any mesh."""
    place = jnp.full(shape, seed, np.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(np.uint32, shape, axis) * np.uint32(stride * _GOLDEN & 0xFFFFFFFF)
        stride *= shape[axis]
    return mix(place)


_GOLDEN = 0x9E3779B9
"""2³² over the golden ratio: its multiples are spread evenly."""


def next_seed(seed: Array) -> Array:
    """The seed after `seed`; all 2³² come before one returns."""
    return jnp.asarray(seed, np.uint32) + np.uint32(_GOLDEN)  # NumPy's scalars, as checkpoints restore them, would warn


def seed_for(seed: Array, place: Any) -> Array:
    """The seed of one of the arrays that are rounded together."""
    return mix(mix(next_seed(seed)) + jnp.asarray(place, np.uint32))
