"""Transformations that run beside a rule, on its input: with states of their own, and steps that may be left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradxform._core import one_array
from gradxform._core.call import Call, Report
from gradxform._core.compiled import prepared
from gradxform._core.leaves import Leaves, masked
from gradxform._core.one_array import Own
from gradxform._core.plan import TreePlan
from gradxform._core.rule import Rule
from gradxform._core.values import changing


@dataclasses.dataclass(frozen=True)
class BesidePass:
    """What runs beside a rule, before its own pass, and the state fields that hold the states."""

    rule: Rule
    fields: tuple[str, ...]

    @property
    def bodies(self) -> list[tuple[str, Any]]:
        """The state fields, and the bodies whose states they hold."""
        return [(field, body) for field, (_, body) in zip(self.fields, self.rule.beside, strict=True)]

    def initial(self, plan: TreePlan, leaves: Sequence[Any], structure: Any) -> dict[str, Any]:
        """The pass's part of the state."""
        seen = masked(plan.sees, structure.unflatten(leaves), leaves, structure)
        return {field: body.init(seen) for field, body in self.bodies}

    def run(
        self,
        state: Any,
        leaves: Leaves,
        plan: TreePlan,
        values: Mapping[str, Any],
        extra: Mapping[str, Any],
        call: Call,
    ) -> tuple[list[Own], dict[str, Any], Report]:
        """What the rule gets of it for each leaf, the new states, and what they tell."""
        updates, params = leaves.seen(plan.sees)
        asked = call.but(wants="updates", accepted=self._accepted(state, values, extra, call))
        beside: list[dict[str, Any]] = [{} for _ in leaves.leaves]
        fields: dict[str, Any] = {}
        told: Report = {}
        for field, (name, body) in zip(self.fields, self.rule.beside, strict=True):
            new, fields[field], report = body.step(updates, getattr(state, field), params, asked)
            told |= {f"{name}/{key}": value for key, value in report.items()}
            for own, leaf, act, part in zip(
                beside, leaves.leaves, plan.acts, leaves.structure.flatten_up_to(new), strict=True
            ):
                if act and leaf.update is not None:
                    own[name] = part
        return [{0: own} if own else {} for own in beside], fields, told

    def _accepted(self, state: Any, values: Mapping[str, Any], extra: Mapping[str, Any], call: Call) -> Any:
        """Whether the transformations take a step; else their states stay, and their updates are 0."""
        if self.rule.when is None:
            return call.accepted
        scalars = prepared((self.rule,))(np.dtype(np.float32), state.count, changing(values), extra)
        try:
            return call.also(self.rule.when(one_array.step_of(self.rule, scalars, scalars.prepared[0])))
        except Exception as error:
            error.add_note(f"in when of {self.rule.name}")
            raise


def reports_of(rule: Rule) -> tuple[str, ...]:
    """The names of what the transformations beside a rule tell."""
    return tuple(f"{name}/{key}" for name, body in rule.beside for key in body.reports)
