"""Against curvature that differs by direction: an inverse Hessian, made of the last steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core.arguments import count_of, flag
from gradxform._core.body import Transformation
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Slot, Step
from gradxform._core.totals import Norm
from gradxform._core.xla import after
from gradxform.numerics import norm


def scale_by_lbfgs(
    memory_size: int = 10, scale_init_precond: bool = True, *, axis_name: str | Sequence[str] | None = None
) -> Transformation:
    """u ← H·u: H is the inverse Hessian that the last k steps s = θₜ − θₜ₋₁, with y = gₜ − gₜ₋₁, give. L-BFGS.

    H changes as little as it can so that H·y = s for the last k pairs, from γ·I with γ = ⟨s, y⟩/⟨y, y⟩ of the newest.
    Pairs with ⟨s, y⟩ ≤ 0, which would make H indefinite, and pairs that are not finite are left out. It is for
    gradients of the same data in every step; a line search after it gives steps the right length, see `lbfgs`.

    The inner products are taken once, over all leaves, and kept in the state; from these k² numbers the coefficients
    follow by which H·u is a sum of the k steps, the k differences and u.

    Args:
      memory_size: k ≥ 1, how many pairs are kept: 2·k + 2 numbers per parameter.
      scale_init_precond: Whether H starts from γ·I, in the first step with γ = min(1, 1/‖u‖); else from I.
      axis_name: See `clip_by_global_norm`.

    Raises:
      TypeError, ValueError: if ``memory_size`` is no whole number of at least 1.

    References:
      Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization"; Nocedal & Wright 2006,
      algorithms 7.4 and 7.5; Byrd, Nocedal & Schnabel 1994, for the products.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> curvatures, params = jnp.array([1.0, 10.0, 100.0]), jnp.ones(3)
      >>> tx = gx.chain(gx.scale_by_lbfgs(), gx.scale(-1.0))
      >>> state = tx.init(params)
      >>> for _ in range(12):
      ...     updates, state = tx.update(curvatures * params, state, params)
      ...     params = params + updates
      >>> print(bool(jnp.abs(params).max() < 1e-4))
      True
    """
    size = count_of("memory_size", memory_size)
    return lift(
        History(size),
        _combine,
        constructor=scale_by_lbfgs,
        prepare=_places,
        totals=_products,
        gather=_coefficients,
        memory={"steps_by_differences": np.zeros((size, size)), "differences_by_differences": np.zeros((size, size))},
        needs_params=True,
        axis_name=axis_name,
        memory_size=size,
        scale_init_precond=flag("scale_init_precond", scale_init_precond),
    )


@dataclasses.dataclass(frozen=True)
class History:
    """The `init` of the rule: no pairs yet."""

    size: int

    def __call__(self, param: Array) -> RuleState:
        axes = (None, *range(param.ndim))
        pairs = {name: jnp.zeros((self.size, *param.shape), param.dtype) for name in ("steps", "differences")}
        last = {name: Slot(jnp.zeros_like(param), role="kept") for name in ("last_param", "last_update")}
        return {**{name: Slot(array, axes, "kept") for name, array in pairs.items()}, **last}


def _places(step: Step) -> dict[str, Any]:
    """Where the pair that the last step gave stands; pairs are kept in a ring."""
    return {"newest": (step.count - 2) % step.memory_size}


def _pair(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, Array]:
    """s and y; zeros in the first step."""
    assert param is not None
    first = step.number == 1
    return jnp.where(first, 0, param - state["last_param"]), jnp.where(first, 0, update - state["last_update"])


def _products(update: Array, state: RuleState, param: Array | None, step: Step) -> dict[str, Any]:
    new = jnp.stack([vector.ravel() for vector in (*_pair(update, state, param, step), update)])

    def with_new(arrays: Array) -> Array:
        rows = arrays.reshape(len(arrays), -1).conj()
        return jnp.matmul(rows, new.T, precision=jax.lax.Precision.HIGHEST).real

    return {
        "of_steps": with_new(state["steps"]),
        "of_differences": with_new(state["differences"]),
        "of_new": with_new(new),
        "size": Norm(norm(update)),
    }


def _coefficients(total: Any, step: Step) -> dict[str, Any]:
    """The coefficients of H·u, by the two loops of L-BFGS in the products of all vectors."""
    newest, new = step.newest, jnp.nan_to_num(total["of_new"], nan=0.0, posinf=0.0, neginf=0.0)
    of_steps, of_differences = (
        jnp.nan_to_num(total[name], nan=0.0, posinf=0.0, neginf=0.0).at[newest].set(new[row])
        for row, name in enumerate(("of_steps", "of_differences"))
    )
    # ⟨sᵢ, yⱼ⟩ and ⟨yᵢ, yⱼ⟩ with those of the new pair
    known, squares_known = (x.astype(new.dtype) for x in (step.steps_by_differences, step.differences_by_differences))
    crossed = known.at[newest].set(of_differences[:, 0]).at[:, newest].set(of_steps[:, 1])
    squares = squares_known.at[newest].set(of_differences[:, 1]).at[:, newest].set(of_differences[:, 1])
    curvature, square = jnp.diagonal(crossed), jnp.diagonal(squares)
    taken = (curvature > 0) & (square > 0)
    inverse = jnp.where(taken, 1 / jnp.where(taken, curvature, 1), 0)

    def backward(turn: Any, alphas: Array) -> Array:
        place = (newest - turn) % step.memory_size
        return alphas.at[place].set(inverse[place] * (of_steps[place, 2] - crossed[place] @ alphas))

    alphas = jax.lax.fori_loop(0, step.memory_size, backward, jnp.zeros_like(inverse))
    scale = _first_scale(taken, curvature / jnp.where(taken, square, 1), total["size"], step)

    def forward(turn: Any, weights: Array) -> Array:
        place = (newest + 1 + turn) % step.memory_size
        along = scale * (of_differences[place, 2] - squares[place] @ alphas) + crossed[:, place] @ weights
        return weights.at[place].set(jnp.where(inverse[place] > 0, alphas[place] - inverse[place] * along, 0))

    weights = jax.lax.fori_loop(0, step.memory_size, forward, jnp.zeros_like(inverse))
    return {
        "steps_by_differences": crossed,
        "differences_by_differences": squares,
        "scale": scale,
        "of_step": weights,
        "of_difference": -scale * alphas,
    }


def _first_scale(taken: Array, scales: Array, size: Array, step: Step) -> Any:
    """γ: what H is before any pair is taken into it; that of the newest pair that is."""
    if not step.scale_init_precond:
        return jnp.ones_like(size)
    from_newest = (step.newest - jnp.arange(step.memory_size)) % step.memory_size
    newest = from_newest[jnp.argmax(taken[from_newest])]
    return jnp.where(jnp.any(taken), scales[newest], jnp.minimum(1, 1 / jnp.where(size > 0, size, 1)))


def _combine(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    # the products of the old pairs are known before one of them is overwritten (X4)
    pair = [after(step.scale, each) for each in _pair(update, state, param, step)]
    steps, differences = (
        step.keep(name, jax.lax.dynamic_update_index_in_dim(state[name], new, step.newest, 0))
        for name, new in zip(("steps", "differences"), pair, strict=True)
    )
    direction = step.scale * update
    for place in range(step.memory_size):
        direction = direction + step.of_step[place] * steps[place] + step.of_difference[place] * differences[place]
    new = {"steps": steps, "differences": differences, "last_param": param, "last_update": update}
    return direction, new
