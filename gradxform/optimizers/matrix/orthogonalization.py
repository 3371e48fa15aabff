"""Against directions that starve: make all singular values of a matrix equal."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core.arguments import FINITE, count_of, flag, float_dtype, number_in, one_of
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics.arithmetic import cast, smallest_normal, times
from gradxform.optimizers.matrix.layouts import layout_of

Polynomial: TypeAlias = tuple[float, float, float]
"""a, b, c of p(σ) = a·σ + b·σ³ + c·σ⁵."""


def orthogonalize(
    layout: str = "in out",
    *,
    method: str = "newton_schulz",
    steps: int = 5,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
    scale: str | None = None,
    eps: Numeric = 1e-7,
    dtype: Any = None,
    batched: bool | None = None,
) -> Transformation:
    """U·S·Vᵀ ← u/(‖u‖ + ε),  u ← s·U·pₖ(…p₁(S))·Vᵀ ≈ s·U·Vᵀ, for every matrix of a leaf.

    Each step applies an odd polynomial p(σ) = a·σ + b·σ³ + c·σ⁵ to all singular values, by products of matrices:
    X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ on the shorter side. A zero matrix stays zero; one element that is not
    finite makes its whole matrix NaN.

    Args:
      layout: What each axis of a leaf is, one word per axis: ``in`` and ``out`` are the sides of the matrix (several
        axes of one side count as one, so ``in in in out`` is a convolution's kernel in JAX); ``each`` has a matrix per
        index (layers of a scan, experts, heads); ``3*out`` consists of three blocks, each with a matrix of its own
        (fused query, key and value); ``(32+8+8)*out`` of three whose sizes are as 32 to 8 to 8 (grouped queries, in
        heads or in columns). Kernels are ``in out`` in Flax and Haiku, ``out in`` in Equinox and PyTorch.
      method: How:

        - ``"newton_schulz"``, Jordan's quintic, ends between 0.68 and 1.21 for singular values from 0.002 to 1 of
          the norm (after five steps);
        - ``"polar_express"``, the polynomials of least error, reaches 1 to the arithmetic's precision in eight steps;
        - ``"gram"``, the same with products of the shorter side only, starting anew after two steps, then after
          every three; only where one side is 1.5 times the other or more, for elsewhere it takes more operations.
      steps: k ≥ 1.
      coefficients: (a, b, c), or one triple for each step, of which the last is repeated; in place of the method's.
      scale: s by the name of its convention:

        - None: 1;
        - ``"jordan"``: √max(1, out/in);
        - ``"adam_rms"``: 0.2·√max(in, out), so that the root mean square is about that of AdamW's updates;
        - ``"spectral"``: √(out/in), so that the change of the outputs does not depend on the widths.
      eps: ε ≥ 0.
      dtype: Dtype of the products after the norm was divided out, such as ``"bfloat16"``; default that of the
        leaf's arithmetic, float32 or more, at full precision on every device.
      batched: Whether leaves of one shape are multiplied together, as one array. None does so where it is the faster
        way, which is not on CPUs, and for leaves of at most 2²⁰ elements.

    Raises:
      TypeError, ValueError: if an argument is none of these, and in ``update`` if a leaf has not this layout, is
        complex, or inside `jax.shard_map` is a shard.

    References:
      Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Amsel et al. 2025,
      arXiv 2505.16932, algorithm 1, with a safety factor of 1.02; Gram Newton–Schulz, Dao AI Lab 2026; Liu et al.
      2025, arXiv 2502.16982 (adam_rms); Yang, Simon & Bernstein 2023, arXiv 2310.17813 (spectral).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.orthogonalize(method="polar_express", steps=8)
      >>> print(tx.update(jnp.diag(jnp.array([100.0, -1.0])), tx.init(jnp.zeros((2, 2))))[0].round(5))
      [[ 1.  0.]
       [ 0. -1.]]
    """
    steps = count_of("steps", steps)
    own = None if coefficients is None else _polynomials(coefficients)
    if own and len(own) > steps:
        raise ValueError(f"coefficients must be at most steps={steps} triples, got {len(own)}")
    narrow = float_dtype("dtype", dtype)
    found = layout_of(layout)
    return lift(
        None,
        _orthogonalize,
        constructor=orthogonalize,
        whole=True,
        fits=found,
        batched=None if batched is None else flag("batched", batched),
        layout=found.text,
        method=one_of("method", method, *_METHODS),
        steps=steps,
        coefficients=None if own is None else own,
        scale=None if scale is None else one_of("scale", scale, *_SCALES),
        eps=non_negative(eps),
        dtype=None if narrow is None else str(narrow),
    )


def _orthogonalize(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    if update.size == 0:
        return update, state
    polynomials = _METHODS[step.method](step.steps) if step.coefficients is None else step.coefficients
    polynomials = (*polynomials, *polynomials[-1:] * step.steps)[: step.steps]
    factor = functools.partial(
        _polar_factor, eps=step.eps, polynomials=polynomials, gram=step.method == "gram", dtype=step.dtype
    )
    layout = layout_of(step.layout)

    def direction(piece: Array) -> Array:
        result = layout.even.leaf(_one_by_one(factor, layout.even.matrices(piece)), piece.shape)
        return result if step.scale is None else _SCALES[step.scale](*layout.even.sides(piece.shape)) * result

    return layout.joined(list(map(direction, layout.cut(update)))), state


_SCALES: dict[str, Callable[[int, int], float]] = {
    "jordan": lambda rows, columns: math.sqrt(max(1.0, columns / rows)),
    "adam_rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(columns / rows),
}


def _one_by_one(function: Callable[[Array], Array], matrices: Array) -> Array:
    """A function of each matrix: one after the other on a CPU, where products of many matrices at once are slower."""
    if matrices.shape[0] == 1:
        return function(matrices[0])[None]
    return jax.lax.map(function, matrices) if jax.default_backend() == "cpu" else jax.vmap(function)(matrices)


def _polar_factor(matrix: Array, eps: Any, polynomials: Sequence[Polynomial], gram: bool, dtype: Any) -> Array:
    """U·p(S)·Vᵀ of one matrix."""
    rows, columns = matrix.shape
    short = matrix if rows <= columns else matrix.T
    unit = cast(_unit(short, eps), dtype or matrix.dtype)
    iterate = _by_gram if gram and 2 * max(rows, columns) >= 3 * min(rows, columns) else _by_steps
    result = iterate(unit, polynomials)
    return (result if rows <= columns else result.T).astype(matrix.dtype)


def _unit(x: Array, eps: Any) -> Array:
    """x/(‖x‖ + ε), for x of any size; 0/0 is 0."""
    tiny = smallest_normal(x.dtype)
    largest = jnp.max(jnp.abs(x), initial=tiny)
    x = x / largest
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x))) + eps / largest, tiny)


def _by_steps(x: Array, polynomials: Sequence[Polynomial]) -> Array:
    def iteration(x: Array, a: Any, b: Any, c: Any) -> Array:
        square = _product(x, x.T)
        return _sum((a, x), (1.0, _product(_sum((b, square), (c, _product(square, square))), x)))

    return _in_turn(iteration, x, polynomials)


def _in_turn(function: Callable[..., Array], x: Array, polynomials: Sequence[Polynomial]) -> Array:
    """x after a function of it and each polynomial in turn; polynomials that are all the same are constants."""
    first, *others = polynomials
    if all(other == first for other in others):
        return jax.lax.fori_loop(0, len(polynomials), lambda _, x: function(x, *first), x)
    table = jnp.asarray(polynomials, jnp.promote_types(x.dtype, np.float32))
    return jax.lax.scan(lambda x, polynomial: (function(x, *polynomial), None), x, table)[0]


def _by_gram(x: Array, polynomials: Sequence[Polynomial]) -> Array:
    """The same, as X ← Q·X after two steps and after every three from then on; in between only Q and X·Xᵀ are computed.

    Rounding errors of X·Xᵀ grow with it from step to step where X has no such singular value; hence the new starts.
    """
    eye = jnp.eye(len(x), dtype=x.dtype)

    def factor_of(square: Array, a: Any, b: Any, c: Any) -> Array:
        return _sum((a, eye), (b, square), (c, _product(square, square)))

    def part(x: Array, polynomials: Sequence[Polynomial]) -> Array:
        square = _product(x, x.T)
        product = factor = factor_of(square, *polynomials[0])
        for polynomial in polynomials[1:]:
            square = _product(factor, _product(square, factor))
            factor = factor_of(square, *polynomial)
            product = _product(product, factor)
        return _product(product, x)

    for start, end in itertools.pairwise([0, *range(2, len(polynomials), 3), len(polynomials)]):
        x = part(x, polynomials[start:end])
    return x


def _product(x: Array, y: Array) -> Array:
    return jax.lax.dot(x, y, precision=jax.lax.Precision.HIGHEST)


def _sum(*terms: tuple[Any, Array]) -> Array:
    """a·x + b·y + … in at least float32, rounded once."""
    wide = [times(a, x.astype(jnp.promote_types(x.dtype, np.float32))) for a, x in terms]
    return functools.reduce(jnp.add, wide).astype(terms[0][1].dtype)


# Polynomials


def _jordan(steps: int) -> tuple[Polynomial, ...]:
    return ((3.4445, -4.7750, 2.0315),)


_SAFETY = 1.02
_POLAR_EXPRESS = (
    (8.31968561540051, -23.859450318966726, 17.53144504181025),
    (4.1237885338700595, -2.9808456861620445, 0.5520601040380051),
    (3.9695011583385096, -2.942182363267831, 0.5587364505634639),
    (3.351468730910771, -2.51307796337105, 0.5128347598303035),
    (2.3465413258596404, -1.7097828382687084, 0.4232355116930525),
    (1.9003834757310245, -1.2779237188293062, 0.377803153363632),
    (1.8750223595292461, -1.250024843696377, 0.375002484377803),
    (1.875, -1.25, 0.375),
)
"""The polynomials of least error for singular values from 0.001 to 1, one after the other; the last is repeated."""


def _polar_express(steps: int) -> tuple[Polynomial, ...]:
    """Amsel et al., algorithm 1: each but the last takes singular values up to 1.02, as rounding may leave them."""

    def safe(a: float, b: float, c: float) -> Polynomial:
        return a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5

    *others, last = _POLAR_EXPRESS[:steps]
    all_safe = [*(safe(*polynomial) for polynomial in others), last]
    return safe(*all_safe[0]), *all_safe[1:]  # the first once more, for the norm itself


_METHODS: dict[str, Callable[[int], tuple[Polynomial, ...]]] = {
    "newton_schulz": _jordan,
    "polar_express": _polar_express,
    "gram": _polar_express,
}


def _polynomials(coefficients: Any) -> tuple[Polynomial, ...]:
    """One triple or several, checked."""
    message = f"coefficients must be (a, b, c) or a sequence of such triples, got {coefficients!r}"
    if not isinstance(coefficients, Sequence) or not coefficients or isinstance(coefficients, str):
        raise TypeError(message)
    triples = coefficients if isinstance(coefficients[0], Sequence) else (coefficients,)
    if not all(isinstance(triple, Sequence) and len(triple) == 3 for triple in triples):
        raise ValueError(message)
    every = [tuple(number_in("every number in coefficients", value, FINITE) for value in triple) for triple in triples]
    return tuple((a, b, c) for a, b, c in every)
