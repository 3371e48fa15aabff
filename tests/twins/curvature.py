"""Naive twins of quasi-Newton methods, in NumPy float64: the two loops over vectors, as the books write them.

See `twins` for what a twin takes and returns.
"""

from __future__ import annotations

import collections

import numpy as np

from tests.twins.elementwise import at


def inner(a, b):
    return np.sum(np.conj(a) * b).real


def two_loops(g, pairs, scale_init_precond):
    """Nocedal & Wright 2006, algorithm 7.4, with γ of equation 7.20 and only those pairs for which ⟨s, y⟩ > 0.

    Before there is any, γ = min(1, 1/‖g‖), as in optax.
    """
    pairs = [(s, y) for s, y in pairs if inner(s, y) > 0]
    q, alphas = g, []
    for s, y in reversed(pairs):
        alphas.append(inner(s, q) / inner(y, s))
        q = q - alphas[-1] * y
    if not scale_init_precond:
        gamma = 1.0
    elif pairs:
        gamma = inner(*pairs[-1]) / inner(pairs[-1][1], pairs[-1][1])
    else:
        gamma = min(1.0, 1 / np.sqrt(inner(g, g)))
    r = gamma * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - inner(y, r) / inner(y, s))
    return r


class History:
    """The last k steps."""

    def __init__(self, memory_size, scale_init_precond):
        self.pairs = collections.deque(maxlen=memory_size)
        self.scale_init_precond = scale_init_precond
        self.last = None

    def direction(self, theta, g):
        if self.last is not None:
            self.pairs.append((theta - self.last[0], g - self.last[1]))
        self.last = theta, g
        return two_loops(g, self.pairs, self.scale_init_precond)


def scale_by_lbfgs(updates, theta, memory_size=10, scale_init_precond=True):
    """Liu & Nocedal 1989; where θ stays, there are no pairs."""
    history = History(memory_size, scale_init_precond)
    return np.array([history.direction(theta, u) for u in updates])


def lbfgs(theta, gradients, learning_rate=None, memory_size=10, scale_init_precond=True):
    """Nocedal & Wright 2006, algorithm 7.5, with a learning rate in place of a line search."""
    history, path = History(memory_size, scale_init_precond), []
    for t, g in enumerate(gradients, 1):
        rate = 1.0 if learning_rate is None else at(learning_rate, t)
        theta = theta - rate * history.direction(theta, g)
        path.append(theta)
    return np.array(path)
