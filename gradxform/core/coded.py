"""Rules on a leaf whose moments are kept as codes: decode, step and encode in the kernels of one step.

Decoded moments are never written. On a CPU each of three kernels makes them anew, which costs less than to store them:
the largest of each block, the update, and the codes in place of the old ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gradxform import numerics, rounding
from gradxform.codecs.codec import Codec, largest_of
from gradxform.core import trees
from gradxform.core.compiled import on_leaf
from gradxform.core.leaves import HOLE
from gradxform.core.rules import Array, Rule


@dataclasses.dataclass(frozen=True)
class Coded:
    """A moment of one leaf, kept as codes; a leaf of JAX's trees, so that it stands where the moment would."""

    codec: Codec
    codes: Any
    scales: Any
    seed: Any
    """Of the bits that round the next codes; None rounds to nearest."""

    def arrays(self) -> tuple[Any, Any]:
        """Codes and scales, None if the codec has none."""
        return self.codes, None if self.codec.scale_dtype is None else self.scales

    def replaced(self, codes: Any, scales: Any) -> Coded:
        """With other codes and scales."""
        return dataclasses.replace(self, codes=codes, scales=self.scales if scales is None else scales)


def coded_update(rules: tuple[Rule, ...]) -> Callable[..., tuple[jax.Array, tuple[Any, ...]]]:
    """`on_leaf` for a leaf some of whose moments are `Coded`."""

    def update_leaf(
        how: str, final: Any, dtype: Any, scalars: Any, own: Any, update: Any, slots: Any, param: Any, taken: Any
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        codecs = tuple(slot.codec if isinstance(slot, Coded) else None for slot in slots)
        seeds = tuple(slot.seed if isinstance(slot, Coded) else None for slot in slots)
        given = tuple(slot.arrays() if isinstance(slot, Coded) else slot for slot in slots)
        result, new = _on_coded(rules, codecs)(how, final, dtype, scalars, own, update, given, param, taken, seeds)
        kept = (old.replaced(*one) if isinstance(old, Coded) else one for old, one in zip(slots, new, strict=True))
        return result, tuple(kept)

    return update_leaf


@functools.lru_cache(maxsize=4096)
def _on_coded(rules: tuple[Rule, ...], codecs: tuple[Codec | None, ...]) -> Callable[..., Any]:
    coded = {place: codec for place, codec in enumerate(codecs) if codec is not None}
    scaled = any(codec.scale_dtype is not None for codec in coded.values())

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def coded_leaf_update(how, final, dtype, scalars, own, update, slots, param, taken, seeds):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        with jax.numpy_dtype_promotion("standard"):
            wide = tuple(
                slot if codec is None else codec.decode(*slot).reshape(update.shape)
                for codec, slot in zip(codecs, slots, strict=True)
            )
            result, new = on_leaf(rules)(how, final, dtype, scalars, own, update, wide, param, taken)
            kept = list(new)
            moments = [numerics.cast(new[place], jnp.float32) for place in coded]
            after = result if jax.default_backend() == "cpu" else None
            largest = largest_of([*coded.values()], moments, after) if scaled else [None] * len(coded)
            for (place, codec), moment, highest in zip(coded.items(), moments, largest, strict=True):
                bits = None if seeds[place] is None else rounding.own_bits(moment, seeds[place])
                pair = codec.to_codes(moment, highest, bits)
                kept[place] = tuple(map(functools.partial(_taken, taken), pair, slots[place]))
            return result, tuple(kept)

    return coded_leaf_update


def _taken(taken: Any, new: Any, old: Any) -> Any:
    """The new array, the old one where the step is not taken."""
    return new if taken is None or new is None else jnp.where(taken, new, old)


# A whole array, outside the kernels of a step


def coded_avals(codec: Codec, shape: tuple[int, ...]) -> tuple[trees.Aval, trees.Aval | None]:
    """Shape and dtype of the codes and the scales of an array; None if there are no scales."""
    scales = None if codec.scale_dtype is None else (codec.scale_shape(shape), np.dtype(codec.scale_dtype))
    return (codec.code_shape(shape), np.dtype(codec.code_dtype)), scales


@functools.partial(jax.jit, static_argnums=0)
def encoded(codec: Codec, value: Array, seed: Array | None) -> tuple[Array, Any]:
    """Codes, in the shape of the array, and scales; rounded at random where there is a seed."""
    with jax.numpy_dtype_promotion("standard"):
        value = numerics.cast(value, jnp.float32)
        codes, scales = codec.encode(value, None if seed is None else rounding.own_bits(value, seed))
        return codes, HOLE if scales is None else scales


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(codec: Codec, aval: trees.Aval, codes: Array, scales: Any) -> Array:
    """The array of this shape and dtype that codes and scales stand for."""
    shape, dtype = aval
    with jax.numpy_dtype_promotion("standard"):
        some = None if isinstance(scales, optax.MaskedNode) else scales
        return numerics.cast(codec.decode(codes, some).reshape(shape), dtype)


def on_devices_of(value: Any, codes: Any, scales: Any) -> tuple[Any, Any]:
    """Codes and scales on the devices of what they stand for, in the same parts where these are whole blocks."""
    sharding = getattr(value, "sharding", None) if trees.concrete(value) else None
    if isinstance(codes, optax.MaskedNode) or not isinstance(sharding, NamedSharding):
        return codes, scales

    def put(some: Any) -> Any:
        if isinstance(some, optax.MaskedNode):
            return some
        try:
            sharding.shard_shape(some.shape)
        except ValueError:
            return jax.device_put(some, NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.device_put(some, sharding)

    return put(codes), put(scales)
