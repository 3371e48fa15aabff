"""Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gradxform._core.arguments import count_of, flag, one_of
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction, non_negative
from gradxform._core.lift import chain, lift
from gradxform._core.masks import MaskLike
from gradxform._core.rule import Array, RuleState, Slot, Step
from gradxform.numerics import (
    abs_squared,
    clamp,
    largest_square,
    lerp,
    one_minus_power,
    real_dtype,
    root,
    zero_if_finite,
)
from gradxform.transforms.scaling import scale_by_learning_rate
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def soap(
    learning_rate: Numeric = 3e-3,
    b1: Numeric = 0.95,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-8,
    weight_decay: Numeric = 0.01,
    mask: MaskLike | None = None,
    *,
    shampoo_beta: Numeric | None = None,
    every: int = 10,
    max_size: int = 10_000,
    renewal: str = "qr",
    kl: bool = False,
) -> Transformation:
    """θ ← θ − α·(Q_L·(m̂′/(√v̂′ + ε))·Q_Rᵀ + λ·θ): Adam for matrices, in a basis in which their gradients are plainer.

    See `scale_by_soap`, of which this is the optimizer, with decoupled weight decay.

    Args:
      learning_rate: α ≥ 0; see `sgd`.
      b1, b2, eps, shampoo_beta, every, max_size, renewal, kl: See `scale_by_soap`.
      weight_decay: λ ≥ 0; see `add_decoupled_weight_decay`.
      mask: Which leaves decay; see `add_decoupled_weight_decay`.

    Raises:
      TypeError, ValueError: see `scale_by_soap` and `add_decoupled_weight_decay`.

    References:
      Vyas et al. 2024, arXiv 2409.11321, algorithm 3.

    Example:
      >>> import gradxform as gx
      >>> gx.soap(0.01).init({})._fields
      ('count', 'left', 'left_basis', 'mu', 'nu', 'right', 'right_basis')
    """
    bases: dict[str, Any] = {"shampoo_beta": shampoo_beta, "every": every, "max_size": max_size, "renewal": renewal}
    return chain(
        scale_by_soap(b1, b2, eps, kl=kl, **bases),
        add_decoupled_weight_decay(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def scale_by_soap(
    b1: Numeric = 0.95,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-8,
    *,
    shampoo_beta: Numeric | None = None,
    every: int = 10,
    max_size: int = 10_000,
    renewal: str = "qr",
    kl: bool = False,
) -> Transformation:
    """v′ ← β₂·v′ + (1 − β₂)·(Q_Lᵀ·u·Q_R)²,  u ← Q_L·(Q_Lᵀ·m̂·Q_R/(√v̂′ + ε))·Q_Rᵀ,  m ← β₁·m + (1 − β₁)·u

    Q_L and Q_R are eigenvectors of averages of u·uᵀ and uᵀ·u, renewed every k steps. In them Adam's second moment
    stands for more of what Shampoo knows. The first update only makes the bases, and is 0. Leaves that are no matrices
    get Adam's direction, from the same m and v.

    Args:
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1), of v′.
      eps: ε ≥ 0.
      shampoo_beta: β₃ in [0, 1), of the averages of u·uᵀ and uᵀ·u; default β₂.
      every: k ≥ 1: the bases are renewed after every k-th step.
      max_size: An axis longer than this keeps its own basis, for its square would not fit.
      renewal: ``"qr"``, a step of power iteration and a QR decomposition; or ``"eigh"``, the eigenvectors themselves.
      kl: Take the averages of u·R⁻¹·uᵀ/m and uᵀ·L⁻¹·u/n in place of u·uᵀ and uᵀ·u, which fits L and R to the gradients
        by the Kullback-Leibler divergence: KL-SOAP. Eigenvalues count as at least ε in the inverses.

    Returns:
      A transformation whose state has ``mu`` and ``nu`` (v′), and for matrices ``left``, ``right`` (the averages),
      ``left_basis`` and ``right_basis``, which are divided over devices by rows as the parameter's axes are.

    Raises:
      TypeError, ValueError: if an argument is out of its range, or inside `jax.shard_map` a leaf is a shard.

    References:
      Vyas et al. 2024, arXiv 2409.11321, algorithm 3; Lin et al. 2025, arXiv 2509.03378 (kl).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx, params = gx.scale_by_soap(), {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> first, state = tx.update(params, state, params)
      >>> print(first["bias"], state.left_basis["kernel"].shape, state.left_basis["bias"])
      [-0. -0. -0.] (2, 2) MaskedNode()
    """
    size = count_of("max_size", max_size)
    return lift(
        Bases(size),
        _step,
        constructor=scale_by_soap,
        prepare=_corrections,
        slots=("mu", "nu", *(f"{side}{what}" for side in _SIDES for what in ("", "_basis"))),
        whole=True,
        b1=fraction(b1, "b1"),
        b2=fraction(b2, "b2"),
        eps=non_negative(eps),
        shampoo_beta=None if shampoo_beta is None else fraction(shampoo_beta),
        every=count_of("every", every),
        max_size=size,
        renewal=one_of("renewal", renewal, "qr", "eigh"),
        kl=flag("kl", kl),
    )


_SIDES = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Bases:
    """The `init` of the rule: Adam's moments, and for matrices the averages and bases of both sides."""

    max_size: int

    def __call__(self, param: Array) -> RuleState:
        state: RuleState = {"mu": jnp.zeros_like(param), "nu": jnp.zeros_like(param, dtype=real_dtype(param.dtype))}
        for axis, side in enumerate(_SIDES if param.ndim == 2 else ()):
            length = param.shape[axis]
            if 1 < length <= self.max_size:
                state[side] = Slot(jnp.zeros((length, length), param.dtype), (axis, None), "kept")
                state[f"{side}_basis"] = Slot(jnp.eye(length, dtype=param.dtype), (axis, None), "kept")
        return state


def _corrections(step: Step) -> dict[str, Any]:
    ran = jnp.maximum(step.number - 1, 1)  # the first step makes no moments
    factors = {"mu_factor": 1 / one_minus_power(step.b1, ran), "nu_factor": 1 / one_minus_power(step.b2, ran)}
    return {**factors, "due": (step.count - 1) % step.every == 0}


def _step(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    bounded = clamp(update, largest_square(update.dtype) / max(update.size, 1))
    first = step.number == 1
    mu = step.keep("mu", jnp.where(first, 0, lerp(state["mu"], bounded, 1 - step.b1)))
    zero = zero_if_finite(update)
    squares = abs_squared(_turned(bounded, state)) + zero
    nu = step.keep("nu", jnp.where(first, 0, lerp(state["nu"], squares, 1 - step.b2)))
    divisor = root(nu * step.nu_factor) + step.eps
    divided = _turned(mu, state) * step.mu_factor / jnp.where(divisor == 0, 1, divisor)
    direction = jnp.where(first, -0.0 * zero, _turned(divided, state, back=True))
    return direction, {"mu": mu, **_renewed(bounded, state, nu, step)}


def _turned(matrix: Array, state: RuleState, back: bool = False) -> Array:
    """Q_Lᵀ·X·Q_R, or back from there Q_L·X·Q_Rᵀ; of complex matrices the conjugate transpose."""
    if "left_basis" in state:
        left = state["left_basis"]
        matrix = _product(left if back else left.conj().T, matrix)
    if "right_basis" in state:
        right = state["right_basis"]
        matrix = _product(matrix, right.conj().T if back else right)
    return matrix


def _product(first: Array, second: Array) -> Array:
    return jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST)


def _renewed(update: Array, state: RuleState, nu: Array, step: Step) -> RuleState:
    """The averages with this update, the bases renewed if it is their turn, and v′ in their order."""
    new: RuleState = {"nu": nu}
    weight = 1 - (step.b2 if step.shampoo_beta is None else step.shampoo_beta)
    sides = [(axis, side) for axis, side in enumerate(_SIDES) if side in state]
    for axis, side in sides:
        rows = update if axis == 0 else update.conj().T
        whitened = _whitened(rows, state, _SIDES[1 - axis], step) if step.kl else rows
        new[side] = step.keep(side, lerp(state[side], _product(whitened, whitened.conj().T), weight))
    if not sides:
        return new
    bases = {side: state[f"{side}_basis"] for _, side in sides}

    def eigenbases() -> tuple[dict[str, Array], Array]:
        return {side: jnp.linalg.eigh(_scaled(new[side]))[1][:, ::-1] for side in bases}, nu

    def one_iteration() -> tuple[dict[str, Array], Array]:
        turned, ordered = {}, nu
        for axis, side in sides:
            iterated = _product(_scaled(new[side]), bases[side])
            order = jnp.argsort(-jnp.sum((bases[side].conj() * iterated).real, 0))
            ordered = jnp.take(ordered, order, axis)
            turned[side] = jnp.linalg.qr(iterated[:, order])[0]
        return turned, ordered

    def unchanged() -> tuple[dict[str, Array], Array]:
        return bases, nu

    which = jnp.where(step.number == 1, 2, jnp.where(step.due, 1 if step.renewal == "qr" else 2, 0))
    bases, nu = jax.lax.switch(which, [unchanged, one_iteration, eigenbases])
    return {**new, "nu": nu, **{f"{side}_basis": basis for side, basis in bases.items()}}


def _whitened(rows: Array, state: RuleState, other: str, step: Step) -> Array:
    """rows·Q·(n·Λ)^(−½): rows in the basis of their other side, by its eigenvalues; as they are in the first step."""
    if other not in state:
        return rows
    basis = state[f"{other}_basis"]
    eigenvalues = jnp.maximum(jnp.sum((basis.conj() * _product(state[other], basis)).real, 0), step.eps)
    return _product(rows, basis) * jnp.where(step.number == 1, 1, jax.lax.rsqrt(len(basis) * eigenvalues))[None]


def _scaled(matrix: Array) -> Array:
    """A matrix with the same eigenvectors whose largest number is 1, so that no product of it over- or underflows."""
    largest = jnp.max(jnp.abs(matrix))
    return matrix / jnp.where(largest > 0, largest, 1)
