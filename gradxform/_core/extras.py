"""Extra arguments of ``update`` that rules read by name, such as the loss: ``update(…, value=loss)``."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core.arguments import visible_dtype
from gradxform._core.call import Call
from gradxform._core.trees import aval, describe


def extra_of(who: str, name: str, call: Call) -> jax.Array:
    """The extra argument `name`, a real scalar of at least float32; `who` reads it, for messages."""
    if name not in call.extra_args:
        got = ", ".join(call.extra_args) or "no extra argument"
        raise TypeError(f"{who} reads {name!r}: call update(…, {name}=…); it got {got}")
    value = call.extra_args[name]
    _, dtype = aval(value)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, which {who} reads, got {describe(value)}")
    if np.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, which {who} reads, got shape {np.shape(value)}")
    return jnp.asarray(value, visible_dtype())


def extras_of(who: str, names: Iterable[str], call: Call) -> dict[str, jax.Array]:
    """Several extra arguments by name; see `extra_of`."""
    return {name: extra_of(who, name, call) for name in names}


def with_finite(finite: jax.Array, extras: Iterable[jax.Array]) -> jax.Array:
    """Whether also the extra arguments are finite."""
    for value in extras:
        finite = finite & jnp.isfinite(value)
    return finite
