"""This library beside optax, torch and a loop in C, in one interleaved run: ``python benchmarks/run.py --help``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# on a GPU the peak is of what is used, and torch and children find room
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import compare
import report
from cases import QUICK, Case, Sizes, cases, with_rounds
from measure import measure_all, peak
from results import Saved, load, new_file, save


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, print the tables, write the files; 1 if an exact figure grew since another run."""
    options = parse(arguments)
    chosen = choose(options)
    if options.peak:
        name, who = options.peak
        case = next(case for case in chosen if case.name == name)
        print(json.dumps(peak(case, next(some for some in case.contenders if some.name == who))))
        return 0
    console = report.wide_console()
    results = measure_all(chosen, console, peaks=sys.argv[1:] if arguments is None else arguments)
    facts = {**report.facts(), "sizes": "tiny" if options.quick else "full"}
    console.print(report.in_a_line(facts), report.terminal(chosen, results), sep="\n")
    if options.markdown:
        options.markdown.write_text(report.markdown(facts, chosen, results))
    if options.picture:
        report.picture(chosen, results, options.picture)
    if options.save:
        save(options.save, facts, results)
    return compare.show(load(options.against), Saved(facts, results), console) if options.against else 0


def choose(options: argparse.Namespace) -> list[Case]:
    """The cases with those of their figures that the pattern finds."""
    sizes = QUICK if options.quick else Sizes()
    sizes = dataclasses.replace(sizes, leaf=options.size) if options.size else sizes
    rounds, repeats = (options.rounds or 2, 1) if options.quick else (options.rounds, None)
    found = with_rounds(cases(sizes), rounds, repeats)
    taken = [
        dataclasses.replace(case, figures=figures)
        for case in found
        if (figures := tuple(f for f in case.figures if re.search(options.only, f"{case.name}/{f}")))
    ]
    if not taken:
        names = "\n  ".join(f"{case.name}/{figure}" for case in found for figure in case.figures)
        raise SystemExit(f"nothing matches {options.only!r} among the names WORK/FIGURE:\n  {names}")
    return taken


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Compare gradxform with optax, torch and a loop in C. The full run takes about twenty "
        "minutes on 2 CPUs, and 10 GB of memory."
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="",
        help="a regular expression for WORK/FIGURE; one that matches nothing lists the names",
    )
    parser.add_argument("--size", metavar="N", type=int, help="elements of the one large leaf, by default 64 M")
    parser.add_argument("--rounds", metavar="N", type=int, help="rounds of the compiled steps, by default 5 to 21")
    parser.add_argument("--markdown", metavar="FILE", type=new_file, help="write the tables as Markdown")
    parser.add_argument("--picture", metavar="FILE", type=new_file, help="write a bar chart of the ratios as PNG")
    parser.add_argument("--save", metavar="FILE", type=new_file, help="write all figures as JSON, for compare.py")
    parser.add_argument("--against", metavar="FILE", type=Path, help="say what changed since the run saved there")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # for `measure.peak_in_fresh_process`
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
