"""How the times grow with the number of leaves and with their size: ``python benchmarks/scaling.py --picture FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cases import BUILD, STEP, Case
from libraries import OPTAX_ADAMW, OPTAX_CLIPPED, OUR_ADAMW, OUR_CLIPPED, Contender
from measure import measure_all, results_of
from picture import drawable
from results import Result, new_file
from rich.console import Console
from workloads import Shapes, small_leaves

COUNTS, SIZES = (10, 30, 100, 300, 1000, 3000), tuple(1 << power for power in range(10, 27, 2))
QUICK_COUNTS, QUICK_SIZES = (1, 2), (1 << 10, 1 << 12)
ADAMW, CLIPPED = (OPTAX_ADAMW, OUR_ADAMW), (OPTAX_CLIPPED, OUR_CLIPPED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every point, print the times, draw the curves."""
    parser = argparse.ArgumentParser(
        description="Curves of gradxform and optax: building and running clip + AdamW against the number of small "
        "leaves, and the compiled step of AdamW against the size of one leaf. About ten minutes on 2 CPUs."
    )
    parser.add_argument("--quick", action="store_true", help="four tiny points: does it run?")
    parser.add_argument(
        "--leaves", metavar="N", type=int, default=3000, help="the most leaves; 1000 take half the time"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=9, help="rounds of the compiled steps")
    parser.add_argument("--picture", metavar="FILE", type=new_file, help="write the curves as PNG")
    options = parser.parse_args(arguments)
    counts, sizes = (QUICK_COUNTS, QUICK_SIZES) if options.quick else (COUNTS, SIZES)
    counts = tuple(count for count in counts if count <= options.leaves)

    def point(name: str, shapes: Shapes, contenders: tuple[Contender, ...], *figures: str) -> Case:
        repeats = 1 if options.quick or len(shapes) > 300 else 3
        return Case(
            name, shapes, contenders, (), figures=figures, rounds=options.rounds, repeats=repeats, compiles=repeats
        )

    leaves = {n: point(f"{n} leaves", small_leaves(n), CLIPPED, STEP, BUILD) for n in counts}
    elements = {n: point(f"one leaf of {n}", {"leaf": (n,)}, ADAMW, STEP) for n in sizes}
    every = [*leaves.values(), *elements.values()]
    console = Console()
    drawn = drawable(options.picture, console)
    found = {(result.case, result.figure): result for result in results_of(measure_all(every, console))}

    def curve(points: dict[int, Case], figure: str) -> dict[int, Result]:
        return {n: found[case.name, figure] for n, case in points.items()}

    panels = {
        "build: trace, lower, compile\nclip + AdamW, small leaves": ("leaves", curve(leaves, BUILD)),
        "compiled step\nclip + AdamW, small leaves": ("leaves", curve(leaves, STEP)),
        "compiled step\nAdamW, one leaf": ("elements", curve(elements, STEP)),
    }
    for title, (axis, results) in panels.items():
        console.print(title.replace("\n", ", "))
        for n, result in results.items():
            seconds = ", ".join(f"{name} {np.median(values):.3g} s" for name, values in result.values.items())
            console.print(f"  {n} {axis}: {seconds}, {result.ratio('gradxform') or 0:.2f}×")
    if drawn:
        draw(panels, drawn)


def draw(panels: dict[str, tuple[str, dict[int, Result]]], path: Path) -> None:
    """A panel each, with log axes: the medians, and the quartiles as a band."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained")

    def quartile(q: float, rows: list[list[float]]) -> list[float]:
        return [float(np.quantile(row, q)) for row in rows]

    for ax, (title, (axis, results)) in zip(axes, panels.items(), strict=True):
        for name, colour in {"optax": "#e07b39", "gradxform": "#0b6e99"}.items():
            rows = [result.values[name] for result in results.values()]
            ax.plot(list(results), quartile(0.5, rows), "o-", markersize=3, color=colour, label=name)
            ax.fill_between(list(results), quartile(0.25, rows), quartile(0.75, rows), color=colour, alpha=0.2)
        ax.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        ax.set_title(title, loc="left", fontsize=9)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
