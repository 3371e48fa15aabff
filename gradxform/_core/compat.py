"""Names of JAX that have moved, or may: where they stand now. No other file says them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer as Tracer  # others of jax.core have gone
from jax.sharding import AxisType as AxisType
from jax.sharding import auto_axes as auto_axes  # from jax.experimental.shard
from jax.sharding import reshard as reshard  # from jax.experimental.shard


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which the type of a traced array says that it differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying  # .vma until JAX 0.9


def canonical_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype that JAX gives an array of this one: 32 bits for 64 without x64; those of keys are their own."""
    canonical: Any = jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
    return canonical
