"""The hyperparameters of one state: their keys in it, what it shows of them, and their values in a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gradxform._core.arguments import Range, check_range, number, visible_dtype
from gradxform._core.hyperparameters import Hyperparameter, Live, Multiple, Schedule
from gradxform._core.shown import Shown, numbered
from gradxform._core.state import unique_names


def by_key(every: Iterable[Hyperparameter]) -> dict[str, Hyperparameter]:
    """The hyperparameters that are no Python numbers, by their keys in a state's values; equal ones of a group as one.

    The key of a live value is its name, which optax's ``tree_set`` finds. What follows a schedule has a key that nobody
    takes for a value to set. An array that was given as it is has a key too, but the state does not hold it.
    """
    distinct: dict[Any, Hyperparameter] = {}
    for h in every:  # a live value has one place, whichever groups share it
        if not h.constant:
            distinct.setdefault((h, None if h.live else h.group), h)
    visible = [h for h in distinct.values() if h.visible]
    names = numbered([h.shown_as for h in visible])
    keys = [name if h.live else f"scheduled/{name}" for name, h in zip(names, visible, strict=True)]
    arrays = [h for h in distinct.values() if not h.visible]
    keys = unique_names([*keys, *(h.shown_as for h in arrays)])  # a group may be called scheduled
    return dict(zip(keys, [*visible, *arrays], strict=True))


def shown(keyed: Mapping[str, Hyperparameter]) -> tuple[Shown, ...]:
    """What a state shows of the hyperparameters of `by_key`."""
    visible = {key: h for key, h in keyed.items() if h.visible}
    bare = [h.shown_as for h in visible.values()]
    within = [h.within if h.live else None for h in visible.values()]
    return tuple(map(Shown, visible, numbered(bare), bare, within))


def evaluate(keyed: Mapping[str, Hyperparameter], stored: Mapping[str, jax.Array], count: Any) -> dict[str, Any]:
    """This step's values by key, 0-d arrays of at least float32."""
    key_of = {parameter: key for key, parameter in keyed.items()}

    @functools.cache
    def value_of(parameter: Hyperparameter) -> Any:
        value = parameter.value
        if isinstance(value, Multiple):
            return value.factor * value_of(value.of)
        if isinstance(value, Live):
            value = stored.get(key_of[parameter], value.value)
        elif callable(value):
            value = scheduled(f"the schedule for {parameter.shown_as}", value, count)
            ends = Range(-math.inf, math.inf, closed_low=False, closed_high=parameter.within.closed_high)
            check_range(f"the schedule for {parameter.shown_as}", value, ends)
        return jnp.asarray(value, dtype=visible_dtype())

    return {key: value_of(parameter) for key, parameter in keyed.items()}


def changing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are no Python numbers."""
    return {name: value for name, value in values.items() if not isinstance(value, float)}


def scheduled(name: str, schedule: Schedule, count: Any) -> float | jax.Array:
    """The value of a schedule, checked; `name` is what messages call it."""
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix the count with floats
            value = schedule(count)
    except TypeError as error:
        raise TypeError(f"{name} failed at schedule(step): {error}") from error
    return number(name, value)
