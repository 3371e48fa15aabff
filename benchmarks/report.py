"""What is shown: what was to reach, everything that was measured, and a picture of the ratios."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from cases import COPIES, EQUATIONS, Case, Goal
from libraries import has_torch
from results import Result
from rich.console import Console, Group
from rich.table import Table

HOW_TO_READ = (
    "Times are of one step (one call of several timed together), medians of interleaved rounds with the quartiles in "
    "brackets. A ratio of times is the median over the rounds of the time divided by the base's in the same round: "
    "below 1 is faster. A build is trace, lower and compile, from cold caches. The other figures are exact: the same "
    "on every run with the same versions. The goals are for the full sizes."
)
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


def facts() -> dict[str, str]:
    """What the numbers depend on, and when they were taken."""
    names = ("gradxform", "jax", "jaxlib", "optax", "torch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if name != "torch" or has_torch()}
    cpu = jax.default_backend() == "cpu"
    device = f"{os.cpu_count()} CPUs, {_processor()}" if cpu else jax.devices()[0].device_kind
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return {**versions, "Python": platform.python_version(), "device": device, "date": date}


def _processor() -> str:
    """The model of the CPU where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def in_a_line(facts: dict[str, str]) -> str:
    """The facts as a reader wants them."""
    bare = ("device", "date")
    return ", ".join(value if name in bare else f"{name} {value}" for name, value in facts.items())


def outcomes(cases: Sequence[Case], results: Sequence[Result]) -> list[Outcome]:
    """The goals whose figures were taken."""
    found = {(result.case, result.figure): result for result in results}
    asked = ((goal, found.get((case.name, goal.figure))) for case in cases for goal in case.goals)
    return [Outcome(goal, result) for goal, result in asked if result is not None]


def wide_console() -> Console:
    """Where tables go: the terminal, or a file with room for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def terminal(cases: Sequence[Case], results: Sequence[Result]) -> Group:
    """What was to reach, one line each; then one table per case."""
    table = Table(title="To reach", title_justify="left")
    for column in GOALS:
        table.add_column(column)
    for outcome in outcomes(cases, results):
        table.add_row(*outcome.cells(), style="green" if outcome.reached else "red")
    tables = [table] if table.rows else []
    for title, head, rows in everything(results):
        table = Table(title=title, title_justify="left")
        for column in head:
            table.add_column(column, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables, HOW_TO_READ)


def markdown(facts: dict[str, str], cases: Sequence[Case], results: Sequence[Result]) -> str:
    """The same tables, under what they depend on."""
    lines = ["# Results", "", in_a_line(facts), "", HOW_TO_READ, ""]
    if goals := [outcome.cells() for outcome in outcomes(cases, results)]:
        lines += ["## To reach", "", *_markdown_table(GOALS, goals), "", "## Everything", ""]
    for title, head, rows in everything(results):
        lines += [f"### {title}", "", *_markdown_table(head, rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
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
        return f"{values[0]:.0f}" if result.figure in (COPIES, EQUATIONS) else f"{values[0]:.3g}"
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


def picture(cases: Sequence[Case], results: Sequence[Result], path: Path) -> None:
    """Bars of the time ratios to the first of each case, on a log axis; a notch where one is to be."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    timed = [result for result in results if not result.exact]
    goals = {
        (case.name, goal.figure, goal.who): goal.at_most
        for case in cases
        for goal in case.goals
        if goal.base == case.contenders[0].name
    }
    groups = [(title, list(group)) for title, group in itertools.groupby(timed, key=lambda result: result.case)]
    columns = min(3, len(groups))
    # each group goes under the column that is the shortest so far
    stacks: list[list[tuple[str, list[tuple[Result, str]]]]] = [[] for _ in range(columns)]
    for title, group in groups:
        bars = [(result, name) for result in group for name in result.values if name != result.base]
        min(stacks, key=lambda stack: sum(len(some) + 2 for _, some in stack)).append((title, bars))
    height = max(sum(len(bars) + 2 for _, bars in stack) for stack in stacks)
    figure = plt.figure(figsize=(5.2 * columns, 1 + 0.24 * height), layout="constrained")
    low = min(0.5, *(result.ratio(name) or 1 for _, group in groups for result in group for name in result.values))
    for part, stack in zip(np.atleast_1d(figure.subfigures(1, columns)), stacks, strict=True):
        heights = [len(bars) + 1 for _, bars in stack]
        axes = part.subplots(len(stack), squeeze=False, gridspec_kw={"height_ratios": heights})
        for ax, (title, bars) in zip(axes.flat, stack, strict=True):
            ax.set_title(f"{title}\n(1: {bars[0][0].base})" if bars else title, loc="left", fontsize=8)
            _bars(ax, bars, goals, low)
    figure.supxlabel("time divided by that of the first, left of the line is faster; | is where to be", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(ax, bars: list[tuple[Result, str]], goals: dict[tuple[str, str, str], float], low: float) -> None:
    several = len({result.figure for result, _ in bars}) > 1
    labels = [f"{name}: {result.figure}" if several else name for result, name in bars]
    ax.spines[["top", "right"]].set_visible(False)
    ax.axvline(1, color="black", linewidth=1)
    ax.set(xscale="log", xlim=(low / 2, 20))
    ax.set_yticks(range(len(bars)), labels, fontsize=7)
    ax.invert_yaxis()
    ticks = [x for x in (0.01, 0.1, 0.3, 1, 3, 10) if x > low / 2]
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7)
    ax.minorticks_off()
    for y, (result, name) in enumerate(bars):
        ratio = result.ratio(name) or np.nan
        ax.barh(y, ratio - 1, left=1, color="#0b6e99" if name.startswith("gradxform") else "#e9a675")
        goal = goals.get((result.case, result.figure, name))
        if goal is not None:
            ax.plot([goal, goal], [y - 0.45, y + 0.45], color="#c1121f", linewidth=1.5)
        side, shift = ("left", 4) if ratio > 1 else ("right", -4)
        ax.annotate(
            f"{ratio:.2f}",
            (min(ratio, 12), y),
            (shift, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=6,
        )
