"""Against neurons with steps of every size: divide each neuron's update by how large it has been."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from gradxform._core.arguments import square_dtype
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction, non_negative
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics.arithmetic import clamp, largest_square, lerp, root, zero_if_finite
from gradxform.numerics.norms import norm
from gradxform.optimizers.matrix.layouts import Layout, layout_of


def normalize_by_neuron(
    decay: Numeric = 0.95, eps: Numeric = 1e-8, *, layout: str = "in out", state_dtype: Any = None
) -> Transformation:
    """v ← γ·v + (1 − γ)·mean(u²) over the inputs of each neuron,  û ← u/(√v + ε),  u ← û·‖u‖/‖û‖ for each matrix.

    Every output neuron gets steps of about the same size, and every matrix keeps its Frobenius norm.

    Args:
      decay: γ in [0, 1).
      eps: ε ≥ 0; 0/0 is 0.
      layout: See `orthogonalize`.
      state_dtype: Dtype of the state ``nu``, one number per neuron; see `normalize_by_rms`.

    Raises:
      TypeError, ValueError: see `orthogonalize`.

    References:
      Li et al. 2025, arXiv 2510.05491 (NorMuon), algorithm 1; the norm is kept as in the authors'
      code, while their paper makes the root mean square 0.2.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.normalize_by_neuron()
      >>> updates, state = tx.update(jnp.array([[0.3, 4.0], [0.4, 3.0]]), tx.init(jnp.zeros((2, 2))))
      >>> print(jnp.linalg.norm(updates, axis=0).round(), state.nu.shape)
      [4. 4.] (1, 2)
    """
    found = layout_of(layout)
    return lift(
        _Init(found),
        _divide,
        constructor=normalize_by_neuron,
        whole=True,
        fits=found,
        decay=fraction(decay),
        eps=non_negative(eps),
        layout=found.text,
        state_dtype=square_dtype("state_dtype", state_dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Init:
    """One number per neuron."""

    layout: Layout

    def __call__(self, param: Array) -> RuleState:
        fits = self.layout.misfit(param.shape, param.dtype) is None  # if not, the update raises
        return {"nu": jnp.zeros(self.layout.neurons(param.shape) if fits else (), param.dtype)}


def _divide(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    layout = layout_of(step.layout)
    pairs = zip(layout.cut(update), layout.cut(state["nu"]), strict=True)
    updates, nus = zip(*(_divide_even(layout.even, piece, nu, step) for piece, nu in pairs), strict=True)
    return layout.joined(list(updates)), {"nu": layout.joined(list(nus))}


def _divide_even(layout: Layout, update: Array, nu: Array, step: Step) -> tuple[Array, Array]:
    """The same for a leaf, or a piece of one, without blocks of unequal sizes."""
    shape = nu.shape
    matrices, nu = layout.matrices(update), layout.matrices(nu)
    bounded = clamp(matrices, largest_square(update.dtype))
    inputs = max(1, matrices.shape[1])
    squares = jnp.sum(jnp.square(bounded) / inputs + zero_if_finite(matrices), axis=1, keepdims=True)
    nu = lerp(nu, squares, 1 - step.decay)
    divisor = root(nu) + step.eps
    even = matrices / jnp.where(divisor == 0, 1, divisor)
    size = norm(even, (1, 2))
    kept = even * (norm(matrices, (1, 2)) / jnp.where(size == 0, 1, size))
    return layout.leaf(kept, update.shape), layout.leaf(nu, shape)
