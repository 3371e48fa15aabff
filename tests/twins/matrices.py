"""Naive twins of the Muon family, in NumPy float64: singular values in place of products of matrices.

Matrices are (in, out), as JAX's kernels are; see `twins` for what a twin takes and returns.
"""

from __future__ import annotations

import numpy as np

from tests.twins.elementwise import at, quotient, weight_sum

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
"""Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"."""

POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
"""Amsel et al. 2025, arXiv 2505.16932, for five steps with a safety factor of 1.02, as modded-nanogpt has them."""

METHODS = {"newton_schulz": (JORDAN, 1.0), "polar_express": (POLAR_EXPRESS, 1.02), "gram": (POLAR_EXPRESS, 1.02)}


def scale_of(convention, rows, columns):
    return {
        None: 1.0,
        "jordan": np.sqrt(max(1.0, columns / rows)),  # Jordan et al. 2024
        "adam_rms": 0.2 * np.sqrt(max(rows, columns)),  # Liu et al. 2025, arXiv 2502.16982
        "spectral": np.sqrt(columns / rows),  # Yang, Simon & Bernstein 2023, arXiv 2310.17813
    }[convention]


def orthogonalize(update, method="newton_schulz", scale=None, eps=1e-7):
    """Of one matrix, by the polynomials on its singular values."""
    polynomials, safety = METHODS[method]
    u, s, vt = np.linalg.svd(update, full_matrices=False)
    s = s / (np.sqrt(np.sum(s**2)) + eps) / safety
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return scale_of(scale, *update.shape) * (u * s) @ vt


def normalize_by_neuron(updates, decay=0.95, eps=1e-8):
    """Li et al. 2025, arXiv 2510.05491, algorithm 1, with the Frobenius norm kept as in the authors' code."""
    results, v = [], 0.0
    for t, o in enumerate(updates, 1):
        v = at(decay, t) * v + (1 - at(decay, t)) * np.mean(o**2, axis=0)
        even = o / (np.sqrt(v) + at(eps, t))
        results.append(even * np.linalg.norm(o) / np.linalg.norm(even))
    return np.array(results)


def muon(theta, gradients, learning_rate, beta=0.95, nesterov=True, weight_decay=0.0, normalize=None, **options):
    """Jordan et al. 2024, with decay as in Liu et al. 2025; `normalize` is NorMuon's."""
    directions, m = [], np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m = at(beta, t) * m + (1 - at(beta, t)) * g
        ahead = at(beta, t) * m + (1 - at(beta, t)) * g if nesterov else m
        directions.append(orthogonalize(ahead, **{"scale": "jordan", **options}))
    path = []
    for t, direction in enumerate(normalize(directions) if normalize else directions, 1):
        theta = theta - at(learning_rate, t) * (direction + at(weight_decay, t) * theta)
        path.append(theta)
    return np.array(path)


def normuon(theta, gradients, learning_rate, beta2=0.95, eps=1e-8, **options):
    """Li et al. 2025, arXiv 2510.05491, algorithm 1."""

    def normalize(directions):
        return normalize_by_neuron(directions, beta2, eps)

    return muon(theta, gradients, learning_rate, normalize=normalize, **options)


def by_eigenvalue(symmetric):
    """Eigenvectors, those of the largest eigenvalues first."""
    return np.linalg.eigh(symmetric)[1][:, ::-1]


def scale_by_soap(
    updates, b1=0.95, b2=0.95, eps=1e-8, shampoo_beta=None, every=10, max_size=10_000, renewal="qr", kl=False
):
    """Vyas et al. 2024, arXiv 2409.11321, algorithm 3, with corrected moments; a vector is in its own basis.

    As in the authors' code, the first gradient makes the bases alone, the moments count from the second, and algorithm
    4, the power iteration, sorts the directions by their estimated eigenvalues, and v with them. `kl`: Lin et al. 2025,
    arXiv 2509.03378: L is the average of G·R⁻¹·Gᵀ/n, with the eigenvalues that R has in its basis.
    """
    m, v, (first, *rest) = 0.0, np.zeros(updates[0].shape), updates
    axes = [axis for axis in range(2) if first.ndim == 2 and 1 < first.shape[axis] <= max_size]

    def outer(g, axis, inverse=None):
        g = g if axis == 0 else g.conj().T
        return g @ g.conj().T if inverse is None else g @ inverse @ g.conj().T / len(inverse)

    def inverse_of(axis):
        if not kl or axis not in axes:
            return None
        q = bases[axis]
        return q @ np.diag(1 / np.maximum(np.diag(q.conj().T @ averages[axis] @ q).real, eps)) @ q.conj().T

    def turned(x, back=False):
        for axis in axes:
            q = bases[axis].conj().T if back else bases[axis]
            x = q.conj().T @ x if axis == 0 else x @ q
        return x

    weight = 1 - (b2 if shampoo_beta is None else shampoo_beta)
    averages = {axis: weight * outer(first, axis) for axis in axes}
    bases = {axis: by_eigenvalue(averages[axis]) for axis in axes}
    results = [np.zeros_like(first)]
    for t, g in enumerate(rest, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.abs(turned(g)) ** 2
        divisor = np.sqrt(v / weight_sum(b2, t)) + eps
        results.append(turned(quotient(turned(m) / weight_sum(b1, t), divisor), back=True))
        averages = {
            axis: (1 - weight) * averages[axis] + weight * outer(g, axis, inverse_of(1 - axis)) for axis in axes
        }
        for axis in axes if t % every == 0 else []:
            if renewal == "eigh":
                bases[axis] = by_eigenvalue(averages[axis])
                continue
            product = averages[axis] @ bases[axis]
            order = np.argsort(-np.diag(bases[axis].conj().T @ product).real)
            v = np.take(v, order, axis)
            bases[axis] = np.linalg.qr(product[:, order])[0]
    return np.array(results)


def soap(theta, gradients, learning_rate=3e-3, b1=0.95, b2=0.95, eps=1e-8, weight_decay=0.01, **options):
    """Vyas et al. 2024, algorithm 3, with decoupled decay, in the first step too."""
    path = []
    for t, direction in enumerate(scale_by_soap(gradients, b1, b2, eps, **options), 1):
        theta = theta - at(learning_rate, t) * (direction + at(weight_decay, t) * theta)
        path.append(theta)
    return np.array(path)
