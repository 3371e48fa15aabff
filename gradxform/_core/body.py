"""What a transformation is: a pure ``(init, update)`` pair around a body, and how bodies call one another."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from gradxform._core import explain, trees
from gradxform._core.call import Call, Report
from gradxform._core.compiled import cast
from gradxform._core.encoded import decoded
from gradxform._core.hyperparameters import Hyperparameter
from gradxform._core.inventory import StateArray, of_foreign, per_leaf, shared, state_shapes, within
from gradxform._core.leaves import Leaf, Leaves, masked, no_update
from gradxform._core.meshes import spread
from gradxform._core.trees import unless


@dataclasses.dataclass(frozen=True)
class Assigned:
    """What one leaf gets: its group, whether it is frozen, and the hyperparameters of its rules by name."""

    group: str = ""
    frozen: bool = False
    hyperparameters: Mapping[str, Hyperparameter] = dataclasses.field(default_factory=dict[str, Hyperparameter])

    def joined(self, inner: Assigned) -> Assigned:
        """This, together with what a transformation inside gives the leaf."""
        group = " ".join(filter(None, (self.group, inner.group)))
        return Assigned(group, self.frozen or inner.frozen, {**self.hyperparameters, **inner.hyperparameters})


class Body(abc.ABC):
    """What a transformation does: pure, hashable, comparable, and with a `repr` that reads like the call."""

    @property
    def lands(self) -> bool:
        """Whether its updates take low-precision parameters exactly to chosen values, so that nothing may follow it."""
        return False

    @property
    def reports(self) -> tuple[str, ...]:
        """The names in its report."""
        return ()

    @property
    def needs_params(self) -> bool:
        """Whether ``update`` raises without params."""
        return False

    @property
    def measures(self) -> bool:
        """Whether something in it depends on all leaves at once, such as a global norm."""
        return False

    @property
    def extra(self) -> tuple[str, ...]:
        """The extra arguments of ``update`` that something in it says it reads, such as ``value``."""
        return ()

    @property
    def last(self) -> bool:
        """Whether nothing may follow it, because it relies on where its updates lead."""
        return False

    @property
    def views(self) -> bool:
        """Whether other parameters than those that are trained are to be evaluated."""
        return False

    def view(self, state: Any, params: Any) -> Any:
        """The parameters to evaluate."""
        return params

    @abc.abstractmethod
    def init(self, params: Any) -> Any: ...

    @abc.abstractmethod
    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        """Return what `call` wants, updates or the new parameters; the new state; and the report."""

    @abc.abstractmethod
    def frozen(self, params: Any) -> list[bool]:
        """Whether each leaf is frozen or a function, and so has no state, no update and no part in any norm."""

    @abc.abstractmethod
    def assign(self, params: Any) -> list[Assigned]:
        """What each leaf gets."""

    @abc.abstractmethod
    def inventory(self, params: Any) -> list[StateArray]:
        """Every array of the state for parameters of these shapes."""


@dataclasses.dataclass(frozen=True)
class Foreign(Body):
    """Any other ``(init, update)`` pair, such as optax's."""

    tx: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        return self.tx.init(masked([not rests for rests in self.frozen(params)], params, leaves, structure))

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        frozen = self.frozen(updates if params is None else params)
        leaves, acts = Leaves.of(updates, params, frozen), [not rests for rests in frozen]
        given, seen = self._seen(leaves, acts)
        tx = optax.with_extra_args_support(self.tx)
        new_updates, new_state = tx.update(given, state, seen, **call.extra_args)
        made = leaves.checked(f"{self!r}: new updates", new_updates, given, acts)
        new_state = unless(call.accepted, state, new_state)
        results = [self._result(leaf, update, call) for leaf, update in zip(leaves.leaves, made, strict=True)]
        return leaves.result(call.wants, results), new_state, {}

    def _seen(self, leaves: Leaves, acts: list[bool]) -> tuple[Any, Any]:
        """Updates in the parameters' dtypes, and the parameters, decoded; a hole for each leaf that takes no part."""
        each = leaves.leaves
        if not leaves.has_params:
            updates = [leaf.update for leaf in each]
            return masked(acts, leaves.structure.unflatten(updates), updates, leaves.structure), None
        updates = [None if leaf.update is None else cast(leaf.update, leaf.final) for leaf in each]
        values = [decoded(leaf.param) for leaf in each]
        given, seen = (masked(acts, leaves.structure.unflatten(c), c, leaves.structure) for c in (updates, values))
        return given, seen

    def _result(self, leaf: Leaf, update: Any, call: Call) -> Any:
        """What is wanted of a leaf, made of its update, which may be of any dtype."""
        if leaf.update is None:
            return None
        if leaf.gives_param(call.wants):
            return leaf._replace(update=update).moved(call.accepted)
        kept = update if call.accepted is None else jnp.where(call.accepted, update, no_update(update))
        return kept if leaf.param is None else cast(kept, leaf.final)

    def frozen(self, params: Any) -> list[bool]:
        return [trees.rests(leaf) for leaf in jax.tree.leaves(params)]

    def assign(self, params: Any) -> list[Assigned]:
        return [Assigned()] * len(jax.tree.leaves(params))

    def inventory(self, params: Any) -> list[StateArray]:
        return of_foreign(self.init, params)

    def __repr__(self) -> str:
        module, name = self.tx.update.__module__, getattr(self.tx.update, "__qualname__", "update")
        return f"{module.partition('.')[0]}.{name.partition('.')[0]}(…)"


@dataclasses.dataclass(frozen=True)
class Wrapper(Body):
    """A body around another body, which decides what each leaf gets."""

    tx: Body

    @property
    def lands(self) -> bool:
        return self.tx.lands

    @property
    def reports(self) -> tuple[str, ...]:
        return self.tx.reports

    @property
    def measures(self) -> bool:
        return self.tx.measures

    @property
    def needs_params(self) -> bool:
        return self.tx.needs_params

    @property
    def extra(self) -> tuple[str, ...]:
        return self.tx.extra

    @property
    def last(self) -> bool:
        return self.tx.last

    @property
    def views(self) -> bool:
        return self.tx.views

    def view(self, state: Any, params: Any) -> Any:
        if "inner" not in getattr(state, "_fields", ()):
            raise TypeError(explain.wrong_state(self.name, state, "one with a field 'inner'", ("inner",)))
        return self.tx.view(state.inner, params)

    def frozen(self, params: Any) -> list[bool]:
        return self.tx.frozen(params)

    def assign(self, params: Any) -> list[Assigned]:
        return self.tx.assign(params)

    def inner_params(self, params: Any) -> Any:
        """The parameters, or shapes of them, as the wrapped transformation gets them."""
        return params

    like_params: ClassVar[tuple[str, ...]] = ()
    """The fields of its own state that are trees like the parameters."""

    def inventory(self, params: Any) -> list[StateArray]:
        state = state_shapes(self.init, params)
        own = [name for name in state._fields if name not in ("inner", *self.like_params)]
        trees_of = [
            a for name in self.like_params for a in per_leaf((GetAttrKey(name),), getattr(state, name), params, "kept")
        ]
        return [*shared(state, *own), *trees_of, *within("inner", self.tx.inventory(self.inner_params(params)))]

    @property
    def name(self) -> str:
        """What users call it: the name of the class, written as a function's."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)[1:]
        options = ((f.metadata.get("written", f.name), getattr(self, f.name), f.default) for f in fields)
        changed = [f"{name}={value!r}" for name, value, default in options if value != default]
        return f"{self.name}({', '.join([repr(self.tx), *changed])})"


@dataclasses.dataclass(frozen=True)
class Init:
    """``init(params) -> state``; equal if the transformations are."""

    body: Body

    __name__ = "init"  # what profiles show of ``jax.jit(tx.init)``

    def __str__(self) -> str:  # what JAX asks for whenever it compiles
        return "init of a gradxform.Transformation"

    def __call__(self, params: Any) -> Any:
        explain.check_order("init(params)", params=params)
        return spread(self.body.init(params), params)


@dataclasses.dataclass(frozen=True)
class Update:
    """``update(updates, state, params=None, **extra_args) -> (updates, state)``; equal if the transformations are."""

    body: Body

    __name__ = "update"  # what profiles show of ``jax.jit(tx.update)``

    def __str__(self) -> str:  # what JAX asks for whenever it compiles
        return "update of a gradxform.Transformation"

    def __call__(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        explain.check_order("update(updates, state, params)", updates=updates, params=params)
        updates, state, _ = self.body.step(updates, state, params, Call(extra_args))
        return updates, state


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
    """The body of a transformation: ours, an ``(init, update)`` pair or an object with both; `name` is for messages."""
    if isinstance(tx, Transformation) and tx.whole:
        return tx.body
    if isinstance(tx, tuple) and len(tx) == 2 and all(map(callable, tx)):
        return Foreign(tx if isinstance(tx, optax.GradientTransformation) else optax.GradientTransformation(*tx))
    if pair := explain.pair_of(tx):
        return Foreign(pair)
    raise TypeError(explain.no_transformation(name, tx))
