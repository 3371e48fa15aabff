"""What is shown: what went wrong, what was to reach, and everything that was measured, in tables. No JAX here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from cases import COMPILATIONS, COPIES, EQUATIONS, Case, Goal
from results import Found, Result
from rich.console import Console, Group
from rich.table import Table

HOW_TO_READ = (
    "Times are of one step (one call of several timed together), medians of interleaved rounds with the quartiles in "
    "brackets. A ratio of times is the median over the rounds of the time divided by the base's in the same round: "
    "below 1 is faster. A build is trace, lower and compile, from cold caches. The other figures are exact: the same "
    "on every run with the same versions. The goals are for the full sizes."
)
COUNTS = (COPIES, EQUATIONS, COMPILATIONS)
GOALS = ("work", "figure", "who", "value", "base", "ratio", "to reach", "")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A goal, and how far it was reached."""

    goal: Goal
    result: Result

    @property
    def number(self) -> float | None:
        """What is compared with the goal: the ratio to the base, or the figure itself."""
        goal = self.goal
        return self.result.values[goal.who][0] if goal.base is None else self.result.ratio(goal.who, goal.base)

    @property
    def reached(self) -> bool:
        """Whether it is; a ratio of times to the two digits shown. No ratio, of nothing to nothing, is reached."""
        number = self.number
        if number is None:
            return self.result.values[self.goal.who][0] == 0
        return (number if self.goal.base is None else round(number, 2)) <= self.goal.at_most

    def cells(self) -> tuple[str, ...]:
        """One line of the table."""
        goal, result = self.goal, self.result
        base = "" if goal.base is None else f"{goal.base}: {shown(result, goal.base, spread=False)}"
        ratio = "" if goal.base is None else times(result, goal.who, goal.base)
        limit = f"≤ {goal.at_most:g}" + ("" if goal.base is None else "×")
        verdict = "yes" if self.reached else "no"
        return result.case, result.figure, goal.who, shown(result, goal.who), base, ratio, limit, verdict


def in_a_line(facts: dict[str, str]) -> str:
    """The facts as a reader wants them."""
    bare = ("device", "date")
    return ", ".join(value if name in bare else f"{name} {value}" for name, value in facts.items())


def outcomes(cases: Sequence[Case], results: Sequence[Result]) -> list[Outcome]:
    """The goals whose figures were taken."""
    found = {(result.case, result.figure): result for result in results}
    asked = ((goal, found.get((case.name, goal.figure))) for case in cases for goal in case.goals)
    return [
        Outcome(goal, result)
        for goal, result in asked
        if result is not None and {goal.who, goal.base or goal.who} <= result.values.keys()
    ]


def wide_console() -> Console:
    """Where tables go: the terminal, or a file with room for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def terminal(cases: Sequence[Case], found: Found) -> Group:
    """What went wrong; what was to reach, one line each; then one table per case."""
    table = Table(title="To reach", title_justify="left")
    for column in GOALS:
        table.add_column(column)
    for outcome in outcomes(cases, found.results):
        table.add_row(*outcome.cells(), style="green" if outcome.reached else "red")
    tables = [table] if table.rows else []
    for title, head, rows in everything(found.results):
        table = Table(title=title, title_justify="left")
        for column in head:
            table.add_column(column, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables, HOW_TO_READ, *exceptions(found), spent(found))


def spent(found: Found) -> str:
    """Where the time of the run went."""
    each = (f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items())
    return f"The run took {sum(found.seconds.values()):.0f} s: {'; '.join(each)}."


def exceptions(found: Found) -> list[str]:
    """What is not in the tables, or not to be trusted there, and why."""
    left_out = [f"Left out, for want of time: {'; '.join(found.left_out)}"] if found.left_out else []
    return [*(f"Wrong or failed: {fault}" for fault in found.faults), *left_out]


def markdown(cases: Sequence[Case], found: Found) -> str:
    """The same tables, under what they depend on."""
    lines = ["# Results", "", in_a_line(found.facts), "", HOW_TO_READ, ""]
    lines += [f"- {line}" for line in exceptions(found)] + [""] * bool(exceptions(found))
    if goals := [outcome.cells() for outcome in outcomes(cases, found.results)]:
        lines += ["## To reach", "", *markdown_table(GOALS, goals), "", "## Everything", ""]
    for title, head, rows in everything(found.results):
        lines += [f"### {title}", "", *markdown_table(head, rows), ""]
    return "\n".join([*lines, spent(found)]) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def everything(results: Sequence[Result]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Of each case the title, the head, and a line for everybody; a time is followed by its ratio to the first."""
    for title, found in itertools.groupby(results, key=lambda result: result.case):
        group = list(found)
        names = list(dict.fromkeys(name for result in group for name in result.values))

        def cell(result: Result, name: str) -> str:
            if name not in result.values:
                return ""
            return shown(result, name) + ("" if result.exact else f" {times(result, name)}")

        rows = [[name, *(cell(result, name) for result in group)] for name in names]
        yield title, ["", *(result.figure for result in group)], rows


def shown(result: Result, who: str, spread: bool = True) -> str:
    """A value with its unit, and the quartiles of times."""
    values = result.values[who]
    if result.exact:
        return f"{values[0]:.0f}" if result.figure in COUNTS else f"{values[0]:.3g}"
    middle = float(np.median(values))
    unit, factor = ("s", 1) if middle >= 1 else ("ms", 1e3)
    digits = max(0, 2 - int(np.floor(np.log10(middle * factor))))
    low, high = np.quantile(values, (0.25, 0.75)) * factor
    quartiles = f" ({low:.{digits}f}–{high:.{digits}f})" if spread and len(values) > 1 else ""
    return f"{middle * factor:.{digits}f} {unit}{quartiles}"


def times(result: Result, who: str, base: str | None = None) -> str:
    """The ratio to the base."""
    ratio = result.ratio(who, base)
    return "" if ratio is None else f"{ratio:.2f}×"
