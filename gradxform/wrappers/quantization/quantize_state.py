"""Optimizer states in one byte per number, or half of one, around any transformation.

Every array of the state that is shaped like a parameter is kept as codes and scales. A step decodes it, lets the
wrapped transformation work in float32, and codes the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core import trees
from gradxform._core.arguments import count_of
from gradxform._core.body import Call, Foreign, Report, Transformation, Wrapper, body_of
from gradxform._core.chain import Chain
from gradxform._core.leaves import Leaves, trained_leaves, widened
from gradxform._core.meshes import put_like
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform._core.trees import unless
from gradxform.numerics.arithmetic import Array, cast
from gradxform.numerics.rounding import next_seed, seed_for
from gradxform.wrappers.quantization.codecs import CODECS, Codec
from gradxform.wrappers.quantization.coded import Coded, decoded, encoded
from gradxform.wrappers.quantization.fields import KINDS, KNOWN, Fields, checked_fields, names_of


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

    hyperparams = inner_hyperparams


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
        ``"companded8"``, in groups of 32 with float16 scales (6e-8 to 65504) as FlashOptim has it; ``"dynamic8"`` and
        ``"dynamic4"``, 8 bits in blocks of 256 and 4 in blocks of 128, as bitsandbytes and torchao have them, slow;
        ``"bfloat16"``. Or a `gradxform.wrappers.quantization.codecs.Codec` of your own.
      min_size: Leaves with fewer elements than this, or with a number of them that is no multiple of the block, keep
        their state as it is; moments that are complex or float64 are always kept.
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

    def init(self, params: Any) -> QuantizedState:
        leaves, structure = trees.flatten("params", params)
        found = self.coded_fields(leaves, structure)
        coded = any(codec is not None for _, field in found.placed for codec in field.codecs)
        trained = trained_leaves(self.tx, params, params)
        if not coded and any(act and self.fits(trees.aval(leaf)) for act, leaf in zip(trained, leaves, strict=True)):
            raise ValueError(f"{self.name} has nothing to do: the state of {self.tx!r} has no array like a parameter")
        state = self.tx.init(self.seen(params))
        return self._closed(jnp.zeros((), jnp.uint32), state, found, structure, placed=True)

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        return self._run(self.tx.step, updates, state, params, call)

    def guarded(self, updates: Any, state: Any, params: Any, call: Call, taken: Any) -> tuple[Any, Any, Report]:
        if not self._in_kernels(self._coded_fields_for(updates, params)):
            return super().guarded(updates, state, params, call, taken)
        return self._run(functools.partial(self.tx.guarded, taken=taken), updates, state, params, call, taken)

    def advance(self, updates: Any, state: Any, params: Any, call: Call, taken: Any = None) -> tuple[Any, Any, Report]:
        if not self._in_kernels(self._coded_fields_for(updates, params)):
            return super().advance(updates, state, params, call, taken)
        return self._run(functools.partial(self.tx.advance, taken=taken), updates, state, params, call, taken)

    def _run(
        self, inner_step: Callable[..., Any], updates: Any, state: Any, params: Any, call: Call, taken: Any = None
    ) -> tuple[Any, Any, Report]:
        """What the wrapped transformation does in `inner_step`, on a state that is decoded, or is in its kernels."""
        check_state_type(self.name, state, QuantizedState)
        leaves = Leaves.of(updates, params)
        structure = leaves.structure
        found = self._coded_fields_for(updates, params)
        given = None if params is None else self.seen(params)

        def coded(number: int, codec: Codec, aval: trees.Aval, codes: Any, scales: Any) -> Coded:
            return Coded(codec, codes, scales, self._seed(state.seed, number))

        decode = coded if self._in_kernels(found) else _decoded
        opened = found.opened(state.codes, state.scales, state.inner, structure, decode)
        stepped, new, report = inner_step(self.seen(updates), opened, given, call)
        if isinstance(self.tx, Foreign):
            steps = zip(structure.flatten_up_to(stepped), leaves.final, strict=True)
            stepped = structure.unflatten([cast(one, dtype) for one, dtype in steps])
        after = unless(taken, state.seed, next_seed(state.seed))
        return stepped, self._closed(state.seed, new, found, structure)._replace(seed=after), report

    def _in_kernels(self, found: Fields) -> bool:
        """Whether all fields are those of rules, which decode and encode them in the kernels of the step."""
        segments = self.tx.segments if isinstance(self.tx, Chain) else ()
        return set(found.names) <= {name for segment in segments for name in getattr(segment, "fields", ())}

    def seen(self, tree: Any) -> Any:
        """Updates or parameters as the wrapped transformation gets them: ours computes in float32 whatever they are."""
        return jax.tree.map(widened, tree) if isinstance(self.tx, Foreign) else tree

    def _closed(self, seed: Any, inner: Any, found: Fields, structure: Any, placed: bool = False) -> QuantizedState:
        """The state with every field coded; where `placed`, on the devices of what is coded."""

        def encode(number: int, codec: Codec, value: Any) -> tuple[Any, Any]:
            if isinstance(value, Coded):
                return value.codes, value.scales
            codes, scales = encoded(codec, value, self._seed(seed, number))
            return jax.tree.map(functools.partial(put_like, value), (codes, scales)) if placed else (codes, scales)

        return QuantizedState(seed, *found.closed(inner, structure, encode))

    def _seed(self, seed: Any, number: int) -> Any:
        """Of the bits that round one of the fields."""
        return seed_for(seed, number) if self.rounding == "stochastic" else None

    # What is known before any array is there

    def coded_fields(self, leaves: list[Any], structure: Any) -> Fields:
        """The fields of the state, for parameters of these shapes."""
        avals = tuple(map(trees.aval, leaves))
        if (structure, avals) not in self._known:
            self._known[structure, avals] = self._found(structure, avals)
        return self._known[structure, avals]

    @functools.cached_property
    def _known(self) -> dict[Any, Fields]:
        """What `coded_fields` has found; it goes with the transformation, which may hold a tracer as learning rate."""
        return {}

    def _found(self, structure: Any, avals: tuple[trees.Aval, ...]) -> Fields:
        def codec_of(name: str, aval: trees.Aval) -> Codec | None:
            return self.codec_of(name) if self.fits(aval) else None

        shapes = structure.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals])
        state = jax.eval_shape(lambda params: self.tx.init(self.seen(params)), shapes)
        found = Fields.of(state, structure, avals, codec_of)
        for name, _ in self.fields:
            if not any(name in names_of(path) for path in found.names):
                raise ValueError(
                    f"fields names {name!r}, which is no field of the state of {self.tx!r}; it has {found.names}"
                )
        return found

    def _coded_fields_for(self, updates: Any, params: Any) -> Fields:
        return self.coded_fields(*jax.tree.flatten(updates if params is None else params))

    def fits(self, aval: trees.Aval) -> bool:
        """Whether an array of this shape and dtype can be coded."""
        shape, dtype = aval
        size = int(np.prod(shape))
        real = dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize <= 4
        return real and size >= self.min_size and size % self.codec.block == 0

    def codec_of(self, path: str) -> Codec | None:
        """How a field is coded; None if it is kept."""
        given = dict(self.fields)
        kind = next((given[name] for name in names_of(path) if name in given), KNOWN.get(names_of(path)[-1]))
        if kind is None:
            raise ValueError(
                f"{self.name} does not know what the state field {path!r} of {self.tx!r} holds; say "
                f"fields={{{names_of(path)[-1]!r}: …}} with one of {', '.join(map(repr, KINDS))}"
            )
        return None if kind == "kept" else dataclasses.replace(self.codec, signed=kind == "signed")


def _decoded(number: int, codec: Codec, aval: trees.Aval, codes: Any, scales: Any) -> Array:
    return decoded(codec, aval, codes, scales)
