"""Rules on a leaf whose moments are kept as codes: decode, step and encode in the kernels of one step.

Decoded moments are not written to memory. On a CPU three kernels decode them anew, which costs less than to store them
(X1): one for the largest number of each block, one for the update, one for the codes, which overwrite the old ones.
Where decoding looks numbers up, which kernels do not repeat (X9), the step goes over one run of blocks after the other.
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

from gradxform._core import meshes, trees
from gradxform._core.compiled import compiled, on_leaf
from gradxform._core.encoded import EncodedMoment
from gradxform._core.leaves import HOLE
from gradxform._core.rule import Array, Rule
from gradxform._core.trees import unless
from gradxform._core.xla import after
from gradxform.numerics import arithmetic as numerics
from gradxform.numerics import rounding
from gradxform.wrappers.quantization.codecs.codec import Codec, largest_of, largest_of_written


@dataclasses.dataclass(frozen=True)
class Coded(EncodedMoment):
    """A moment of one leaf, kept as codes; a leaf of JAX's trees, so that it can stand where the moment would."""

    codec: Codec
    codes: Any
    scales: Any
    seed: Any
    """The seed of the bits that round the next codes; None rounds to nearest."""

    def arrays(self) -> tuple[Any, Any]:
        """The codes, and the scales or None if the codec has none."""
        return self.codes, None if self.codec.scale_dtype is None else self.scales

    def renewed(self, arrays: tuple[Any, Any]) -> Coded:
        codes, scales = arrays
        return dataclasses.replace(self, codes=codes, scales=self.scales if scales is None else scales)

    def emptied(self) -> Coded:
        return dataclasses.replace(self, codes=None, scales=HOLE, seed=None)

    def decoded(self, aval: trees.Aval) -> Array:
        return decoded(self.codec, aval, self.codes, self.scales)

    @staticmethod
    def on_leaf(rules: tuple[Rule, ...]) -> Callable[..., tuple[Any, tuple[Any, ...]]]:
        """`compiled.on_leaf` for a leaf with moments that are `Coded`."""

        def update_leaf(
            ending: Any, dtype: Any, scalars: Any, own: Any, update: Any, slots: Any, param: Any, accepted: Any
        ) -> tuple[Any, tuple[Any, ...]]:
            codecs = tuple(slot.codec if isinstance(slot, Coded) else None for slot in slots)
            seeds = tuple(slot.seed if isinstance(slot, Coded) else None for slot in slots)
            given = tuple(slot.arrays() if isinstance(slot, Coded) else slot for slot in slots)
            run = _on_coded(rules, codecs)
            result, new = run(ending, dtype, scalars, own, update, given, param, accepted, seeds)
            kept = (
                old.renewed(arrays) if isinstance(old, Coded) else arrays
                for old, arrays in zip(slots, new, strict=True)
            )
            return result, tuple(kept)

        return update_leaf


@functools.lru_cache(maxsize=4096)
def _on_coded(rules: tuple[Rule, ...], codecs: tuple[Codec | None, ...]) -> Callable[..., Any]:
    coded = {place: codec for place, codec in enumerate(codecs) if codec is not None}
    used = list(coded.values())
    parts = [inner for rule in rules for inner in rule.parts]
    # a run has another shape than the leaf, and would draw what the others draw
    in_parts = not any(inner.whole or inner.slots is not None or inner.seed is not None for inner in parts)

    @compiled
    def coded_leaf_update(
        ending: Any, dtype: Any, scalars: Any, own: Any, update: Any, slots: Any, param: Any, accepted: Any, seeds: Any
    ) -> Any:
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1 and not meshes.varying_over(update)
        length = _run_length(update.size // used[0].block)
        alike = all(codec is not None or slot.shape == update.shape for codec, slot in zip(codecs, slots, strict=True))
        in_runs = one_cpu and in_parts and alike and length > 0 and any(codec.looked_up for codec in used)
        in_runs = in_runs and all(x.ndim == 0 for x in jax.tree.leaves(own))  # arrays, keys: of the whole leaf
        in_runs = in_runs and ending.form is None  # a form's random bits depend on the place in the whole array
        lands = ending.gives == "param"

        def step(update: Any, param: Any, slots: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
            wide = tuple(
                slot if codec is None else codec.decode(*slot).reshape(update.shape)
                for codec, slot in zip(codecs, slots, strict=True)
            )
            result, new = on_leaf(rules)(ending, dtype, scalars, own, update, wide, param, accepted)
            kept = list(new)
            moments = [numerics.cast(new[place], jnp.float32) for place in coded]
            for (place, codec), moment, largest in zip(coded.items(), moments, largest_of_all(moments), strict=True):
                codes, scales = codec.encode(moment, _bits(seeds[place]), largest)
                codes = after(jax.tree.leaves(result)[0], codes) if lands and one_cpu and not in_runs else codes
                kept[place] = tuple(map(functools.partial(_accepted, accepted), (codes, scales), slots[place]))
            return result, tuple(kept)

        def largest_of_all(moments: list[Any]) -> list[Any]:
            if in_runs:
                return list(map(largest_of_written, used, moments))
            return largest_of(used, moments) if used[0].scale_dtype is not None else [None] * len(used)

        with jax.numpy_dtype_promotion("standard"):
            if in_runs:
                return _in_runs(
                    step,
                    length,
                    used[0].block,
                    lands,
                    dtype if ending.gives == "wide" else ending.final,
                    update,
                    param,
                    slots,
                )
            return step(update, param, slots)

    return coded_leaf_update


def _bits(seed: Any) -> Callable[[Array], Array] | None:
    """The function that gives the random bits of an array's numbers; None without a seed."""
    return None if seed is None else functools.partial(rounding.own_bits, seed=seed)


def _accepted(accepted: Any, new: Any, old: Any) -> Any:
    """The new array in the shape of the old one, which stays where the step is not accepted."""
    return None if new is None else unless(accepted, old, new.reshape(old.shape))


def _run_length(rows: int) -> int:
    """How many blocks make up a run: a divisor of `rows` that is large enough to be worth it, or 0 if there is none."""
    return max((length for length in range(64, 513) if rows % length == 0), default=0)


def _in_runs(
    step: Callable[..., tuple[Any, tuple[Any, ...]]],
    length: int,
    block: int,
    lands: bool,
    final: Any,
    update: Any,
    param: Any,
    slots: tuple[Any, ...],
) -> tuple[Any, tuple[Any, ...]]:
    """`step` on one run of blocks after the other: what is looked up is written out (X9), but only a run at a time."""
    rows = update.size // block

    def cut(x: Any, number: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(x, number * length, length)

    def body(number: Any, carry: tuple[Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
        def put(whole: Any, part: Any) -> Any:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, number * length, 0)

        run = functools.partial(cut, number=number)
        own = carry[0] if lands else in_rows[1]
        part = step(run(in_rows[0]), None if own is None else run(own), jax.tree.map(run, carry[1]))
        return jax.tree.map(put, carry, part)

    in_rows = jax.tree.map(lambda x: x.reshape(rows, -1), (update, param, slots))
    start = in_rows[1] if lands else jnp.zeros(in_rows[0].shape, final)
    done = jax.lax.fori_loop(0, rows // length, body, (start, in_rows[2]))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), done, (update, slots))


# A whole array, outside the kernels of a step


def coded_avals(codec: Codec, shape: tuple[int, ...]) -> tuple[trees.Aval, trees.Aval | None]:
    """Shape and dtype of the codes and the scales of an array; None if there are no scales."""
    scales = None if codec.scale_dtype is None else (codec.scale_shape(shape), np.dtype(codec.scale_dtype))
    return (codec.code_shape(shape), np.dtype(codec.code_dtype)), scales


@functools.partial(jax.jit, static_argnums=0)
def encoded(codec: Codec, value: Array, seed: Array | None) -> tuple[Array, Any]:
    """Codes, in the shape of the array, and scales; rounded at random where there is a seed."""

    def on_whole(value: Array, seed: Array | None) -> tuple[Array, Any]:
        codes, scales = codec.encode(numerics.cast(value, jnp.float32), _bits(seed))
        return codes, HOLE if scales is None else scales

    like = [HOLE if aval is None else meshes.spec_of(value, aval[0]) for aval in coded_avals(codec, value.shape)]
    with jax.numpy_dtype_promotion("standard"):
        return meshes.partitioned(on_whole, tuple(like), value, seed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(codec: Codec, aval: trees.Aval, codes: Array, scales: Any) -> Array:
    """The array of this shape and dtype that codes and scales stand for."""
    shape, dtype = aval

    def on_whole(codes: Array, scales: Any) -> Array:
        given = None if isinstance(scales, optax.MaskedNode) else scales
        return numerics.cast(codec.decode(codes, given).reshape(shape), dtype)

    with jax.numpy_dtype_promotion("standard"):
        return meshes.partitioned(on_whole, meshes.spec_of(codes, shape), codes, scales)
