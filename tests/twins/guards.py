"""Naive twins of the guards against spikes, in NumPy float64.

A twin takes gradients g₁ … g_T, each a list of leaves, and returns what becomes of each; `skip_spikes` takes a
loss and a gradient norm per step, and returns which steps are taken. Where the papers leave a choice, it is made as
in the package that is named.
"""

from __future__ import annotations

import math

import numpy as np

from tests.twins.elementwise import at


def norm(x, axis=None):
    return np.sqrt(np.sum(np.abs(x) ** 2, axis=axis, keepdims=axis is not None))


def global_norm(leaves):
    return norm(np.array([norm(leaf) for leaf in leaves]))


def zclip(gradients, threshold=2.5, decay=0.97, warmup=25, max_norm=1.0, eps=1e-6):
    """Kumar et al. 2025, arXiv 2504.02507, and the package zclip: a norm with z > z* becomes μ + (z*²/z)·σ.

    That norm enters μ and σ, whether or not `max_norm` is below it. During the warm-up, at least one step, only
    `max_norm` clips, and the statistics after it are those of all norms so far.
    """
    results, warmup_norms, mean, variance = [], [], 0.0, 0.0
    for t, leaves in enumerate(gradients, 1):
        size = limit = global_norm(leaves)
        if t <= max(1, warmup):
            warmup_norms.append(size)
            mean, variance = np.mean(warmup_norms), np.var(warmup_norms)
        else:
            deviation = np.sqrt(variance)
            z = (size - mean) / (deviation + at(eps, t))
            if z > at(threshold, t):
                limit = mean + at(threshold, t) ** 2 / z * deviation
            mean = at(decay, t) * mean + (1 - at(decay, t)) * limit
            variance = at(decay, t) * variance + (1 - at(decay, t)) * (limit - mean) ** 2
        limit = min(limit, at(max_norm, t))
        results.append([leaf * (limit / size) if size > limit else leaf for leaf in leaves])
    return results


def agc(gradients, params, max_ratio=0.01, eps=1e-3, axis=None):
    """Brock et al. 2021, arXiv 2102.06171, section 4: ‖g‖ ≤ λ·max(‖θ‖, ε) for each unit; units as in optax."""
    results = []
    for t, leaves in enumerate(gradients, 1):
        results.append([])
        for leaf, param in zip(leaves, params, strict=True):
            axes = input_axes(leaf) if axis is None else axis
            limit = at(max_ratio, t) * np.maximum(norm(param, axes), at(eps, t))
            results[-1].append(leaf * (limit / np.maximum(norm(leaf, axes), limit)))
    return results


def input_axes(leaf):
    """All axes of a vector, the first of a linear layer with one or more output axes, all but the last of a kernel."""
    if np.squeeze(leaf).ndim <= 1:
        return None
    return (0,) if leaf.ndim <= 3 else tuple(range(leaf.ndim - 1))


def adagc(gradients, max_ratio=1.05, decay=0.98, warmup=100, max_norm=1.0, eps=1e-8):
    """Wang et al. 2025, arXiv 2502.11034, and pytorch_optimizer's AdaGC: ‖g‖ ≤ λ·γ for each leaf, γ the mean of ‖ĝ‖.

    Before step number `warmup`, and at the first, the global norm is clipped, and γ is the least ‖ĝ‖ so far.
    """
    results, averages = [], math.inf
    for t, leaves in enumerate(gradients, 1):
        sizes = np.array([norm(leaf) for leaf in leaves])
        if t == 1 or t < warmup:
            scales = np.full(len(leaves), at(max_norm, t) / max(global_norm(leaves), at(max_norm, t)))
            averages = np.minimum(averages, scales * sizes)
        else:
            limits = at(max_ratio, t) * np.maximum(averages, at(eps, t))
            scales = limits / np.maximum(sizes, limits)
            averages = at(decay, t) * averages + (1 - at(decay, t)) * scales * sizes
        results.append([scale * leaf for scale, leaf in zip(scales, leaves, strict=True)])
    return results


def skip_spikes(losses, norms=None, threshold=6.0, window=128):
    """OLMo-core's SkipStepOptimizer: skip where the loss or the norm is more than k·σ above its mean.

    Both are of the last `window` steps before this one, skipped ones included, and σ has n − 1 below the sum. Every
    step is taken until the window is half full. Up to a window of 5, OLMo-core takes σ of a single value at step 2,
    gets NaN, and skips; here at least two values are needed.
    """
    taken, series = [], [losses] if norms is None else [losses, norms]
    for t in range(1, len(losses) + 1):
        unusual = False
        for values in series if t >= max(3, window // 2) else []:
            past = values[max(0, t - 1 - window) : t - 1]
            unusual |= bool(values[t - 1] - np.mean(past) > at(threshold, t) * np.std(past, ddof=1))
        taken.append(not unusual)
    return taken
