"""Codes of one or two bytes for the numbers of an optimizer state: mathematics on rows of one array.

A codec takes float32 blocks of shape (…, block), one per row, and gives codes of the same shape and one scale per row.
Rows are independent of one another, so any run of rows may be coded by itself, such as a chunk inside a loop.
Each codec has a form for signed numbers and one for numbers that are never negative, such as second moments: there a
positive number never becomes 0, which would make m/(√v + ε) huge, but the smallest positive number of its block's code.

What holds for every codec: a block of zeros stays so; a NaN or an infinity makes its whole block NaN, and so does a
negative number where there must be none; no finite number overflows. What has been decoded is coded as it was.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics import Array, cast, round_to, smallest_normal


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
    needs_bits: ClassVar[bool] = False
    """Whether `encode` rounds at random."""

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

        `bits` are 32 random ones per number, where the codec needs them.
        """

    @abc.abstractmethod
    def decode(self, codes: Array, scales: Array | None) -> Array:
        """The blocks, in float32, that codes and scales stand for."""

    def largest(self, blocks: Array) -> Array:
        """Of each block the largest magnitude, NaN where the block cannot be coded."""
        magnitudes = jnp.abs(blocks) if self.signed else jnp.where(blocks < 0, jnp.nan, blocks)
        largest = jnp.max(magnitudes, -1)
        return largest + (largest - largest)  # NaN for an infinity


def _inverse(scales: Array) -> Array:
    """One over each scale, 0 for a scale of 0: multiplied with its block."""
    return jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)[..., None]


def _whole(x: Array) -> Array:
    """The int32 nearest to a small `x`, in whose low byte it is: in the last bits of x + 3·2²², without a conversion.

    XLA's own makes sure of NaN and of numbers too large, for a third of the time of a step.
    """
    return jax.lax.bitcast_convert_type(x + np.float32(3 * 2**22), np.int32)


def _positive(codes: Array, blocks: Array) -> Array:
    """Codes of which none is 0 where the number is positive."""
    return jnp.where(blocks > 0, jnp.maximum(codes, 1), 0)


@dataclasses.dataclass(frozen=True)
class Linear8(Codec):
    """x = q·s, and where x ≥ 0, x = (q·s)²: evenly spaced numbers, or roots; the fastest.

    s is rounded to 16 significant bits, so that every product q·s is exact and decoding and coding again changes nothing.
    """

    name: ClassVar[str] = "linear8"
    block: ClassVar[int] = 256

    @property
    def code_dtype(self) -> Any:
        return np.int8 if self.signed else np.uint8

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        largest = self.largest(blocks)
        # the smallest step has an inverse, and where it is squared a square
        levels, smallest = (127, 2.0**-126) if self.signed else (255, 2.0**-62)
        largest = largest if self.signed else jnp.sqrt(largest)
        steps = jax.lax.reduce_precision(jnp.maximum(largest * np.float32(1 / levels), np.float32(smallest)), 8, 15)
        steps = jnp.where(largest == 0, 0, steps)
        inverse = _inverse(steps)
        if self.signed:
            return _whole(blocks * inverse).astype(np.int8), steps
        return _whole(_positive(jnp.sqrt(blocks) * inverse, blocks)).astype(np.uint8), steps

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        products = codes.astype(np.float32) * scales[..., None]
        return products if self.signed else products * products


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
        scales = jnp.where(coarse, upper, round_to(largest, np.float16))
        inverse = _inverse(jnp.where(coarse, upper, largest))
        if self.signed:
            shares = blocks * inverse
            codes = _whole(shares * np.float32(254) / (1 + jnp.abs(shares)))
        else:
            codes = _whole(_positive(jnp.sqrt(blocks) * (inverse * np.float32(255)), blocks))
        return codes.astype(self.code_dtype), scales.astype(np.float16)

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
    def find(self, shares: Array) -> Array:
        """The code of each number from −1 to 1."""

    @abc.abstractmethod
    def look_up(self, codes: Array) -> Array:
        """The number of each code."""

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        largest = self.largest(blocks)
        numbers = self.map
        smallest = smallest_normal(np.float32) / (1.0 if self.signed else float(numbers[numbers > 0].min()))
        scales = jnp.where(largest == 0, 0, jnp.maximum(largest, np.float32(smallest)))
        codes = self.find(blocks * _inverse(scales))
        if not self.signed and numbers[0] == 0:
            codes = _positive(codes, blocks)
        return codes, scales

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        return self.look_up(codes) * scales[..., None]


@dataclasses.dataclass(frozen=True)
class Dynamic8(_Mapped):
    """x = map[q]·s, 7 decades of which each has twice as many numbers as the one below.

    References:
      Dettmers 2016, arXiv 1511.04561; Dettmers et al. 2022, arXiv 2110.02861, section 2.2.
    """

    name: ClassVar[str] = "dynamic8"
    block: ClassVar[int] = 256

    @property
    def map(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return dynamic_map(7, self.signed)

    def find(self, shares: Array) -> Array:
        bounds = jnp.asarray(np.append(midpoints(dynamic_map(7, self.signed)), np.float32(np.inf)))
        codes = jnp.zeros(shares.shape, np.int32)
        for half in (128, 64, 32, 16, 8, 4, 2, 1):
            bound = bounds.at[codes + (half - 1)].get(mode="promise_in_bounds")
            codes += jnp.where(shares >= bound, half, 0)
        return codes

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        codes, scales = super().encode(blocks)
        return codes.astype(np.uint8), scales

    def look_up(self, codes: Array) -> Array:
        return jnp.asarray(self.map).at[codes.astype(np.int32)].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Dynamic4(_Mapped):
    """x = map[q]·s with 16 numbers, two codes to a byte: the first in the upper half.

    The map for x ≥ 0 is 1/16, 2/16, … 1: without 0, so 0 in a block that has other numbers becomes a 16th of its largest.

    References:
      Li et al. 2023, arXiv 2309.01507, section 3 and 4.2.
    """

    name: ClassVar[str] = "dynamic4"
    block: ClassVar[int] = 128
    per_code: ClassVar[int] = 2

    @property
    def map(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return dynamic_map(3, True) if self.signed else np.arange(1, 17, dtype=np.float32) / 16

    def find(self, shares: Array) -> Array:
        # 15 comparisons of whole vectors: a look-up takes its elements one by one
        return sum((shares >= bound).astype(np.int32) for bound in midpoints(self.map))  # pyright: ignore[reportReturnType] (of arrays, not of the 0 it begins with)

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        codes, scales = super().encode(blocks)
        pairs = codes.reshape(*codes.shape[:-1], -1, 2)
        return (pairs[..., 0] << 4 | pairs[..., 1]).astype(np.uint8), scales

    def decode(self, codes: Array, scales: Array | None) -> Array:
        pairs = jnp.stack([codes >> np.uint8(4), codes & np.uint8(15)], -1)
        return super().decode(pairs.reshape(*codes.shape[:-1], -1), scales)

    def look_up(self, codes: Array) -> Array:
        numbers = jnp.full(codes.shape, self.map[0])
        for code, number in enumerate(self.map[1:], 1):
            numbers = jnp.where(codes >= np.uint8(code), number, numbers)
        return numbers


@dataclasses.dataclass(frozen=True)
class Bfloat16(Codec):
    """x up or down to a bfloat16 at random, so that its mean is right; with the range of float32, and no scale.

    References:
      Zamirai et al. 2020, arXiv 2010.06192, section 3.
    """

    name: ClassVar[str] = "bfloat16"
    block: ClassVar[int] = 1
    scale_dtype: ClassVar[Any] = None
    needs_bits: ClassVar[bool] = True

    @property
    def code_dtype(self) -> Any:
        return jnp.bfloat16

    def encode(self, blocks: Array, bits: Array | None = None) -> tuple[Array, Array | None]:
        if not self.signed:
            blocks = jnp.where(blocks < 0, jnp.nan, blocks)
        return cast(round_to(blocks, jnp.bfloat16, bits), jnp.bfloat16), None

    def decode(self, codes: Array, scales: Array | None) -> Array:
        return codes.astype(np.float32)


CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Linear8, Companded8, Dynamic8, Dynamic4, Bfloat16)
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
    """0.1 to 1 in `parts` equal parts, each half counted from its own end and rounded once, as torch.linspace has it."""
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
