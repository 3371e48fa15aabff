"""Naive twins of Adafactor, in NumPy float64: a second moment of rows and of columns.

See `twins` for what a twin takes and returns. Rows and columns are summed, as in the paper, where we take means.
"""

from __future__ import annotations

import numpy as np

from tests.twins.elementwise import at


def rms(x):
    return np.sqrt(np.mean(np.abs(x) ** 2)) if x.size else 0.0


def factored_axes(shape, min_size, which):
    """The axes of rows and columns: the two largest, or the last two; None where one of them is too short."""
    if len(shape) < 2:
        return None
    axes = sorted(range(len(shape)), key=lambda axis: shape[axis]) if which == "largest" else list(range(len(shape)))
    return tuple(axes[-2:]) if all(shape[axis] >= min_size for axis in axes[-2:]) else None


def normalize_by_factored_rms(
    updates, decay_rate=0.8, step_offset=0, min_dim_size_to_factor=128, eps=1e-30, factored=True, axes="largest"
):
    """Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4: V̂ = R·C/(1ᵀR), with β̂₂ = 1 − t^(−κ) of section 7.2."""
    found = factored_axes(updates[0].shape, min_dim_size_to_factor, axes) if factored else None
    results, v, r, c = [], 0.0, 0.0, 0.0
    for t, g in enumerate(updates, 1):
        beta = 1 - (t - step_offset) ** -at(decay_rate, t)
        squares = np.abs(g) ** 2 + at(eps, t)
        if found is None:
            v = beta * v + (1 - beta) * squares
            results.append(g / np.sqrt(v))
            continue
        rows, columns = found
        r = beta * r + (1 - beta) * squares.sum(columns, keepdims=True)
        c = beta * c + (1 - beta) * squares.sum(rows, keepdims=True)
        results.append(g / np.sqrt(r * c / r.sum(rows, keepdims=True)))
    return np.array(results)


def clip_by_leaf_rms(updates, max_rms):
    """Shazeer & Stern 2018, section 6: U/max(1, RMS(U)/d)."""
    return np.array([u / max(1.0, rms(u) / at(max_rms, t)) for t, u in enumerate(updates, 1)])


def scale_by_param_rms(updates, theta, min_scale=1e-3):
    """Shazeer & Stern 2018, section 8: max(ε₂, RMS(X))."""
    return np.array([max(at(min_scale, t), rms(theta)) * u for t, u in enumerate(updates, 1)])


def adafactor(
    theta,
    gradients,
    learning_rate=None,
    min_dim_size_to_factor=128,
    decay_rate=0.8,
    decay_offset=0,
    multiply_by_parameter_scale=True,
    clipping_threshold=1.0,
    momentum=None,
    weight_decay_rate=None,
    eps=1e-30,
    factored=True,
):
    """Shazeer & Stern 2018, algorithms 4 and 5. The momentum of the steps, and a decay without α, are optax's."""
    directions = normalize_by_factored_rms(gradients, decay_rate, decay_offset, min_dim_size_to_factor, eps, factored)
    path, m = [], np.zeros_like(theta)
    for t, u in enumerate(directions, 1):
        if clipping_threshold is not None:
            u = u / max(1.0, rms(u) / at(clipping_threshold, t))
        relative = 1.0 if learning_rate is None else at(learning_rate, t)
        move = relative * (max(1e-3, rms(theta)) if multiply_by_parameter_scale else 1.0) * u
        if momentum is not None:
            move = m = at(momentum, t) * m + (1 - at(momentum, t)) * move
        if weight_decay_rate is not None:
            move = move + at(weight_decay_rate, t) * theta
        theta = theta - move
        path.append(theta)
    return np.array(path)
