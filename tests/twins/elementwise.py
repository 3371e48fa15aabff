"""Naive twins: every optimizer and transformation once more, in NumPy float64, as the papers write them.

The twin of an optimizer takes parameters θ₀ and gradients g₁ … g_T, and returns θ₁ … θ_T; the twin of a
transformation takes updates u₁ … u_T, and returns what becomes of each. All are single arrays. Names,
hyperparameters and defaults are those of gradxform; a hyperparameter may be a schedule, a function of t − 1.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import optax

import gradxform as gx
from tests.support.trees import LOSS


def at(value, t):
    """The hyperparameter at step t = 1, 2, …"""
    return float(value(t - 1)) if callable(value) else value


def weight_sum(beta, t):
    """1 − βᵗ = (1 − β)·Σ βᵏ, what the weights of a moving average of t terms add up to.

    Kingma & Ba 2015, equations 1 to 4. Summed, because 1 − β**t cancels.
    """
    return math.fsum((1 - beta) * beta**k for k in range(t))


def quotient(numerator, divisor):
    """numerator/divisor with 0/0 = 0."""
    return np.divide(numerator, divisor, out=np.zeros_like(numerator), where=divisor != 0)


# Optimizers


def sgd(theta, gradients, learning_rate, momentum=0.0, nesterov=False, dampening=0.0):
    """Robbins & Monro 1951; Polyak 1964; Sutskever et al. 2013, equations 1 to 4, with v = −α·m.

    Nesterov's point is moved as in Bengio et al. 2012, arXiv 1212.0901, section 3.5. The dampening, and
    that the first gradient is not dampened, are PyTorch's.
    """
    path, m = [], None
    for t, g in enumerate(gradients, 1):
        beta = at(momentum, t)
        m = g if m is None else beta * m + (1 - at(dampening, t)) * g
        theta = theta - at(learning_rate, t) * (beta * m + g if nesterov else m)
        path.append(theta)
    return np.array(path)


def momentum(theta, gradients, learning_rate, decay=0.9, nesterov=False):
    """Polyak 1964 with the moving average of Kingma & Ba 2015, algorithm 1, in place of the sum."""
    path, m = [], np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        beta = at(decay, t)
        m = beta * m + (1 - beta) * g
        theta = theta - at(learning_rate, t) * (beta * m + (1 - beta) * g if nesterov else m)
        path.append(theta)
    return np.array(path)


def adagrad(theta, gradients, learning_rate, initial_accumulator_value=0.0, eps=1e-7, eps_in_sqrt=False):
    """Duchi, Hazan & Singer 2011, figure 1 with diagonal matrices: H = δ·I + diag(s), s² = Σ g²."""
    path, v = [], initial_accumulator_value
    for t, g in enumerate(gradients, 1):
        v = v + np.abs(g) ** 2
        divisor = np.sqrt(v + at(eps, t)) if eps_in_sqrt else np.sqrt(v) + at(eps, t)
        theta = theta - at(learning_rate, t) * quotient(g, divisor)
        path.append(theta)
    return np.array(path)


def rmsprop(
    theta,
    gradients,
    learning_rate,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=0.0,
    nesterov=False,
    bias_correction=False,
):
    """Tieleman & Hinton 2012, lecture 6.5; centered with ε inside: Graves 2013, equations 38 to 45.

    The variance of the centered form is that of the corrected moments, v̂ − m̂². The momentum, a heavy ball
    on the normalised gradient with the learning rate after it, is PyTorch's.
    """
    path, v, m, ball = [], initial_scale, np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        gamma = at(decay, t)
        v = gamma * v + (1 - gamma) * np.abs(g) ** 2
        m = gamma * m + (1 - gamma) * g
        total = weight_sum(gamma, t) if bias_correction else 1
        variance = np.maximum(v / total - np.abs(m / total) ** 2, 0) if centered else v / total
        divisor = np.sqrt(variance + at(eps, t)) if eps_in_sqrt else np.sqrt(variance) + at(eps, t)
        normalised = quotient(g, divisor)
        ball = at(momentum, t) * ball + normalised
        theta = theta - at(learning_rate, t) * (at(momentum, t) * ball + normalised if nesterov else ball)
        path.append(theta)
    return np.array(path)


def adam(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False):
    """Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; `nesterov`: Dozat 2016, algorithm 2."""
    path, moments = [], (0.0, 0.0)
    for t, g in enumerate(gradients, 1):
        direction, moments = adam_direction(moments, g, t, b1, b2, eps, eps_root, nesterov)
        theta = theta - at(learning_rate, t) * direction
        path.append(theta)
    return np.array(path)


def adam_l2(
    theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=1e-4, nesterov=False
):
    """Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2 with line 6: the penalty is part of the gradient."""
    path, moments = [], (0.0, 0.0)
    for t, g in enumerate(gradients, 1):
        g = g + at(weight_decay, t) * theta
        direction, moments = adam_direction(moments, g, t, b1, b2, eps, eps_root, nesterov)
        theta = theta - at(learning_rate, t) * direction
        path.append(theta)
    return np.array(path)


def adamw(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=1e-4, nesterov=False):
    """Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2 with line 12, where α scales λ too."""
    path, moments = [], (0.0, 0.0)
    for t, g in enumerate(gradients, 1):
        direction, moments = adam_direction(moments, g, t, b1, b2, eps, eps_root, nesterov)
        theta = theta - at(learning_rate, t) * (direction + at(weight_decay, t) * theta)
        path.append(theta)
    return np.array(path)


def nadam(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, momentum_decay=None):
    """Dozat 2016, algorithm 2: see `adam`, and `nesterov_weights` for the schedule of momenta."""
    path, moments = [], (0.0, 0.0)
    for t, g in enumerate(gradients, 1):
        direction, moments = adam_direction(moments, g, t, b1, b2, eps, eps_root, True, momentum_decay)
        theta = theta - at(learning_rate, t) * direction
        path.append(theta)
    return np.array(path)


def lion(theta, gradients, learning_rate, b1=0.9, b2=0.99, weight_decay=1e-3):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2."""
    path, m = [], np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        c = at(b1, t) * m + (1 - at(b1, t)) * g
        theta = theta - at(learning_rate, t) * (np.sign(c) + at(weight_decay, t) * theta)
        m = at(b2, t) * m + (1 - at(b2, t)) * g
        path.append(theta)
    return np.array(path)


def nesterov_weights(beta, t, momentum_decay=None):
    """What NAdam's m̂ = a·m + b·g weighs with; Dozat 2016, algorithm 2.

    The momenta are μₜ = β₁(1 − ½·0.96^(tψ)), as section 3 proposes and torch has them; m itself is averaged with β₁.
    """
    if momentum_decay is None:
        return beta / weight_sum(beta, t + 1), (1 - beta) / weight_sum(beta, t)
    momenta = [beta * (1 - 0.5 * 0.96 ** (k * at(momentum_decay, t))) for k in range(1, t + 2)]
    return momenta[t] / (1 - math.prod(momenta)), (1 - momenta[t - 1]) / (1 - math.prod(momenta[:t]))


def adam_direction(moments, g, t, b1, b2, eps, eps_root, nesterov, momentum_decay=None):
    """m̂/(√v̂ + ε) and the new moments. Dozat's extra factor ν on v̂ is left out: v̂ is Kingma & Ba's."""
    (m, v), beta, gamma = moments, at(b1, t), at(b2, t)
    m = beta * m + (1 - beta) * g
    v = gamma * v + (1 - gamma) * np.abs(g) ** 2
    m_hat = m / weight_sum(beta, t)
    if nesterov:
        of_m, of_g = nesterov_weights(beta, t, momentum_decay)
        m_hat = of_m * m + of_g * g
    v_hat = v / weight_sum(gamma, t)
    return quotient(m_hat, np.sqrt(v_hat + at(eps_root, t)) + at(eps, t)), (m, v)


def accumulate(theta, gradients, tx, every):
    """θ moves at every k-th gradient only, as `tx` moves it on the mean of k gradients."""
    steps = len(gradients) // every
    means = np.reshape(gradients[: steps * every], (steps, every, *theta.shape)).mean(axis=1)
    corners = [theta, *tx(theta, means)]
    return np.array([corners[t // every] for t in range(1, len(gradients) + 1)])


# Transformations


def scale_by_adam(updates, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False, momentum_decay=None):
    """See `adam` and `nadam`: what α multiplies."""
    results, moments = [], (0.0, 0.0)
    for t, u in enumerate(updates, 1):
        direction, moments = adam_direction(moments, u, t, b1, b2, eps, eps_root, nesterov, momentum_decay)
        results.append(direction)
    return np.array(results)


def scale(updates, factor):
    """c·u"""
    return np.array([at(factor, t) * u for t, u in enumerate(updates, 1)])


def scale_by_schedule(updates, schedule):
    """c(t − 1)·u"""
    return np.array([schedule(t) * u for t, u in enumerate(updates)])


def scale_by_learning_rate(updates, learning_rate):
    """−α·u"""
    return np.array([-at(learning_rate, t) * u for t, u in enumerate(updates, 1)])


def scale_by_momentum(
    updates, decay=0.9, dampening=None, nesterov=False, debias=False, blend=None, momentum_decay=None
):
    """See `momentum`; `sgd` with `dampening`; `adam` with `debias`; `lion` with `blend`; `nadam`."""
    results, m = [], np.zeros_like(updates[0])
    for t, u in enumerate(updates, 1):
        beta = at(decay, t)
        if blend is not None:
            results.append(at(blend, t) * m + (1 - at(blend, t)) * u)
            m = beta * m + (1 - beta) * u
            continue
        if momentum_decay is not None:
            m = beta * m + (1 - beta) * u
            of_m, of_u = nesterov_weights(beta, t, momentum_decay)
            results.append(of_m * m + of_u * u)
            continue
        weight = 1 - beta if dampening is None else 1.0 if t == 1 else 1 - at(dampening, t)
        m = beta * m + weight * u
        now, after = (weight_sum(beta, t), weight_sum(beta, t + 1)) if debias else (1, 1)
        ahead = beta * m / after + (weight if dampening is None else 1) * u / now
        results.append(ahead if nesterov else m / now)
    return np.array(results)


def bias_correction(updates, decay=0.9):
    """Kingma & Ba 2015, arXiv 1412.6980, section 3: u/(1 − βᵗ)."""
    return np.array([u / weight_sum(at(decay, t), t) for t, u in enumerate(updates, 1)])


def normalize_by_rms(
    updates, decay=0.999, eps=1e-8, of=None, debias=False, eps_root=0.0, centered=False, initial_scale=0.0
):
    """See `rmsprop`, and `adam` with `of`: the numerator is what `of` makes of the updates."""
    results, v, m = [], initial_scale, np.zeros_like(updates[0])
    numerators = updates if of is None else of(updates)
    for t, (u, numerator) in enumerate(zip(updates, numerators, strict=True), 1):
        gamma = at(decay, t)
        v = gamma * v + (1 - gamma) * np.abs(u) ** 2
        m = gamma * m + (1 - gamma) * u
        total = weight_sum(gamma, t) if debias else 1
        variance = np.maximum(v / total - np.abs(m / total) ** 2, 0) if centered else v / total
        results.append(quotient(numerator, np.sqrt(variance + at(eps_root, t)) + at(eps, t)))
    return np.array(results)


def normalize_by_rss(updates, eps=1e-7, of=None, eps_root=0.0, initial_accumulator_value=0.0):
    """See `adagrad`, and `normalize_by_rms` for `of`."""
    results, v = [], initial_accumulator_value
    numerators = updates if of is None else of(updates)
    for t, (u, numerator) in enumerate(zip(updates, numerators, strict=True), 1):
        v = v + np.abs(u) ** 2
        results.append(quotient(numerator, np.sqrt(v + at(eps_root, t)) + at(eps, t)))
    return np.array(results)


def scale_by_sign(updates):
    """Bernstein et al. 2018, arXiv 1802.04434, algorithm 1; u/|u| for a complex u."""
    return np.array([quotient(u, np.abs(u)) for u in updates])


def add_decoupled_weight_decay(updates, theta, weight_decay=1e-4):
    """Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2, line 12: what α multiplies."""
    return np.array([u + at(weight_decay, t) * theta for t, u in enumerate(updates, 1)])


def add_l2_regularization(updates, theta, weight_decay=1e-4):
    """Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2, line 6: ∇((λ/2)·‖θ‖²) = λ·θ."""
    return np.array([u + at(weight_decay, t) * theta for t, u in enumerate(updates, 1)])


def clip_by_value(updates, max_value):
    """Each element on its own: sign(u)·min(|u|, c)."""
    return np.array([u / np.maximum(1, np.abs(u) / at(max_value, t)) for t, u in enumerate(updates, 1)])


def clip_by_leaf_norm(updates, max_norm):
    """Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1, on one leaf."""
    results = []
    for t, u in enumerate(updates, 1):
        norm = np.sqrt(np.sum(np.abs(u) ** 2))
        results.append(u * at(max_norm, t) / norm if norm > at(max_norm, t) else u)
    return np.array(results)


def clip_by_global_norm(updates, max_norm):
    """The same on the vector of all leaves."""
    return clip_by_leaf_norm(updates, max_norm)


# What the comparisons share: one example, and a walk through it


def example(dtype, steps=50):
    """θ₀ and, stacked, gradients of sizes from 0.01 to 100; some elements have one rarely, two never."""
    random = np.random.default_rng(1)
    theta = random.standard_normal(20)
    gradients = random.standard_normal((steps, 20)) * np.logspace(-2, 2, 20)
    gradients[:, 12:16] *= random.random((steps, 4)) < 0.1
    gradients[:, 10:14:3] = 0
    return theta.astype(dtype), gradients.astype(dtype)


def as_tree(array):
    """The 20 elements, or a stack of them, as two leaves."""
    kernel, bias = array[..., :12], array[..., 12:]
    return {"kernel": kernel.reshape(*kernel.shape[:-1], 4, 3), "bias": bias}


def as_array(tree):
    """What `as_tree` made two leaves of."""
    if not isinstance(tree, dict):
        return tree
    kernel, bias = tree["kernel"], tree["bias"]
    return np.concatenate([kernel.reshape(*kernel.shape[:-2], 12), bias], axis=-1)


def walk(tx, params, gradients, curvatures=None):
    """The parameters after each step of an optimizer, stacked; with curvatures c, ½·c·θ² is added to the loss."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def path(params, gradients):
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    def step(carry, gradient):
        params, state = carry
        if curvatures is not None:
            gradient = jax.tree.map(lambda g, c, p: g + c * p, gradient, curvatures, params)
        updates, state = tx.update(gradient, state, params, value=LOSS)
        params = gx.apply_updates(params, updates)
        return (params, state), params

    return jax.tree.map(np.asarray, path(params, gradients))


def transform(tx, updates, params=None):
    """What a transformation makes of each of the stacked updates."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def results(updates):
        first = jax.tree.map(lambda u: u[0], updates)
        return jax.lax.scan(step, tx.init(first if params is None else params), updates)[1]

    def step(state, update):
        update, state = tx.update(update, state, params, value=LOSS)
        return state, update

    return jax.tree.map(np.asarray, results(updates))
