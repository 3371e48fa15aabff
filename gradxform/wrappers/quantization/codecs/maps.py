"""Codes that are indices in a list of numbers."""

from __future__ import annotations

import abc
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array, smallest_normal
from gradxform.numerics.rounding import unit
from gradxform.wrappers.quantization.codecs.codec import Codec, inverse, least


class _Mapped(Codec):
    """x = map[q]·s with the map's entry nearest to x/s; of two as near, the upper one."""

    looked_up: ClassVar[bool] = True

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

    def to_codes(
        self, x: Array, largest: Array | None, bits: Array | None, block_bits: Array | None
    ) -> tuple[Array, Array | None]:
        assert largest is not None
        numbers = self.map
        smallest = smallest_normal(np.float32) / (1.0 if self.signed else float(numbers[numbers > 0].min()))
        # larger scales, of 3e38 at most, become 2¹²⁶, whose inverse is the smallest normal number
        scales = jnp.where(largest == 0, 0, jnp.clip(largest, np.float32(smallest), np.float32(2.0**126)))
        shares = x * self.spread(inverse(scales), x.shape)
        if bits is None:
            codes = self.count(shares, midpoints(numbers))
        else:
            below = self.count(shares, numbers[1:])
            low, high = self.look_up(below), self.look_up(jnp.minimum(below + 1, len(numbers) - 1))
            codes = jnp.where(shares - low > unit(bits) * (high - low), below + 1, below)
        if not self.signed and numbers[0] == 0:
            codes = jnp.maximum(codes, least(x))
        return codes.astype(np.uint8), scales

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        return self.look_up(codes) * self.spread(scales, codes.shape)


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

    def to_codes(
        self, x: Array, largest: Array | None, bits: Array | None, block_bits: Array | None
    ) -> tuple[Array, Array | None]:
        codes, scales = super().to_codes(x, largest, bits, block_bits)
        pairs = codes.reshape(*self.code_shape(x.shape), 2)
        return pairs[..., 0] << np.uint8(4) | pairs[..., 1], scales

    def decode(self, codes: Array, scales: Array | None) -> Array:
        pairs = jnp.stack([codes >> np.uint8(4), codes & np.uint8(15)], -1).astype(np.int32)
        return super().decode(pairs.reshape(*codes.shape[:-1], -1), scales)


@functools.cache
def dynamic_map(exponent_bits: int, signed: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """0, 1 and the middles of 2ⁱ equal parts of each decade from 10^(i−e), twice as many where nothing is negative.

    i goes from 0 to e − 1, where e is `exponent_bits`; codes have e + 1 bits. References: see `Dynamic8`.
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
    """Between neighbours a and b, the least x for which x − a ≥ (b − a)/2 in float32: from there on b is the nearer."""
    low, high = lower, upper = numbers[:-1], numbers[1:]
    while True:  # bisection down to neighbouring floats
        middle = low + (high - low) * np.float32(0.5)
        between = (low < middle) & (middle < high)
        if not between.any():
            return high
        nearer = middle - lower >= (upper - lower) * np.float32(0.5)
        low, high = np.where(between & ~nearer, middle, low), np.where(between & nearer, middle, high)
