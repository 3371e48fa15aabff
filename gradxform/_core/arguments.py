"""Arguments, checked by name: numbers and their ranges, flags, words, dtypes, counts, axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core import trees


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of real numbers, e.g. ``[0, 1)``."""

    low: float
    high: float
    closed_low: bool = True
    closed_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, float)
        above = value >= self.low if self.closed_low else value > self.low
        below = value <= self.high if self.closed_high else value < self.high
        return above and below

    def __str__(self) -> str:
        left, right = "[" if self.closed_low else "(", "]" if self.closed_high else ")"
        return f"{left}{self.low:g}, {self.high:g}{right}"


FINITE = Range(-math.inf, math.inf, closed_low=False)


def positive_range() -> Range:
    """(0, inf)"""
    return Range(0.0, math.inf, closed_low=False)


def is_a(value: object, *types: type) -> bool:
    """`isinstance`, for arguments whose annotation says that they are: not every caller is type-checked."""
    return isinstance(value, types)


def flag(name: str, value: object) -> bool:
    """`value` as a bool, if it is one: nothing that is merely true or false in a condition."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_describe(value)}")
    return bool(value)


def one_of(name: str, value: object, *choices: str) -> str:
    """`value`, if it is one of the words `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {_describe(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def float_dtype(name: str, value: Any) -> np.dtype[Any] | None:
    """A real floating-point dtype, or None for the default."""
    if value is None:
        return None
    try:
        dtype = np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a real floating-point dtype, got {value!r}")
    return dtype


def state_float_dtype(name: str, value: Any) -> np.dtype[Any] | None:
    """A dtype that a moment can be kept in, or None for the default."""
    dtype = float_dtype(name, value)
    if dtype is not None and dtype.itemsize < 2:
        raise TypeError(f"{name} must have at least 16 bits, got {dtype}: its range is too small for a moment")
    return dtype


def square_dtype(name: str, value: Any) -> np.dtype[Any] | None:
    """A dtype that second moments can be kept in, or None for the default."""
    dtype = state_float_dtype(name, value)
    if dtype == np.float16:
        raise ValueError(f"{name} float16 holds 6e-8 to 65504, which squares of gradients leave; use bfloat16")
    return dtype


def axes(name: str, value: Any) -> tuple[str, ...] | None:
    """The names of mesh axes, given as one name, several or None."""
    names = (value,) if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, tuple | list) or not all(isinstance(axis, str) for axis in names):
        raise TypeError(f"{name} must be the name of a mesh axis or a sequence of names, got {value!r}")
    return tuple(names)


def names(name: str, value: Any) -> tuple[str, ...]:
    """A sequence of names, such as ``extra=``."""
    found = () if isinstance(value, str) or not is_a(value, Sequence) else tuple(value)
    if not all(isinstance(each, str) and each.isidentifier() for each in found) or len(found) != len(value or ()):
        raise TypeError(f"{name} must be a sequence of names such as ('value',), got {value!r}")
    return found


def count_of(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least 1, such as ``every=``, or of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = " (optax.inject_hyperparams: name it in static_args)" if isinstance(value, jax.Array) else ""
        raise TypeError(f"{name} must be a whole number, got {value!r}{hint}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def number_in(name: str, value: Any, within: Range) -> float:
    """A Python float in a range, for what is fixed when a transformation is built."""
    plain = number(name, value)
    if not isinstance(plain, float):
        if not trees.concrete(plain):
            raise TypeError(f"{name} must be a concrete number, got {plain}")
        plain = float(plain)
    check_range(name, plain, within)
    return plain


def number(name: str, value: Any) -> float | jax.Array:
    """`value` as a Python float, or as the 0-d array or tracer it is."""
    check_real(name, value)
    if np.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(value)}")
    return value if isinstance(value, jax.Array) else float(value)


def check_real(name: str, value: Any) -> None:
    """Raise unless `value` is real and, if an array, of at least float32."""
    _, dtype = trees.aval(value)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, a 0-d array or a schedule, got {_describe(value)}")
    if isinstance(value, jax.Array) and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{name} arrives as {dtype}, which rounds 0.999 to 1; pass a Python number or at least float32 "
            "(optax.inject_hyperparams takes hyperparam_dtype=jnp.float32; gx.live needs nothing)"
        )


def check_range(name: str, value: Any, within: Range) -> None:
    """Raise if a concrete `value` lies outside `within`; tracers pass."""
    if trees.concrete(value) and not all(x in within for x in np.ravel(value).astype(float).tolist()):
        raise ValueError(f"{name} must be in {within}, got {value}")


def visible_dtype() -> np.dtype[Any]:
    """The dtype of the values shown in the state: float32, or float64 under x64."""
    return np.dtype(jnp.result_type(float))


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if not isinstance(value, jax.Array) else str(jax.typeof(value))
