"""Codes of numbers whose sizes were made more alike first, in small groups."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array
from gradxform.numerics.rounding import round_to
from gradxform.wrappers.quantization.codecs.codec import Codec, inverse, least, whole, with_sign_of


class Companded8(Codec):
    """x = s·z/(2 − |z|), z = q/127, and where x ≥ 0, x = (s·q/255)²: finer near zero, in groups of 32.

    The scale is a float16: from 6e-8 to 65504, for numbers or, where x ≥ 0, for their roots. Smaller numbers lose their
    precision, and blocks of larger numbers shrink to 65504.

    References:
      Ortiz et al. 2026, arXiv 2602.23349, section 3.2.
    """

    name: ClassVar[str] = "companded8"
    block: ClassVar[int] = 32
    scale_dtype: ClassVar[Any] = np.float16

    @property
    def code_dtype(self) -> Any:
        return np.int8 if self.signed else np.uint8

    def to_codes(
        self, x: Array, largest: Array | None, bits: Array | None, block_bits: Array | None
    ) -> tuple[Array, Array | None]:
        assert largest is not None
        largest = largest if self.signed else jnp.sqrt(largest)
        coarse = largest < 2.0**-14  # below float16's normal numbers: its next number up is the unit
        upper = jnp.ceil(largest * 2.0**24) * 2.0**-24
        upper = jnp.where(largest > 0, jnp.maximum(upper, 2.0**-24), upper)
        # rounded to nearest, a scale that shrinks by less than half of float16's step would not change
        scales = jnp.where(coarse, upper, round_to(largest, np.float16, block_bits))
        unit = jnp.where(coarse, upper, largest)
        per_unit = self.spread(inverse(jnp.minimum(unit, 2.0**126)), x.shape)  # a larger unit has no normal inverse
        if self.signed:
            shares = jnp.abs(x) * per_unit
            codes = whole(with_sign_of(x, shares / (1 + shares) * np.float32(254)), -127, 127, bits, np.int8)
        else:
            codes = whole(jnp.sqrt(jnp.abs(x)) * per_unit * np.float32(255), least(x), 255, bits, np.uint8)
        return codes, scales.astype(np.float16)

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        numbers, scales = codes.astype(np.float32), self.spread(scales.astype(np.float32), codes.shape)
        if self.signed:
            return numbers * _inverse_up_to_254(254 - jnp.abs(numbers)) * scales
        roots = numbers * (scales * np.float32(1 / 255))
        return roots * roots


def _inverse_up_to_254(x: Array) -> Array:
    """1/x for x from 127 to 254, by Newton's iteration: a quotient would be written out (X9)."""
    y = np.float32(48 / 17 / 254) - np.float32(32 / 17 / 254**2) * x
    for _ in range(3):
        y = y * (2 - x * y)
    return y
