"""No schedule of learning rates: an average of the parameters takes its place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import optax

from gradxform._core.arguments import count_of
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction
from gradxform._core.lift import chain
from gradxform.transforms.averaging import average_schedule_free
from gradxform.transforms.normalization import normalize_by_rms
from gradxform.transforms.scaling import scale_by_learning_rate
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def schedule_free(
    tx: optax.GradientTransformation,
    learning_rate: Numeric,
    b1: Numeric = 0.9,
    weight_lr_power: Numeric = 2.0,
    state_dtype: Any = None,
) -> Transformation:
    """z ← z + tx(∇L(θ)),  x ← (1 − c)·x + c·z,  θ ← β₁·x + (1 − β₁)·z: train at θ, evaluate at x.

    The average x does what a falling learning rate does, at every step and not only at a last one that must be known.
    **Evaluate, save for use and export** ``gx.eval_params(tx, state, params)``, not ``params``. Statistics of batch
    normalisation must be taken at x before it is evaluated.

    Args:
      tx: Any transformation, best without momentum, for β₁ is one, such as ``sgd(α)``.
      learning_rate: α ≥ 0 of ``tx``: constant, or with a warmup, the same schedule or `live` value as in ``tx``.
      b1, weight_lr_power, state_dtype: See `average_schedule_free`.

    Raises:
      TypeError, ValueError: see `average_schedule_free`.

    References:
      Defazio et al. 2024, arXiv 2405.15682, algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx, params = gx.schedule_free(gx.sgd(0.1), 0.1), jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(2 * params, state, params)
      ...     params = gx.apply_updates(params, updates)
      >>> print(bool(jnp.abs(gx.eval_params(tx, state, params)).max() < 0.1))
      True
    """
    return chain(tx, average_schedule_free(learning_rate, b1, weight_lr_power, state_dtype))


def schedule_free_sgd(
    learning_rate: Numeric = 1.0,
    warmup_steps: int | None = None,
    b1: Numeric = 0.9,
    weight_decay: Numeric = 0.0,
    weight_lr_power: Numeric = 2.0,
    state_dtype: Any = None,
) -> Transformation:
    """`schedule_free` around gradient descent, z ← z − α·(∇L(θ) + λ·θ), with a warmup of α.

    Args:
      learning_rate: α ≥ 0.
      warmup_steps: In how many steps α rises from 0, a whole number of at least 1; None for no warmup. It takes a
        constant α.
      b1, weight_lr_power, state_dtype: See `average_schedule_free`.
      weight_decay: λ ≥ 0; see `add_decoupled_weight_decay`.

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Defazio et al. 2024, arXiv 2405.15682, algorithm 1.

    Example:
      >>> import gradxform as gx
      >>> gx.schedule_free_sgd(0.1) == gx.schedule_free(
      ...     gx.chain(gx.add_decoupled_weight_decay(0.0), gx.sgd(0.1)), 0.1
      ... )
      True
    """
    rate = _warmed_up(learning_rate, warmup_steps)
    descent = chain(add_decoupled_weight_decay(weight_decay), scale_by_learning_rate(rate))
    return schedule_free(descent, rate, b1, weight_lr_power, state_dtype)


def schedule_free_adamw(
    learning_rate: Numeric = 0.0025,
    warmup_steps: int | None = None,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    weight_decay: Numeric = 0.0,
    weight_lr_power: Numeric = 2.0,
    state_dtype: Any = None,
) -> Transformation:
    """`schedule_free` around AdamW without momentum, z ← z − α·(∇L(θ)/(√v̂ + ε) + λ·θ), with a warmup of α.

    Args:
      learning_rate, warmup_steps, weight_decay: See `schedule_free_sgd`.
      b1, weight_lr_power, state_dtype: See `average_schedule_free`.
      b2: γ in [0, 1); see `normalize_by_rms`.
      eps: ε ≥ 0.

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Defazio et al. 2024, arXiv 2405.15682, algorithm 1.

    Example:
      >>> import gradxform as gx
      >>> gx.schedule_free_adamw(0.001).init({})._fields
      ('count', 'nu', 'z', 'largest_rate', 'weight_sum')
    """
    rate = _warmed_up(learning_rate, warmup_steps)
    descent = chain(
        normalize_by_rms(fraction(b2, "b2"), eps, debias=True),
        add_decoupled_weight_decay(weight_decay),
        scale_by_learning_rate(rate),
    )
    return schedule_free(descent, rate, b1, weight_lr_power, state_dtype)


def _warmed_up(learning_rate: Any, warmup_steps: int | None) -> Any:
    if warmup_steps is None:
        return learning_rate
    if not isinstance(learning_rate, int | float):
        raise TypeError("warmup_steps goes with a learning_rate that is a number; a schedule has a warmup of its own")
    return warmup(float(learning_rate), count_of("warmup_steps", warmup_steps))


@functools.cache  # schedules are compared by identity, and equal calls are to build equal optimizers
def warmup(learning_rate: float, steps: int) -> Warmup:
    """α·min(t/k, 1) after t steps: a schedule."""
    return Warmup(learning_rate, steps)


@dataclasses.dataclass(frozen=True)
class Warmup:
    """What `warmup` builds."""

    learning_rate: float
    steps: int

    def __call__(self, count: Any) -> Any:
        return self.learning_rate * jnp.minimum(jnp.asarray(count, float) / self.steps, 1)

    def __reduce__(self) -> Any:
        return warmup, (self.learning_rate, self.steps)

    def __repr__(self) -> str:
        return f"warmup({self.learning_rate!r}, {self.steps})"
