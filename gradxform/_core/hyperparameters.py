"""Numbers that steer an optimizer: constants, arrays, schedules and live values, checked by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from gradxform._core.arguments import FINITE, Range, check_range, number, positive_range

Schedule: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Live:
    """A value that lives in the state; made by `live`."""

    value: Any

    def __repr__(self) -> str:
        return f"live({_show(self.value)})"


def live(value: float | jax.Array) -> Live:
    """Mark a hyperparameter as settable in the state: no recompilation, and vmappable.

    The number moves into the state, where every step reads it, ``state.hyperparams`` shows it and `set_hyperparams`
    replaces it. So it is saved with the state: a restored state goes on with the checkpoint's number, whatever number
    the optimizer is built with; to change it, call `set_hyperparams`.

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
    """A multiple of the default's hyperparameter; made by `times`."""

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


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """A value, the range it must lie in, the name under which users know it, and the group that has it.

    Equality is by value for constants and by identity for arrays, schedules and live values, so an
    optimizer rebuilt from the same numbers is the same optimizer.
    """

    value: float | jax.Array | np.ndarray | np.number | Schedule | Live | Multiple = dataclasses.field(compare=False)
    within: Range = dataclasses.field(default=FINITE, compare=False)
    name: str | None = dataclasses.field(default=None, compare=False)
    group: str | None = dataclasses.field(default=None, compare=False)
    key: tuple[Any, ...] = dataclasses.field(init=False)
    """What is compared and hashed. It is made once, for every trace looks rules up by it."""

    def __post_init__(self) -> None:
        value = self.value
        if isinstance(value, float):
            key: tuple[Any, ...] = (value,)
        else:
            key = (self.name, value if isinstance(value, Multiple) else id(value))
        object.__setattr__(self, "key", key)

    def __reduce__(self) -> Any:  # a copy has a key of its own: its value lies elsewhere
        return Hyperparameter, (self.value, self.within, self.name, self.group)

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

    def inside(self, group: str) -> Hyperparameter:
        """The same in a group, whose name goes before that of its own group, if it has one."""
        return dataclasses.replace(self, group=group if self.group is None else f"{group}/{self.group}")

    def replaced(self, value: Any, group: str) -> Hyperparameter:
        """What `group` has in place of this: a hyperparameter of another value, or a multiple of this one."""
        if not isinstance(value, Times):
            return Hyperparameter(value, self.within, self.name, group).named(str(self.name))
        if isinstance(self.value, float):
            return self.replaced(value.factor * self.value, group)
        return Hyperparameter(Multiple(value.factor, self), self.within, self.name, group)

    @property
    def shown_as(self) -> str:
        """What users call it, unless others of the state have the same name."""
        return str(self.name) if self.group is None else f"{self.group}/{self.name}"

    def _check(self, name: str, value: Any) -> None:
        check_range(name, value, self.within)

    @property
    def constant(self) -> bool:
        return isinstance(self.value, float)

    @property
    def scales(self) -> bool:
        """Whether it is a constant that kernels may get as an argument: not 0, and unbounded, as a learning rate is."""
        return isinstance(self.value, float) and self.value != 0.0 and self.within.high == math.inf

    @property
    def live(self) -> bool:
        return isinstance(self.value, Live)

    @property
    def visible(self) -> bool:
        """Whether the state shows it: because it changes from step to step, or can be set."""
        if isinstance(self.value, Multiple):
            return self.value.of.visible
        return self.live or callable(self.value)

    @property
    def off(self) -> bool:
        """Whether it is a zero that switches something off, which tables leave out."""
        zero = isinstance(self.value, float) and self.value == 0.0
        return zero and self.name not in ("learning_rate", "weight_decay")

    @property
    def number(self) -> Any:
        """Its value, if the state does not show it and so it never changes."""
        return self.value.factor * self.value.of.number if isinstance(self.value, Multiple) else self.value

    def __repr__(self) -> str:
        return _show(self.value)


Numeric: TypeAlias = float | jax.Array | np.ndarray | np.number | Schedule | Live | Hyperparameter


def ranged(value: Numeric, within: Range, name: str | None = None) -> Hyperparameter:
    """`value` with its range; `name` is what users call it, if that differs from the argument's name in `lift`."""
    return value if isinstance(value, Hyperparameter) else Hyperparameter(value, within, name)


def fraction(value: Numeric, name: str | None = None) -> Hyperparameter:
    """A hyperparameter in [0, 1), such as a decay, for the arguments of `lift`.

    Args:
      value: A number, 0-d array, schedule or `live` value; a number out of range raises in `lift`.
      name: What users call it, if that differs from the argument's name in `lift`.

    Example:
      >>> import gradxform as gx
      >>> def shrink(decay):
      ...     return gx.lift(None, lambda u, s, p, step: (step.decay * u, s), decay=gx.fraction(decay))
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


def finite(value: Numeric, name: str | None = None) -> Hyperparameter:
    """A hyperparameter that is any finite number, such as a factor, for the arguments of `lift`.

    Args:
      value, name: See `fraction`.

    Example: see `fraction`.
    """
    return ranged(value, FINITE, name)


def bound(value: Numeric, name: str | None = None) -> Hyperparameter:
    """A hyperparameter in (0, inf] that bounds something from above, infinity for no bound; see `fraction`."""
    return ranged(value, Range(0.0, math.inf, closed_low=False, closed_high=True), name)


def _show(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"Array({jax.typeof(value)})"
    if not callable(value):
        return repr(value)
    name = getattr(value, "__qualname__", repr(value))
    return name if name.endswith("<lambda>") else name.partition(".<locals>")[0]  # optax's schedules are closures
