"""Muon with steps of the same size for every neuron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction
from gradxform._core.lift import chain
from gradxform.optimizers.matrix.matrices import Matrices, by_layout
from gradxform.optimizers.matrix.neuron_normalization import normalize_by_neuron
from gradxform.optimizers.matrix.orthogonalization import orthogonalize
from gradxform.transforms.momentum import scale_by_momentum
from gradxform.transforms.scaling import scale_by_learning_rate
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def normuon(
    learning_rate: Numeric,
    matrices: Matrices,
    other: optax.GradientTransformation | None = None,
    *,
    beta: Numeric = 0.95,
    beta2: Numeric = 0.95,
    nesterov: bool = True,
    weight_decay: Numeric = 0.0,
    method: str = "newton_schulz",
    steps: int = 5,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
    scale: str | None = "jordan",
    eps: Numeric = 1e-8,
    dtype: Any = None,
    batched: bool | None = None,
    state_dtype: Any = None,
) -> Transformation:
    """O ← s·U·Vᵀ as in `muon`,  v ← β₂·v + (1 − β₂)·mean(O²) for each neuron,  θ ← θ − α·(c·O/(√v + ε) + λ·θ)

    c keeps each matrix's Frobenius norm; see `normalize_by_neuron`.

    Args:
      learning_rate, matrices, other, beta, nesterov, weight_decay, method, steps, coefficients, scale, dtype, batched:
        See `muon`.
      beta2: β₂ in [0, 1).
      eps: ε ≥ 0 beside √v.
      state_dtype: Dtype of the momentum and of v; see `normalize_by_rms`.

    Raises:
      TypeError, ValueError: see `muon`.

    References:
      Li et al. 2025, arXiv 2510.05491, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> state = gx.normuon(0.02, "kernel").init({"kernel": jnp.ones((256, 64))})
      >>> print(state.mu["kernel"].shape, state.nu["kernel"].shape)
      (256, 64) (1, 64)
    """

    def on(layout: str) -> Transformation:
        return chain(
            scale_by_momentum(fraction(beta, "beta"), nesterov=nesterov, state_dtype=state_dtype),
            orthogonalize(
                layout,
                method=method,
                steps=steps,
                coefficients=coefficients,
                scale=scale,
                dtype=dtype,
                batched=batched,
            ),
            normalize_by_neuron(fraction(beta2, "beta2"), eps, layout=layout, state_dtype=state_dtype),
            add_decoupled_weight_decay(weight_decay),
            scale_by_learning_rate(learning_rate),
        )

    return by_layout("normuon", matrices, on, other)
