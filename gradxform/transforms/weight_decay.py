"""Against weights that grow without need: pull every parameter towards zero."""

from __future__ import annotations

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative
from gradxform._core.lift import lift
from gradxform._core.masks import MaskLike
from gradxform._core.rule import Array, RuleState, Step
from gradxform.numerics.arithmetic import is_constant


def add_decoupled_weight_decay(weight_decay: Numeric = 1e-4, mask: MaskLike | None = None) -> Transformation:
    """u ← u + λ·θ, after the gradient was normalised and before the learning rate: AdamW's decay.

    Every parameter shrinks by the same factor 1 − α·λ per step, however large its gradients are.

    Args:
      weight_decay: λ ≥ 0, per unit of learning rate.
      mask: Which leaves decay, by default all; one of these four:

        - a path pattern: a regular expression, a string or compiled, that matches whole paths like ``dense/kernel``;
        - a tree of booleans, or a prefix of one. It is read as a tree even if it can be called, as Equinox modules can;
        - a function ``(path, leaf) -> bool``, called for each leaf: two required arguments, any number of others;
        - a function ``(params) -> tree of booleans``, called once: one argument and no other. It gets the parameters as
          ``init`` and ``update`` get them, also in a group of `by_path` and beside frozen leaves, and answers for every
          leaf; what `optax.masked` leaves out is an `optax.MaskedNode` in both.

    Raises:
      TypeError, ValueError: if ``weight_decay`` is negative, ``mask`` is none of these, fits no leaf or another tree,
        or ``update`` is called without params.

    References:
      Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2 (line 12, with η·λ for the schedule times λ).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.add_decoupled_weight_decay(0.5, mask=".*kernel")
      >>> params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
      >>> updates, _ = tx.update({"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}, tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [0.5 0.5] [0. 0.]
    """
    return lift(
        None,
        _add,
        constructor=add_decoupled_weight_decay,
        mask=mask,
        needs_params=True,
        weight_decay=non_negative(weight_decay),
    )


def add_l2_regularization(weight_decay: Numeric = 1e-4, mask: MaskLike | None = None) -> Transformation:
    """u ← u + λ·θ, before anything else: the gradient of the penalty (λ/2)·‖θ‖² in the loss.

    What normalises the gradient then normalises the penalty with it, so parameters with large gradients
    are regularised less: this is not AdamW's decay. See `add_decoupled_weight_decay`.

    Args:
      weight_decay: λ ≥ 0.
      mask: See `add_decoupled_weight_decay`.

    Raises:
      TypeError, ValueError: see `add_decoupled_weight_decay`.

    References:
      Loshchilov & Hutter 2019, arXiv 1711.05101, proposition 2.

    Example:
      >>> import gradxform as gx
      >>> gx.chain(gx.add_l2_regularization(1e-2), gx.sgd(0.1))
      chain(add_l2_regularization(0.01), scale_by_learning_rate(0.1))
    """
    return lift(
        None,
        _add,
        constructor=add_l2_regularization,
        mask=mask,
        needs_params=True,
        weight_decay=non_negative(weight_decay),
    )


def _add(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    decay = step.weight_decay
    return (update if is_constant(decay, 0.0) else update + decay * param), state
