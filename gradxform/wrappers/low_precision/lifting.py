"""Wrappers that train float32 values where parameters are narrower: how a rule for one array becomes one for trees."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core import trees
from gradxform._core.body import Call, Foreign, Report, Wrapper
from gradxform._core.leaves import HOLE, Leaves, column, trained_leaves, widened
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform.numerics.arithmetic import Array, cast
from gradxform.numerics.rounding import next_seed, random_bits, seed_for


class LowPrecisionState(NamedTuple):
    """What the wrappers for low-precision parameters carry from step to step."""

    seed: jax.Array
    """Of the random bits of the next step, uint32."""
    residual: Any
    """What the low-precision parameters lack of the values trained, one array per such leaf."""
    inner: Any
    """The state of the wrapped transformation, which sees float32 parameters."""

    hyperparams = inner_hyperparams


class LowPrecision(Wrapper):
    """Train float32 values; give the parameters low-precision numbers."""

    @property
    def lands(self) -> bool:
        return True

    @property
    def first_seed(self) -> int:
        """Of the first step's random bits."""
        return 0

    # The mathematics, on one array

    @property
    @abc.abstractmethod
    def residual_dtype(self) -> Any:
        """The dtype of the residual; None if there is none."""

    def first_residual(self, value: Array) -> Array:
        """What a parameter that was not trained yet lacks: nothing."""
        return jnp.zeros_like(value, dtype=self.residual_dtype)

    @abc.abstractmethod
    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        """The value that a parameter, widened from `dtype`, and its residual stand for."""

    @abc.abstractmethod
    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        """The number of `dtype` chosen for `value`, but widened, and its residual."""

    def unmoved(self, residual: Any, new: Any) -> Any:
        """The residual where the value did not change."""
        return new

    # The same for trees

    def init(self, params: Any) -> LowPrecisionState:
        leaves, structure = trees.flatten("params", params)
        narrow = self._narrow(leaves, params, params)
        wide = [widened(leaf) for leaf in leaves]
        residuals = [
            self.first_residual(value) if is_narrow and self.residual_dtype is not None else HOLE
            for value, is_narrow in zip(wide, narrow, strict=True)
        ]
        seed = jnp.asarray(self.first_seed, jnp.uint32)
        return LowPrecisionState(seed, structure.unflatten(residuals), self.tx.init(structure.unflatten(wide)))

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        check_state_type(self.name, state, LowPrecisionState)
        if params is None:
            raise ValueError(f"{self.name} needs the parameters: call update(updates, state, params)")
        leaves = Leaves.of(updates, params)
        structure = leaves.structure
        narrow = self._narrow(leaves.params, params, updates)
        residuals = self._residuals(state, leaves, narrow)
        bare = dataclasses.replace(self, tx=_NOTHING)
        wide = [
            _whole(bare, trees.dtype_of(param), param, residual) if is_narrow else param
            for param, residual, is_narrow in zip(leaves.params, residuals, narrow, strict=True)
        ]
        stepped, inner, report = self.tx.step(updates, state.inner, structure.unflatten(wide), call)
        steps = structure.flatten_up_to(stepped)
        new = [
            _landed(bare, trees.dtype_of(param), param, residual, value, step, state.seed, np.uint32(place))
            if is_narrow
            else (cast(step, trees.dtype_of(param)), HOLE)
            for place, (param, residual, value, step, is_narrow) in enumerate(
                zip(leaves.params, residuals, wide, steps, narrow, strict=True)
            )
        ]
        new_updates, new_residuals = (structure.unflatten([pair[i] for pair in new]) for i in (0, 1))
        return new_updates, LowPrecisionState(next_seed(state.seed), new_residuals, inner), report

    def _narrow(self, leaves: list[Any], params: Any, updates: Any) -> list[bool]:
        """Which leaves are low-precision numbers and not frozen."""
        trained = trained_leaves(self.tx, params, updates)
        narrow = [act and trees.dtype_of(leaf).itemsize < 4 for leaf, act in zip(leaves, trained, strict=True)]
        if any(trained) and not any(narrow):
            raise ValueError(f"{self.name} has nothing to do: no parameter is float16 or bfloat16; {_PROMOTED}")
        return narrow

    def _residuals(self, state: LowPrecisionState, leaves: Leaves, narrow: list[bool]) -> list[Any]:
        """The residual of each leaf, after checking that the state is for these parameters."""
        residuals = column("state.residual", state.residual, leaves.structure)
        for index, (residual, is_narrow) in enumerate(zip(residuals, narrow, strict=True)):
            expected = is_narrow and self.residual_dtype is not None
            if isinstance(residual, optax.MaskedNode) == expected:
                name = trees.name_leaf("params", leaves.structure, index)
                why = _ANOTHERS if is_narrow else _PROMOTED
                raise ValueError(
                    f"{name} is {trees.describe(leaves.params[index])}, which the state was not made for; {why}"
                )
            if expected:
                aval = trees.aval(leaves.params[index])[0], np.dtype(self.residual_dtype)
                trees.check_slot("state.residual", residual, aval, leaves.structure, index, check_dtype=True)
        return residuals


_PROMOTED = (
    "if it was before, something made it wider, as equinox.apply_updates does: "
    "add updates with gradxform's or optax's apply_updates"
)
_ANOTHERS = f"the state is another wrapper's, or of other parameters; {trees.ANEW}"


_NOTHING = Foreign(optax.identity())
"""In place of the wrapped transformation, which does not decide how an array is rounded."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _whole(form: LowPrecision, dtype: Any, param: Any, residual: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return form.whole(cast(param, jnp.float32), residual, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _landed(
    form: LowPrecision, dtype: Any, param: Any, residual: Any, value: Any, update: Any, seed: Any, place: Any
) -> tuple[Array, Any]:
    """The difference to the number chosen, and the new residual."""
    with jax.numpy_dtype_promotion("standard"):
        param, new = cast(param, jnp.float32), value + cast(update, jnp.float32)
        bits = random_bits(seed_for(seed, place), value.shape)
        target, kept = form.split(new, dtype, bits)
        stays = new == value
        # where nothing changes −0, which leaves a parameter of −0 as it is
        difference = jnp.where(stays | (target == param), -0.0, target - param)
        return difference, HOLE if kept is None else jnp.where(stays, form.unmoved(residual, kept), kept)
