"""This library beside optax, torch and a loop in C, in one interleaved run: ``python benchmarks/run.py --help``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# JAX else takes most of a GPU's memory at once, and torch has to find room beside it
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import compare
import jax
import picture
import report
from cases import Case
from facts import facts
from measure import measure_all
from presets import PRESETS, Preset
from results import Found, load, new_file, save
from rich.console import Console
from rows import cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, print the tables, write the files; 1 if something failed, or grew since another."""
    options = parse(arguments)
    name, preset = preset_of(options)
    chosen = choose(options, preset)
    if options.list:
        print("\n".join(dict.fromkeys(case.name for case in chosen)))
        return 0
    console = report.wide_console()
    drawn = picture.drawable(options.picture, console)
    budget = preset.budget if options.budget is None else options.budget
    begun = Found(facts={**facts(outsiders=not options.ours), "sizes": f"{name}, tiny" if options.quick else name})
    record = Record(chosen, begun, console, options.markdown, options.save)
    with contextlib.nullcontext() if budget is None else watched(CUT_OFF * budget, record.cut_off):
        for part in measure_all(chosen, console, budget):
            record.add(part)
    record.show()
    found = record.found
    if drawn and any(not result.exact for result in found.results):
        picture.draw(chosen, found.results, drawn)
    grown = compare.show(load(options.against), found, console) if options.against else 0
    return int(grown > 0 or bool(found.faults))


CUT_OFF = 1.25
"""A row that still runs after so many times the budget, most likely inside the compiler, is cut off."""


@contextlib.contextmanager
def watched(seconds: float, late: Callable[[], None]) -> Iterator[None]:
    """Call something from another thread if what is inside has not ended by then."""
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclasses.dataclass
class Record:
    """What a run has found so far. It is written after every row, so that a run that is cut off leaves what it has."""

    chosen: Sequence[Case]
    found: Found
    console: Console
    tables: Path | None
    figures: Path | None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, part: Found) -> None:
        """Take what a row has brought."""
        with self.lock:
            self.found += part
            if self.tables:
                self.tables.write_text(report.markdown(self.chosen, self.found))
            if self.figures:
                save(self.figures, self.found)

    def show(self) -> None:
        """Print the tables."""
        self.console.print(report.in_a_line(self.found.facts), report.terminal(self.chosen, self.found), sep="\n")

    def cut_off(self) -> None:
        """End the program from another thread, in the middle of a row that is not coming to an end."""
        done = {*self.found.seconds, *self.found.left_out}
        self.add(Found(left_out=[case.name for case in self.chosen if case.name not in done]))
        self.show()
        self.console.show_cursor()
        sys.stdout.flush()
        os._exit(int(bool(self.found.faults)))


def preset_of(options: argparse.Namespace) -> tuple[str, Preset]:
    """What is measured here, by name: at the sizes that were asked for, else at those for this sort of machine."""
    name = options.preset or ("cpu" if jax.default_backend() == "cpu" else "gpu")
    preset = PRESETS[name].tiny() if options.quick else PRESETS[name]
    return name, dataclasses.replace(preset, leaf=options.size) if options.size else preset


def choose(options: argparse.Namespace, preset: Preset) -> list[Case]:
    """The cases with those of their figures that the pattern finds."""
    found = cases(preset)
    if options.ours:
        found = [alone(case) for case in found]
    if options.rounds:
        found = [dataclasses.replace(case, rounds=options.rounds) for case in found]
    taken = [
        dataclasses.replace(case, figures=figures)
        for case in found
        if (figures := tuple(f for f in case.figures if re.search(options.only, f"{case.name}/{f}")))
    ]
    if not taken:
        names = "\n  ".join(f"{case.name}/{figure}" for case in found for figure in case.figures)
        raise SystemExit(f"nothing matches {options.only!r} among the names WORK/FIGURE:\n  {names}")
    return taken


def alone(case: Case) -> Case:
    """The case with nobody but this library, which has nobody to agree with; in as little time as there is to it."""
    ours = tuple(contender for contender in case.contenders if contender.ours)
    once = {"sittings": 1, "repeats": 1, "compiles": 1}
    return dataclasses.replace(case, contenders=ours, outsiders=(), goals=(), checked=0, **once)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Compare gradxform with optax, torch and a loop in C. The full run takes about twenty "
        "minutes on 2 CPUs, and 10 GB of memory; on a GPU, less than seven minutes. Exit status 1 if somebody failed "
        "or came to something else than the others, or if --against finds an exact figure that grew."
    )
    parser.add_argument("--preset", choices=PRESETS, help="sizes and rows; by default those for this machine")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="",
        help="a regular expression for WORK/FIGURE; one that matches nothing lists the names",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the work, and measure nothing")
    parser.add_argument(
        "--ours", action="store_true", help="measure gradxform alone, once, and check nothing; for two_versions.py"
    )
    parser.add_argument("--size", metavar="N", type=int, help="elements of the one large leaf")
    parser.add_argument("--rounds", metavar="N", type=int, help="rounds of the compiled steps, by default 5 to 21")
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        help="begin no row for which the time may not be enough, cut off one that still runs after a quarter more, "
        "and name what is left out; by default 320 on a GPU, else no limit",
    )
    parser.add_argument("--markdown", metavar="FILE", type=new_file, help="write the tables as Markdown")
    parser.add_argument("--picture", metavar="FILE", type=new_file, help="write a bar chart of the ratios as PNG")
    parser.add_argument("--save", metavar="FILE", type=new_file, help="write all figures as JSON, for compare.py")
    parser.add_argument("--against", metavar="FILE", type=Path, help="say what changed since the run saved there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
