"""Rules on a leaf whose moments are kept as codes: decode, step and encode, one run of blocks after the other.

Of the whole array at once the decoded moments would be arrays of their own, and on a CPU the step several times slower.
In runs that fit the cache they never leave it, and codes and parameters are written in place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradxform import numerics, rounding
from gradxform.codecs import Codec
from gradxform.core.compiled import on_leaf
from gradxform.core.rules import Rule
from gradxform.core.trees import varying_over


@dataclasses.dataclass(frozen=True)
class Coded:
    """A moment of one leaf, kept as codes; a leaf of JAX's trees, so that it stands where the moment would."""

    codec: Codec
    codes: Any
    scales: Any
    seed: Any
    """Of the bits that round the next codes; None rounds to nearest."""

    def rows(self) -> tuple[Any, Any]:
        """Codes and scales, one row per block."""
        width = self.codec.block // self.codec.per_code
        return self.codes.reshape(-1, width), None if self.codec.scale_dtype is None else self.scales.reshape(-1)

    def replaced(self, rows: tuple[Any, Any]) -> Coded:
        """With other codes and scales, in the shapes of the old ones."""
        codes, scales = rows
        scales = self.scales if scales is None else scales.reshape(self.scales.shape)
        return dataclasses.replace(self, codes=codes.reshape(self.codes.shape), scales=scales)


def coded_update(rules: tuple[Rule, ...]) -> Callable[..., tuple[jax.Array, tuple[Any, ...]]]:
    """`on_leaf` for a leaf some of whose moments are `Coded`."""

    def update_leaf(
        how: str, final: Any, dtype: Any, scalars: Any, own: Any, update: Any, slots: Any, param: Any, taken: Any
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        codecs = tuple(slot.codec if isinstance(slot, Coded) else None for slot in slots)
        seeds = tuple(slot.seed if isinstance(slot, Coded) else None for slot in slots)
        given = tuple(slot.rows() if isinstance(slot, Coded) else slot for slot in slots)
        result, new = _on_blocks(rules, codecs)(how, final, dtype, scalars, own, update, given, param, taken, seeds)
        kept = (old.replaced(one) if isinstance(old, Coded) else one for old, one in zip(slots, new, strict=True))
        return result, tuple(kept)

    return update_leaf


@functools.lru_cache(maxsize=4096)
def _on_blocks(rules: tuple[Rule, ...], codecs: tuple[Codec | None, ...]) -> Callable[..., Any]:
    [codec] = {dataclasses.replace(codec, signed=True) for codec in codecs if codec is not None}

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def blocks_update(how, final, dtype, scalars, own, update, slots, param, taken, seeds):  # pyright: ignore[reportMissingParameterType] (a compiled closure)
        def run(update: Any, param: Any, slots: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
            pairs = list(zip(codecs, slots, strict=True))
            wide = tuple(slot if codec is None else codec.decode(*slot) for codec, slot in pairs)
            result, new = on_leaf(rules)(how, final, dtype, scalars, own, update, wide, param, taken)
            kept = tuple(
                one if codec is None else _encoded(codec, one, old, seed, taken)
                for (codec, old), one, seed in zip(pairs, new, seeds, strict=True)
            )
            return result, kept

        blocks = [None if x is None else x.reshape(-1, codec.block) for x in (update, param)]
        given = tuple(
            slot.reshape(-1, codec.block) if own is None else slot for own, slot in zip(codecs, slots, strict=True)
        )
        with jax.numpy_dtype_promotion("standard"):
            result, new = _in_runs(run, codec, how, final, blocks[0], blocks[1], given)
        back = (one.reshape(update.shape) if own is None else one for own, one in zip(codecs, new, strict=True))
        return result.reshape(update.shape), tuple(back)

    return blocks_update


def _encoded(codec: Codec, new: Any, old: Any, seed: Any, taken: Any) -> tuple[Any, Any]:
    """Codes and scales of a moment, the old ones where the step is not taken."""
    new = numerics.cast(new, jnp.float32)
    codes, scales = codec.encode(new, None if seed is None else rounding.own_bits(new, seed))
    if taken is None:
        return codes, scales
    return jnp.where(taken, codes, old[0]), None if scales is None else jnp.where(taken, scales, old[1])


def _in_runs(
    run: Callable[..., tuple[Any, tuple[Any, ...]]],
    codec: Codec,
    how: str,
    final: Any,
    update: Any,
    param: Any,
    slots: tuple[Any, ...],
) -> tuple[Any, tuple[Any, ...]]:
    """`run` on one run of rows after the other where that is faster: on one CPU, and with blocks."""
    rows, length = len(update), _run_length(len(update))
    one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1 and not varying_over(update)
    if rows <= length or codec.scale_dtype is None or not one_cpu:
        return run(update, param, slots)
    lands = how == "land"

    def body(number: Any, carry: tuple[Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
        def cut(x: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(x, number * length, length)

        def put(whole: Any, part: Any) -> Any:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, number * length, 0)

        own = carry[0] if lands else param
        part = run(cut(update), None if own is None else cut(own), jax.tree.map(cut, carry[1]))
        return jax.tree.map(put, carry, part)

    start = param if lands else jnp.zeros(update.shape, final)
    return jax.lax.fori_loop(0, rows // length, body, (start, slots))


def _run_length(rows: int) -> int:
    """The largest divisor of the number of rows of which a run fits the cache; all rows if there is no good one."""
    best = max(length for length in range(1, 513) if rows % length == 0)
    return best if best >= 64 else rows
