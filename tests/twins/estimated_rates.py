"""Naive twins of optimizers that find their learning rate, in NumPy float64.

See `twins` for what a twin takes and returns. The loss is `LOSS` at every step.
"""

from __future__ import annotations

import numpy as np

from tests.support.trees import LOSS
from tests.twins.elementwise import at, quotient, weight_sum


def polyak_length(g, t, f_min, max_learning_rate, eps, variant):
    """Loizou et al. 2021, arXiv 2002.10542, equation 3; "sps+": Garrigos et al. 2023, arXiv 2307.14528."""
    gap = LOSS - at(f_min, t)
    if variant == "sps+":
        gap = max(gap, 0.0)
    square = np.sum(np.abs(g) ** 2)
    return min(gap / (square + at(eps, t)), at(max_learning_rate, t)) if square > 0 else 0.0


def scale_by_polyak(updates, f_min=0.0, max_learning_rate=1.0, eps=0.0, variant="sps"):
    """See `polyak_length`."""
    return np.array([polyak_length(u, t, f_min, max_learning_rate, eps, variant) * u for t, u in enumerate(updates, 1)])


def polyak_sgd(theta, gradients, max_learning_rate=1.0, scaling=1.0, f_min=0.0, eps=0.0, variant="sps"):
    """θ ← θ − α·γ·g with γ of `polyak_length`."""
    path = []
    for t, g in enumerate(gradients, 1):
        theta = theta - at(scaling, t) * polyak_length(g, t, f_min, max_learning_rate, eps, variant) * g
        path.append(theta)
    return np.array(path)


def prodigy(
    theta,
    gradients,
    learning_rate=1.0,
    b1=0.9,
    b2=0.999,
    b3=None,
    eps=1e-8,
    d0=1e-6,
    d_coef=1.0,
    weight_decay=0.0,
    safeguard_warmup=False,
):
    """Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4, with γ the corrected rate of Adam.

    As in the authors' package, ε is multiplied by the new d, and the decay by γ·d. The factors 1 − β₃ of r and s are
    the paper's: their quotient does not depend on them.
    """
    path, start, d = [], theta, d0
    m, v, s, r = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta), 0.0
    for t, g in enumerate(gradients, 1):
        beta1, beta2 = at(b1, t), at(b2, t)
        root = np.sqrt(beta2) if b3 is None else at(b3, t)
        gamma = at(learning_rate, t) * np.sqrt(weight_sum(beta2, t)) / weight_sum(beta1, t)
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * np.abs(g) ** 2
        r = root * r + (1 - root) * gamma * d**2 * np.sum(np.conj(g) * (start - theta)).real
        s = root * s + (1 - root) * (1.0 if safeguard_warmup else gamma) * d**2 * g
        size = np.sum(np.abs(s))
        estimate = d_coef * r / size if size > 0 else 0.0
        before, d = d, max(d, estimate)
        theta = theta - before * gamma * (quotient(m, np.sqrt(v) + d * at(eps, t)) + at(weight_decay, t) * theta)
        path.append(theta)
    return np.array(path)
