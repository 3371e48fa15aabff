"""What is shown: tables for the terminal and for Markdown, and a picture of the ratios."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from libraries import GRADXFORM, OPTAX, torch_variants
from measure import Row
from rich.console import Group
from rich.table import Table

HOW_TO_READ = (
    "Times are medians of interleaved rounds, with the quartiles in brackets; × is the median over the rounds of the "
    "time divided by optax's in the same round, so below 1 is faster than optax."
)
COLUMNS = ("", "optax", "gradxform", "× optax", "to reach")


def facts() -> str:
    """What the numbers depend on, in one line."""
    names = ("jax", "jaxlib", "optax", "torch", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if name != "torch" or torch_variants()]
    python = f"Python {platform.python_version()}"
    device = f"{os.cpu_count()} CPUs" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return ", ".join([*versions, python, device, f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"])


def terminal(rows: Sequence[Row]) -> Group:
    """One table per workload and optimizer."""
    tables = []
    for title, group in grouped(rows):
        table = Table(title=title, caption=_torch(group), title_justify="left", caption_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column else "left")
        for row in group:
            table.add_row(*cells(row), style={True: "green", False: "red", None: None}[reached(row)])
        tables.append(table)
    return Group(*tables, HOW_TO_READ)


def markdown(rows: Sequence[Row]) -> str:
    """The same tables, under what they depend on."""
    lines = ["# Results", "", facts(), "", HOW_TO_READ]
    for title, group in grouped(rows):
        rule = ("---", *["---:"] * (len(COLUMNS) - 1))
        table = (f"| {' | '.join(line)} |" for line in (COLUMNS, rule, *map(cells, group)))
        lines += ["", f"## {title}", "", *table, "", _torch(group)]
    return "\n".join(lines).rstrip() + "\n"


def cells(row: Row) -> list[str]:
    """One line of a table."""
    to_reach = "" if row.reach is None else f"≤ {row.reach:.2f} {'yes' if reached(row) else 'no'}"
    return [row.figure, _value(row, OPTAX.name), _value(row, GRADXFORM.name), _times(row, GRADXFORM.name), to_reach]


def _torch(rows: Sequence[Row]) -> str:
    """torch's times for the compiled step, in a line."""
    parts = [
        f"{name} {_value(row, name)}, {_times(row, name)}"
        for row in rows
        for name in row.values
        if name not in (OPTAX.name, GRADXFORM.name)
    ]
    return f"The step by {'; '.join(parts)}." if parts else ""


def reached(row: Row) -> bool | None:
    """Whether the ratio, to the two digits shown, is what the row wants; None if it wants nothing."""
    ratio = row.ratio(GRADXFORM.name)
    return None if row.reach is None or ratio is None else round(ratio, 2) <= round(row.reach, 2)


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one workload and optimizer, under their title."""
    groups = itertools.groupby(rows, key=lambda row: f"{row.workload}: {row.optimizer}")
    return [(title, list(group)) for title, group in groups]


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars of the time ratios to optax on a log axis, for gradxform, and for torch where it takes part."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if not row.exact and row.figure not in ("trace", "lower")]
    names = [name for name in dict.fromkeys(name for row in timed for name in row.values) if name != OPTAX.name]
    colours = dict(zip(names, ("#0b6e99", "#e07b39", "#e9a675", "#f2cfb3"), strict=False))
    groups = grouped(timed)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 0.8 + 2.1 * lines), sharex=True, squeeze=False, layout="constrained"
    )
    for ax, (title, group) in itertools.zip_longest(axes.flat, groups, fillvalue=("", [])):
        ax.set_title(title, loc="left", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(xscale="log")
        ax.margins(x=0.15)
        bars = [(row, name, row.ratio(name) or np.nan) for row in group for name in names if name in row.values]
        labels = [row.figure if name == GRADXFORM.name else name for row, name, _ in bars]
        ax.set_yticks(range(len(bars)), labels, fontsize=8)
        ax.invert_yaxis()
        for y, (_, name, ratio) in enumerate(bars):
            ax.barh(y, ratio - 1, left=1, color=colours[name])
            side, shift = ("left", 4) if ratio > 1 else ("right", -4)
            ax.annotate(
                f"{ratio:.2f}", (ratio, y), (shift, 0), textcoords="offset points", ha=side, va="center", fontsize=7
            )
    low, high = axes[0, 0].get_xlim()
    ticks = [x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= x <= high]
    axes[0, 0].set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes[0, 0].minorticks_off()
    figure.supxlabel("time divided by optax's: left of the line is faster", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _value(row: Row, library: str) -> str:
    values = row.values[library]
    if row.exact:
        return f"{values[0]:.3f}" if isinstance(values[0], float) else str(values[0])
    middle = float(np.median(values))
    unit, factor = ("s", 1) if middle >= 1 else ("ms", 1e3)
    digits = max(0, 2 - int(np.floor(np.log10(middle * factor))))
    low, high = np.quantile(values, (0.25, 0.75)) * factor
    spread = f" ({low:.{digits}f}–{high:.{digits}f})" if len(values) > 1 else ""
    return f"{middle * factor:.{digits}f} {unit}{spread}"


def _times(row: Row, library: str) -> str:
    ratio = row.ratio(library)
    return "" if ratio is None else f"{ratio:.2f}×"
