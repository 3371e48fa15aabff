"""A rule: an optimizer's mathematics on one array. Nothing here knows about trees.

A rule reads its hyperparameters, options and branches from ``step``:

    step.number      1 at the first update, a scalar of the arithmetic's dtype
    step.count       the same as int32, right beyond 2²⁴, in `prepare` alone
    step.decay       the current value of the argument `decay`
    step.at_most     a bound on |u|, a float: infinity where none is known in advance
    step.of          a branch: ``direction, slots = step.of(update, state["of"], param)``
    step.keep        ``mu = step.keep("mu", mu)``: a new moment as the state will hold it, to go on with
    step.value       an extra argument of ``update``, if the rule names it: ``extra=("value",)``
    step.key         a random key of its own for this array and step, if the rule has one: ``key=0``
    step.inner       the update of a transformation that runs ``beside={"inner": tx}``

together with what it remembers of all leaves, and whatever its own `prepare` and `gather` computed for this step.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from gradxform._core.hyperparameters import Hyperparameter
from gradxform._core.inventory import Role
from gradxform._core.keys import Seed
from gradxform._core.masks import Mask

Array: TypeAlias = jax.Array
RuleState: TypeAlias = dict[str, Any]
"""The state of one rule for one array, by name: ``{"mu": m}``; a branch's state stands under the branch's name."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """An array of a rule's state, with what its shape does not tell: an `init` gives it in place of the array.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> def normalize_rows() -> gx.Transformation:
      ...     def init(param):
      ...         return {"rows": gx.Slot(jnp.zeros(len(param)), axes=(0,), role="non_negative")}
      ...     def update(update, state, param, step):
      ...         rows = state["rows"] + jnp.sum(update**2, axis=1)
      ...         return update / jnp.sqrt(rows)[:, None], {"rows": rows}
      ...     return gx.lift(init, update, slots=("rows",))
      >>> print(normalize_rows().init(jnp.ones((2, 3))).rows)
      [0. 0.]
    """

    array: Any
    axes: tuple[int | None, ...] | None = None
    """For each axis of the array the axis of the parameter that it goes along, None if it goes along none. On a mesh
    the array is divided as these are. Default: the parameter's axes, if it has the parameter's shape."""
    role: Role | None = None
    """``"signed"``, ``"non_negative"`` or ``"kept"``: a moment of either sign, one that is never negative, or what must
    stay exact; `quantize_state` asks. Default: what its name means, such as ``mu``, else unknown."""
    dtype: Any = None
    """A dtype of its own, in a rule that names its ``slots``; default the rule's ``state_dtype``."""


class Step(types.SimpleNamespace):
    """What is the same for every leaf in one step: the step number, hyperparameters and prepared scalars.

    A rule may pass a new moment through ``step.keep(name, value)`` before it makes the update of it. It gets back what
    the state will hold: the moment rounded, if the state has a narrower dtype; the old one, if a guard skips the step.
    So the moment is written once and read back; otherwise XLA keeps a copy of the old one to compute with.
    """

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"step has no {name!r}; it has {', '.join(sorted(vars(self)))}")


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A hyperparameter's place in a compiled rule, filled at every step."""

    name: str


@dataclasses.dataclass(frozen=True)
class Branch:
    """Rules that another rule applies to its own input."""

    rules: tuple[Rule, ...]

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.rules))})"


def stateless(param: Array) -> RuleState:
    """The `init` of a rule without state."""
    return {}


def pass_through(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    """u ← u"""
    return update, state


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a rule needs to know of all leaves before it acts: numbers of each, and how to combine those of shards.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> LARGEST = gx.Measure(
      ...     of=lambda update: {"largest": jnp.max(jnp.abs(update))},
      ...     across=lambda numbers, axes: {"largest": jax.lax.pmax(numbers["largest"], axes)},
      ... )
      >>> def divide_by_largest(axis_name=None):
      ...     def gather(measured, step):
      ...         return {"all": jnp.max(measured["largest"])}
      ...     def update(update, state, param, step):
      ...         return update / step.all, state
      ...     return gx.lift(None, update, measure=LARGEST, gather=gather, axis_name=axis_name)
      >>> tx = divide_by_largest()
      >>> print(tx.update({"a": jnp.array(4.0), "b": jnp.array(-1.0)}, tx.init({"a": 0.0, "b": 0.0}))[0]["b"])
      -0.25
    """

    of: Callable[[Array], Mapping[str, Array]]
    """Scalars of one array, by name."""
    across: Callable[[Mapping[str, Array], tuple[str, ...]], Mapping[str, Array]] | None = None
    """``across(numbers, axes)``: the numbers of whole arrays, from those of their shards over the mesh axes `axes`.
    Numbers are stacked over leaves."""
    joint: Callable[[Sequence[Sequence[Array]], Any], Mapping[str, Array]] | None = None
    """``joint(groups, dtype)``: the numbers of each group of arrays of one shape, in this dtype, stacked. Then `gather`
    sees groups in place of leaves, and no leaf has numbers of its own."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One transformation of one array; see `lift` for the meaning of the fields."""

    name: str
    constructor: Callable[..., Any] | None
    init: Callable[[Array], RuleState]
    update: Callable[[Array, RuleState, Array | None, Step], tuple[Array, RuleState]]
    prepare: Callable[[Step], Mapping[str, Any]] | None = None
    measure: Measure | None = None
    totals: Callable[[Array, RuleState, Array | None, Step], Mapping[str, Any]] | None = None
    gather: Callable[[Mapping[str, Array], Step], Mapping[str, Any]] | None = None
    memory: tuple[tuple[str, Any], ...] = ()
    extra: tuple[str, ...] = ()
    seed: Seed | None = None
    slots: tuple[str, ...] | None = None
    view: Callable[[RuleState, Array, Step], Array] | None = None
    last: bool = False
    beside: tuple[tuple[str, Any], ...] = ()
    when: Callable[[Step], Any] | None = None
    reports: tuple[str, ...] = ()
    axis_name: tuple[str, ...] | None = None
    mask: Mask | None = None
    whole: bool = False
    fits: Callable[[tuple[int, ...], Any], str | None] | None = None
    batched: bool | None = False
    freezes: bool = False
    needs_params: bool = False
    at_most: str | None = None
    rescales: str | None = None
    state_dtype: np.dtype[Any] | None = None
    arguments: tuple[tuple[str, Any], ...] = ()
    kinds: tuple[Any, ...] = ()
    """Of which types the arguments are, where equal ones may be of several."""

    @functools.cached_property
    def picky(self) -> bool:
        """Whether there are leaves that it, or a branch of it, can't take."""
        return any(inner.whole or inner.fits is not None for inner in self.parts)

    @property
    def gathers(self) -> bool:
        """Whether something is computed for all leaves before it runs on any."""
        return self.measure is not None or self.gather is not None or bool(self.beside)

    @property
    def measures(self) -> bool:
        """Whether it looks at all leaves before it runs on any."""
        return self.measure is not None or self.totals is not None

    @functools.cached_property
    def branches(self) -> list[tuple[str, tuple[Rule, ...]]]:
        return [(name, value.rules) for name, value in self.arguments if isinstance(value, Branch)]

    @functools.cached_property
    def parts(self) -> tuple[Rule, ...]:
        """The rule itself, then those of its branches."""
        return (self, *[part for _, rules in self.branches for rule in rules for part in rule.parts])

    @functools.cached_property
    def varying(self) -> list[tuple[str, Any]]:
        """The arguments that a step fills in: hyperparameters that change, and branches."""
        return [(name, value) for name, value in self.arguments if isinstance(value, Dynamic | Branch)]

    @property
    def hyperparameters(self) -> list[Hyperparameter]:
        """Its own and those of its branches."""
        return [value for rule in self.parts for _, value in rule.arguments if isinstance(value, Hyperparameter)]

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether its hyperparameters are constants, not arrays, which may be traced, and no part of it has a mask."""
        traced = self.seed is not None and not self.seed.constant
        masked = any(part.mask is not None for part in self.parts)
        return not traced and not masked and all(h.constant for h in self.hyperparameters)

    @functools.cached_property
    def labels(self) -> tuple[Any, ...]:
        """Names, groups and ranges of its hyperparameters, in which equal rules may differ."""
        return tuple([(h.name, h.group, h.within) for h in self.hyperparameters])

    def bind(
        self, name_of: Callable[[Hyperparameter], str], keeps: Callable[[Hyperparameter], bool] = lambda h: h.constant
    ) -> Rule:
        """The rule without arrays: the hyperparameters it `keeps` as numbers, a `Dynamic` in place of all others.

        Its seed, which lives in the state, is another rule's as well.
        """

        def bound(value: Any) -> Any:
            if isinstance(value, Hyperparameter):
                return value.value if keeps(value) else Dynamic(name_of(value))
            return value

        bare = self._mapped(lambda rule: rule.bind(name_of, keeps), bound)
        return bare if self.seed is None else dataclasses.replace(bare, seed=Seed(0))

    def select(self, acts: Callable[[Mask], bool]) -> Rule:
        """The rule for one leaf; `NOTHING`, which has no state, if a mask leaves the leaf out."""
        if self.mask is not None and not acts(self.mask):
            return NOTHING
        return dataclasses.replace(self._mapped(lambda rule: rule.select(acts)), mask=None)

    def override(self, changes: Mapping[str, Any], group: str) -> Rule:
        """The rule in a group that has other values of some hyperparameters."""

        def changed(value: Any) -> Any:
            if isinstance(value, Hyperparameter) and value.name in changes:
                return value.replaced(changes[str(value.name)], group)
            return value

        return self._mapped(lambda rule: rule.override(changes, group), changed)

    def shown_in(self, group: str) -> Rule:
        """The rule with the name of its group before those of its hyperparameters."""

        def in_group(value: Any) -> Any:
            return value.inside(group) if isinstance(value, Hyperparameter) else value

        return self._mapped(lambda rule: rule.shown_in(group), in_group)

    def _mapped(self, on_rule: Callable[[Rule], Rule], on_value: Callable[[Any], Any] = lambda value: value) -> Rule:
        """The rule with its branches' rules and its own other arguments replaced."""

        def mapped(value: Any) -> Any:
            return Branch(tuple(map(on_rule, value.rules))) if isinstance(value, Branch) else on_value(value)

        return dataclasses.replace(self, arguments=tuple((key, mapped(value)) for key, value in self.arguments))

    def __repr__(self) -> str:
        defaults = inspect.signature(self.constructor).parameters if self.constructor else {}
        dtype = None if self.state_dtype is None else str(self.state_dtype)
        parts: list[str] = []
        axis = self.axis_name if self.axis_name is None or len(self.axis_name) != 1 else self.axis_name[0]
        key_of = None if self.seed is None else self.seed.value
        rest = {"mask": self.mask, "state_dtype": dtype, "axis_name": axis, "key": key_of}
        for key, value in (*self.arguments, *self.beside, *rest.items()):
            default: Any = defaults[key].default if key in defaults else None
            plain = value.value if isinstance(value, Hyperparameter) else value
            off = not isinstance(plain, jax.Array) and plain in (None, False, _NO_RULES)  # False is 0.0 too
            if not parts and isinstance(value, Hyperparameter):
                parts.append(repr(value))
            elif not (off and plain in (default, _NO_RULES)):
                parts.append(f"{key}={value!r}")
        return f"{self.name}({', '.join(parts)})"


_NO_RULES = Branch(())

NOTHING = Rule("identity", None, stateless, pass_through)
"""What stands in place of a rule on a leaf that it leaves alone."""
