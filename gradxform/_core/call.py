"""What is asked of a step, and what has been measured in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax

Report: TypeAlias = dict[str, jax.Array]
"""What a step tells besides its result: scalars by name, such as ``clipped``."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What is asked of a transformation in one step, and of every transformation inside it."""

    extra_args: Mapping[str, Any]
    accepted: Any = None
    """A 0-d boolean: where it is False, parameters and state stay as they are. None stands for True."""
    wants: Literal["updates", "params"] = "updates"
    """What the step returns: updates, which are added to the parameters, or the new parameters."""
    measured: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])
    """What was measured of an array in this step, so that a norm that several transformations want is taken once."""
    rescaled: dict[int, tuple[Any, Any, Any]] = dataclasses.field(default_factory=dict[int, tuple[Any, Any, Any]])
    """Arrays that are multiples of others, by their ids: the array, the other array, the factor."""

    def but(self, **changes: Any) -> Call:
        """The same step with other requests."""
        return dataclasses.replace(self, **changes)

    def within_branch(self) -> Call:
        """The same step in a branch that may not run: what is measured there is not remembered outside."""
        return Call(self.extra_args, wants=self.wants)

    def also(self, condition: Any) -> Any:
        """`condition` where the step is accepted, else False."""
        return condition if self.accepted is None else self.accepted & condition
