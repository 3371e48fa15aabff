"""Optimizer states in one byte per number, or half of one, around any transformation.

Every array of the state that is shaped like a parameter is kept as codes and scales. A step decodes it, lets the wrapped
transformation work in float32, and codes the result.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gradxform.codecs import CODECS, Codec
from gradxform.core import trees
from gradxform.core.arguments import count_of
from gradxform.core.body import Alone, Call, Report, Transformation, Wrapper, body_of
from gradxform.core.leaves import HOLE, Leaves, column, trained_leaves, widened
from gradxform.core.state import check_state_type, get_hyperparams
from gradxform.numerics import Array, cast, next_seed, random_bits, seed_for


class QuantizedState(NamedTuple):
    """What `quantize_state` carries from step to step."""

    seed: jax.Array
    """Of the random bits of the next step, uint32; only bfloat16 draws any."""
    codes: dict[str, Any]
    """By the name of each field of the inner state that is like the parameters, a tree of codes in their shapes."""
    scales: dict[str, Any]
    """The same for scales: the codes' shape with one number per block in the last axis, or flat if that is no whole number
    of blocks."""
    inner: Any
    """The state of the wrapped transformation, without what is coded."""

    @property
    def hyperparams(self) -> dict[str, jax.Array]:
        """Those of the inner state, for trackers that look at the top."""
        return get_hyperparams(self.inner)


def quantize_state(
    tx: optax.GradientTransformation,
    codec: str | Codec = "root8",
    min_size: int = 4096,
    fields: Mapping[str, str] | None = None,
    rounding: str = "stochastic",
) -> Transformation:
    """s ← encode(step(decode(s))): keep the moments in 8 or 4 bits, or in bfloat16.

    Args:
      tx: Any transformation. Another library's sees float32 updates and parameters.
      codec: ``"linear8"``, evenly spaced numbers and roots in blocks of 256, the fastest; ``"companded8"``, finer near zero,
        in groups of 32 with a float16 scale (6e-8 to 65504); ``"dynamic8"``, 7 decades in blocks of 256, as bitsandbytes
        and torchao have them; ``"dynamic4"``, 4 bits in blocks of 128; ``"bfloat16"``, rounded stochastically. Or a
        `Codec` of your own.
      min_size: Leaves with fewer elements than this, or with a number of them that is no multiple of the block, keep their
        state as it is, and so do complex and float64 leaves.
      fields: What fields of the state hold, by name: ``"signed"``, ``"non_negative"`` or ``"kept"`` as they are. Known are
        those of this library and of optax's usual transformations (``mu`` and ``trace`` are signed, ``nu`` is not
        negative, residuals and means of gradients are kept); any other must be told.

    Returns:
      A transformation whose state has ``codes`` and ``scales``, shaped so that they shard like the parameters, and
      ``inner``. A negative number in a field that has none, NaN and infinity make their block NaN.

    Raises:
      TypeError, ValueError: if ``codec`` is none of these, ``min_size`` no whole number, ``fields`` says something else; if
        ``init`` finds a field that it does not know, or nothing to code though there are leaves large enough.

    References:
      Dettmers et al. 2022, arXiv 2110.02861 (block-wise 8-bit states, ``dynamic8``, ``min_size``); Li et al. 2023, arXiv
      2309.01507 (4 bits); Ortiz et al. 2026, arXiv 2602.23349 (``companded8``).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = {"kernel": jnp.zeros((64, 256)), "bias": jnp.zeros(256)}
      >>> tx = gx.quantize_state(gx.adamw(1e-3))
      >>> state = tx.init(params)
      >>> print(state.codes["mu"]["kernel"].dtype, state.scales["nu"]["kernel"].shape)
      int8 (64, 1)
      >>> print(f'{gx.describe(tx, {"kernel": params["kernel"]}, show=False).state_bytes_per_parameter:.2f}')
      2.03
    """
    if isinstance(codec, str) and codec in CODECS:
        codec = CODECS[codec]()
    if not isinstance(codec, Codec):
        raise ValueError(f"codec must be one of {', '.join(map(repr, CODECS))} or a Codec, got {codec!r}")
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, _ROUNDINGS))}, got {rounding!r}")
    return Transformation.of(
        QuantizeState(
            body_of("tx of quantize_state", tx), codec, count_of("min_size", min_size), _told(fields), rounding
        )
    )


def _told(fields: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(fields, Mapping | None):
        raise TypeError(f"fields must map names of state fields to what they hold, got {fields!r}")
    for name, kind in (fields or {}).items():
        if kind not in _KINDS:
            raise ValueError(f"fields[{name!r}] must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    return tuple(sorted((fields or {}).items()))


_ROUNDINGS = ("stochastic", "nearest")
_KINDS = ("signed", "non_negative", "kept")
_KNOWN: dict[str, str] = {
    **dict.fromkeys(["mu", "m", "m1", "m2", "trace", "exp_avg", "momentum", "momentum_buffer", "velocity"], "signed"),
    **dict.fromkeys(
        ["nu", "nu_max", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum_of_squares", "e_g", "e_x"], "non_negative"
    ),
    **dict.fromkeys(["mean", "acc_grads", "grad_acc", "residual"], "kept"),
}
"""What fields of these names hold in this library, optax and torch."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A part of the inner state that is a tree like the parameters."""

    name: str
    codecs: tuple[Codec | None, ...]
    """How each leaf is coded; None where it is kept."""
    avals: tuple[trees.Aval, ...]
    """Shape and dtype of each leaf, as the wrapped transformation has it."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where in an inner state the fields are."""

    structure: Any
    """Of the inner state, each field a leaf."""
    fields: tuple[tuple[int, Field], ...]
    """Each field, and its place among those leaves."""


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizeState(Wrapper):
    """The body of `quantize_state`."""

    codec: Codec = CODECS["root8"]()
    min_size: int = 4096
    fields: tuple[tuple[str, str], ...] = ()
    rounding: str = "stochastic"

    def __repr__(self) -> str:
        options = [repr(self.tx)]
        if self.codec != CODECS["root8"]():
            options += [
                f"codec={self.codec.name!r}" if type(self.codec) in CODECS.values() else f"codec={self.codec!r}"
            ]
        options += [f"min_size={self.min_size}"] * (self.min_size != 4096) + [f"fields={dict(self.fields)}"] * bool(
            self.fields
        )
        return f"{self.name}({', '.join(options)})"

    def init(self, params: Any) -> QuantizedState:
        leaves, structure = trees.flatten("params", params)
        layout = self._layout(params)
        self._check_acts(layout, params, leaves)
        state = self.tx.init(self._seen(params))
        return self._closed(jnp.zeros((), jnp.uint32), state, layout, structure, placed=True)

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        check_state_type(self.name, state, QuantizedState)
        leaves = Leaves.of(updates, params)
        layout = self._layout(updates if params is None else params)
        inner = _opened(state, layout, leaves.structure)
        given = None if params is None else self._seen(params)
        stepped, new, report = self.tx.step(self._seen(updates), inner, given, call)
        if isinstance(self.tx, Alone):
            steps = zip(leaves.structure.flatten_up_to(stepped), leaves.final, strict=True)
            stepped = leaves.structure.unflatten([cast(one, dtype) for one, dtype in steps])
        return stepped, self._closed(state.seed, new, layout, leaves.structure), report

    def _seen(self, tree: Any) -> Any:
        """Updates or parameters as the wrapped transformation gets them: ours computes in float32 whatever they are."""
        return jax.tree.map(widened, tree) if isinstance(self.tx, Alone) else tree

    def _closed(self, seed: Any, inner: Any, layout: Layout, structure: Any, placed: bool = False) -> QuantizedState:
        """The state with every field coded."""
        parts = layout.structure.flatten_up_to(inner)
        codes: dict[str, Any] = {}
        scales: dict[str, Any] = {}
        for number, (place, field) in enumerate(layout.fields):
            values = structure.flatten_up_to(parts[place])
            coded = [
                (HOLE, HOLE)
                if codec is None
                else encoded(
                    codec, value, seed_for(seed_for(seed, number), index) if self.rounding == "stochastic" else None
                )
                for index, (codec, value) in enumerate(zip(field.codecs, values, strict=True))
            ]
            if placed:
                coded = [_like(value, *pair) for value, pair in zip(values, coded, strict=True)]
            codes[field.name], scales[field.name] = (structure.unflatten([pair[i] for pair in coded]) for i in (0, 1))
            kept = [value if codec is None else HOLE for codec, value in zip(field.codecs, values, strict=True)]
            parts[place] = structure.unflatten(kept)
        return QuantizedState(next_seed(seed) if not placed else seed, codes, scales, layout.structure.unflatten(parts))

    # What is known before any array is there

    def _layout(self, params: Any) -> Layout:
        """Where the fields are, for parameters of these shapes."""
        leaves, structure = jax.tree.flatten(params)
        avals = tuple(map(trees.aval, leaves))
        try:
            return _layout(self, structure, avals)
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            return _layout.__wrapped__(self, structure, avals)

    def _check_acts(self, layout: Layout, params: Any, leaves: list[Any]) -> None:
        """Raise if no state is coded though there are leaves large enough."""
        coded = any(codec is not None for _, field in layout.fields for codec in field.codecs)
        large = [self._fits(trees.aval(leaf)) for leaf in leaves]
        if not coded and any(
            act and fits for act, fits in zip(trained_leaves(self.tx, params, params), large, strict=True)
        ):
            raise ValueError(f"{self.name} has nothing to do: the state of {self.tx!r} has no array like a parameter")

    def _fits(self, aval: trees.Aval) -> bool:
        """Whether an array of this shape and dtype can be coded."""
        shape, dtype = aval
        size = int(np.prod(shape))
        real = dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize <= 4
        return real and size >= self.min_size and size % self.codec.block == 0

    def _codec_of(self, path: str) -> Codec | None:
        """How a field is coded; None if it is kept."""
        name = re.sub(r"_\d+$", "", path.rpartition("/")[2])
        told = dict(self.fields)
        kind = told.get(path, told.get(name, _KNOWN.get(name)))
        if kind is None:
            raise ValueError(
                f"{self.name} does not know what the state field {path!r} of {self.tx!r} holds; say "
                f"fields={{{name!r}: …}} with one of {', '.join(map(repr, _KINDS))}"
            )
        return None if kind == "kept" else dataclasses.replace(self.codec, signed=kind == "signed")


@functools.lru_cache(maxsize=256)
def _layout(body: QuantizeState, structure: Any, avals: tuple[trees.Aval, ...]) -> Layout:
    shapes = structure.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals])
    state = jax.eval_shape(lambda params: body.tx.init(body._seen(params)), shapes)  # pyright: ignore[reportPrivateUsage] (its own)
    nodes, whole = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: _alike(node, structure, avals))
    fields: list[tuple[int, Field]] = []
    for place, (path, node) in enumerate(nodes):
        if _alike(node, structure, avals):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
            parts = [trees.aval(part) for part in structure.flatten_up_to(node)]
            fits = [body._fits(aval) for aval in parts]  # pyright: ignore[reportPrivateUsage] (its own)
            codec = body._codec_of(name) if any(fits) else None  # pyright: ignore[reportPrivateUsage] (its own)
            fields.append((place, Field(name, tuple(codec if fit else None for fit in fits), tuple(parts))))
    return Layout(whole, tuple(fields))


def _alike(node: Any, structure: Any, avals: Iterable[trees.Aval]) -> bool:
    """Whether a part of a state is a tree like the parameters: an array of its shape, or nothing, for each."""
    if structure.num_leaves == 0:
        return jax.tree.structure(node) == structure
    try:
        parts = structure.flatten_up_to(node)
    except ValueError:
        return False
    holes = [isinstance(part, optax.MaskedNode) for part in parts]
    return not all(holes) and all(
        hole or (trees.aval(part)[0] == shape and trees.trainable(trees.aval(part)[1]))
        for hole, part, (shape, _) in zip(holes, parts, avals, strict=True)
    )


def _opened(state: QuantizedState, layout: Layout, structure: Any) -> Any:
    """The inner state with every field decoded, after checking that it is for these parameters."""
    names = [field.name for _, field in layout.fields]
    if (
        not isinstance(state.codes, Mapping)
        or sorted(state.codes) != sorted(names)
        or sorted(state.scales) != sorted(names)
    ):
        raise ValueError(f"state.codes has {sorted(state.codes)}, this transformation's has {sorted(names)}; {_ANEW}")
    try:
        parts = layout.structure.flatten_up_to(state.inner)
    except ValueError as error:
        raise ValueError(
            f"state.inner is not of the wrapped transformation, or for other parameters; {_ANEW}"
        ) from error
    for place, field in layout.fields:
        kept = column(f"state.inner.{field.name}", parts[place], structure)
        codes, scales = (
            column(f"state.{k}[{field.name!r}]", getattr(state, k)[field.name], structure) for k in ("codes", "scales")
        )
        values: list[Any] = []
        for index, (codec, aval) in enumerate(zip(field.codecs, field.avals, strict=True)):
            if codec is None:
                values.append(kept[index])
                continue
            shapes = coded_avals(codec, aval[0])
            for kind, some, expected in zip(("codes", "scales"), (codes, scales), shapes, strict=True):
                if expected is not None:
                    name = f"state.{kind}[{field.name!r}]"
                    trees.check_slot(name, some[index], expected, structure, index, check_dtype=True)
            values.append(decoded(codec, aval, codes[index], scales[index]))
        parts[place] = structure.unflatten(values)
    return layout.structure.unflatten(parts)


_ANEW = "call init(params) again"


def _like(value: Any, codes: Any, scales: Any) -> tuple[Any, Any]:
    """Codes and scales on the devices of the array that they stand for, in the same parts where these are whole blocks."""
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


# One array


def blocked(codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """An array's shape with its last axis in blocks, or if it is no whole number of them, all of it."""
    if shape and shape[-1] % codec.block == 0:
        return (*shape[:-1], shape[-1] // codec.block, codec.block)
    return (int(np.prod(shape)) // codec.block, codec.block)


def coded_avals(codec: Codec, shape: tuple[int, ...]) -> tuple[trees.Aval, trees.Aval | None]:
    """Shape and dtype of the codes and the scales of an array; no scales, None."""
    codes = shape
    if codec.per_code > 1:
        whole = bool(shape) and shape[-1] % codec.per_code == 0
        codes = (*shape[:-1], shape[-1] // codec.per_code) if whole else (int(np.prod(shape)) // codec.per_code,)
    scales = None if codec.scale_dtype is None else (blocked(codec, shape)[:-1], np.dtype(codec.scale_dtype))
    return (codes, np.dtype(codec.code_dtype)), scales


@functools.partial(jax.jit, static_argnums=0)
def encoded(codec: Codec, value: Array, seed: Array | None) -> tuple[Array, Any]:
    """Codes, in the shape of the array, and scales."""
    with jax.numpy_dtype_promotion("standard"):
        bits = None if seed is None else random_bits(seed, value.shape).reshape(blocked(codec, value.shape))
        codes, scales = codec.encode(cast(value, jnp.float32).reshape(blocked(codec, value.shape)), bits)
        return codes.reshape(coded_avals(codec, value.shape)[0][0]), HOLE if scales is None else scales


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(codec: Codec, aval: trees.Aval, codes: Array, scales: Any) -> Array:
    """The array of this shape and dtype that codes and scales stand for."""
    with jax.numpy_dtype_promotion("standard"):
        *rows, block = blocked(codec, aval[0])
        some = None if isinstance(scales, optax.MaskedNode) else scales
        blocks = codec.decode(codes.reshape(*rows, block // codec.per_code if codec.per_code > 1 else block), some)
        return cast(blocks.reshape(aval[0]), aval[1])
