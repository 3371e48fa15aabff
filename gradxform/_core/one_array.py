"""How rules run one after the other on one array, and how a rule calls its branches. Nothing here knows of trees."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from gradxform._core.rule import Array, Dynamic, Rule, RuleState, Step
from gradxform._core.trees import is_complex, trainable


@dataclasses.dataclass(frozen=True)
class Scalars:
    """The numbers of one step in the dtype of one leaf's arithmetic."""

    number: Array
    seed: Array | None
    """For the stochastic rounding of low-precision states, if there are any."""
    dynamic: dict[str, Array]
    prepared: tuple[dict[str, Any], ...] = ()

    def with_own(self, numbers: Mapping[str, Any]) -> Scalars:
        """The same with more numbers for the first rule: gathered of all leaves, or measured of one."""
        first, *others = self.prepared
        return dataclasses.replace(self, prepared=({**first, **numbers}, *others))


jax.tree_util.register_dataclass(Scalars)


def init(rules: tuple[Rule, ...], param: Any) -> tuple[RuleState, ...]:
    """The state of `rules` for one array, one dict per rule."""
    return tuple(_init_rule(rule, param) for rule in rules)


def prepare(rules: tuple[Rule, ...], scalars: Scalars) -> tuple[dict[str, Any], ...]:
    """What `rules` compute once per step, one dict per rule."""

    def prepared_of(rule: Rule) -> dict[str, Any]:
        branches = {name: prepare(branch, scalars) for name, branch in rule.branches}
        own = rule.prepare(step_of(rule, scalars)) if rule.prepare else {}
        return {**own, **branches}

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
        new_update, new_slots = rule.update(update, slots, param, step)
        _check_kept(rule, "an update", update, new_update)
        if new_slots.keys() != slots.keys():
            raise ValueError(f"{rule.name} returned the state {sorted(new_slots)}, its init made {sorted(slots)}")
        branches, rest = dict(rule.branches), {}
        for name, new in new_slots.items():
            if name not in branches and new is not kept.get(name):
                rest[name] = stored(name, new)
        limit = math.inf if rule.at_most is None else getattr(step, rule.at_most)
        # a bound on the magnitudes of the result, if it is known before the step runs
        update, at_most = new_update, limit if isinstance(limit, float) else math.inf
        new_state.append({**new_slots, **rest})
    return update, tuple(new_state)


def _check_kept(rule: Rule, what: str, old: Array, new: Array) -> None:
    """Raise if a rule changes a shape, or makes complex what was real."""
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
    for name, value in rule.varying:
        if isinstance(value, Dynamic):
            arguments[name] = scalars.dynamic[value.name]
        else:
            own = dataclasses.replace(scalars, prepared=prepared.pop(name, ()))
            arguments[name] = _branch(value.rules, own, keep)
    return Step(number=scalars.number, **arguments, **prepared)


def _branch(
    rules: tuple[Rule, ...], scalars: Scalars, keep: Keep
) -> Callable[..., tuple[Array, tuple[RuleState, ...]]]:
    return lambda update, state, param: run(rules, scalars, update, state, param, keep)


def _init_rule(rule: Rule, param: Any) -> RuleState:
    slots = {name: _as_state(value, rule.state_dtype) for name, value in rule.init(param).items()}
    return {**slots, **{name: init(branch, param) for name, branch in rule.branches}}


def _as_state(value: Array, dtype: np.dtype[Any] | None) -> Array:
    if dtype is None or not trainable(value.dtype):  # counters stay integers
        return value
    if is_complex(value.dtype) and not is_complex(dtype):
        raise TypeError(f"state_dtype {dtype} would drop the imaginary part of a {value.dtype} moment; leave it out")
    return value.astype(dtype)
