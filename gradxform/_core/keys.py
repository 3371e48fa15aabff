"""Random keys of rules: a seed in the state, and from it a key for each step, stage and leaf."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core import meshes

WORDS = 2
"""A seed is this many uint32 numbers: plain arrays, which every library for checkpoints keeps."""


@dataclasses.dataclass(frozen=True)
class Seed:
    """What users give as ``key=``: equal for equal whole numbers; an array is equal to itself only."""

    value: Any = dataclasses.field(compare=False)
    identity: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", self.value if self.constant else id(self.value))

    def __reduce__(self) -> Any:  # a copy has an identity of its own; keys of JAX are not pickled
        if self.constant:
            return Seed, (self.value,)
        return _restored, (jax.random.key_data(self.value), str(jax.random.key_impl(self.value)))

    @property
    def constant(self) -> bool:
        """Whether it is a number, not an array, which may be traced."""
        return isinstance(self.value, int)

    def array(self, stage: int) -> jax.Array:
        """The seed that the state holds for a stage: two stages with one seed draw other numbers."""
        key = jax.random.key(self.value) if self.constant else self.value
        return jax.random.bits(jax.random.fold_in(key, np.uint32(stage)), (WORDS,), np.uint32)


def _restored(data: Any, impl: str) -> Seed:
    return Seed(jax.random.wrap_key_data(data, impl=impl))


def seed_of(name: str, value: Any) -> Seed | None:
    """The argument `name`, checked: a whole number or one of JAX's keys, typed or raw; None for no randomness."""
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return Seed(int(value))
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            if value.shape == ():
                return Seed(value)
        elif value.dtype == np.uint32 and value.ndim == 1:
            return Seed(jax.random.wrap_key_data(jnp.asarray(value)))
    what = jax.typeof(value) if isinstance(value, jax.Array | np.ndarray) else repr(value)
    raise TypeError(f"{name} must be a whole number or a key, as jax.random.key gives it, got {what}")


@functools.partial(jax.jit, static_argnums=2)
def leaf_keys(seed: jax.Array, count: jax.Array, leaves: int) -> list[jax.Array]:
    """A key for each of so many leaves in this step, raw; run-time data, so that equal leaves stay equal (X7)."""
    now = jax.random.fold_in(typed(seed), count)
    return list(jax.random.key_data(jax.random.split(now, leaves)))


def typed(key: jax.Array) -> jax.Array:
    """A raw key as `jax.random` takes it."""
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def of_shards(key: jax.Array, update: Any, axis_name: Sequence[str] | None) -> jax.Array:
    """Inside `jax.shard_map`, a key for each shard of a leaf that is divided; elsewhere the key as it is."""
    varying = meshes.varying_over(update)
    named = meshes.tracked(tuple(axis_name), varying) if axis_name else ()
    for axis in sorted(varying.union(named)):
        key = jax.random.key_data(jax.random.fold_in(typed(key), jax.lax.axis_index(axis)))
    return key
