"""AdamW of gradxform beside optax's and torch's, in one interleaved run: ``python benchmarks/run.py --help``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import report
from libraries import OPTIMIZERS
from measure import FIGURES, count_ticks, measure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workloads import FULL, QUICK


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, print the tables, write the files."""
    options = parse(arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    cases = [
        (workload, optimizer, clips, figures)
        for workload in (QUICK if options.quick else FULL)
        for optimizer, clips in OPTIMIZERS.items()
        if (figures := [f for f in FIGURES if re.search(options.only, f"{workload.name}/{optimizer}/{f}")])
    ]
    if not cases:
        raise SystemExit(f"nothing matches {options.only!r}; a name is WORKLOAD/OPTIMIZER/FIGURE, see --help")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(count_ticks(workload, figures) for workload, _, _, figures in cases))
        for workload, optimizer, clips, figures in cases:

            def tick(what: str, where: str = f"{workload.name}, {optimizer}") -> None:
                progress.update(task, advance=1, description=f"{where}: {what}")

            rows += measure(workload, optimizer, clips, figures, tick)
    console.print(report.facts(), report.terminal(rows), sep="\n")
    if options.markdown:
        options.markdown.write_text(report.markdown(rows))
    if options.picture:
        report.picture(rows, options.picture)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    names = "; ".join(workload.name for workload in FULL)
    parser = argparse.ArgumentParser(
        description="Compare AdamW of gradxform with optax's and torch's. The full run takes about a quarter of an "
        "hour on 2 CPUs, and 6 GB of memory."
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="",
        help="a regular expression for WORKLOAD/OPTIMIZER/FIGURE. "
        f"Workloads: {names}. Optimizers: {'; '.join(OPTIMIZERS)}. Figures: {', '.join(FIGURES)}.",
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables as Markdown")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="write a bar chart of the ratios as PNG")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
