"""Codes of one or two bytes for the numbers of an optimizer state: mathematics on rows of one array.

A codec takes float32 blocks of shape (…, block), one per row, and gives codes of the same shape and one scale per row.
Rows are independent of one another, so any run of rows may be coded by itself, such as a chunk inside a loop.
Each codec has a form for signed numbers and one for numbers that are never negative, such as second moments: there a
positive number never becomes 0, which would make m/(√v + ε) huge, but the smallest positive number of its block's code.

What holds for every codec: a block of zeros stays so; no finite number overflows; a NaN or an infinity makes its whole
block NaN, and so does a negative number where there must be none. (`Bfloat16` has no blocks: there it is the number
alone, and infinity stays.) What has been decoded is coded as it was, but for signed maps, which end before −1.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics import Array, smallest_normal
from gradxform.rounding import round_to


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """How blocks of an array are kept in few bits."""

    signed: bool = True
    """Whether there may be negative numbers."""

    name: ClassVar[str]
    block: ClassVar[int]
    """How many numbers share a scale; where there are no scales 1, and rows may have any length."""
    per_code: ClassVar[int] = 1
    """How many numbers one element of the codes holds."""
    scale_dtype: ClassVar[Any] = np.float32
    """None if there are no scales."""

    @property
    def code_dtype(self) -> Any:
        """What codes are kept as."""
        return np.uint8

    @property
    def bytes_per_number(self) -> float:
        """What codes and scales take."""
        scale = 0 if self.scale_dtype is None else np.dtype(self.scale_dtype).itemsize
        return np.dtype(self.code_dtype).itemsize / self.per_code + scale / self.block

    @abc.abstractmethod
    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        """Codes and scales, (…, block / per_code) and (…,), of float32 `blocks` (…, block).

        Each number gets the nearest code, or with 32 random `bits` for each, one of the two beside it at random, the
        nearer one likelier in proportion. Only the upper 16 bits count, so that ``bits << 16`` serves a second array.
        """

    @abc.abstractmethod
    def decode(self, codes: Array, scales: Array | None) -> Array:
        """The blocks, in float32, that codes and scales stand for."""

    def largest(self, blocks: Array) -> Array:
        """Of each block the largest magnitude, NaN where the block cannot be coded."""
        # Of the blocks as they are: of anything else that `encode` needs too, XLA keeps that and not the block, which
        # it then decodes once more where the codes are written, and in a loop copies all codes first.
        highest, lowest, total = jnp.max(blocks, -1), jnp.min(blocks, -1), jnp.sum(blocks, -1)
        largest = jnp.maximum(highest, -lowest) if self.signed else highest
        # the maximum of a long row is a number though one is NaN, on CPUs (JAX 0.10.2 to 0.12.0); the sum is not
        wrong = jnp.isnan(total) | jnp.isinf(largest)
        if not self.signed:
            wrong |= lowest < 0
        return jnp.where(wrong, jnp.nan, largest)


def _inverse(scales: Array) -> Array:
    """One over each scale, 0 for a scale of 0: multiplied with its block."""
    return jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)[..., None]


def _dither(bits: Array) -> Array:
    """Uniform in (−1/2, 1/2), of 2¹⁶ numbers symmetrically around 0."""
    mantissa = (bits >> np.uint32(16)) << np.uint32(7) | np.uint32(0x3F800040)
    return jax.lax.bitcast_convert_type(mantissa, np.float32) - np.float32(1.5)


def _whole(x: Array, low: Any, high: int, bits: Array | None, dtype: Any) -> Array:
    """The whole number nearest to a small `x`, or with `bits` one of the two beside it, with the mean `x`; in range.

    In the last bits of x + 3·2²²: XLA's own conversion makes sure of NaN and of numbers too large, for a third of the
    time of a step.
    """
    pattern = jax.lax.bitcast_convert_type((x if bits is None else x + _dither(bits)) + np.float32(3 * 2**22), np.int32)
    zero = np.float32(3 * 2**22).view(np.int32)
    return jnp.clip(pattern, zero + low, zero + high).astype(dtype)


def _least(blocks: Array) -> Array:
    """The smallest code of each x ≥ 0: only that of 0 is 0."""
    return (blocks > 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Powers(Codec):
    """x = ±(q·s)ᵖ, and where x ≥ 0, x = (q·s)²ᵖ, for p of 1 or 2.

    s is rounded to 16 significant bits, so that q·s is exact, and decoding and coding again changes nothing.
    """

    block: ClassVar[int] = 256
    halvings: ClassVar[int]
    """How many square roots are taken of what is signed; of the rest one more."""

    @property
    def code_dtype(self) -> Any:
        return np.int8 if self.signed else np.uint8

    @property
    def levels(self) -> int:
        """The largest code."""
        return 127 if self.signed else 255

    def root(self, x: Array) -> Array:
        """The root of x ≥ 0 that is evenly spaced."""
        for _ in range(self.halvings + (not self.signed)):
            x = jnp.sqrt(x)
        return x

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        largest = self.largest(blocks)
        power = 2.0 ** (self.halvings + (not self.signed))
        # the power of the smallest step is a normal number, and of the largest code times the largest step a finite one
        smallest, most = 2.0 ** np.ceil(-126 / power), 2.0 ** (128 / power) / self.levels * (1 - 2.0**-15)
        steps = jnp.clip(self.root(largest) * np.float32(1 / self.levels), np.float32(smallest), np.float32(most))
        steps = jnp.where(largest == 0, 0, jax.lax.reduce_precision(steps, 8, 15))
        inverse = _inverse(steps)
        if not self.signed:
            x, low = self.root(blocks) * inverse, _least(blocks)
        elif self.halvings == 0:
            x, low = blocks * inverse, -127
        else:
            squares = blocks * (inverse * inverse)
            roots = jnp.sqrt(jnp.abs(squares))
            x, low = jnp.where(squares < 0, -roots, roots), -127
        return _whole(x, low, self.levels, bits, self.code_dtype), steps

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        x = codes.astype(np.float32) * scales[..., None]
        if self.signed:
            return x if self.halvings == 0 else x * jnp.abs(x)
        for _ in range(self.halvings + 1):
            x = x * x
        return x


@dataclasses.dataclass(frozen=True)
class Linear8(_Powers):
    """x = q·s, and where x ≥ 0, x = (q·s)²: evenly spaced numbers, or square roots."""

    name: ClassVar[str] = "linear8"
    halvings: ClassVar[int] = 0


@dataclasses.dataclass(frozen=True)
class Root8(_Powers):
    """x = ±(q·s)², and where x ≥ 0, x = (q·s)⁴: evenly spaced square roots, or fourth roots; finer near zero."""

    name: ClassVar[str] = "root8"
    halvings: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class Companded8(Codec):
    """x = s·z/(2 − |z|), z = q/127, and where x ≥ 0, x = (s·q/255)²: finer near zero, in groups of 32.

    The scale is a float16: 6e-8 to 65504, and for roots the same. Below, numbers lose their precision, and blocks of
    larger ones shrink to it.

    References:
      Ortiz et al. 2026, arXiv 2602.23349, section 3.2.
    """

    name: ClassVar[str] = "companded8"
    block: ClassVar[int] = 32
    scale_dtype: ClassVar[Any] = np.float16

    @property
    def code_dtype(self) -> Any:
        return np.int8 if self.signed else np.uint8

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        largest = self.largest(blocks)
        largest = largest if self.signed else jnp.sqrt(largest)
        coarse = largest < 2.0**-14  # below the normal numbers of float16: the next one up is its own unit
        upper = jnp.ceil(largest * 2.0**24) * 2.0**-24
        upper = jnp.where(largest > 0, jnp.maximum(upper, 2.0**-24), upper)
        # to nearest, a scale sticks that shrinks by less than half of float16's step
        drawn = None if bits is None else bits[..., 0] ^ bits[..., -1]
        scales = jnp.where(coarse, upper, round_to(largest, np.float16, drawn))
        unit = jnp.where(coarse, upper, largest)
        if self.signed:
            shares = blocks / (jnp.where(unit > 0, unit, 1)[..., None] + jnp.abs(blocks))  # y/(1 + |y|) for y = x/s
            codes = _whole(shares * np.float32(254), -127, 127, bits, np.int8)
        else:
            roots = jnp.sqrt(blocks) * (_inverse(unit) * np.float32(255))
            codes = _whole(roots, _least(blocks), 255, bits, np.uint8)
        return codes, scales.astype(np.float16)

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        numbers, scales = codes.astype(np.float32), scales.astype(np.float32)[..., None]
        if self.signed:
            return numbers / (254 - jnp.abs(numbers)) * scales
        roots = numbers * (scales * np.float32(1 / 255))
        return roots * roots


@dataclasses.dataclass(frozen=True)
class _Mapped(Codec):
    """x = map[q]·s with the map's entry nearest to x/s, the upper one of two."""

    @property
    @abc.abstractmethod
    def map(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The numbers from −1 to 1 that codes stand for, ascending."""

    @abc.abstractmethod
    def count(self, shares: Array, bounds: np.ndarray[Any, np.dtype[np.float32]]) -> Array:
        """How many of the ascending `bounds` are not above each number."""

    @abc.abstractmethod
    def look_up(self, codes: Array) -> Array:
        """The number of each code."""

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        largest, numbers = self.largest(blocks), self.map
        smallest = smallest_normal(np.float32) / (1.0 if self.signed else float(numbers[numbers > 0].min()))
        # the inverse of 2¹²⁶ is the smallest normal number; larger ones, of 3e38 at most, become this
        scales = jnp.where(largest == 0, 0, jnp.clip(largest, np.float32(smallest), np.float32(2.0**126)))
        shares = blocks * _inverse(scales)
        if bits is None:
            codes = self.count(shares, midpoints(numbers))
        else:
            below = self.count(shares, numbers[1:])
            low, high = self.look_up(below), self.look_up(jnp.minimum(below + 1, len(numbers) - 1))
            codes = jnp.where(shares - low > (_dither(bits) + np.float32(0.5)) * (high - low), below + 1, below)
        if not self.signed and numbers[0] == 0:
            codes = jnp.maximum(codes, _least(blocks))
        return codes.astype(np.uint8), scales

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        return self.look_up(codes) * scales[..., None]


@dataclasses.dataclass(frozen=True)
class Dynamic8(_Mapped):
    """x = map[q]·s, 7 decades of which each has twice as many numbers as the one below.

    The signed map goes from −0.993 to 1: a block's largest number, if it is negative, loses 0.7 % whenever it is coded.

    References:
      Dettmers 2016, arXiv 1511.04561; Dettmers et al. 2022, arXiv 2110.02861, section 2.2.
    """

    name: ClassVar[str] = "dynamic8"
    block: ClassVar[int] = 256

    @property
    def map(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return dynamic_map(7, self.signed)

    def count(self, shares: Array, bounds: np.ndarray[Any, np.dtype[np.float32]]) -> Array:
        table = jnp.asarray(np.append(bounds, np.float32(np.inf)))
        found = jnp.where(shares >= bounds[127], 128, 0).astype(np.int32)
        for half in (64, 32, 16, 8, 4, 2, 1):
            bound = table.at[found + (half - 1)].get(mode="promise_in_bounds")
            found += jnp.where(shares >= bound, half, 0)
        return found

    def look_up(self, codes: Array) -> Array:
        return jnp.asarray(self.map).at[codes.astype(np.int32)].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Dynamic4(_Mapped):
    """x = map[q]·s with 16 numbers, two codes to a byte: the first in the upper half.

    The signed map goes from −0.8875 to 1: a block's largest number, if it is negative, loses 11 % whenever it is coded.
    The map for x ≥ 0 is 1/16, 2/16, … 1: 0 in a block that has other numbers becomes a 16th of its largest.

    References:
      Li et al. 2023, arXiv 2309.01507, sections 3 and 4.2.
    """

    name: ClassVar[str] = "dynamic4"
    block: ClassVar[int] = 128
    per_code: ClassVar[int] = 2

    @property
    def map(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return dynamic_map(3, True) if self.signed else np.arange(1, 17, dtype=np.float32) / np.float32(16)

    def count(self, shares: Array, bounds: np.ndarray[Any, np.dtype[np.float32]]) -> Array:
        # 15 comparisons of whole vectors: a look-up takes its elements one by one
        found = jnp.zeros(shares.shape, np.int32)
        for bound in bounds:
            found += (shares >= bound).astype(np.int32)
        return found

    def look_up(self, codes: Array) -> Array:
        numbers = jnp.full(codes.shape, self.map[0])
        for code, number in enumerate(self.map[1:], 1):
            numbers = jnp.where(codes >= code, number, numbers)
        return numbers

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        codes, scales = super().encode(blocks, bits)
        pairs = codes.reshape(*codes.shape[:-1], -1, 2)
        return pairs[..., 0] << np.uint8(4) | pairs[..., 1], scales

    def decode(self, codes: Array, scales: Array | None) -> Array:
        pairs = jnp.stack([codes >> np.uint8(4), codes & np.uint8(15)], -1).astype(np.int32)
        return super().decode(pairs.reshape(*codes.shape[:-1], -1), scales)


@dataclasses.dataclass(frozen=True)
class Bfloat16(Codec):
    """x as the 16 bits of a bfloat16, without a scale: it has the range of float32."""

    name: ClassVar[str] = "bfloat16"
    block: ClassVar[int] = 1
    scale_dtype: ClassVar[Any] = None

    @property
    def code_dtype(self) -> Any:
        return np.uint16  # XLA widens a bfloat16 that a loop carries, on CPUs, and copies it

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        if not self.signed:
            blocks = jnp.where(blocks < 0, jnp.nan, blocks)
        bits_of = jax.lax.bitcast_convert_type(round_to(blocks, jnp.bfloat16, bits), np.uint32)
        return (bits_of >> np.uint32(16)).astype(np.uint16), None

    def decode(self, codes: Array, scales: Array | None) -> Array:
        return jax.lax.bitcast_convert_type(codes.astype(np.uint32) << np.uint32(16), np.float32)


CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Root8, Linear8, Companded8, Dynamic8, Dynamic4, Bfloat16)
}
"""The codecs by name."""


@functools.cache
def dynamic_map(exponent_bits: int, signed: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """0, 1 and the middles of 2ⁱ equal parts of each decade from 10^(i−e), twice as many where nothing is negative.

    i counts the `exponent_bits` e from 0; of e + 1 bits in all. References: see `Dynamic8`.
    """
    numbers = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for exponent in range(exponent_bits):
        bounds = _even(2**exponent if signed else 2 ** (exponent + 1))
        middles = np.float32(10.0 ** (exponent - exponent_bits + 1)) * ((bounds[1:] + bounds[:-1]) / np.float32(2))
        numbers += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(numbers))


def _even(parts: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """0.1 to 1 in equal parts, each half counted from its own end and rounded once, as torch.linspace has it."""
    first, last = np.float32(0.1), np.float32(1)
    step, places = np.float64((last - first) / np.float32(parts)), np.arange(parts + 1)
    bounds = np.where(places < (parts + 1) // 2, first + step * places, last - step * (parts - places))
    return bounds.astype(np.float32)


def midpoints(numbers: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Between neighbours a and b, the least x for which x − a ≥ (b − a)/2 in float32: from there b is the nearer."""
    low, high = lower, upper = numbers[:-1], numbers[1:]
    while True:  # bisection down to neighbouring floats
        middle = low + (high - low) * np.float32(0.5)
        between = (low < middle) & (middle < high)
        if not between.any():
            return high
        nearer = middle - lower >= (upper - lower) * np.float32(0.5)
        low, high = np.where(between & ~nearer, middle, low), np.where(between & nearer, middle, high)
