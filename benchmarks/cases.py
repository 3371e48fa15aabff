"""What a row is: a piece of work, who does it, which figures are taken, and what is to be reached. No JAX here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from workloads import Shapes

if TYPE_CHECKING:
    from libraries import Contender, Outsider

STEP, UNJITTED, SWEEP, TRACE, COMPILE, BUILD, IMPORT = (
    "compiled step",
    "un-jitted update",
    "sweep",
    "trace + lower",
    "compile",
    "build",
    "import",
)
EXACT = "exact figures"
TEMPORARIES, COPIES, EQUATIONS, STATE, ABOVE, COMPILATIONS = (
    "temporaries, B/param",
    "full-size copies",
    "equations",
    "state, B/param",
    "temporaries above the dearer part's, B/param",
    "compilations",
)


@dataclasses.dataclass(frozen=True)
class Goal:
    """At most so much of a figure: of the base's in the same run, or in itself where there is no base."""

    figure: str
    at_most: float
    who: str = "gradxform"
    base: str | None = "optax"


@dataclasses.dataclass(frozen=True)
class Case:
    """A piece of work on a tree, done by everybody; the first contender is the base of all ratios shown."""

    name: str
    shapes: Shapes
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...]
    outsiders: tuple[Outsider, ...] = ()
    figures: tuple[str, ...] = (STEP,)
    """Of STEP, UNJITTED, SWEEP, BUILD (trace, lower, compile, and its parts), IMPORT and EXACT, which STEP and BUILD
    bring with them."""
    rounds: int = 11
    """The compiled step."""
    sittings: int = 7
    """In so many of the rounds all arrays are made anew: where they lie in memory shows in times."""
    together: int = 1
    """Steps that are launched before the last one is waited for."""
    repeats: int = 5
    """What runs in Python: un-jitted calls, sweeps, tracing and lowering, imports."""
    compiles: int = 1
    """In so many of the repeats the step is compiled as well."""
    checked: int = 3
    """Steps after which everybody must have come to the same; 0 not to look."""
    params_within: float = 1e-3
    """Of the way gone."""
    elementwise: bool = True
    """The furthest element off against the one that went furthest; False for the means of both, for noisy moments."""
    moments_within: float | None = 1e-5
    """Relative; None not to look."""
    large: int | None = None
    """Elements from which on a copy counts; None for those of the smallest leaf."""
