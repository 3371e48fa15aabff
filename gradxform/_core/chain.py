"""What `chain` makes of its stages: the passes over the leaves, and one state for all of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from gradxform._core import trees
from gradxform._core.arguments import visible_dtype
from gradxform._core.beside import BesidePass
from gradxform._core.beside import reports_of as beside_reports
from gradxform._core.body import Assigned, Body
from gradxform._core.call import Call, Report
from gradxform._core.compiled import cast, increment, slot_names
from gradxform._core.explain import wrong_state
from gradxform._core.extras import extra_of
from gradxform._core.hyperparameters import Hyperparameter
from gradxform._core.inventory import ROLES, StateArray, names_of, per_leaf, shared, state_shapes, within
from gradxform._core.leaves import Leaves, masked, no_update
from gradxform._core.masks import Mask
from gradxform._core.one_array import Own
from gradxform._core.passes import RulePass, TreePass
from gradxform._core.plan import Plan, Selection, TreePlan, make_plan, masks_of, select
from gradxform._core.rule import Rule
from gradxform._core.stages import Groups, Stage, TreeStage, expanded, hyperparameters_of, measures
from gradxform._core.state import state_type, unique_names
from gradxform._core.trees import unless
from gradxform._core.values import by_key, evaluate, shown
from gradxform.numerics import arithmetic as numerics

_MOST_PLANS = 64
"""How many plans are kept: a transformation that sees more structures than this makes plans anew."""


@dataclasses.dataclass(frozen=True)
class Chain(Body):
    """Stages, and everything that is derived from them once: names, passes, the class of the state."""

    stages: tuple[Stage, ...]
    flat: list[Rule | TreeStage] = dataclasses.field(init=False, compare=False, repr=False)
    """The stages with groups resolved. They are made once, for a `Selection` knows tree stages by their ids."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "flat", expanded(self.stages))
        for stage, following in itertools.pairwise(self.stages):
            alone = chain_of((stage,))
            if alone.lands:
                raise TypeError(
                    f"{stage!r} must be the last stage, or low-precision parameters miss the values that it chose "
                    f"for them; put {following!r} before it or inside it"
                )
            if alone.last:
                raise TypeError(
                    f"{stage!r} must be the last stage, for it averages the parameters that its updates lead to; put "
                    f"{following!r} before it"
                )
        viewing = [stage for stage in self.stages if len(self.stages) > 1 and chain_of((stage,)).views]
        if len(viewing) > 1:
            raise TypeError(f"{viewing[0]!r} and {viewing[1]!r} both say which parameters to evaluate; use one of them")

    # What is derived from the stages

    @property
    def lands(self) -> bool:
        return any(isinstance(stage, TreeStage) and stage.body.lands for stage in self.flat)

    @property
    def reports(self) -> tuple[str, ...]:
        return self._reports

    @functools.cached_property
    def _reports(self) -> tuple[str, ...]:
        return tuple(unique_names([name for stage in self.flat for name in reports_of(stage)]))

    @property
    def needs_params(self) -> bool:
        rules = [rule for stage in self.flat if isinstance(stage, Rule) for rule in stage.parts]
        bodies = [stage.body for stage in self.flat if isinstance(stage, TreeStage)]
        bodies += [body for rule in rules if rule.beside for _, body in rule.beside]
        masked = any(stage.mask for stage in (*rules, *self.flat))
        return masked or any(part.needs_params for part in (*rules, *bodies))

    @property
    def measures(self) -> bool:
        return any(map(measures, self.flat))

    @property
    def last(self) -> bool:
        return any(stage.last if isinstance(stage, Rule) else stage.body.last for stage in self.flat)

    @property
    def views(self) -> bool:
        return self._views

    @functools.cached_property
    def _views(self) -> bool:
        return any(stage.view is not None if isinstance(stage, Rule) else stage.body.views for stage in self.flat)

    @property
    def extra(self) -> tuple[str, ...]:
        return self._extra

    @functools.cached_property
    def _extra(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for stage in self.flat for name in extra_of_stage(stage)))

    @functools.cached_property
    def _own_extra(self) -> list[tuple[str, str]]:
        """The extra arguments that its rules read, each with the rule that reads it."""
        rules = [part for stage in self.flat if isinstance(stage, Rule) for part in stage.parts]
        return [(part.name, name) for part in rules for name in part.extra]

    @functools.cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """The hyperparameters that are no Python numbers, by their keys in the state's values."""
        return by_key(h for stage in self.stages for h in hyperparameters_of(stage))

    @property
    def constants(self) -> list[Hyperparameter]:
        """Those that the state does not show, without zeros that switch something off; equal ones of one name once."""
        every = [h for stage in self.stages for h in hyperparameters_of(stage) if not h.visible and not h.off]
        return list({(h.shown_as, h): h for h in every}.values())

    @functools.cached_property
    def passes(self) -> tuple[Pass, ...]:
        """Runs of rules, cut where a stage sees whole trees or needs every leaf first."""
        name_of = {h: name for name, h in self.hyperparameters.items()}
        return self._passes(lambda rule: rule.bind(name_of.__getitem__))

    @functools.cached_property
    def eager(self) -> tuple[tuple[Pass, ...], dict[str, np.ndarray]]:
        """The same for steps outside `jax.jit`, and the numbers that their compiled calls are given as arguments.

        These are numbers that only scale: the next optimizer with another learning rate compiles nothing. Inside
        `jax.jit` all is compiled anew anyway, and constants make faster kernels.
        """
        name_of = {h: name for name, h in self.hyperparameters.items()}
        numbers: dict[str, np.ndarray] = {}

        def name(h: Hyperparameter) -> str:
            if not h.scales:
                return name_of[h]
            numbers[f"number {len(numbers)}"] = np.asarray(h.number, np.float64)
            return f"number {len(numbers) - 1}"

        return self._passes(lambda rule: rule.bind(name, keeps=lambda h: h.constant and not h.scales)), numbers

    def _passes(self, bind: Callable[[Rule], Rule]) -> tuple[Pass, ...]:
        runs: list[list[Rule] | TreeStage | Rule] = []  # a rule alone stands for what is beside it
        for stage in self.flat:
            if isinstance(stage, TreeStage):
                runs.append(stage)
            elif runs and isinstance(runs[-1], list) and not stage.gathers:
                runs[-1].append(bind(stage))
            else:
                runs += [bind(stage)] if stage.beside else []
                runs.append([bind(stage)])
        owned = [_own_names(run) for run in runs]
        memories = [[name for name, _ in run[0].memory] if isinstance(run, list) else [] for run in runs]
        seeds = [["seed" for rule in run if rule.seed] if isinstance(run, list) else [] for run in runs]
        names = iter(unique_names([name for each in (*owned, *memories, *seeds) for name in each]))
        columns = [[tuple(next(names) for _ in each) for each in column] for column in (owned, memories, seeds)]
        passes: list[Pass] = []
        stage = 0
        for run, own, kept, drawn in zip(runs, *columns, strict=True):
            if isinstance(run, TreeStage):
                passes.append(TreePass(run, *own))
            elif isinstance(run, Rule):
                passes.append(BesidePass(run, own))
            else:
                passes.append(RulePass(tuple(run), own, kept, drawn, stage))
            stage += len(drawn)
        return tuple(passes)

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The state's fields for moments, for what is remembered of all leaves, and for the states of tree stages."""
        of_rules = [each for each in self.passes if isinstance(each, RulePass)]
        moments = sorted(name for each in of_rules for name in each.fields)
        shared = [name for each in of_rules for name in (*each.memory, *each.seeds)]
        of_trees = [each.field for each in self.passes if isinstance(each, TreePass)]
        beside = [name for each in self.passes if isinstance(each, BesidePass) for name in each.fields]
        return (*moments, *shared, *beside, *of_trees)

    @functools.cached_property
    def state_type(self) -> Any:
        return state_type(self.fields, shown(self.hyperparameters))

    @functools.cached_property
    def _masks(self) -> list[Mask]:
        return masks_of(self.flat)

    @functools.cached_property
    def _plans(self) -> dict[Any, Plan]:
        """The plans made so far."""
        return {}

    def plan(self, tree: Any, given: bool = True, eager: bool = False) -> Plan:
        """What each leaf gets, for these parameters; where none are `given`, for updates in place of them."""
        leaves, structure = jax.tree.flatten(tree)
        selection = self._select(tree, given)
        key = structure, trees.avals(leaves), selection.key, visible_dtype(), eager
        if key not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            passes = self.eager[0] if eager else self.passes
            parts = [_part(each) for each in passes]
            self._plans[key] = make_plan(parts, selection, key[1], structure)
        return self._plans[key]

    def _select(self, tree: Any, given: bool) -> Selection:
        return select(self.flat, self._masks, tree, given)

    def __reduce__(self) -> Any:
        return chain_of, (self.stages,)

    def __repr__(self) -> str:
        if not self.stages:
            return "identity()"
        return repr(self.stages[0]) if len(self.stages) == 1 else f"chain({', '.join(map(repr, self.stages))})"

    # init

    def init(self, params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        plan = self.plan(params)
        for index, (frozen, leaf) in enumerate(zip(plan.frozen, leaves, strict=True)):
            if not frozen:
                trees.check_trainable("params", structure, index, trees.avals([leaf])[0])
        fields: dict[str, Any] = {}
        seeds = [stage.seed for stage in self.flat if isinstance(stage, Rule) and stage.seed is not None]
        for each, own in zip(self.passes, plan.passes, strict=True):
            if isinstance(each, RulePass):
                fields |= each.initial(own, leaves, structure, seeds[each.stage : each.stage + len(each.seeds)])
            else:
                fields |= each.initial(own, leaves, structure)
        count = jnp.zeros((), jnp.int32)
        # copies: a step that donates its state must not delete a user's array, nor be given one twice
        visible = jax.tree.map(jnp.array, self._visible(self._values(count, {})))
        return self.state_type(count=count, **visible, **fields)

    # update

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        self._check_state(state)
        if params is None and self.needs_params:
            raise ValueError(f"{self._who_needs_params()} needs the parameters: call update(updates, state, params)")
        tree = updates if params is None else params
        eager = trees.concrete(getattr(state, "count", None)) and all(map(trees.concrete, jax.tree.leaves(tree)[:1]))
        plan = self.plan(tree, params is not None, eager)
        passes = self.eager[0] if eager else self.passes
        leaves = given = Leaves.of(updates, params, plan.frozen)
        values = self._values(state.count, getattr(state, "values", {}))
        numbers = {**values, **self.eager[1]} if eager else values
        extra = {name: extra_of(who, name, call) for who, name in self._own_extra}
        fields: dict[str, Any] = {}
        told: list[jax.Array] = []
        beside: list[Own] | None = None
        for each, own, following in itertools.zip_longest(passes, plan.passes, passes[1:]):
            if isinstance(each, TreePass):
                leaves, new, report = each.run(state, leaves, own, call)
            elif isinstance(each, BesidePass):
                beside, new, report = each.run(state, leaves, own, numbers, extra, call)
            else:
                rounds = isinstance(following, TreePass) and following.rounds
                leaves, new, report = each.run(state, leaves, own, numbers, extra, call, rounds, beside)
                beside = None
            fields |= new
            told += report.values()
        result = given.result(call.wants, self._results(leaves, plan, call))
        visible = {"count": increment(state.count), **self._visible(values)}
        visible = unless(call.accepted, {name: getattr(state, name) for name in visible}, visible)
        return result, self.state_type(**visible, **fields), dict(zip(self.reports, told, strict=True))

    # view

    def view(self, state: Any, params: Any) -> Any:
        if not self.views:
            return params
        self._check_state(state)
        seen, structure = jax.tree.flatten(params)
        plan, values = self.plan(params), self._values(state.count, getattr(state, "values", {}))
        for each, own in zip(self.passes, plan.passes, strict=True):
            if isinstance(each, TreePass):
                seen = each.view(state, seen, own, structure)
            elif isinstance(each, RulePass):
                seen = each.view(state, seen, own, values, structure)
        return structure.unflatten(seen)

    def _results(self, leaves: Leaves, plan: Plan, call: Call) -> list[Any]:
        """The result of each leaf; here a leaf on which nothing acts, and so no pass, gets what is wanted of all."""
        results = [leaf.update for leaf in leaves.leaves]
        for index in plan.untouched:
            leaf = leaves.leaves[index]
            if leaf.update is None:
                continue
            if leaf.gives_param(call.wants):
                results[index] = leaf.moved(call.accepted)
            else:
                update = leaf.update
                if not numerics.strong(update, leaf.final):
                    update = cast(update, leaf.final)
                accepted = call.accepted
                results[index] = update if accepted is None else jnp.where(accepted, update, no_update(update))
        return results

    def _who_needs_params(self) -> str:
        """The first stage that asks for the parameters, as messages call it."""
        for stage in self.flat:
            for part in stage.parts if isinstance(stage, Rule) else [stage]:
                bodies = [body for _, body in part.beside] if isinstance(part, Rule) else [part.body]
                own = isinstance(part, Rule) and part.needs_params
                if part.mask is not None or own or any(body.needs_params for body in bodies):
                    return part.name if isinstance(part, Rule) else repr(part)
        raise AssertionError

    def _values(self, count: Any, stored: Mapping[str, jax.Array]) -> dict[str, Any]:
        """This step's hyperparameters that are no Python numbers: scalars of at least float32."""
        return evaluate(self.hyperparameters, stored, count)

    def _visible(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The field of the state that shows hyperparameters, if it has one."""
        visible = {key: values[key] for key, h in self.hyperparameters.items() if h.visible}
        return {"values": visible} if visible else {}

    def _check_state(self, state: Any) -> None:
        expected, fields = self.state_type._fields, getattr(state, "_fields", ())
        keys = sorted(key for key, h in self.hyperparameters.items() if h.visible)
        if fields != expected or not hasattr(state, "_shown"):  # optax's may have the same fields
            message = wrong_state("this transformation", state, f"State{expected}", expected)
            if set(fields) ^ set(expected) == {"values"}:
                differ = ", ".join(keys or sorted(getattr(state, "values", ())))
                message += f" ('values' keeps {differ}: live or scheduled in one, a constant in the other)"
            raise TypeError(message)
        trees.check_scalar("state.count", state.count, np.integer)
        if keys and sorted(state.values) != keys:
            raise ValueError(
                f"state.values has {sorted(state.values)}, this transformation has {keys}; "
                "pass what its own init or update returned"
            )
        for key in keys:
            trees.check_scalar(f"state.values[{key!r}]", state.values[key], np.floating)

    # What is told of it

    def frozen(self, params: Any) -> list[bool]:
        return self.plan(params).frozen

    def inventory(self, params: Any) -> list[StateArray]:
        leaves, structure = jax.tree.flatten(params)
        plan, state = self.plan(params), state_shapes(self.init, params)
        arrays = shared(state, *(f for f in ("count", "values") if f in state._fields))
        for each, own in zip(self.passes, plan.passes, strict=True):
            if isinstance(each, RulePass):
                arrays += shared(state, *each.memory, *each.seeds)
                roles = each.roles(own, leaves)
                for field in each.fields:
                    role = ROLES.get(names_of(field)[-1])
                    found = per_leaf((GetAttrKey(field),), getattr(state, field), params, role, of_rule=True)
                    arrays += [array._replace(role=roles.get((field, array.leaf), role)) for array in found]
            elif isinstance(own, TreePlan):
                seen = masked(own.sees, params, leaves, structure)
                places = [place for place, sees in enumerate(own.sees) if sees]
                for field, body in each.bodies:
                    arrays += within(field, body.inventory(seen), places)
        return arrays

    def assign(self, params: Any) -> list[Assigned]:
        leaves, structure = jax.tree.flatten(params)
        selection = self._select(params, given=True)
        frozen, sees = selection.all_frozen, selection.seen_by(self.flat)
        labels = [stage.labels(leaves, structure) for stage in self.stages if isinstance(stage, Groups)]
        groups = [" ".join(of_leaf) for of_leaf in zip(*labels, strict=True)] if labels else [""] * len(leaves)
        assigned = [Assigned(group, rests, {}) for group, rests in zip(groups, frozen, strict=True)]
        for stage in self.flat:
            if isinstance(stage, TreeStage):
                acts = sees[id(stage)]
                inner = iter(stage.body.assign(masked(acts, params, leaves, structure)))
                assigned = [leaf.joined(next(inner)) if act else leaf for leaf, act in zip(assigned, acts, strict=True)]
                continue
            for body in [body for _, body in stage.beside]:
                acts = selection.acting(stage.mask)
                inner = iter(body.assign(masked(acts, params, leaves, structure)))
                assigned = [leaf.joined(next(inner)) if act else leaf for leaf, act in zip(assigned, acts, strict=True)]
            for rule in stage.parts:
                own = {str(h.name): h for _, h in rule.arguments if isinstance(h, Hyperparameter)}
                acts = selection.acting(stage.mask, rule.mask)
                assigned = [
                    leaf.joined(Assigned(hyperparameters=own)) if act else leaf
                    for leaf, act in zip(assigned, acts, strict=True)
                ]
        return assigned


def chain_of(stages: tuple[Stage, ...]) -> Chain:
    """The chain of these stages: the same for equal stages, so that what is derived from them is derived once."""
    rules = [stage for stage in stages if isinstance(stage, Rule) and stage.is_plain]
    if len(rules) < len(stages):
        return Chain(stages)
    return _known(stages, tuple([rule.labels for rule in rules]))


@functools.lru_cache(maxsize=1024)
def _known(stages: tuple[Stage, ...], labels: Any) -> Chain:
    return Chain(stages)


Pass: TypeAlias = RulePass | TreePass | BesidePass


def _own_names(run: list[Rule] | TreeStage | Rule) -> list[str]:
    """The state fields of a pass that hold what it keeps per leaf, or whole states."""
    if isinstance(run, TreeStage):
        return ["inner"]
    return [name for name, _ in run.beside] if isinstance(run, Rule) else slot_names(tuple(run))


def _part(each: Pass) -> Any:
    """What a plan is made of for a pass."""
    if isinstance(each, RulePass):
        return each.rules
    return each.stage if isinstance(each, TreePass) else each.rule


def extra_of_stage(stage: Rule | TreeStage) -> tuple[str, ...]:
    if isinstance(stage, TreeStage):
        return stage.body.extra
    beside = (name for _, body in stage.beside for name in body.extra)
    return (*(name for part in stage.parts for name in part.extra), *beside)


def reports_of(stage: Rule | TreeStage) -> tuple[str, ...]:
    if isinstance(stage, TreeStage):
        return stage.body.reports
    return (*beside_reports(stage), *stage.reports) if stage.beside else stage.reports
