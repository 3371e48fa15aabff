"""Against memory: a second moment of rows and columns in place of one of every element."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core.arguments import count_of, flag, one_of, square_dtype
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative, positive
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Slot, Step
from gradxform.numerics import abs_squared, clamp, largest_square, lerp, real_dtype, zero_if_finite


def normalize_by_factored_rms(
    decay_rate: Numeric = 0.8,
    step_offset: int = 0,
    min_dim_size_to_factor: int = 128,
    eps: Numeric = 1e-30,
    *,
    factored: bool = True,
    axes: str = "largest",
    state_dtype: Any = None,
) -> Transformation:
    """v ← βₜ·v + (1 − βₜ)·(|u|² + ε),  u ← u/√v,  with v ≈ r·cᵀ/mean(r) for a matrix: r of its rows, c of its columns.

    βₜ = 1 − t^(−κ) makes v the mean of the squares so far at κ = 1, and forgets faster below. A matrix of n·m elements
    keeps n + m numbers; r and c are the means of v along the other axis.

    Args:
      decay_rate: κ > 0.
      step_offset: Steps to leave out of t, a whole number ≥ 0, where a run goes on from another.
      min_dim_size_to_factor: Leaves are factored along two axes that both have at least this many elements; others keep
        v whole.
      eps: ε ≥ 0; 0/0 is 0.
      factored: False keeps v whole for every leaf.
      axes: ``"largest"``, the two largest axes, as in optax; or ``"last"``, the last two, as in torch.
      state_dtype: Dtype of the states ``nu_row`` and ``nu_col``, which have the parameter's axes but one and are
        divided over devices as these are, and of ``nu``; see `normalize_by_rms`.

    Raises:
      TypeError, ValueError: if an argument is out of its range, or inside `jax.shard_map` a leaf is a shard.

    References:
      Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4, and section 7.2 for βₜ.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.normalize_by_factored_rms(min_dim_size_to_factor=2)
      >>> state = tx.init({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
      >>> print(state.nu_row["kernel"], state.nu_col["kernel"], state.nu["bias"])
      [0. 0.] [0. 0. 0.] [0. 0. 0.]
    """
    size = count_of("min_dim_size_to_factor", min_dim_size_to_factor)
    factors = Factors(size if flag("factored", factored) else None, one_of("axes", axes, "largest", "last"))
    return lift(
        factors,
        _divide,
        constructor=normalize_by_factored_rms,
        prepare=_weight,
        slots=("nu", "nu_row", "nu_col"),
        whole=True,
        decay_rate=positive(decay_rate),
        step_offset=count_of("step_offset", step_offset, least=0),
        min_dim_size_to_factor=size,
        eps=non_negative(eps),
        factored=factored,
        axes=axes,
        state_dtype=square_dtype("state_dtype", state_dtype),
    )


@dataclasses.dataclass(frozen=True)
class Factors:
    """Which two axes of a leaf are factored; as the `init` of a rule, the state that this takes."""

    min_size: int | None
    """The least size of both axes; None factors nothing."""
    which: str

    def axes_of(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The axis that rows run over and that of columns, or None."""
        if self.min_size is None or len(shape) < 2:
            return None
        order = np.argsort(shape) if self.which == "largest" else np.arange(len(shape))
        rows, columns = int(order[-2]), int(order[-1])
        return (rows, columns) if min(shape[rows], shape[columns]) >= self.min_size else None

    def __call__(self, param: Array) -> RuleState:
        found, dtype = self.axes_of(param.shape), real_dtype(param.dtype)
        if found is None:
            return {"nu": Slot(jnp.zeros_like(param, dtype=dtype), role="non_negative")}
        rows, columns = found

        def without(axis: int) -> Slot:
            left = tuple(each for each in range(param.ndim) if each != axis)
            return Slot(jnp.zeros([param.shape[each] for each in left], dtype), left, "non_negative")

        return {"nu_row": without(columns), "nu_col": without(rows)}


_SUM_ROOT = 2.0**12
"""The sum of squares stays finite over 2²⁴ elements of the largest update."""


def _weight(step: Step) -> dict[str, Any]:
    return {"weight": (step.number - step.step_offset) ** -step.decay_rate}


def _divide(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    bounded = clamp(update, largest_square(update.dtype) / _SUM_ROOT)
    squares = abs_squared(bounded) + step.eps + zero_if_finite(update)
    if "nu" in state:
        nu = step.keep("nu", lerp(state["nu"], squares, step.weight))
        return bounded * _inverse_root(nu), {"nu": nu}
    found = Factors(step.min_dim_size_to_factor, step.axes).axes_of(update.shape)
    assert found is not None
    rows, columns = found
    row = step.keep("nu_row", lerp(state["nu_row"], jnp.mean(squares, columns), step.weight))
    column = step.keep("nu_col", lerp(state["nu_col"], jnp.mean(squares, rows), step.weight))
    mean = jnp.mean(row, rows - (rows > columns), keepdims=True)
    divided = bounded * jnp.expand_dims(_inverse_root(row / jnp.where(mean > 0, mean, 1)), columns)
    return divided * jnp.expand_dims(_inverse_root(column), rows), {"nu_row": row, "nu_col": column}


def _inverse_root(x: Array) -> Array:
    """1/√x, 0 for 0."""
    return jnp.where(x == 0, 0, jax.lax.rsqrt(x))
