"""Arithmetic on one array that keeps its promises: no overflow, no cancellation, no division by zero."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.lru_cache(maxsize=64)
def real_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of the real part: float32 for complex64."""
    return np.dtype(jnp.finfo(dtype).dtype)


@functools.lru_cache(maxsize=64)
def smallest_normal(dtype: Any) -> float:
    """The smallest number that is not flushed to zero."""
    return float(jnp.finfo(dtype).smallest_normal)


@functools.lru_cache(maxsize=64)
def largest_square(dtype: Any) -> float:
    """Half the root of the largest number: its square, and four times that, are finite."""
    return 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 1)


def cast(x: Any, dtype: Any) -> Array:
    """`x` rounded to `dtype`; a finite number too large for it becomes its largest, not infinity."""
    x = jnp.asarray(x)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(x.dtype, jnp.floating):
        largest = float(jnp.finfo(dtype).max)
        if largest < float(jnp.finfo(x.dtype).max):
            x = jnp.where(jnp.isinf(x), x, clamp(x, largest))
    return jax.lax.convert_element_type(x, dtype)


def clamp(x: Array, limit: float) -> Array:
    """`x` within ±limit, infinities too; a complex `x` by its parts."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(clamp(x.real, limit / 2), clamp(x.imag, limit / 2))
    return jnp.clip(x, -limit, limit)


def zero_if_finite(x: Array) -> Array:
    """0 where `x` is finite, NaN where it is not: added, it lets a non-finite input be seen."""
    return (x - x).real


def lerp(old: Array, new: Array, weight: Any) -> Array:
    """old + weight·(new − old), from whichever end is nearer: exact where old = new and for weights 0 and 1."""
    near_old, near_new = old + weight * (new - old), new - (1 - weight) * (new - old)
    if isinstance(weight, float):
        return near_old if weight <= 0.5 else near_new
    return jnp.where(weight <= 0.5, near_old, near_new)


def abs_squared(x: Array) -> Array:
    """|x|², real for complex x."""
    return x * x if not jnp.iscomplexobj(x) else x.real * x.real + x.imag * x.imag


def one_minus_power(base: Any, exponent: Array) -> Array:
    """1 − baseᵗ for base in [0, 1), without the cancellation: −expm1(t·log base)."""
    return -jnp.expm1(exponent * _log(base))


def _log(x: Any) -> Any:
    if isinstance(x, float):
        return math.log(x) if x > 0 else -math.inf
    return jnp.log(x)


def norm(x: Array) -> Array:
    """‖x‖₂ over all elements, in at least float32, right from the smallest to the largest floats."""
    x = jnp.abs(x) if jnp.iscomplexobj(x) else x
    top = jnp.finfo(x.dtype).maxexp
    near, far = 2.0 ** (top // 2 - 4), 2.0 ** (5 * top // 8)
    largest = jnp.max(jnp.abs(x), initial=0.0)
    scale = jnp.where(largest > near, 1 / far, jnp.where(largest < 1 / near, far, 1.0)).astype(x.dtype)
    return jnp.sqrt(jnp.sum(jnp.square(x * scale))) / scale
