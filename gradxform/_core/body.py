"""What a transformation is: a pure ``(init, update)`` pair around a body, and how bodies call one another."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from gradxform._core import explain
from gradxform._core.hyperparameters import Hyperparameter
from gradxform._core.leaves import Leaves
from gradxform._core.meshes import spread
from gradxform._core.rule import Report as Report
from gradxform._core.trees import dtype_of, unless
from gradxform.numerics.arithmetic import cast, no_update


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of ``update``, as every transformation within it sees it."""

    extra_args: Mapping[str, Any]
    measured: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])
    """What was measured of an array in this call, so that a norm several transformations want is taken once."""


@dataclasses.dataclass(frozen=True)
class Assigned:
    """What one leaf gets: its group, whether it is frozen, and the hyperparameters of its rules by name."""

    group: str = ""
    frozen: bool = False
    hyperparameters: Mapping[str, Hyperparameter] = dataclasses.field(default_factory=dict[str, Hyperparameter])

    def joined(self, inner: Assigned) -> Assigned:
        """With what a transformation within gives the leaf."""
        group = " ".join(filter(None, (self.group, inner.group)))
        return Assigned(group, self.frozen or inner.frozen, {**self.hyperparameters, **inner.hyperparameters})


class Body(abc.ABC):
    """What a transformation does: pure, hashable, comparable, and with a `repr` that reads like the call."""

    lands: bool = False
    """Whether its updates are exact: they take low-precision parameters to chosen values, so nothing may follow."""
    reports: tuple[str, ...] = ()
    """The names in its report."""
    needs_params: bool = False
    """Whether ``update`` raises without params."""
    measures: bool = False
    """Whether something in it depends on all leaves at once, such as a global norm."""

    @abc.abstractmethod
    def init(self, params: Any) -> Any: ...

    @abc.abstractmethod
    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]: ...

    def update(self, updates: Any, state: Any, params: Any, extra_args: Mapping[str, Any]) -> tuple[Any, Any]:
        updates, state, _ = self.step(updates, state, params, Call(extra_args))
        return updates, state

    def guarded(self, updates: Any, state: Any, params: Any, call: Call, taken: Any) -> tuple[Any, Any, Report]:
        """The same where `taken`, None or a 0-d boolean; else no update and the state as it was."""
        new_updates, new_state, report = self.step(updates, state, params, call)
        if taken is None:
            return new_updates, new_state, report
        return unless(taken, jax.tree.map(no_update, new_updates), new_updates), unless(taken, state, new_state), report

    def advance(self, updates: Any, state: Any, params: Any, call: Call, taken: Any = None) -> tuple[Any, Any, Report]:
        """The same with the new parameters in place of the updates."""
        new_updates, new_state, report = self.guarded(updates, state, params, call, taken)
        return Leaves.of(new_updates, params).landed(), new_state, report

    @abc.abstractmethod
    def frozen(self, params: Any) -> list[bool]:
        """Whether each leaf is frozen: without state, an update or a part in any norm."""

    @abc.abstractmethod
    def assign(self, params: Any) -> list[Assigned]:
        """What each leaf gets."""


@dataclasses.dataclass(frozen=True)
class Foreign(Body):
    """Any other ``(init, update)`` pair, such as optax's."""

    tx: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        return self.tx.init(params)

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        if params is not None:
            updates = jax.tree.map(lambda update, param: cast(update, dtype_of(param)), updates, params)
        tx = optax.with_extra_args_support(self.tx)
        return *tx.update(updates, state, params, **call.extra_args), {}

    def frozen(self, params: Any) -> list[bool]:
        return [False] * len(jax.tree.leaves(params))

    def assign(self, params: Any) -> list[Assigned]:
        return [Assigned()] * len(jax.tree.leaves(params))

    def __repr__(self) -> str:
        module, name = self.tx.update.__module__, getattr(self.tx.update, "__qualname__", "update")
        return f"{module.partition('.')[0]}.{name.partition('.')[0]}(…)"


@dataclasses.dataclass(frozen=True)
class Wrapper(Body):
    """A body around another one, which decides what each leaf gets."""

    tx: Body

    @property
    def lands(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        return self.tx.lands

    @property
    def reports(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        return self.tx.reports

    @property
    def measures(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        return self.tx.measures

    @property
    def needs_params(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        return self.tx.needs_params

    def frozen(self, params: Any) -> list[bool]:
        return self.tx.frozen(params)

    def assign(self, params: Any) -> list[Assigned]:
        return self.tx.assign(params)

    @property
    def name(self) -> str:
        """What users call it: the class's name as that of a function."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __repr__(self) -> str:
        options = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[1:])
        changed = [f"{name}={value!r}" for name, value, default in options if value != default]
        return f"{self.name}({', '.join([repr(self.tx), *changed])})"


@dataclasses.dataclass(frozen=True)
class Init:
    """``init(params) -> state``; equal if the transformations are."""

    body: Body

    def __call__(self, params: Any) -> Any:
        explain.check_order("init(params)", params=params)
        return spread(self.body.init(params), params)


@dataclasses.dataclass(frozen=True)
class Update:
    """``update(updates, state, params=None, **extra_args) -> (updates, state)``; equal if the transformations are."""

    body: Body

    def __call__(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        explain.check_order("update(updates, state, params)", updates=updates, params=params)
        return self.body.update(updates, state, params, extra_args)


class Transformation(optax.GradientTransformationExtraArgs):
    """A pure ``(init, update)`` pair: ``update(updates, state, params=None, **extra_args)``.

    Every transformation of this library is one, and it is an `optax.GradientTransformationExtraArgs`, so
    it goes wherever optax's do. Two are equal if they were built from the same functions and numbers;
    `repr` shows the composition.
    """

    __slots__ = ()

    init: Init  # pyright: ignore[reportIncompatibleVariableOverride] (narrower than optax's: it takes any tree)
    update: Update  # pyright: ignore[reportIncompatibleVariableOverride] (narrower than optax's: it takes any tree)

    @classmethod
    def of(cls, body: Body) -> Transformation:
        """The pair that does what `body` does."""
        return cls(Init(body), Update(body))

    @property
    def body(self) -> Body:
        return self.update.body

    @property
    def whole(self) -> bool:
        """Whether both functions are of one body; not if ``_replace`` gave it another ``init`` or ``update``."""
        body = getattr(self.update, "body", None)
        return body is not None and getattr(self.init, "body", None) is body

    def __repr__(self) -> str:
        return repr(body_of("tx", self))


def body_of(name: str, tx: Any) -> Body:
    """The body of a transformation, ours, any ``(init, update)`` pair or object with both; messages call it `name`."""
    if isinstance(tx, Transformation) and tx.whole:
        return tx.body
    if isinstance(tx, tuple) and len(tx) == 2 and all(map(callable, tx)):
        return Foreign(tx if isinstance(tx, optax.GradientTransformation) else optax.GradientTransformation(*tx))
    if pair := explain.pair_of(tx):
        return Foreign(pair)
    raise TypeError(explain.no_transformation(name, tx))
