"""Names of JAX that have moved or may move, from where they are now. Other files take them from here."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer as Tracer  # other names of jax.core have been removed
from jax.sharding import AxisType as AxisType
from jax.sharding import auto_axes as auto_axes  # from jax.experimental.shard
from jax.sharding import reshard as reshard  # from jax.experimental.shard


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which the type of a traced array says that it differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying  # .vma until JAX 0.9


def canonical_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype that an array of this dtype has in JAX: 32 bits in place of 64 without x64; dtypes of keys stay."""
    canonical: Any = jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
    return canonical
