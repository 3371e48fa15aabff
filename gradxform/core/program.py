"""What `chain` makes of its stages: the passes over the leaves, and one state for all of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform.core import passes, trees
from gradxform.core.hyperparameters import Hyperparameter, Live, evaluate, visible_dtype
from gradxform.core.passes import Segment
from gradxform.core.rules import Rule
from gradxform.core.state import state_type, unique_names


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A stage that is any other ``(init, update)`` pair: it sees whole trees."""

    tx: optax.GradientTransformation

    def __repr__(self) -> str:
        if hasattr(self.tx.update, "body"):
            return repr(self.tx)
        module, name = self.tx.update.__module__, getattr(self.tx.update, "__qualname__", "update")
        return f"{module.partition('.')[0]}.{name.partition('.')[0]}(…)"


Stage: TypeAlias = Rule | Foreign


@dataclasses.dataclass(frozen=True)
class ForeignSegment:
    """A foreign stage and the state field that holds its state."""

    tx: optax.GradientTransformationExtraArgs
    field: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Stages, and everything derived from them once: names, segments, the class of the state."""

    stages: tuple[Stage, ...]

    # What is derived from the stages

    @functools.cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """Those that change or show in the state, by their names there; equal ones share a name."""
        every = [h for stage in self.stages if isinstance(stage, Rule) for h in stage.hyperparameters]
        distinct = list(dict.fromkeys(h for h in every if not h.constant or h.visible))
        return dict(zip(unique_names([str(h.name) for h in distinct]), distinct, strict=True))

    @functools.cached_property
    def segments(self) -> tuple[Segment | ForeignSegment, ...]:
        """Runs of rules, cut where a stage is foreign or needs every leaf first."""
        name_of = {h: name for name, h in self.hyperparameters.items()}
        runs: list[list[Rule] | Foreign] = []
        for stage in self.stages:
            if isinstance(stage, Foreign):
                runs.append(stage)
            elif runs and isinstance(runs[-1], list) and stage.measure is None:
                runs[-1].append(stage.bind(name_of.__getitem__))
            else:
                runs.append([stage.bind(name_of.__getitem__)])
        owned = [["inner"] if isinstance(run, Foreign) else passes.slot_names(tuple(run)) for run in runs]
        names = iter(unique_names([name for some in owned for name in some]))
        segments: list[Segment | ForeignSegment] = []
        for run, some in zip(runs, owned, strict=True):
            fields = tuple(next(names) for _ in some)
            segments.append(
                ForeignSegment(optax.with_extra_args_support(run.tx), fields[0])
                if isinstance(run, Foreign)
                else Segment(tuple(run), fields)
            )
        return tuple(segments)

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The state's fields for moments and foreign states, moments in the order mu, nu, …"""
        moments = [name for s in self.segments if isinstance(s, Segment) for name in s.fields]
        foreign = [s.field for s in self.segments if isinstance(s, ForeignSegment)]
        return (*sorted(moments), *foreign)

    @functools.cached_property
    def state_type(self) -> Any:
        live = {name: h.within for name, h in self.hyperparameters.items() if isinstance(h.value, Live)}
        return state_type(self.fields, tuple(live.items()))

    def __reduce__(self) -> Any:
        return Program, (self.stages,)

    def __repr__(self) -> str:
        if not self.stages:
            return "identity()"
        return repr(self.stages[0]) if len(self.stages) == 1 else f"chain({', '.join(map(repr, self.stages))})"

    # init

    def init(self, params: Any) -> Any:
        leaves, structure = trees.flatten("params", params)
        fields: dict[str, Any] = {}
        for segment in self.segments:
            if isinstance(segment, ForeignSegment):
                fields[segment.field] = segment.tx.init(params)
                continue
            slots = passes.initial_slots(segment.rules, params, leaves, structure)
            for index, field in enumerate(segment.fields):
                fields[field] = structure.unflatten([slot[index] for slot in slots])
        count = jnp.zeros((), jnp.int32)
        return self.state_type(count=count, hyperparams=self._visible(self._values(count, {})), **fields)

    # update

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        leaves = passes.Leaves.of(updates, params)
        self._check_state(state)
        values = self._values(state.count, state.hyperparams)
        fields: dict[str, Any] = {}
        for segment, following in itertools.zip_longest(self.segments, self.segments[1:]):
            if isinstance(segment, ForeignSegment):
                leaves, fields[segment.field] = passes.run_foreign(
                    segment.tx, getattr(state, segment.field), leaves, extra_args
                )
            else:
                rounded = not isinstance(following, Segment)
                leaves, moments = passes.run_rules(segment, state, leaves, values, rounded)
                fields.update(moments)
        visible = self._visible(values)
        return leaves.rounded(), self.state_type(count=passes.increment(state.count), hyperparams=visible, **fields)

    def _values(self, count: Any, stored: Mapping[str, jax.Array]) -> dict[str, Any]:
        """This step's hyperparameters: floats for constants, else scalars of at least float32."""
        return {name: evaluate(h, stored, name, count) for name, h in self.hyperparameters.items()}

    def _visible(self, values: Mapping[str, Any]) -> dict[str, jax.Array]:
        return {
            name: jnp.asarray(values[name], visible_dtype()) for name, h in self.hyperparameters.items() if h.visible
        }

    def _check_state(self, state: Any) -> None:
        expected = self.state_type._fields
        if getattr(state, "_fields", None) != expected:
            raise TypeError(
                f"state is {type(state).__name__}{getattr(state, '_fields', '')}, this transformation's is "
                f"State{expected}; pass what its own init or update returned"
            )
        trees.check_scalar("state.count", state.count, np.integer)
        visible = [name for name, h in self.hyperparameters.items() if h.visible]
        if sorted(state.hyperparams) != sorted(visible):
            raise ValueError(
                f"state.hyperparams has {sorted(state.hyperparams)}, this transformation has {sorted(visible)}; "
                "pass what its own init or update returned"
            )
        for name in visible:
            trees.check_scalar(f"state.hyperparams[{name!r}]", state.hyperparams[name], np.floating)
