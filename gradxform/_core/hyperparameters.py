"""Numbers that steer an optimizer: constants, arrays, schedules and live values, checked by name."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core.arguments import FINITE, Range, check_range, number, positive_range, visible_dtype

Schedule: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Live:
    """A value that lives in the state; made by `live`."""

    value: Any

    def __repr__(self) -> str:
        return f"live({_show(self.value)})"


def live(value: float | jax.Array) -> Live:
    """Mark a hyperparameter as settable in the state: no recompilation, and vmappable.

    The number moves into ``state.hyperparams``; every step reads it there, and
    `set_hyperparams` replaces it.

    Args:
      value: The first value, a number or a 0-d array.

    Raises:
      TypeError: if ``value`` is a schedule or not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.sgd(gx.live(0.1))
      >>> state = tx.init(jnp.zeros(2))
      >>> state = gx.set_hyperparams(state, learning_rate=0.5)
      >>> updates, state = tx.update(jnp.ones(2), state)
      >>> print(updates)
      [-0.5 -0.5]
    """
    return Live(number("live(value)", value))


@dataclasses.dataclass(frozen=True)
class Times:
    """A multiple of what a hyperparameter is elsewhere; made by `times`."""

    factor: float

    def __repr__(self) -> str:
        return f"times({self.factor!r})"


def times(factor: float) -> Times:
    """h ← c·h: in a group of `by_path`, the default's hyperparameter times a number.

    Where the default follows a schedule or is live, the multiple follows it.

    Args:
      factor: c ≥ 0, a number.

    Raises:
      TypeError, ValueError: if ``factor`` is no number, negative or not finite.

    Example: see `by_path`.
    """
    value = number("factor", factor)
    if not isinstance(value, float):
        raise TypeError("factor must be a number; for one that changes, give the group a live value or a schedule")
    check_range("factor", value, Range(0.0, math.inf))
    return Times(value)


@dataclasses.dataclass(frozen=True)
class Multiple:
    """A number times a hyperparameter that changes."""

    factor: float
    of: Hyperparameter

    def __repr__(self) -> str:
        return f"{self.factor!r}*{self.of!r}"


@dataclasses.dataclass(frozen=True, eq=False)
class Hyperparameter:
    """A value, the range it must lie in, the name under which users know it, and the group that has it.

    Equality is by value for constants and by identity for arrays, schedules and live values, so an
    optimizer rebuilt from the same numbers is the same optimizer.
    """

    value: float | jax.Array | Schedule | Live | Multiple
    within: Range = FINITE
    name: str | None = None
    group: str | None = None

    def named(self, name: str) -> Hyperparameter:
        """The same value, checked, under the name it already has or else under `name`."""
        name = self.name or name
        value = self.value
        if isinstance(value, Live):
            self._check(name, value.value)
        elif not callable(value):
            value = number(name, value)
            self._check(name, value)
        return Hyperparameter(value, self.within, name, self.group)

    def replaced(self, value: Any, group: str) -> Hyperparameter:
        """What `group` has in place of this value: another one, or a multiple of it."""
        if not isinstance(value, Times):
            return Hyperparameter(value, self.within, self.name, group).named(str(self.name))
        if isinstance(self.value, float):
            return self.replaced(value.factor * self.value, group)
        return Hyperparameter(Multiple(value.factor, self), self.within, self.name, group)

    @property
    def shown_as(self) -> str:
        """Its name in the state's `hyperparams`, unless others have the same."""
        return str(self.name) if self.group is None else f"{self.group}/{self.name}"

    def _check(self, name: str, value: Any) -> None:
        check_range(name, value, self.within)

    @property
    def constant(self) -> bool:
        return isinstance(self.value, float)

    @property
    def visible(self) -> bool:
        """Whether the state's `hyperparams` shows it."""
        return self.name == "learning_rate" or callable(self.value) or isinstance(self.value, Live | Multiple)

    def _key(self) -> tuple[Any, ...]:
        if self.constant:
            return (self.value,)
        return (self.name, self.value if isinstance(self.value, Multiple) else id(self.value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hyperparameter) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return _show(self.value)


Numeric: TypeAlias = float | jax.Array | np.ndarray | np.number | Schedule | Live | Hyperparameter


@dataclasses.dataclass(frozen=True)
class Option:
    """A number, or some, that is an option of a rule and no hyperparameter: axes, a number of steps, polynomials."""

    value: int | tuple[Any, ...]


def ranged(value: Numeric, within: Range, name: str | None = None) -> Hyperparameter:
    """`value` with its range; `name` is what users call it where that differs from the argument."""
    return value if isinstance(value, Hyperparameter) else Hyperparameter(value, within, name)  # pyright: ignore[reportArgumentType] (numpy scalars become floats in `named`)


def fraction(value: Numeric, name: str | None = None) -> Hyperparameter:
    """A hyperparameter in [0, 1), such as a decay, for the arguments of `lift`.

    Args:
      value: A number, 0-d array, schedule or `live` value; a number out of range raises in `lift`.
      name: What users call it, where that is not the argument's name in `lift`.

    Example:
      >>> import gradxform as gx
      >>> def shrink(decay):
      ...     return gx.lift(gx.no_slots, lambda u, s, p, step: (step.decay * u, s), decay=gx.fraction(decay))
      >>> print(shrink(0.5).update(3.0, shrink(0.5).init(0.0))[0])
      1.5
      >>> shrink(1.0)
      Traceback (most recent call last):
      ValueError: decay must be in [0, 1), got 1.0
    """
    return ranged(value, Range(0.0, 1.0), name)


def non_negative(value: Numeric, name: str | None = None) -> Hyperparameter:
    """A hyperparameter in [0, inf), such as a learning rate, for the arguments of `lift`.

    Args:
      value, name: See `fraction`.

    Example: see `fraction`.
    """
    return ranged(value, Range(0.0, math.inf), name)


def positive(value: Numeric, name: str | None = None) -> Hyperparameter:
    """A hyperparameter in (0, inf), such as a bound, for the arguments of `lift`.

    Args:
      value, name: See `fraction`.

    Example: see `fraction`.
    """
    return ranged(value, positive_range(), name)


def bound(value: Numeric, name: str | None = None) -> Hyperparameter:
    """A hyperparameter in (0, inf]: what nothing exceeds, infinity for no bound; see `fraction`."""
    return ranged(value, Range(0.0, math.inf, closed_low=False, closed_high=True), name)


def evaluate(named: Mapping[str, Hyperparameter], stored: Mapping[str, jax.Array], count: Any) -> dict[str, Any]:
    """This step's values by name: a float for a constant, else a 0-d array of at least float32."""
    name_of = {parameter: name for name, parameter in named.items()}

    @functools.cache
    def one(parameter: Hyperparameter) -> Any:
        value = parameter.value
        if isinstance(value, float):
            return value
        if isinstance(value, Multiple):
            return value.factor * one(value.of)
        name = name_of.get(parameter, str(parameter.name))
        if isinstance(value, Live):
            value = stored.get(name, value.value)
        elif callable(value):
            value = _scheduled(f"the schedule for {name}", value, count)
            ends = Range(-math.inf, math.inf, closed_low=False, closed_high=parameter.within.closed_high)
            check_range(f"the schedule for {name}", value, ends)
        return jnp.asarray(value, dtype=visible_dtype())

    return {name: one(parameter) for name, parameter in named.items()}


def _scheduled(name: str, schedule: Schedule, count: Any) -> float | jax.Array:
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix the count with floats
            value = schedule(count)
    except TypeError as error:
        raise TypeError(f"{name} failed at schedule(step): {error}") from error
    return number(name, value)


def _show(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"Array({jax.typeof(value)})"
    if not callable(value):
        return repr(value)
    name = getattr(value, "__qualname__", repr(value))
    return name if name.endswith("<lambda>") else name.partition(".<locals>")[0]  # optax's schedules are closures
