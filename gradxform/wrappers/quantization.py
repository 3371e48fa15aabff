"""Optimizer states in one byte per number, or half of one, around any transformation.

Every array of the state that is shaped like a parameter is kept as codes and scales. A step decodes it, lets the
wrapped transformation work in float32, and codes the result.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
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
from gradxform.core.coded import Coded
from gradxform.core.leaves import HOLE, Leaves, column, trained_leaves, widened
from gradxform.core.program import Program
from gradxform.core.state import check_state_type, get_hyperparams
from gradxform.core.trees import unless
from gradxform.numerics import Array, cast
from gradxform.rounding import next_seed, own_bits, seed_for


class QuantizedState(NamedTuple):
    """What `quantize_state` carries from step to step."""

    seed: jax.Array
    """Of the random bits of the next step, uint32."""
    codes: dict[str, Any]
    """By the name of each field of the inner state that is like the parameters, a tree of codes in their shapes."""
    scales: dict[str, Any]
    """The same for scales: one per block along the last axis, or flat where that is no whole number of blocks."""
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

    Rounded to nearest, a code stays what it is while a step changes its number by less than half the distance to the
    next code, as a step nearly always does with a second moment. Stochastic rounding loses no change in the mean, but
    for what is beyond the signed maps of ``dynamic8`` and ``dynamic4``, which end before −1.

    Args:
      tx: Any transformation. Another library's sees float32 updates and parameters.
      codec: ``"root8"``, evenly spaced square roots, fourth roots of what is not negative, in blocks of 256;
        ``"linear8"``, evenly spaced numbers and square roots, coarser near zero;
        ``"companded8"``, in groups of 32 with float16 scales (6e-8 to 65504) as FlashOptim has it; ``"dynamic8"`` and
        ``"dynamic4"``, 8 bits in blocks of 256 and 4 in blocks of 128, as bitsandbytes and torchao have them, slow;
        ``"bfloat16"``. Or a `gradxform.codecs.Codec` of your own.
      min_size: Leaves with fewer elements than this, or with a number of them that is no multiple of the block, keep
        their state as it is, and so do complex and float64 leaves.
      fields: What fields of the state hold, by name: ``"signed"``, ``"non_negative"`` or ``"kept"`` as they are. Known
        are the moments of this library, of optax and of torch, such as ``mu`` and ``nu``; another one must be told.
      rounding: ``"stochastic"``, by a hash of the step, the field and the number itself, so that equal numbers of
        one step are rounded alike; or ``"nearest"``.

    Returns:
      A transformation whose state has ``seed``, ``codes``, ``scales``, shaped so that they shard like the parameters,
      and ``inner``. NaN, infinity, and a negative number in a field that has none make their block NaN
      (in ``bfloat16`` themselves, and infinity stays).

    Raises:
      TypeError, ValueError: if an argument is none of these; if ``init`` finds a field that it does not know, none that
        ``fields`` names, or nothing to code though there are leaves large enough.

    References:
      Dettmers et al. 2022, arXiv 2110.02861 (8-bit states in blocks, ``dynamic8``, ``min_size``); Li et al. 2023,
      arXiv 2309.01507 (4 bits); Ortiz et al. 2026, arXiv 2602.23349 (``companded8``).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = {"kernel": jnp.zeros((64, 256)), "bias": jnp.zeros(256)}
      >>> tx = gx.quantize_state(gx.adamw(1e-3))
      >>> state = tx.init(params)
      >>> print(state.codes["mu"]["kernel"].dtype, state.scales["nu"]["kernel"].shape, state.inner.nu["bias"].dtype)
      int8 (64, 1) float32
      >>> print(f"{gx.describe(tx, params, show=False).state_bytes_per_parameter:.2f}")
      2.12
    """
    if isinstance(codec, str) and codec in CODECS:
        codec = CODECS[codec]()
    if not isinstance(codec, Codec):
        raise ValueError(f"codec must be one of {', '.join(map(repr, CODECS))} or a Codec, got {codec!r}")
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, _ROUNDINGS))}, got {rounding!r}")
    body = body_of("tx of quantize_state", tx)
    return Transformation.of(QuantizeState(body, codec, count_of("min_size", min_size), _told(fields), rounding))


def _told(fields: Any) -> tuple[tuple[str, str], ...]:
    """The argument `fields`, checked and hashable."""
    if not isinstance(fields, Mapping | None):
        raise TypeError(f"fields must map names of state fields to what they hold, got {fields!r}")
    for name, kind in (fields or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"fields must map names of state fields to what they hold, got the name {name!r}")
        if kind not in _KINDS:
            raise ValueError(f"fields[{name!r}] must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    return tuple(sorted((fields or {}).items()))


_ROUNDINGS = ("stochastic", "nearest")
_KINDS = ("signed", "non_negative", "kept")
_SIGNED = ("mu", "m", "m1", "m2", "trace", "exp_avg", "momentum", "momentum_buffer", "velocity")
_NON_NEGATIVE = ("nu", "nu_max", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum_of_squares", "e_g", "e_x")
_KEPT = ("mean", "acc_grads", "grad_acc", "residual")  # gradients not used yet, and what parameters lack
_KNOWN = {name: kind for kind, names in zip(_KINDS, (_SIGNED, _NON_NEGATIVE, _KEPT), strict=True) for name in names}
"""What fields of these names hold in this library, optax and torch."""
_DEFAULT = CODECS["root8"]()


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

    codec: Codec = _DEFAULT
    min_size: int = 4096
    fields: tuple[tuple[str, str], ...] = ()
    rounding: str = "stochastic"

    def __repr__(self) -> str:
        given = self.codec.name if CODECS.get(self.codec.name) is type(self.codec) else self.codec
        options = {"codec": given, "min_size": self.min_size, "fields": dict(self.fields), "rounding": self.rounding}
        usual = {"codec": _DEFAULT.name, "min_size": 4096, "fields": {}, "rounding": "stochastic"}
        changed = [f"{name}={value!r}" for name, value in options.items() if value != usual[name]]
        return f"{self.name}({', '.join([repr(self.tx), *changed])})"

    def init(self, params: Any) -> QuantizedState:
        leaves, structure = trees.flatten("params", params)
        layout = self.layout(leaves, structure)
        coded = any(codec is not None for _, field in layout.fields for codec in field.codecs)
        trained = trained_leaves(self.tx, params, params)
        if not coded and any(act and self.fits(trees.aval(leaf)) for act, leaf in zip(trained, leaves, strict=True)):
            raise ValueError(f"{self.name} has nothing to do: the state of {self.tx!r} has no array like a parameter")
        state = self.tx.init(self.seen(params))
        return self._closed(jnp.zeros((), jnp.uint32), state, layout, structure, placed=True)

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        return self._run(self.tx.step, updates, state, params, call)

    def guarded(self, updates: Any, state: Any, params: Any, call: Call, taken: Any) -> tuple[Any, Any, Report]:
        if not self._in_kernels(updates, params):
            return super().guarded(updates, state, params, call, taken)
        return self._run(functools.partial(self.tx.guarded, taken=taken), updates, state, params, call, taken)

    def advance(self, updates: Any, state: Any, params: Any, call: Call, taken: Any = None) -> tuple[Any, Any, Report]:
        if not self._in_kernels(updates, params):
            return super().advance(updates, state, params, call, taken)
        return self._run(functools.partial(self.tx.advance, taken=taken), updates, state, params, call, taken)

    def _run(
        self, inner_step: Callable[..., Any], updates: Any, state: Any, params: Any, call: Call, taken: Any = None
    ) -> tuple[Any, Any, Report]:
        """What the wrapped transformation does in `inner_step`, on a state that is decoded, or is block by block."""
        check_state_type(self.name, state, QuantizedState)
        leaves = Leaves.of(updates, params)
        structure = leaves.structure
        layout = self.layout(leaves.updates if params is None else leaves.params, structure)
        given = None if params is None else self.seen(params)

        def coded(number: int, codec: Codec, aval: trees.Aval, codes: Any, scales: Any) -> Coded:
            return Coded(codec, codes, scales, self._seed(state.seed, number))

        opened = _opened(state, layout, structure, coded if self._in_kernels(updates, params) else _decoded)
        stepped, new, report = inner_step(self.seen(updates), opened, given, call)
        if isinstance(self.tx, Alone):
            steps = zip(structure.flatten_up_to(stepped), leaves.final, strict=True)
            stepped = structure.unflatten([cast(one, dtype) for one, dtype in steps])
        after = unless(taken, state.seed, next_seed(state.seed))
        return stepped, self._closed(state.seed, new, layout, structure)._replace(seed=after), report

    def _in_kernels(self, updates: Any, params: Any) -> bool:
        """Whether the wrapped transformation acts on any block of an array as on the whole."""
        if not isinstance(self.tx, Program):
            return False
        leaves, structure = jax.tree.flatten(updates if params is None else params)
        fields = {field.name for _, field in self.layout(leaves, structure).fields}
        return fields <= {name for segment in self.tx.segments for name in getattr(segment, "fields", ())}

    def seen(self, tree: Any) -> Any:
        """Updates or parameters as the wrapped transformation gets them: ours computes in float32 whatever they are."""
        return jax.tree.map(widened, tree) if isinstance(self.tx, Alone) else tree

    def _closed(self, seed: Any, inner: Any, layout: Layout, structure: Any, placed: bool = False) -> QuantizedState:
        """The state with every field coded; where `placed`, on the devices of what is coded."""
        parts = layout.structure.flatten_up_to(inner)
        codes: dict[str, Any] = {}
        scales: dict[str, Any] = {}
        for number, (place, field) in enumerate(layout.fields):
            values = structure.flatten_up_to(parts[place])
            own = self._seed(seed, number)
            coded = [
                (HOLE, HOLE)
                if codec is None
                else (value.codes, value.scales)
                if isinstance(value, Coded)
                else encoded(codec, value, own)
                for codec, value in zip(field.codecs, values, strict=True)
            ]
            if placed:
                coded = [_placed(value, *pair) for value, pair in zip(values, coded, strict=True)]
            codes[field.name], scales[field.name] = (structure.unflatten([pair[i] for pair in coded]) for i in (0, 1))
            kept = [value if codec is None else HOLE for codec, value in zip(field.codecs, values, strict=True)]
            parts[place] = structure.unflatten(kept)
        return QuantizedState(seed, codes, scales, layout.structure.unflatten(parts))

    def _seed(self, seed: Any, number: int) -> Any:
        """Of the bits that round one of the fields."""
        return seed_for(seed, number) if self.rounding == "stochastic" else None

    # What is known before any array is there

    def layout(self, leaves: list[Any], structure: Any) -> Layout:
        """Where the fields are, for parameters of these shapes."""
        avals = tuple(map(trees.aval, leaves))
        try:
            hash(self)
        except TypeError:  # what is wrapped is not hashable
            return _layout.__wrapped__(self, structure, avals)
        return _layout(self, structure, avals)

    def fits(self, aval: trees.Aval) -> bool:
        """Whether an array of this shape and dtype can be coded."""
        shape, dtype = aval
        size = int(np.prod(shape))
        real = dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize <= 4
        return real and size >= self.min_size and size % self.codec.block == 0

    def codec_of(self, path: str) -> Codec | None:
        """How a field is coded; None if it is kept."""
        told = dict(self.fields)
        kind = next((told[key] for key in _keys(path) if key in told), _KNOWN.get(_keys(path)[-1]))
        if kind is None:
            raise ValueError(
                f"{self.name} does not know what the state field {path!r} of {self.tx!r} holds; say "
                f"fields={{{_keys(path)[-1]!r}: …}} with one of {', '.join(map(repr, _KINDS))}"
            )
        return None if kind == "kept" else dataclasses.replace(self.codec, signed=kind == "signed")


def _keys(path: str) -> tuple[str, ...]:
    """By what a field may be named, the most exact first: ``inner/mu_2``, ``mu_2``, ``mu``."""
    name = path.rpartition("/")[2]
    return path, name, re.sub(r"_\d+$", "", name)


@functools.lru_cache(maxsize=256)
def _layout(body: QuantizeState, structure: Any, avals: tuple[trees.Aval, ...]) -> Layout:
    shapes = structure.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals])
    state = jax.eval_shape(lambda params: body.tx.init(body.seen(params)), shapes)
    nodes, whole = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: _alike(node, structure, avals))
    fields: list[tuple[int, Field]] = []
    for place, (path, node) in enumerate(nodes):
        if _alike(node, structure, avals):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
            parts = tuple(trees.aval(part) for part in structure.flatten_up_to(node))
            fits = [body.fits(aval) for aval in parts]
            codec = body.codec_of(name) if any(fits) else None
            fields.append((place, Field(name, tuple(codec if fit else None for fit in fits), parts)))
    names = [field.name for _, field in fields]
    for told, _ in body.fields:
        if not any(told in _keys(name) for name in names):
            raise ValueError(f"fields names {told!r}, which is no field of the state of {body.tx!r}; it has {names}")
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
    found = [(trees.aval(part)[0], trees.trainable(trees.aval(part)[1])) for part in parts]
    return not all(holes) and all(
        hole or one == (shape, True) for hole, one, (shape, _) in zip(holes, found, avals, strict=True)
    )


def _opened(state: QuantizedState, layout: Layout, structure: Any, opened: Callable[..., Any]) -> Any:
    """The inner state with `opened` of what is coded, after checking that it is for these parameters."""
    names = sorted(field.name for _, field in layout.fields)
    if sorted(state.codes) != names or sorted(state.scales) != names:
        raise ValueError(f"state.codes has the fields {sorted(state.codes)}, here they are {names}; {_ANEW}")
    try:
        parts = layout.structure.flatten_up_to(state.inner)
    except ValueError as error:
        raise ValueError(f"state.inner is not of what is wrapped, or for other parameters; {_ANEW}") from error
    for number, (place, field) in enumerate(layout.fields):
        kept = column(f"state.inner.{field.name}", parts[place], structure)
        codes = column(f"state.codes[{field.name!r}]", state.codes[field.name], structure)
        scales = column(f"state.scales[{field.name!r}]", state.scales[field.name], structure)
        for index, (codec, aval) in enumerate(zip(field.codecs, field.avals, strict=True)):
            if codec is not None:
                expected = coded_avals(codec, aval[0])
                for kind, some, one in zip(("codes", "scales"), (codes, scales), expected, strict=True):
                    if one is not None:
                        name = f"state.{kind}[{field.name!r}]"
                        trees.check_slot(name, some[index], one, structure, index, check_dtype=True)
                kept[index] = opened(number, codec, aval, codes[index], scales[index])
        parts[place] = structure.unflatten(kept)
    return layout.structure.unflatten(parts)


def _decoded(number: int, codec: Codec, aval: trees.Aval, codes: Any, scales: Any) -> Array:
    return decoded(codec, aval, codes, scales)


_ANEW = "call init(params) again"


def _placed(value: Any, codes: Any, scales: Any) -> tuple[Any, Any]:
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


# One array


def coded_avals(codec: Codec, shape: tuple[int, ...]) -> tuple[trees.Aval, trees.Aval | None]:
    """Shape and dtype of the codes and the scales of an array; None if there are no scales."""
    scales = None if codec.scale_dtype is None else (codec.scale_shape(shape), np.dtype(codec.scale_dtype))
    return (codec.code_shape(shape), np.dtype(codec.code_dtype)), scales


@functools.partial(jax.jit, static_argnums=0)
def encoded(codec: Codec, value: Array, seed: Array | None) -> tuple[Array, Any]:
    """Codes, in the shape of the array, and scales; rounded at random where there is a seed."""
    with jax.numpy_dtype_promotion("standard"):
        value = cast(value, jnp.float32)
        codes, scales = codec.encode(value, None if seed is None else own_bits(value, seed))
        return codes, HOLE if scales is None else scales


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(codec: Codec, aval: trees.Aval, codes: Array, scales: Any) -> Array:
    """The array of this shape and dtype that codes and scales stand for."""
    shape, dtype = aval
    with jax.numpy_dtype_promotion("standard"):
        some = None if isinstance(scales, optax.MaskedNode) else scales
        return cast(codec.decode(codes, some).reshape(shape), dtype)
