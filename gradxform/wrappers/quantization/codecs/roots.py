"""Codes whose roots are evenly spaced."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array
from gradxform.wrappers.quantization.codecs.codec import Codec, inverse, least, whole, with_sign_of


class Root8(Codec):
    """x = ±(q·s)², and where x ≥ 0, x = (q·s)⁴: evenly spaced square roots, or fourth roots; finer near zero.

    s is rounded to 16 significant bits, so that q·s is exact, and decoding and coding again changes nothing.
    """

    name: ClassVar[str] = "root8"
    block: ClassVar[int] = 256

    @property
    def code_dtype(self) -> Any:
        return np.int8 if self.signed else np.uint8

    @property
    def levels(self) -> int:
        """The largest code."""
        return 127 if self.signed else 255

    def root(self, x: Array) -> Array:
        """The root of x ≥ 0 that is evenly spaced."""
        return jnp.sqrt(x) if self.signed else jnp.sqrt(jnp.sqrt(x))

    def to_codes(
        self, x: Array, largest: Array | None, bits: Array | None, block_bits: Array | None
    ) -> tuple[Array, Array | None]:
        assert largest is not None
        power = 2.0 if self.signed else 4.0
        # the power of the smallest step is a normal number; that of the largest code times the largest step is finite
        smallest, most = 2.0 ** np.ceil(-126 / power), 2.0 ** (128 / power) / self.levels * (1 - 2.0**-15)
        root = self.root(largest)
        steps = jnp.clip(root * np.float32(1 / self.levels), np.float32(smallest), np.float32(most))
        steps = jnp.where(root == 0, 0, jax.lax.reduce_precision(steps, 8, 15))
        roots = self.root(jnp.abs(x)) * self.spread(inverse(steps), x.shape)
        if self.signed:
            return whole(with_sign_of(x, roots), -self.levels, self.levels, bits, np.int8), steps
        return whole(roots, least(x), self.levels, bits, np.uint8), steps

    def decode(self, codes: Array, scales: Array | None) -> Array:
        assert scales is not None
        x = codes.astype(np.float32) * self.spread(scales, codes.shape)
        if self.signed:
            return x * jnp.abs(x)
        square = x * x
        return square * square
