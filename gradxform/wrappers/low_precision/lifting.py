"""Wrappers that train float32 values where parameters are narrower: from a form of one array to a wrapper of trees."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core import meshes, trees
from gradxform._core.body import Wrapper
from gradxform._core.call import Call, Report
from gradxform._core.encoded import EncodedParam, Form
from gradxform._core.leaves import HOLE, Leaves, column, widened
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform._core.trees import unless
from gradxform._core.xla import written
from gradxform.numerics.arithmetic import Array, cast
from gradxform.numerics.rounding import next_seed, random_bits, seed_for


class LowPrecisionState(NamedTuple):
    """What the wrappers for low-precision parameters carry from step to step."""

    seed: jax.Array
    """The seed of the next step's random bits, uint32."""
    residual: Any
    """What low-precision parameters lack of the values that are trained, one array per such leaf."""
    inner: Any
    """The state of the wrapped transformation, which sees float32 parameters."""

    hyperparams = inner_hyperparams


@dataclasses.dataclass(frozen=True)
class ParameterForm(Form):
    """Mathematics on one array: a float32 value as a number of a narrower dtype, and the residual of that number."""

    @property
    def name(self) -> str:
        """What users call the wrapper."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")

    twice: ClassVar[bool] = False
    """Whether parameter and residual are each made of the old values of both (X2)."""
    keeps_value: ClassVar[bool] = False
    """Whether the residual is the value itself."""

    @property
    @abc.abstractmethod
    def residual_dtype(self) -> Any:
        """The dtype of the residual; None if there is none."""

    def first_residual(self, value: Array) -> Array:
        """The residual of a parameter that was not trained yet: it lacks nothing."""
        return jnp.zeros_like(value, dtype=self.residual_dtype)

    @abc.abstractmethod
    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        """The value that a parameter, widened from `dtype`, and its residual stand for."""

    @abc.abstractmethod
    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        """The number of `dtype` that is chosen for `value`, widened to float32, and its residual."""

    def read(self, arrays: Kept) -> Array:
        return self.whole(cast(arrays.param, jnp.float32), arrays.residual, arrays.param.dtype)

    def write(self, value: Array, update: Array, arrays: Kept, accepted: Any) -> Kept:
        new = value + update
        stays: Any = False if accepted is None else ~accepted
        if self.keeps_value:  # make the parameter of the residual that is kept, or both are made of both (X2)
            new = jnp.where(stays, arrays.residual, new)
        if self.twice:
            new = written(jnp.where(stays | (new == value), _STAYS, new))
            stays = jax.lax.bitcast_convert_type(new, np.uint32) == _STAYS.view(np.uint32)
        dtype, bits = arrays.param.dtype, random_bits(seed_for(arrays.seed, arrays.place), new.shape)
        target, residual = self.split(new, dtype, bits)
        # where nothing changes the parameter stays, even a −0
        param = jnp.where(stays | (target == cast(arrays.param, jnp.float32)), arrays.param, cast(target, dtype))
        if self.twice:  # a decoded value that rests would drift if it were encoded again
            residual = jnp.where(stays, arrays.residual, residual)
        return arrays._replace(param=param, residual=residual)


_STAYS = np.uint32(0x7FDEFACE).view(np.float32)
"""A NaN that no arithmetic gives; it stands for a value that does not change."""


class Kept(NamedTuple):
    """The arrays that a value is kept as, and what its random bits are made of."""

    param: Any
    residual: Any
    """None if there is none."""
    seed: Any
    place: Any
    """The index of the leaf among all leaves."""


@dataclasses.dataclass(frozen=True, repr=False)
class LowPrecision(Wrapper):
    """Train float32 values; give the parameters low-precision numbers."""

    form: ParameterForm
    key: int | None = None
    """The seed of the first step's random bits, where users choose it."""

    like_params: ClassVar[tuple[str, ...]] = ("residual",)

    @property
    def lands(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return self.form.name

    def __repr__(self) -> str:
        options = [(f.name, getattr(self.form, f.name), f.default) for f in dataclasses.fields(self.form)]
        pairs = [*options, ("key", self.key, None)]
        changed = [f"{name}={value!r}" for name, value, default in pairs if value != default]
        return f"{self.name}({', '.join([repr(self.tx), *changed])})"

    def init(self, params: Any) -> LowPrecisionState:
        leaves, structure = jax.tree.flatten(params)
        narrow = self._narrow(leaves, self.tx.frozen(params))
        wide = jax.tree.leaves(self.inner_params(params))
        residuals = [
            meshes.beside(leaf, self.form.first_residual(value), None, "params")
            if is_narrow and self.form.residual_dtype is not None
            else HOLE
            for leaf, value, is_narrow in zip(leaves, wide, narrow, strict=True)
        ]
        seed = jnp.asarray(self.key or 0, jnp.uint32)
        return LowPrecisionState(seed, structure.unflatten(residuals), self.tx.init(structure.unflatten(wide)))

    def inner_params(self, params: Any) -> Any:
        return jax.tree.map(lambda leaf: widened(leaf) if trees.trainable(trees.aval(leaf)[1]) else leaf, params)

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        check_state_type(self.name, state, LowPrecisionState)
        if params is None:
            raise ValueError(f"{self.name} needs the parameters: call update(updates, state, params)")
        frozen = self.tx.frozen(params)
        leaves = Leaves.of(updates, params, frozen)
        narrow = self._narrow([leaf.param for leaf in leaves.leaves], frozen)
        residuals = self._residuals(state, leaves, narrow)
        kept = [
            EncodedParam(self.form, Kept(leaf.param, residual, state.seed, np.uint32(place)), leaf.shape)
            if is_narrow
            else leaf.param
            for place, (leaf, residual, is_narrow) in enumerate(zip(leaves.leaves, residuals, narrow, strict=True))
        ]
        stepped, inner, report = self.tx.step(updates, state.inner, leaves.structure.unflatten(kept), call)
        results, new_residuals = list(leaves.structure.flatten_up_to(stepped)), [HOLE] * len(kept)
        for index, (leaf, is_narrow) in enumerate(zip(leaves.leaves, narrow, strict=True)):
            if is_narrow:
                new = results[index].kept
                results[index] = new.param if call.wants == "params" else difference(leaf.param, new.param)
                new_residuals[index] = HOLE if new.residual is None else new.residual
        seed = unless(call.accepted, state.seed, next_seed(state.seed))
        new_state = LowPrecisionState(seed, leaves.structure.unflatten(new_residuals), inner)
        return leaves.structure.unflatten(results), new_state, report

    def view(self, state: Any, params: Any) -> Any:
        check_state_type(self.name, state, LowPrecisionState)
        if not self.views:
            return params
        frozen = self.tx.frozen(params)
        leaves = Leaves.of(params, params, frozen)
        kept, structure, narrow = (
            jax.tree.leaves(params),
            leaves.structure,
            self._narrow(jax.tree.leaves(params), frozen),
        )
        residuals = self._residuals(state, leaves, narrow)
        values = [
            EncodedParam(self.form, Kept(leaf, residual, state.seed, None), leaf.shape).decoded() if each else leaf
            for leaf, residual, each in zip(kept, residuals, narrow, strict=True)
        ]
        seen = structure.flatten_up_to(self.tx.view(state.inner, structure.unflatten(values)))
        return structure.unflatten(
            [cast(new, old.dtype) if each else new for new, old, each in zip(seen, kept, narrow, strict=True)]
        )

    def _narrow(self, leaves: list[Any], frozen: list[bool]) -> list[bool]:
        """Which leaves are low-precision numbers and not frozen."""
        dtypes = [trees.aval(leaf)[1] for leaf in leaves]
        narrow = [
            not rests and dtype is not None and trees.trainable(dtype) and dtype.itemsize < 4
            for dtype, rests in zip(dtypes, frozen, strict=True)
        ]
        if not all(frozen) and not any(narrow):
            raise ValueError(f"{self.name} has nothing to do: no parameter is float16 or bfloat16; {_PROMOTED}")
        return narrow

    def _residuals(self, state: LowPrecisionState, leaves: Leaves, narrow: list[bool]) -> list[Any]:
        """The residual of each leaf, None if it has none, after checking that the state is for these parameters."""
        residuals = column("state.residual", state.residual, leaves.structure)
        for index, (residual, is_narrow) in enumerate(zip(residuals, narrow, strict=True)):
            expected = is_narrow and self.form.residual_dtype is not None
            if isinstance(residual, optax.MaskedNode) == expected:
                name = trees.name_leaf("params", leaves.structure, index)
                why = _ANOTHERS if is_narrow else _PROMOTED
                raise ValueError(
                    f"{name} is {trees.describe(leaves.leaves[index].param)}, which the state was not made for; {why}"
                )
            if expected:
                aval = leaves.leaves[index].shape, np.dtype(self.form.residual_dtype)
                trees.check_slot("state.residual", residual, aval, leaves.structure, index, check_dtype=True)
        return [None if isinstance(residual, optax.MaskedNode) else residual for residual in residuals]


_PROMOTED = (
    "if it was before, something made it wider, as equinox.apply_updates does: "
    "add updates with gradxform's or optax's apply_updates"
)
_ANOTHERS = f"the state is another wrapper's, or of other parameters; {trees.ANEW}"


@jax.jit
def difference(old: Array, new: Array) -> Array:
    """new − old in float32, exactly; −0 where nothing changes, which leaves a parameter of −0 as it is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.where(new == old, -0.0, cast(new, jnp.float32) - cast(old, jnp.float32))
