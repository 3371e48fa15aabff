"""Averages of parameters, to evaluate in place of those that are trained."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from gradxform._core.arguments import Range
from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, non_negative, ranged
from gradxform._core.lift import lift
from gradxform._core.rule import Array, RuleState, Step


def average_schedule_free(
    learning_rate: Numeric,
    b1: Numeric = 0.9,
    weight_lr_power: Numeric = 2.0,
    state_dtype: Any = None,
) -> Transformation:
    """z ← z + u,  x ← (1 − c)·x + c·z,  θ ← β₁·x + (1 − β₁)·z: the last stage of `schedule_free`.

    z is where the updates lead, x its weighted average, and gradients are taken between them, at θ. c = αₘʳ/Σαₘʳ, with
    αₘ the largest learning rate so far, is 1/t for a constant one. x is not kept, for θ and z tell it; `eval_params`
    gives it.

    Args:
      learning_rate: α ≥ 0, the rate that the transformations before it have; see `sgd`.
      b1: β₁ in (0, 1], which plays the part of a momentum.
      weight_lr_power: r ≥ 0; with 0 all steps count the same.
      state_dtype: Dtype of the state ``z``, shaped like the parameters; default float32 (float64 for float64 leaves).

    Returns:
      A transformation whose state has ``z``, ``largest_rate`` and ``weight_sum``. Nothing may follow it in a chain.

    Raises:
      TypeError, ValueError: if a number is out of its range.

    References:
      Defazio et al. 2024, arXiv 2405.15682, equations 6 to 8 and algorithm 1.

    Example: see `schedule_free`.
    """
    return lift(
        _start,
        _move,
        constructor=average_schedule_free,
        gather=_share,
        memory={"largest_rate": 0.0, "weight_sum": 0.0},
        view=_average,
        last=True,
        needs_params=True,
        learning_rate=non_negative(learning_rate),
        b1=ranged(b1, Range(0.0, 1.0, closed_low=False, closed_high=True)),
        weight_lr_power=non_negative(weight_lr_power),
        state_dtype=state_dtype,
    )


def _start(param: Array) -> RuleState:
    return {"z": param}


def _share(total: Any, step: Step) -> dict[str, Any]:
    largest = jnp.maximum(step.largest_rate, step.learning_rate)
    weight = largest**step.weight_lr_power
    weight_sum = step.weight_sum + weight
    share = jnp.where(weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1), 0)
    return {"largest_rate": largest, "weight_sum": weight_sum, "share": share}


def _average(state: RuleState, param: Array, step: Step) -> Array:
    """x, of θ = β₁·x + (1 − β₁)·z"""
    return param + (1 / step.b1 - 1) * (param - state["z"])


def _move(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    assert param is not None
    new = state["z"] + update
    z = step.keep("z", new)
    # where nothing was rounded the old z follows from the new one, which is written over it without a copy (X4)
    before = z - update if z is new else state["z"]
    average = _average({"z": before}, param, step)
    average = average + step.share * (z - average)
    return step.b1 * (average - z) + (z - param), {"z": z}
