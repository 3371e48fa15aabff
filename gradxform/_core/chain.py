"""What `chain` makes of its stages: the passes over the leaves, and one state for all of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core import passes, trees
from gradxform._core.body import Assigned, Body, Call, Report
from gradxform._core.compiled import increment, slot_names
from gradxform._core.hyperparameters import Hyperparameter, by_key, evaluate, shown
from gradxform._core.leaves import Leaves, masked
from gradxform._core.passes import RulePass, TreePass
from gradxform._core.rule import Rule
from gradxform._core.selection import Selection
from gradxform._core.stages import Groups, Stage, TreeStage, expanded, hyperparameters_of, measures
from gradxform._core.state import state_type, unique_names
from gradxform._core.trees import unless


@dataclasses.dataclass(frozen=True)
class Chain(Body):
    """Stages, and everything derived from them once: names, segments, the class of the state."""

    stages: tuple[Stage, ...]
    flat: list[Rule | TreeStage] = dataclasses.field(init=False, compare=False, repr=False)
    """The stages, groups resolved: once, for a selection knows some of them by their identity."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "flat", expanded(self.stages))
        for stage, following in itertools.pairwise(self.stages):
            if Chain((stage,)).lands:
                raise TypeError(
                    f"{stage!r} must be the last stage, or low-precision parameters miss the values that it chose "
                    f"for them; put {following!r} before it or inside it"
                )

    # What is derived from the stages

    @functools.cached_property
    def lands(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        return any(isinstance(stage, TreeStage) and stage.body.lands for stage in self.flat)

    @functools.cached_property
    def reports(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        return tuple(unique_names([name for stage in self.flat for name in _reports(stage)]))

    @functools.cached_property
    def needs_params(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        rules = [rule for stage in self.flat if isinstance(stage, Rule) for rule in stage.walk()]
        bodies = [stage.body for stage in self.flat if isinstance(stage, TreeStage)]
        masked = any(stage.mask for stage in (*rules, *self.flat))
        return masked or any(one.needs_params for one in (*rules, *bodies))

    @functools.cached_property
    def measures(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (read only)
        return any(map(measures, self.flat))

    @functools.cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """Those that are no Python numbers, by their keys in the state's values."""
        return by_key(h for stage in self.stages for h in hyperparameters_of(stage))

    @property
    def constants(self) -> list[Hyperparameter]:
        """Those that the state does not show, but for zeros that switch something off; equal ones of one name once."""
        every = [h for stage in self.stages for h in hyperparameters_of(stage) if not h.visible and not h.off]
        return list({(h.shown_as, h): h for h in every}.values())

    @functools.cached_property
    def segments(self) -> tuple[RulePass | TreePass, ...]:
        """Runs of rules, cut where a stage is foreign or needs every leaf first."""
        name_of = {h: name for name, h in self.hyperparameters.items()}
        runs: list[list[Rule] | TreeStage] = []
        for stage in self.flat:
            if isinstance(stage, TreeStage):
                runs.append(stage)
            elif runs and isinstance(runs[-1], list) and stage.measure is None:
                runs[-1].append(stage.bind(name_of.__getitem__))
            else:
                runs.append([stage.bind(name_of.__getitem__)])
        owned = [["inner"] if isinstance(run, TreeStage) else slot_names(tuple(run)) for run in runs]
        memories = [[] if isinstance(run, TreeStage) else [name for name, _ in run[0].memory] for run in runs]
        names = iter(unique_names([name for some in (*owned, *memories) for name in some]))
        fields = [tuple(next(names) for _ in some) for some in owned]
        memory = [tuple(next(names) for _ in some) for some in memories]
        return tuple(
            TreePass(run, *some) if isinstance(run, TreeStage) else RulePass(tuple(run), some, kept)
            for run, some, kept in zip(runs, fields, memory, strict=True)
        )

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The state's fields for moments, what is remembered of all leaves, and foreign states."""
        rules = [segment for segment in self.segments if isinstance(segment, RulePass)]
        moments = sorted(name for segment in rules for name in segment.fields)
        memory = [name for segment in rules for name in segment.memory]
        foreign = [segment.field for segment in self.segments if isinstance(segment, TreePass)]
        return (*moments, *memory, *foreign)

    @functools.cached_property
    def state_type(self) -> Any:
        return state_type(self.fields, shown(self.hyperparameters))

    def select(self, params: Any, leaves: list[Any], structure: Any) -> Selection:
        return Selection.of(self.flat, params, leaves, structure)

    def __reduce__(self) -> Any:
        return Chain, (self.stages,)

    def __repr__(self) -> str:
        if not self.stages:
            return "identity()"
        return repr(self.stages[0]) if len(self.stages) == 1 else f"chain({', '.join(map(repr, self.stages))})"

    # init

    def init(self, params: Any) -> Any:
        leaves, structure = trees.flatten("params", params)
        selection = self.select(params, leaves, structure)
        fields: dict[str, Any] = {}
        for segment in self.segments:
            if isinstance(segment, TreePass):
                acts = selection.seen_by(segment.stage)
                fields[segment.field] = segment.stage.body.init(masked(acts, params, leaves, structure))
            else:
                fields |= passes.initial_fields(segment, selection, leaves, structure)
        count = jnp.zeros((), jnp.int32)
        # arrays of their own: a step that donates its state may neither delete a user's nor be given one twice
        visible = jax.tree.map(jnp.array, self._visible(self._values(count, {})))
        return self.state_type(count=count, **visible, **fields)

    # update

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        return self._run(updates, state, params, call, None, lands=False)

    def guarded(self, updates: Any, state: Any, params: Any, call: Call, taken: Any) -> tuple[Any, Any, Report]:
        if not self.segments:
            return super().guarded(updates, state, params, call, taken)
        return self._run(updates, state, params, call, taken, lands=False)

    def advance(self, updates: Any, state: Any, params: Any, call: Call, taken: Any = None) -> tuple[Any, Any, Report]:
        if not self.segments or isinstance(self.segments[-1], TreePass):
            return super().advance(updates, state, params, call, taken)
        return self._run(updates, state, params, call, taken, lands=True)

    def _run(
        self, updates: Any, state: Any, params: Any, call: Call, taken: Any, lands: bool
    ) -> tuple[Any, Any, Report]:
        """The updates, or if it `lands` the new parameters, with the new state; as they were where none is `taken`."""
        leaves = Leaves.of(updates, params)
        self._check_state(state)
        selection = self.select(params, leaves.params, leaves.structure)
        values = self._values(state.count, getattr(state, "values", {}))
        fields: dict[str, Any] = {}
        reports: list[tuple[str, jax.Array]] = []
        for segment, following in itertools.zip_longest(self.segments, self.segments[1:]):
            if isinstance(segment, TreePass):
                ran = passes.run_foreign(segment, state, leaves, selection, call, taken)
                leaves, fields[segment.field], report = ran
            else:
                rounds = following is None or (isinstance(following, TreePass) and following.rounds)
                how = "land" if lands and following is None else "round" if rounds else "wide"
                ran = passes.run_rules(segment, state, leaves, selection, values, call, how, taken)
                leaves, new, report = ran
                old = {name: getattr(state, name) for name in segment.memory}
                fields |= new | unless(taken, old, {name: new[name] for name in old})
            reports += report.items()
        told = {"count": increment(state.count), **self._visible(values)}
        told = unless(taken, {name: getattr(state, name) for name in told}, told)
        new_state = self.state_type(**told, **fields)
        return leaves.rounded(), new_state, dict(zip(self.reports, [value for _, value in reports], strict=True))

    def _values(self, count: Any, stored: Mapping[str, jax.Array]) -> dict[str, Any]:
        """This step's hyperparameters that are no Python numbers: scalars of at least float32."""
        return evaluate(self.hyperparameters, stored, count)

    def _visible(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The field of the state that shows them, if it has one."""
        visible = {key: values[key] for key, h in self.hyperparameters.items() if h.visible}
        return {"values": visible} if visible else {}

    def _check_state(self, state: Any) -> None:
        expected, fields = self.state_type._fields, getattr(state, "_fields", ())
        keys = sorted(key for key, h in self.hyperparameters.items() if h.visible)
        if fields != expected:
            differ = keys or sorted(getattr(state, "values", ())) if set(fields) ^ set(expected) == {"values"} else []
            why = f" ('values' keeps {', '.join(differ)}: live or scheduled in one, a constant in the other)"
            raise TypeError(
                f"state is {type(state).__name__}{fields or ''}, this transformation's is State{expected}"
                f"{why if differ else ''}; pass what its own init or update returned"
            )
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
        leaves, structure = trees.flatten("params", params)
        within = [stage for stage in self.flat if isinstance(stage, TreeStage)]
        freezing = [stage for stage in self.flat if isinstance(stage, Rule) and stage.freezes]
        if not freezing and not within:
            return [False] * len(leaves)
        return Selection.of([*freezing, *within], params, leaves, structure).frozen

    def assign(self, params: Any) -> list[Assigned]:
        leaves, structure = trees.flatten("params", params)
        selection = self.select(params, leaves, structure)
        tables = [stage.table for stage in self.stages if isinstance(stage, Groups)]
        labels = zip(*([table.label(group) for group in table(structure)] for table in tables), strict=True)
        groups = [" ".join(some) for some in labels] if tables else [""] * len(leaves)
        assigned = [Assigned(group, frozen, {}) for group, frozen in zip(groups, selection.frozen, strict=True)]
        for stage in self.flat:
            if isinstance(stage, TreeStage):
                acts = selection.seen_by(stage)
                inner = iter(stage.body.assign(masked(acts, params, leaves, structure)))
                assigned = [one.joined(next(inner)) if act else one for one, act in zip(assigned, acts, strict=True)]
                continue
            for rule in stage.walk():
                own = {str(h.name): h for _, h in rule.arguments if isinstance(h, Hyperparameter)}
                acts = selection.acting(stage.mask, rule.mask)
                assigned = [
                    one.joined(Assigned(hyperparameters=own)) if act else one
                    for one, act in zip(assigned, acts, strict=True)
                ]
        return assigned


def _reports(stage: Rule | TreeStage) -> tuple[str, ...]:
    return stage.reports if isinstance(stage, Rule) else stage.body.reports
