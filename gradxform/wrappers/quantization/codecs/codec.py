"""What a codec is, and what all codecs that scale blocks use."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array, zero_if_finite


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """How an array is kept in few bits: a code for each number and a scale for each block of them.

    Blocks lie along the last axis; if that is no whole number of blocks, along the flattened array.
    """

    signed: bool = True
    """Whether there may be negative numbers."""

    name: ClassVar[str]
    block: ClassVar[int]
    """How many numbers share a scale; 1 if there are no scales."""
    per_code: ClassVar[int] = 1
    """How many numbers one element of the codes holds."""
    scale_dtype: ClassVar[Any] = np.float32
    """None if there are no scales."""
    looked_up: ClassVar[bool] = False
    """Whether decoding looks numbers up."""

    @property
    def code_dtype(self) -> Any:
        """The dtype of the codes."""
        return np.uint8

    @property
    def bytes_per_number(self) -> float:
        """The bytes of codes and scales for each number."""
        scale = 0 if self.scale_dtype is None else np.dtype(self.scale_dtype).itemsize
        return np.dtype(self.code_dtype).itemsize / self.per_code + scale / self.block

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of an array of this shape; flat if its last axis holds no whole number of them."""
        return shape if self.per_code == 1 else _parted(shape, self.per_code)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of an array of this shape: one per block."""
        return _parted(shape, self.block)

    def encode(
        self, x: Array, bits_of: Callable[[Array], Array] | None = None, largest: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Codes and scales of a float32 `x` of a whole number of blocks.

        Each number gets the nearest code; or, with ``bits_of(array)``, which gives 32 random bits for each number of an
        array, one of the two codes beside it at random, the nearer one likelier in proportion. `largest` is what
        `largest_of` gives, if it was called already.
        """
        if largest is None and self.scale_dtype is not None:
            [largest] = largest_of([self], [x])
        bits = [None if array is None or bits_of is None else bits_of(array) for array in (x, largest)]
        return self.to_codes(x, largest, *bits)

    @abc.abstractmethod
    def to_codes(
        self, x: Array, largest: Array | None, bits: Array | None, block_bits: Array | None
    ) -> tuple[Array, Array | None]:
        """`encode`, given the largest magnitude of each block, NaN where it cannot be coded, and random bits for it.

        What is made of `largest` may be combined with what is made of `x`, such as |x|, but not with `x` itself, unless
        the codec is `looked_up`: else XLA makes `x` in one more kernel, which writes it out, and not where it is read.
        """

    @abc.abstractmethod
    def decode(self, codes: Array, scales: Array | None) -> Array:
        """The numbers that codes and scales stand for, in float32: `per_code` for each code along the last axis."""

    def spread(self, numbers: Array, shape: tuple[int, ...]) -> Array:
        """The number of each block, for every number of an array of this shape."""
        return jnp.broadcast_to(numbers[..., None], (*numbers.shape, self.block)).reshape(shape)


def _parted(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape with its last axis counted in parts of this size; flat, if that is no whole number of parts."""
    return (*shape[:-1], shape[-1] // size) if shape and shape[-1] % size == 0 else (math.prod(shape) // size,)


def largest_of(codecs: Sequence[Codec], arrays: Sequence[Array]) -> list[Array]:
    """The largest magnitude of each block, NaN if it can't be coded; of arrays of one shape, for codecs of one block.

    All arrays are read in one pass, so what they are made of comes from memory once. Bit patterns are compared, at most
    32 at a time (X3): they have the order of the magnitudes, with infinity and NaN as the largest.
    """
    [block] = {codec.block for codec in codecs}
    rows = codecs[0].scale_shape(arrays[0].shape)
    *outer, inner = _factors(block)
    highest = [_pattern(codec, x).reshape(*rows, *outer, inner) for codec, x in zip(codecs, arrays, strict=True)]
    for _ in outer:
        highest = [jnp.max(patterns, len(rows)) for patterns in highest]
    patterns = jnp.max(jnp.stack(highest, len(rows)), -1)
    numbers = jax.lax.bitcast_convert_type(patterns, np.float32)
    numbers = jnp.where(patterns >= _INFINITY, jnp.nan, numbers)
    return [numbers[..., place] for place in range(len(arrays))]


def largest_of_written(codec: Codec, x: Array) -> Array:
    """`largest_of` for one array that lies in memory, as looked-up numbers do (X9), with blocks along its last axis."""
    highest, lowest = jnp.max(x, -1), jnp.min(x, -1)
    largest = jnp.maximum(highest, -lowest) if codec.signed else highest
    # on CPUs the maximum of a long row that has a NaN may be a number (JAX 0.10.2 to 0.12.0); the sum is NaN
    wrong = jnp.isnan(jnp.sum(zero_if_finite(x), -1))
    return jnp.where(wrong if codec.signed else wrong | (lowest < 0), jnp.nan, largest)[..., None]


_INFINITY = np.float32(np.inf).view(np.uint32)
_SIGN = np.float32(-0.0).view(np.uint32)


def _pattern(codec: Codec, x: Array) -> Array:
    """The bits of each magnitude; where it cannot be coded, those of infinity or more."""
    bits = jax.lax.bitcast_convert_type(x, np.uint32)
    return bits & ~_SIGN if codec.signed else jnp.where(x == 0, 0, bits)


def _factors(size: int) -> list[int]:
    """Factors of a size, each at most 32 if that is possible."""
    if size <= 32:
        return [size]
    factor = max(divisor for divisor in range(1, 33) if size % divisor == 0)
    return [size] if factor == 1 else [*_factors(size // factor), factor]


def inverse(scales: Array) -> Array:
    """One over each scale, 0 for a scale of 0 or NaN."""
    return jnp.where(scales > 0, 1, 0) / jnp.where(scales > 0, scales, 1)


def with_sign_of(x: Array, magnitude: Array) -> Array:
    """A number of this magnitude and of the sign of `x`."""
    sign = jax.lax.bitcast_convert_type(x, np.uint32) & _SIGN
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(magnitude, np.uint32) | sign, np.float32)


def whole(x: Array, low: Any, high: int, bits: Array | None, dtype: Any) -> Array:
    """The whole number nearest to `x`, within [low, high]; with `bits`, one of the two beside it, of mean `x`.

    |x| is less than 256. The result is read from the last bits of x + 3·2²², or with `bits` from those above the last
    14 of x + 3·2⁸: XLA's own conversion also handles NaN and numbers too large, which takes a third of a step's time.
    """
    base = np.float32(3 * 2**22 if bits is None else 3 * 2**8)
    pattern = jax.lax.bitcast_convert_type(x + base, np.int32)
    zero = base.view(np.int32)
    if bits is not None:
        drawn = jax.lax.bitcast_convert_type(bits >> np.uint32(18), np.int32)
        pattern, zero = (pattern + drawn) >> np.int32(14), zero >> np.int32(14)
    return jnp.clip(pattern, zero + low, zero + high).astype(dtype)


def least(x: Array) -> Array:
    """The smallest code allowed for each x ≥ 0: 0 for 0, 1 for all others."""
    return (x > 0).astype(np.int32)
