"""How rules run one after the other on one array, and how a rule calls its branches. Nothing here knows of trees."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core.keys import typed
from gradxform._core.rule import Array, Dynamic, Rule, RuleState, Slot, Step
from gradxform._core.trees import is_complex, trainable


@dataclasses.dataclass(frozen=True)
class Scalars:
    """The numbers of one step in the dtype of one leaf's arithmetic."""

    number: Array
    seed: Array | None
    """For the stochastic rounding of low-precision states, if there are any."""
    dynamic: dict[str, Array]
    extra: dict[str, Array] = dataclasses.field(default_factory=dict[str, Array])
    """The extra arguments of ``update`` that rules read."""
    prepared: tuple[dict[str, Any], ...] = ()
    count: Array | None = None
    """The number of the step as int32, for `prepare` alone."""

    def with_own(self, numbers: Own) -> Scalars:
        """The same with more for some of the rules: gathered of all leaves, measured of one, or its random key."""
        prepared = list(self.prepared)
        for place, more in numbers.items():
            prepared[place] = {**prepared[place], **more}
        return dataclasses.replace(self, prepared=tuple(prepared))


jax.tree_util.register_dataclass(Scalars)

Own: TypeAlias = Mapping[int, Mapping[str, Any]]
"""What some of the rules of a pass get besides, by their places in it."""


def init(rules: tuple[Rule, ...], param: Any) -> tuple[RuleState, ...]:
    """The state of `rules` for one array, one dict per rule."""
    return tuple([_init_rule(rule, param, _as_state) for rule in rules])


def slots(rules: tuple[Rule, ...], param: Any) -> tuple[RuleState, ...]:
    """The same with each array in a `Slot`, which tells more of it."""
    return tuple([_init_rule(rule, param, _slot) for rule in rules])


def names(rules: tuple[Rule, ...]) -> tuple[RuleState, ...]:
    """The state of `rules` with a name in place of every array that they keep for any leaf."""

    def names_of(rule: Rule) -> RuleState:
        own = rule.slots
        if own is None:
            try:
                own = tuple(jax.eval_shape(lambda: _init_rule(rule, jnp.zeros((), np.float32), _array, branches=False)))
            except Exception as error:
                error.add_note("it was asked for a 0-d array; if the names depend on the shape, say slots=(…)")
                raise
        return {name: name for name in own} | {name: names(branch) for name, branch in rule.branches}

    return tuple(map(names_of, rules))


def prepare(rules: tuple[Rule, ...], scalars: Scalars) -> tuple[dict[str, Any], ...]:
    """What `rules` compute once per step, one dict per rule."""

    def prepared_of(rule: Rule) -> dict[str, Any]:
        branches = {name: prepare(branch, scalars) for name, branch in rule.branches}
        if rule.prepare is None:
            return branches
        try:
            return {**rule.prepare(step_of(rule, scalars)), **branches}
        except Exception as error:
            error.add_note(f"in prepare of {rule.name}")
            raise

    return tuple(map(prepared_of, rules))


Keep: TypeAlias = Callable[[Rule, Array, Array], Array]
"""``keep(rule, new, old)``: a new moment as the state will hold it, in the dtype of the arithmetic."""


def run(
    rules: tuple[Rule, ...],
    scalars: Scalars,
    update: Array,
    state: tuple[RuleState, ...],
    param: Array | None,
    keep: Keep = lambda rule, new, old: new,
) -> tuple[Array, tuple[RuleState, ...]]:
    """Apply `rules` to one array, one after the other; every moment goes through `keep` once."""
    new_state: list[RuleState] = []
    at_most = math.inf
    for rule, prepared, slots in zip(rules, scalars.prepared, state, strict=True):
        kept: dict[str, Array] = {}

        def stored(name: str, new: Array, rule: Rule = rule, slots: RuleState = slots, kept: Any = kept) -> Array:
            if name not in slots:
                raise ValueError(f"{rule.name} keeps {name!r}, its init made {sorted(slots)}")
            _check_kept(rule, f"the state {name}", slots[name], new)
            kept[name] = keep(rule, new, slots[name])
            return kept[name]

        step = step_of(rule, scalars, prepared, keep=keep)
        step.keep, step.at_most = stored, at_most
        try:
            returned: Any = rule.update(update, slots, param, step)
            if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
                raise _no_pair(rule, returned)
            new_update, new_slots = returned
            _check_kept(rule, "an update", update, new_update)
            if new_slots.keys() != slots.keys():
                raise ValueError(f"{rule.name} returned the state {sorted(new_slots)}, its init made {sorted(slots)}")
            branches, rest = dict(rule.branches), {}
            for name, new in new_slots.items():
                if name not in branches and new is not kept.get(name) and new is not slots[name]:
                    rest[name] = stored(name, new)
        except Exception as error:
            error.add_note(f"in update of {rule.name}")
            raise
        limit = math.inf if rule.at_most is None else getattr(step, rule.at_most)
        # a bound on the magnitudes of the result, if it is known before the step runs
        update, at_most = new_update, limit if isinstance(limit, float) else math.inf
        new_state.append({**new_slots, **rest})
    return update, tuple(new_state)


def _no_pair(rule: Rule, returned: Any) -> TypeError:
    what = f"({', '.join(type(each).__name__ for each in returned)})" if isinstance(returned, tuple) else repr(returned)
    return TypeError(f"update of {rule.name} must return the new update and the new state, a dict; it returned {what}")


def _check_kept(rule: Rule, what: str, old: Array, new: Any) -> None:
    """Raise if a rule changes a shape, or makes complex what was real."""
    if not hasattr(new, "shape"):
        raise TypeError(f"{rule.name} turned {what} of shape {old.shape} into {type(new).__name__}, which is no array")
    if new.shape != old.shape:
        raise ValueError(f"{rule.name} turned {what} of shape {old.shape} into {new.shape}; the shape must stay")
    if is_complex(new.dtype) and not is_complex(old.dtype):
        raise TypeError(f"{rule.name} turned {what} of {old.dtype} into {new.dtype}; real must stay real")


def step_of(
    rule: Rule,
    scalars: Scalars,
    prepared: Mapping[str, Any] | None = None,
    memory: Mapping[str, Array] | None = None,
    keep: Keep = lambda rule, new, old: new,
) -> Step:
    """The step as `rule` sees it."""
    prepared = {**(prepared or {}), **(memory or {})}
    arguments = dict(rule.arguments)
    for name in rule.extra:
        if name in scalars.extra:  # not where parameters are only looked at
            arguments[name] = scalars.extra[name]
    if scalars.count is not None:
        arguments["count"] = scalars.count
    if rule.seed is not None and "key" in prepared:
        prepared["key"] = typed(prepared["key"])
    for name, value in rule.varying:
        if isinstance(value, Dynamic):
            arguments[name] = scalars.dynamic[value.name]
        else:
            own = dataclasses.replace(scalars, prepared=prepared.pop(name, ()))
            arguments[name] = _branch(value.rules, own, keep)
    if not (arguments.keys().isdisjoint(prepared) and _OWN.isdisjoint(prepared)):
        twice = sorted((arguments.keys() | _OWN) & prepared.keys())[0]
        whose = f"an argument of {rule.name}" if twice in arguments else f"in every step, also of {rule.name}"
        raise ValueError(f"{twice!r} is {whose}: prepare and gather must give other names")
    return Step(number=scalars.number, **arguments, **prepared)


_OWN = frozenset(("number", "keep", "at_most"))
"""What every step has itself."""


def _branch(
    rules: tuple[Rule, ...], scalars: Scalars, keep: Keep
) -> Callable[..., tuple[Array, tuple[RuleState, ...]]]:
    return lambda update, state, param: run(rules, scalars, update, state, param, keep)


def _init_rule(rule: Rule, param: Any, kept: Callable[[Rule, Slot], Any], branches: bool = True) -> RuleState:
    """What `kept` makes of each array that the rule keeps for an array; nothing for a name that has None."""
    state: RuleState = {}
    try:
        made: Any = rule.init(param)
        if not isinstance(made, Mapping):
            raise TypeError(f"init of {rule.name} must give a dict of arrays by name, got {type(made).__name__}")
        for name, value in made.items():
            if value is not None:
                slot = value if isinstance(value, Slot) else Slot(value)
                _check_slot(rule, name, slot, param)
                state[name] = kept(rule, slot)
    except Exception as error:
        error.add_note(f"in init of {rule.name}")
        raise
    if branches:
        for name, rules in rule.branches:
            state[name] = tuple([_init_rule(inner, param, kept) for inner in rules])
    return state


def _check_slot(rule: Rule, name: str, slot: Slot, param: Any) -> None:
    if rule.slots is not None and name not in rule.slots:
        raise ValueError(f"init of {rule.name} gives {name!r}, which is not one of slots={rule.slots}")
    if not hasattr(slot.array, "shape"):
        raise TypeError(f"init of {rule.name} gives {type(slot.array).__name__} for {name!r}, not an array")
    if slot.dtype is not None and rule.slots is None:
        raise ValueError(f"init of {rule.name} gives {name!r} a dtype of its own: name all that it keeps, slots=(…)")
    if slot.axes is not None and len(slot.axes) != len(slot.array.shape):
        raise ValueError(f"axes of {name!r} in {rule.name} must tell of {len(slot.array.shape)} axes, got {slot.axes}")
    if any(axis is not None and not 0 <= axis < param.ndim for axis in slot.axes or ()):
        raise ValueError(
            f"axes of {name!r} in {rule.name} must be None or axes of its parameter, from 0 to {param.ndim - 1}, got "
            f"{slot.axes}"
        )


def _array(rule: Rule, slot: Slot) -> Array:
    return slot.array


def _slot(rule: Rule, slot: Slot) -> Slot:
    return dataclasses.replace(slot, array=_as_state(rule, slot))


def _as_state(rule: Rule, slot: Slot) -> Array:
    """The array in the dtype that the state keeps it in."""
    value, dtype = slot.array, rule.state_dtype if slot.dtype is None else np.dtype(slot.dtype)
    if dtype is None or not trainable(value.dtype):  # counters stay integers
        return value
    if is_complex(value.dtype) and not is_complex(dtype):
        raise TypeError(f"state_dtype {dtype} would drop the imaginary part of a {value.dtype} moment; leave it out")
    return value.astype(dtype)
