"""The upper half of a float32 as a code."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array
from gradxform.numerics.rounding import round_to
from gradxform.wrappers.quantization.codecs.codec import Codec


class Bfloat16(Codec):
    """x as the 16 bits of a bfloat16, without a scale: it has the range of float32."""

    name: ClassVar[str] = "bfloat16"
    block: ClassVar[int] = 1
    scale_dtype: ClassVar[Any] = None

    @property
    def code_dtype(self) -> Any:
        return np.uint16  # on CPUs XLA widens, and so copies, a bfloat16 that a loop carries

    def to_codes(
        self, x: Array, largest: Array | None, bits: Array | None, block_bits: Array | None
    ) -> tuple[Array, Array | None]:
        if not self.signed:
            x = jnp.where(x < 0, jnp.nan, x)
        bits_of = jax.lax.bitcast_convert_type(round_to(x, jnp.bfloat16, bits), np.uint32)
        return (bits_of >> np.uint32(16)).astype(np.uint16), None

    def decode(self, codes: Array, scales: Array | None) -> Array:
        return jax.lax.bitcast_convert_type(codes.astype(np.uint32) << np.uint32(16), np.float32)
