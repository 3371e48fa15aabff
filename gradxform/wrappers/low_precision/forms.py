"""Ways to keep a float32 value as a low-precision parameter and what that lacks: mathematics on one array."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.numerics.arithmetic import Array, cast
from gradxform.numerics.rounding import half_step, round_to, up_or_down
from gradxform.wrappers.low_precision.lifting import ParameterForm


@dataclasses.dataclass(frozen=True)
class StochasticRounding(ParameterForm):
    """The number above or below, at random."""

    @property
    def residual_dtype(self) -> Any:
        return None

    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        return param

    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        return round_to(value, dtype, bits), None


@dataclasses.dataclass(frozen=True)
class MasterWeights(ParameterForm):
    """A float32 copy beside the nearest number."""

    keeps_value: ClassVar[bool] = True

    @property
    def residual_dtype(self) -> Any:
        return jnp.float32

    def first_residual(self, value: Array) -> Array:
        return jnp.zeros_like(value) if isinstance(value, jax.ShapeDtypeStruct) else jnp.array(value)

    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        return jnp.where(round_to(residual, dtype) == param, residual, param)

    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        return round_to(value, dtype), value


@dataclasses.dataclass(frozen=True)
class Compensated(ParameterForm):
    """The nearest number, beside what it lacks."""

    residual: str = "bfloat16"
    twice: ClassVar[bool] = True

    @property
    def residual_dtype(self) -> Any:
        return np.dtype(self.residual)

    @property
    def _parts(self) -> float:
        """The number of parts into which an integer residual divides half a step."""
        return float(np.iinfo(self.residual_dtype).max)

    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        if self.residual == "bfloat16":
            rest = cast(residual, jnp.float32)
            # a residual of more than half a step is an old one: the parameter was set from outside
            return param + jnp.where(jnp.abs(rest) <= half_step(param, dtype), rest, 0)
        return param + residual.astype(jnp.float32) * (half_step(param, dtype) / self._parts)

    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        target = round_to(value, dtype)
        rest = jnp.where(jnp.isfinite(value), value - target, 0)
        if self.residual == "bfloat16":
            return target, cast(round_to(rest, jnp.bfloat16, bits), jnp.bfloat16)
        step = half_step(target, dtype)
        parts = jnp.where(step > 0, rest / jnp.where(step > 0, step, 1), 0) * self._parts
        # int16 is as fine as float32: there rounding to nearest loses nothing, and rounding at random would
        parts = jnp.round(parts) if self.residual == "int16" else up_or_down(parts, bits)
        return target, jnp.clip(parts, -self._parts, self._parts).astype(self.residual_dtype)


RESIDUALS = ("bfloat16", "int8", "int16")
