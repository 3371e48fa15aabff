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


def strong(x: Any, dtype: Any) -> bool:
    """Whether `x` is an array of just this dtype, not a Python number or weakly typed."""
    aval = getattr(x, "aval", x)
    return hasattr(aval, "dtype") and aval.dtype == dtype and not getattr(aval, "weak_type", False)


def cast(x: Any, dtype: Any) -> Array:
    """`x` rounded to `dtype`; a finite number too large for it becomes its largest, not infinity."""
    known = getattr(x, "aval", None)
    if known is not None and known.dtype == dtype and not known.weak_type:  # `strong`, written out for speed
        return x
    x = jnp.asarray(x)
    if jnp.issubdtype(dtype, jnp.complexfloating) and x.dtype != dtype:
        real = real_dtype(dtype)
        return jax.lax.complex(cast(x.real, real), cast(x.imag, real))
    if jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(x.dtype, jnp.floating):
        largest = float(jnp.finfo(dtype).max)
        if largest < float(jnp.finfo(x.dtype).max):
            x = jnp.where(jnp.isinf(x), x, clamp(x, largest))
    return jax.lax.convert_element_type(x, dtype)


def widened_apart(x: Array, dtype: Any) -> Array:
    """`x` in a wider dtype; a bfloat16 by its bits: a conversion that a reduction makes as well is written out (X3)."""
    return _by_bits(x) if x.dtype == jnp.bfloat16 and dtype == np.float32 else cast(x, dtype)


@jax.custom_jvp
def _by_bits(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, np.uint16).astype(np.uint32) << np.uint32(16)
    return jax.lax.bitcast_convert_type(bits, np.float32)


@_by_bits.defjvp
def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    [x], [tangent] = primals, tangents
    return _by_bits(x), cast(tangent, np.float32)


def no_update(x: Array) -> Array:
    """−0, which leaves every number as it is when added, −0 included."""
    return jnp.full_like(x, complex(-0.0, -0.0) if jnp.iscomplexobj(x) else -0.0)


def clamp(x: Array, limit: float) -> Array:
    """`x` bounded by ±limit, infinities too; a complex `x` keeps its phase."""
    if jnp.iscomplexobj(x):
        largest = largest_part(x)
        return x * jnp.where(largest > limit / 2, limit / 2 / largest, 1)
    low, high = np.asarray((-limit, limit), x.dtype)
    return jax.lax.clamp(low, x, high)  # one operation, of which jnp.clip makes two


def parts(x: Array) -> list[Array]:
    """The real and the imaginary part of a complex `x`; a real `x` alone."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def largest_part(x: Array) -> Array:
    """max(|Re x|, |Im x|)."""
    return functools.reduce(jnp.maximum, map(jnp.abs, parts(x)))


def zero_if_finite(x: Array) -> Array:
    """0 where `x` is finite, NaN where it is not: added to a result, it shows that an input was not finite."""
    nothing = x - x
    return nothing.real + nothing.imag if jnp.iscomplexobj(x) else nothing


def lerp(old: Array, new: Array, weight: Any) -> Array:
    """old + weight·(new − old), from whichever end is nearer: exact where old = new and for weights 0 and 1.

    Numbers that are further apart than the largest float overflow.
    """
    way = new - old
    if isinstance(weight, float):
        return old + weight * way if weight <= 0.5 else new - (1 - weight) * way
    return jnp.where(weight <= 0.5, old + weight * way, new - (1 - weight) * way)


def is_constant(number: Any, value: float) -> bool:
    """Whether a number of a step is known to be `value` before any step runs."""
    return isinstance(number, float) and number == value


def plus(number: Any, x: Array) -> Array:
    """number + x; `x` itself if the number is a constant 0: what is not traced is not compiled."""
    return x if is_constant(number, 0.0) else number + x


def times(number: Any, x: Array) -> Array:
    """number · x; `x` itself if the number is a constant 1."""
    return x if is_constant(number, 1.0) else number * x


def abs_squared(x: Array, scale: Array | float | None = None) -> Array:
    """|x|², real for complex x; with a scale, |scale·x|²."""
    scaled = parts(x) if scale is None else [scale * part for part in parts(x)]
    return functools.reduce(jax.lax.add, [part * part for part in scaled])


@jax.custom_jvp
def root(x: Array) -> Array:
    """√x for x ≥ 0, whose derivative counts as 0 at 0: then quotients like m/(√v + ε) have the right one there."""
    return jnp.sqrt(x)


@root.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    [x], [way] = primals, tangents
    result = root(x)
    return result, jnp.where(result > 0, way / (2 * jnp.where(result > 0, result, 1)), 0)


def one_minus_power(base: Any, exponent: Array) -> Array:
    """1 − baseᵗ for base in [0, 1), without the cancellation: −expm1(t·log base)."""
    return -jnp.expm1(exponent * _log(base))


def _log(x: Any) -> Any:
    if isinstance(x, float):
        return math.log(x) if x > 0 else -math.inf
    return jnp.log(x)
