"""A picture of the ratios, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cases import Case
from results import Result
from rich.console import Console


def drawable(path: Path | None, console: Console) -> Path | None:
    """The file that a picture is asked for in; None, with a word about it, where matplotlib is not installed."""
    if path is None or importlib.util.find_spec("matplotlib"):
        return path
    console.print(f"There will be no {path}: it is drawn with matplotlib, which is not installed.")
    return None


def draw(cases: Sequence[Case], results: Sequence[Result], path: Path) -> None:
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
