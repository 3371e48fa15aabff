"""Optimizer states in one byte per number, or half of one, around any transformation.

Every array of the state that is shaped like a parameter is kept as codes and scales. A step decodes these, lets the
wrapped transformation work in float32, and encodes the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core import trees
from gradxform._core.arguments import count_of
from gradxform._core.body import Foreign, Transformation, Wrapper, body_of
from gradxform._core.call import Call, Report
from gradxform._core.compiled import cast
from gradxform._core.encoded import EncodedParam
from gradxform._core.inventory import StateArray, names_of, per_leaf_by_name, shared, state_shapes, within
from gradxform._core.leaves import Leaves, widened
from gradxform._core.meshes import put_like
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform._core.trees import unless
from gradxform.numerics.arithmetic import Array
from gradxform.numerics.rounding import next_seed, seed_for
from gradxform.wrappers.quantization.codecs import CODECS, Codec
from gradxform.wrappers.quantization.coded import Coded, decoded, encoded
from gradxform.wrappers.quantization.coding import HOLDS, CodedArray, Coding, checked_fields, role_of


class QuantizedState(NamedTuple):
    """What `quantize_state` carries from step to step."""

    seed: jax.Array
    """The seed of the next step's random bits, uint32."""
    codes: dict[str, Any]
    """A tree of codes in the parameters' shapes for each field of the inner state that holds moments, by its name."""
    scales: dict[str, Any]
    """The same for scales: one per block along the last axis, or flat if that is no whole number of blocks."""
    inner: Any
    """The state of the wrapped transformation, without what is coded."""

    hyperparams = inner_hyperparams


def quantize_state(
    tx: optax.GradientTransformation,
    codec: str | Codec = "root8",
    min_size: int = 4096,
    fields: Mapping[str, str] | None = None,
    rounding: str = "stochastic",
) -> Transformation:
    """s ← encode(step(decode(s))): keep the moments in 8 or 4 bits, or in bfloat16.

    Rounded to nearest, a code does not change while steps change its number by less than half the distance to the next
    code, as nearly every step does with a second moment. Stochastic rounding loses no change in the mean, except of
    numbers beyond the signed maps of ``dynamic8`` and ``dynamic4``, which end before −1.

    Args:
      tx: Any transformation. Another library's sees float32 updates and parameters.
      codec: ``"root8"``, evenly spaced square roots, fourth roots of what is not negative, in blocks of 256;
        ``"companded8"``, in groups of 32 with float16 scales (6e-8 to 65504) as FlashOptim has it; ``"dynamic8"`` and
        ``"dynamic4"``, 8 bits in blocks of 256 and 4 in blocks of 128, as bitsandbytes and torchao have them, slow;
        ``"bfloat16"``. Or a `gradxform.wrappers.quantization.codecs.Codec` of your own.
      min_size: Leaves with fewer elements than this, or with a number of them that is no multiple of the block, keep
        their state as it is; moments that are complex or float64 are always kept.
      fields: What fields of the state hold, by name: ``"signed"``, ``"non_negative"`` or ``"kept"`` as they are. The
        moments of this library, of optax and of torch, such as ``mu`` and ``nu``, are known; others must be named.
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
    body, size = body_of("tx of quantize_state", tx), count_of("min_size", min_size)
    return Transformation.of(QuantizeState(body, codec, size, checked_fields(fields), rounding))


_ROUNDINGS = ("stochastic", "nearest")
_DEFAULT = CODECS["root8"]()


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

    def inventory(self, params: Any) -> list[StateArray]:
        state, seen = state_shapes(self.init, params), self.inner_params(params)
        coded = {array.path for array in self.coding(params).arrays}
        kept = [array for array in self.tx.inventory(seen) if array.path not in coded]
        parts = [per_leaf_by_name(name, getattr(state, name), params) for name in ("codes", "scales")]
        return [*shared(state, "seed"), *(array for part in parts for array in part), *within("inner", kept)]

    def init(self, params: Any) -> QuantizedState:
        leaves, structure = jax.tree.flatten(params)
        coding = self.coding(params)
        trained = [not rests for rests in self.tx.frozen(params)]
        if not coding.arrays and any(
            act and self.fits(trees.aval(leaf)) for act, leaf in zip(trained, leaves, strict=True)
        ):
            raise ValueError(f"{self.name} has nothing to do: the state of {self.tx!r} has no array like a parameter")
        state = self.tx.init(self.inner_params(params))
        return self._closed(jnp.zeros((), jnp.uint32), state, coding, structure, placed=True)

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        check_state_type(self.name, state, QuantizedState)
        like = updates if params is None else params
        leaves = Leaves.of(updates, params, self.tx.frozen(like))
        coding, structure = self.coding(like), leaves.structure

        def coded(array: CodedArray, codes: Any, scales: Any) -> Coded:
            return Coded(array.codec, codes, scales, self._seed(state.seed, array.number))

        decode = coded if coding.in_kernels else _decoded
        opened = coding.opened(state.codes, state.scales, state.inner, structure, decode)
        given = (
            updates
            if not self.widens
            else structure.unflatten([self.inner_params(leaf.update) for leaf in leaves.leaves])
        )
        result, new, report = self.tx.step(given, opened, None if params is None else self.inner_params(params), call)
        if self.widens:
            result = self._narrowed(leaves, structure.flatten_up_to(result), call)
        closed = self._closed(state.seed, new, coding, structure)
        if not coding.in_kernels:  # to decode and encode again may change the codes
            closed = unless(call.accepted, state, closed)
        return result, closed._replace(seed=unless(call.accepted, state.seed, next_seed(state.seed))), report

    def view(self, state: Any, params: Any) -> Any:
        check_state_type(self.name, state, QuantizedState)
        if not self.views:
            return params
        coding, structure = self.coding(params), jax.tree.structure(params)
        opened = coding.opened(state.codes, state.scales, state.inner, structure, _decoded)
        return self.tx.view(opened, self.inner_params(params))

    def _narrowed(self, leaves: Leaves, results: list[Any], call: Call) -> Any:
        """What is wanted, made of the results of a transformation that saw float32."""
        narrow = [
            each if leaf.update is None or isinstance(each, EncodedParam) else cast(each, leaf.final)
            for leaf, each in zip(leaves.leaves, results, strict=True)
        ]
        return leaves.result(call.wants, narrow)

    # What is known before any array is there

    def coding(self, params: Any) -> Coding:
        """Which arrays of the state are coded, for parameters of these shapes."""
        leaves, structure = jax.tree.flatten(params)
        key = structure, trees.avals(leaves)
        if key not in self._known:
            self._known[key] = self._found(params)
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[Any, Coding]:
        """What `coding` has found. It goes away with the transformation, which may hold a tracer as learning rate."""
        return {}

    def _found(self, params: Any) -> Coding:
        leaves, structure = jax.tree.flatten(params)
        avals = [trees.aval(leaf) for leaf in leaves]
        shapes = [leaf if a[1] is None else jax.ShapeDtypeStruct(*a) for leaf, a in zip(leaves, avals, strict=True)]
        seen = self.inner_params(structure.unflatten(shapes))
        inventory = self.tx.inventory(seen)
        known = sorted({array.field for array in inventory if array.leaf is not None})
        for name, _ in self.fields:
            if leaves and not any(name in names_of(field) for field in known):
                raise ValueError(
                    f"fields names {name!r}, which is no field of the state of {self.tx!r}; it has {known}"
                )
        roles = [(array.field, role_of(array, dict(self.fields))) for array in inventory if array.leaf is not None]
        moments = sorted({field for field, role in roles if role in ("signed", "non_negative")})
        return Coding.of(self.tx.init, inventory, moments if leaves else self._moments, seen, self.codec_of)

    @functools.cached_property
    def _moments(self) -> list[str]:
        """The fields of moments where there is no parameter to tell them by: for optax's `tree_map_params`."""
        try:
            like = self.coding([jax.ShapeDtypeStruct((self.min_size * self.codec.block,), jnp.float32)])
        except ValueError:  # patterns that match no path of it
            return []
        return list(like.fields)

    def fits(self, aval: trees.Aval) -> bool:
        """Whether an array of this shape and dtype can be coded."""
        shape, dtype = aval
        size = int(np.prod(shape))
        real = dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize <= 4
        return real and size >= self.min_size and size % self.codec.block == 0

    def codec_of(self, array: StateArray) -> Codec | None:
        """How an array of the state is coded; None if it is kept."""
        if not self.fits(array.aval):
            return None
        role = role_of(array, dict(self.fields))
        if role is None:
            raise ValueError(
                f"{self.name} does not know what the state field {array.field!r} of {self.tx!r} holds; say "
                f"fields={{{names_of(array.field)[-1]!r}: …}} with one of {', '.join(map(repr, HOLDS))}"
            )
        return None if role == "kept" else dataclasses.replace(self.codec, signed=role == "signed")

    @property
    def widens(self) -> bool:
        """Whether the wrapped transformation must get float32 leaves: ours computes in float32 whatever it gets."""
        return isinstance(self.tx, Foreign)

    def inner_params(self, params: Any) -> Any:
        """Parameters, or updates, as the wrapped transformation gets them; encoded ones are float32 anyway."""
        if not self.widens:
            return params

        def wide(leaf: Any) -> Any:
            narrow = trees.trainable(trees.aval(leaf)[1]) and not isinstance(leaf, EncodedParam)
            return widened(leaf) if narrow else leaf

        return jax.tree.map(wide, params)

    def _seed(self, seed: Any, number: int) -> Any:
        """The seed of the bits that round the next codes of a field; None rounds to nearest."""
        return seed_for(seed, number) if self.rounding == "stochastic" else None

    def _closed(self, seed: Any, inner: Any, coding: Coding, structure: Any, placed: bool = False) -> QuantizedState:
        """The state with every moment coded; if `placed`, codes and scales are on the devices of their moments."""

        def encode(array: CodedArray, value: Any) -> tuple[Any, Any]:
            if isinstance(value, Coded):
                return value.codes, value.scales
            codes, scales = encoded(array.codec, value, self._seed(seed, array.number))
            return jax.tree.map(functools.partial(put_like, value), (codes, scales)) if placed else (codes, scales)

        return QuantizedState(seed, *coding.closed(inner, structure, encode))


def _decoded(array: CodedArray, codes: Any, scales: Any) -> Array:
    return decoded(array.codec, array.aval, codes, scales)
