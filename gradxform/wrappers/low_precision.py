"""Against steps that low-precision parameters round away: bfloat16 weights that keep learning.

A bfloat16 number has 8 significant bits: adding less than a 256th of it, and often a 512th, changes nothing. Each
wrapper computes the new value in float32, chooses a low-precision number for it, and returns the difference to the old
parameter, exactly, in float32: whoever adds it lands on the number that was chosen.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform.core import trees
from gradxform.core.body import Alone, Call, Report, Transformation, Wrapper, body_of
from gradxform.core.leaves import HOLE, Leaves, column, trained_leaves, widened
from gradxform.core.state import check_state_type, get_hyperparams
from gradxform.numerics import Array, cast
from gradxform.rounding import half_step, next_seed, random_bits, round_to, seed_for, up_or_down


class LowPrecisionState(NamedTuple):
    """What the wrappers for low-precision parameters carry from step to step."""

    seed: jax.Array
    """Of the random bits of the next step, uint32."""
    residual: Any
    """What the low-precision parameters lack of the values trained, one array per such leaf."""
    inner: Any
    """The state of the wrapped transformation, which sees float32 parameters."""

    @property
    def hyperparams(self) -> dict[str, jax.Array]:
        """Those of the inner state, for trackers that look at the top."""
        return get_hyperparams(self.inner)


def stochastic_rounding(tx: optax.GradientTransformation, key: jax.Array | int) -> Transformation:
    """θ ← SR(θ + u),  E[SR(x)] = x: round the new parameter up or down at random, so that its mean is right.

    Of the two float16 or bfloat16 neighbours of x the nearer one is the likelier, in proportion; what is one of
    these numbers stays. Costs no memory, and some noise.

    Args:
      tx: Any transformation; it sees float32 parameters. Leaves of float32 or wider are its alone.
      key: A PRNG key or a whole number. The bits are a hash of it, the step, the leaf and the element: the same
        however arrays are sharded, and after a restart. Inside `jax.shard_map` every shard draws the same.

    Returns:
      A transformation whose updates are float32 differences to the numbers chosen: add them with `apply_updates`
      or optax's. The state has ``seed`` and ``inner``.

    Raises:
      TypeError, ValueError: if ``key`` is no key, no parameter is float16 or bfloat16, or ``update`` gets no params.

    References:
      Zamirai et al. 2020, arXiv 2010.06192, section 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> tx = gx.stochastic_rounding(gx.sgd(1e-3), jax.random.key(0))
      >>> updates, _ = tx.update(jnp.ones_like(params), tx.init(params), params)
      >>> params = gx.apply_updates(params, updates)
      >>> print(jnp.unique(params), f"{params.astype(float).mean():.4f}")
      [0.996094 1] 0.9990
    """
    return Transformation.of(StochasticRounding(body_of("tx of stochastic_rounding", tx), _seed(key)))


def compensated(tx: optax.GradientTransformation, residual: str = "bfloat16") -> Transformation:
    """θ + r ← θ + r + u: keep what rounding takes from the parameter beside it, and add it again.

    Args:
      tx: See `stochastic_rounding`.
      residual: How r is kept, ``"bfloat16"`` as a number of 2 bytes (Kahan's sum), ``"int8"`` or ``"int16"`` as a
        fraction of half the distance to the next number, which makes 16 or 24 significant bits of a bfloat16
        parameter's 8. What the first two cannot hold is rounded stochastically, so that no step is lost in the
        mean; int16 loses no more than float32 does.

    Returns:
      As `stochastic_rounding`; the state has ``seed``, ``residual`` and ``inner``.

    Raises:
      TypeError, ValueError: if ``residual`` is none of these; see `stochastic_rounding`.

    References:
      Kahan 1965; Zamirai et al. 2020, arXiv 2010.06192, algorithm 3; Ortiz et al. 2026, arXiv 2602.23349 (integers).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = jnp.ones(1, jnp.bfloat16)
      >>> tx = gx.compensated(gx.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = gx.apply_updates(params, updates)
      >>> print(params)
      [0.898438]
    """
    if residual not in _RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(map(repr, _RESIDUALS))}, got {residual!r}")
    return Transformation.of(Compensated(body_of("tx of compensated", tx), residual))


def master_weights(tx: optax.GradientTransformation) -> Transformation:
    """w ← w + u,  θ ← round(w): train a float32 copy and give the model its nearest low-precision numbers.

    Where a parameter is no longer what its copy rounds to, since it was set from outside, the copy starts again
    from the parameter.

    Args:
      tx: See `stochastic_rounding`.

    Returns:
      As `stochastic_rounding`; the state has the copies in ``residual``, 4 bytes per parameter.

    Raises:
      TypeError, ValueError: see `stochastic_rounding`.

    References:
      Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = jnp.ones(1, jnp.bfloat16)
      >>> tx = gx.master_weights(gx.sgd(1e-3))
      >>> updates, state = tx.update(jnp.ones_like(params), tx.init(params), params)
      >>> print(state.residual, gx.apply_updates(params, updates))
      [0.999] [1]
    """
    return Transformation.of(MasterWeights(body_of("tx of master_weights", tx)))


@dataclasses.dataclass(frozen=True, repr=False)
class _LowPrecision(Wrapper):
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
            else (step, HOLE)
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
                raise ValueError(
                    f"{name} is {trees.describe(leaves.params[index])}, which the state was not made for; {_PROMOTED}"
                )
            if expected:
                aval = trees.aval(leaves.params[index])[0], np.dtype(self.residual_dtype)
                trees.check_slot("state.residual", residual, aval, leaves.structure, index, check_dtype=True)
        return residuals


_PROMOTED = (
    "if it was before, something made it wider, as equinox.apply_updates does: "
    "add updates with gradxform's or optax's apply_updates"
)


_NOTHING = Alone(optax.identity())
"""In place of the wrapped transformation, which does not decide how an array is rounded."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _whole(form: _LowPrecision, dtype: Any, param: Any, residual: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return form.whole(cast(param, jnp.float32), residual, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _landed(
    form: _LowPrecision, dtype: Any, param: Any, residual: Any, value: Any, update: Any, seed: Any, place: Any
) -> tuple[Array, Any]:
    """The difference to the number chosen, and the new residual."""
    with jax.numpy_dtype_promotion("standard"):
        param, new = cast(param, jnp.float32), value + update
        bits = random_bits(seed_for(seed, place), value.shape)
        target, kept = form.split(new, dtype, bits)
        stays = new == value
        # where nothing changes −0, which leaves a parameter of −0 as it is
        difference = jnp.where(stays | (target == param), -0.0, target - param)
        return difference, HOLE if kept is None else jnp.where(stays, form.unmoved(residual, kept), kept)


@dataclasses.dataclass(frozen=True, repr=False)
class StochasticRounding(_LowPrecision):
    """The body of `stochastic_rounding`."""

    key: int

    @property
    def first_seed(self) -> int:
        return self.key

    @property
    def residual_dtype(self) -> Any:
        return None

    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        return param

    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        return round_to(value, dtype, bits), None


@dataclasses.dataclass(frozen=True, repr=False)
class MasterWeights(_LowPrecision):
    """The body of `master_weights`."""

    @property
    def residual_dtype(self) -> Any:
        return jnp.float32

    def first_residual(self, value: Array) -> Array:
        return jnp.zeros_like(value) if isinstance(value, jax.ShapeDtypeStruct) else jnp.array(value)

    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        return jnp.where(round_to(residual, dtype) == param, residual, param)

    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        return round_to(value, dtype), value


@dataclasses.dataclass(frozen=True, repr=False)
class Compensated(_LowPrecision):
    """The body of `compensated`."""

    residual: str = "bfloat16"

    @property
    def residual_dtype(self) -> Any:
        return np.dtype(self.residual)

    @property
    def _parts(self) -> float:
        """How many parts an integer residual divides half a step into."""
        return float(np.iinfo(self.residual_dtype).max)

    def whole(self, param: Array, residual: Any, dtype: Any) -> Array:
        if self.residual == "bfloat16":
            rest = cast(residual, jnp.float32)
            # more than half a step is left from before the parameter was set from outside
            return param + jnp.where(jnp.abs(rest) <= half_step(param, dtype), rest, 0)
        return param + residual.astype(jnp.float32) * (half_step(param, dtype) / self._parts)

    def split(self, value: Array, dtype: Any, bits: Array) -> tuple[Array, Any]:
        target = round_to(value, dtype)
        rest = jnp.where(jnp.isfinite(value), value - target, 0)
        if self.residual == "bfloat16":
            return target, cast(round_to(rest, jnp.bfloat16, bits), jnp.bfloat16)
        step = half_step(target, dtype)
        parts = jnp.where(step > 0, rest / jnp.where(step > 0, step, 1), 0) * self._parts
        # the parts of int16 are as fine as float32, of which the nearest loses nothing and a random one would
        parts = jnp.round(parts) if self.residual == "int16" else up_or_down(parts, bits)
        return target, jnp.clip(parts, -self._parts, self._parts).astype(self.residual_dtype)

    def unmoved(self, residual: Any, new: Any) -> Any:
        return residual  # to encode again what was decoded would let a resting value drift


_RESIDUALS = ("bfloat16", "int8", "int16")


def _seed(key: Any) -> int:
    """32 bits of a key or a whole number."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return int(key) & 0xFFFFFFFF
    try:
        with jax.ensure_compile_time_eval():
            return int(jax.random.bits(key, (), jnp.uint32))
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(f"key must be a whole number or a concrete PRNG key, got {key!r:.60}") from error
