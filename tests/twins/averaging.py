"""Naive twins of optimizers that evaluate an average, in NumPy float64: all three sequences are kept.

See `twins` for what a twin takes and returns: here θ, where gradients are taken, is the paper's y.
"""

from __future__ import annotations

import numpy as np

from tests.twins.elementwise import at, quotient, weight_sum


class Averages:
    """Defazio et al. 2024, arXiv 2405.15682, algorithm 1: z, x and y, with the weights of line 8."""

    def __init__(self, start, b1, weight_lr_power):
        self.x = self.y = self.z = start
        self.b1, self.power = b1, weight_lr_power
        self.largest_rate = self.weights = 0.0

    def move(self, update, rate, t):
        """z ← z + update, and what follows from it."""
        self.z = self.z + update
        self.largest_rate = max(self.largest_rate, rate)
        weight = self.largest_rate ** at(self.power, t)
        self.weights += weight
        c = weight / self.weights if self.weights > 0 else 0.0
        self.x = (1 - c) * self.x + c * self.z
        self.y = (1 - at(self.b1, t)) * self.z + at(self.b1, t) * self.x
        return self.y


def average_schedule_free(updates, theta, learning_rate, b1=0.9, weight_lr_power=2.0):
    """See `Averages`; where θ stays as it is, x is that of which it would be made."""
    averages, results = Averages(theta, b1, weight_lr_power), []
    for t, u in enumerate(updates, 1):
        averages.x = (theta - (1 - at(b1, t)) * averages.z) / at(b1, t)
        results.append(averages.move(u, at(learning_rate, t), t) - theta)
    return np.array(results)


def schedule_free(theta, gradients, tx, learning_rate, b1=0.9, weight_lr_power=2.0):
    """`tx` moves z, by updates that must not depend on the parameters."""
    averages, path = Averages(theta, b1, weight_lr_power), []
    updates = np.diff(tx(np.zeros_like(theta), gradients), axis=0, prepend=np.zeros((1, *theta.shape)))
    for t, update in enumerate(updates, 1):
        path.append(averages.move(update, at(learning_rate, t), t))
    return np.array(path)


def warmed_up(learning_rate, warmup_steps, t):
    """From 0 in the first step to α in step k + 1, as in optax; in the authors' package from α/k to α in step k."""
    return at(learning_rate, t) * (1.0 if warmup_steps is None else min(1.0, (t - 1) / warmup_steps))


def schedule_free_sgd(
    theta, gradients, learning_rate=1.0, warmup_steps=None, b1=0.9, weight_decay=0.0, weight_lr_power=2.0
):
    """The decay is that of y, as the authors have it by default."""
    averages, path = Averages(theta, b1, weight_lr_power), []
    for t, g in enumerate(gradients, 1):
        rate = warmed_up(learning_rate, warmup_steps, t)
        path.append(averages.move(-rate * (g + at(weight_decay, t) * averages.y), rate, t))
    return np.array(path)


def schedule_free_adamw(
    theta,
    gradients,
    learning_rate=0.0025,
    warmup_steps=None,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    weight_lr_power=2.0,
):
    """Defazio et al. 2024, algorithm 1: v is corrected, and there is no other momentum than that of y."""
    averages, path, v = Averages(theta, b1, weight_lr_power), [], 0.0
    for t, g in enumerate(gradients, 1):
        v = at(b2, t) * v + (1 - at(b2, t)) * np.abs(g) ** 2
        direction = quotient(g, np.sqrt(v / weight_sum(at(b2, t), t)) + at(eps, t))
        rate = warmed_up(learning_rate, warmup_steps, t)
        path.append(averages.move(-rate * (direction + at(weight_decay, t) * averages.y), rate, t))
    return np.array(path)
