"""Two versions of this library, by turns on one machine: ``python benchmarks/two_versions.py --help``. No JAX here."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from report import markdown_table, shown, wide_console
from results import Found, Result, load, new_file
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
HEAD = ("work", "who", "figure", "old", "new", "new / old", "")
HOW_TO_READ = (
    "Times: medians over all turns with the quartiles in brackets; the ratio is the median, with quartiles, of new to "
    "old of one turn. A time is slower or faster where the quartiles of the two don't overlap, each time it was looked "
    "at: what seems to differ is measured a second time, since chance parts a few of so many quartiles. Exact figures "
    "that are the same are not listed."
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One figure of one contender in both versions."""

    case: str
    who: str
    figure: str
    exact: bool
    old: list[float]
    new: list[float]
    verdict: str
    """slower, faster; more, less of an exact figure; or nothing."""

    @classmethod
    def of(cls, old: Result, new: Result, who: str) -> Line:
        """The figure as two versions have it."""
        values = (old.values[who], new.values[who])
        before, now = (np.quantile(numbers, (0.25, 0.75)) for numbers in values)
        words = ("more", "less") if new.exact else ("slower", "faster")
        verdict = words[0] if now[0] > before[1] else words[1] if now[1] < before[0] else ""
        return cls(new.case, who, new.figure, new.exact, *values, verdict)

    def and_again(self, other: Line) -> Line:
        """The figure measured twice: it differs if it does both times."""
        verdict = self.verdict if self.verdict == other.verdict else ""
        return dataclasses.replace(self, old=self.old + other.old, new=self.new + other.new, verdict=verdict)

    @property
    def worse(self) -> bool:
        """Whether the new version is slower here, or an exact figure grew."""
        return self.verdict in ("slower", "more")

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        old, new = (
            shown(Result(self.case, self.figure, self.who, {self.who: values}, self.exact), self.who)
            for values in (self.old, self.new)
        )
        ratios = [new / old for new, old in zip(self.new, self.old, strict=False) if old]
        ratio = ""
        if ratios:
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            ratio = f"{middle:.3f}×" + ("" if self.exact else f" ({low:.3f}–{high:.3f})")
        return self.case, self.who, self.figure, old, new, ratio, self.verdict or "overlap"


@dataclasses.dataclass
class Comparison:
    """What was found so far."""

    lines: list[Line] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def listed(self) -> list[Line]:
        """All times, and the exact figures that changed."""
        return [line for line in self.lines if not line.exact or line.verdict]

    @property
    def notes(self) -> list[str]:
        """What is not in the table."""
        same = sum(line.exact and not line.verdict for line in self.lines)
        worse = sum(line.worse for line in self.lines)
        return [
            f"Of {len(self.lines)} figures {worse} are worse in the new version; {same} exact ones are the same.",
            *(f"Failed: {fault}" for fault in self.faults),
            *([f"Left out, for want of time: {'; '.join(self.left_out)}"] if self.left_out else []),
        ]

    def markdown(self) -> str:
        """All of it."""
        title = [
            "# Two versions",
            "",
            *(f"- {name}: gradxform {version}" for name, version in self.versions.items()),
            "",
        ]
        table = markdown_table(HEAD, [line.cells() for line in self.listed])
        return "\n".join([*title, HOW_TO_READ, "", *table, "", *self.notes]) + "\n"

    def show(self, console: Console) -> None:
        """Print it."""
        names = ", ".join(f"{name} gradxform {version}" for name, version in self.versions.items())
        table = Table(*HEAD, title=names, title_justify="left")
        for line in self.listed:
            style = "red" if line.worse else "green" if line.verdict else None
            table.add_row(*line.cells(), style=style)
        console.print(table, HOW_TO_READ, *self.notes, sep="\n")


@dataclasses.dataclass(frozen=True)
class Versions:
    """Two versions, and how they are measured."""

    places: dict[str, Path]
    """The folders that hold ``gradxform/``, of ``old`` and ``new``."""
    turns: int
    arguments: tuple[str, ...]
    """Of `run.py`."""

    def compare(self, work: str, tick: Callable[[str], None]) -> tuple[list[Line], dict[str, Found]]:
        """The figures of a piece of work, once more if a time seems to differ."""
        found = self.measure(work, tick)
        lines = lines_of(**found)
        if any(line.verdict and not line.exact for line in lines):
            again = {(line.who, line.figure): line for line in lines_of(**self.measure(work, tick))}
            lines = [line.and_again(again.get((line.who, line.figure), line)) for line in lines]
        return lines, found

    def measure(self, work: str, tick: Callable[[str], None]) -> dict[str, Found]:
        """A piece of work in each version, turn by turn, every time in a fresh process."""
        parts: dict[str, list[Found]] = {version: [] for version in self.places}
        for turn in range(self.turns):
            for version in sorted(self.places, reverse=turn % 2 == 0):
                tick(f"{work}: {version}")
                parts[version].append(self.once(version, work))
        return {version: together(found) for version, found in parts.items()}

    def once(self, version: str, work: str) -> Found:
        """One run of a piece of work; nothing but faults if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.json"
            done = self.run(version, "--only", f"^{re.escape(work)}/", "--save", str(file))
            if file.exists():
                return load(file)
        return Found(faults=[f"{work}: {(done.stderr.strip() or 'no output').splitlines()[-1][:200]}"])

    def run(self, version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`run.py` of this folder with the library of that version."""
        path = os.pathsep.join([str(self.places[version]), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(HERE / "run.py"), "--ours", *self.arguments, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def together(parts: Sequence[Found]) -> Found:
    """Several runs of the same work as one: the repeats of all, and of exact figures the largest."""
    results: dict[tuple[str, str], Result] = {}
    for result in itertools.chain.from_iterable(part.results for part in parts):
        earlier = results.setdefault((result.case, result.figure), dataclasses.replace(result, values={}))
        for who, numbers in result.values.items():
            every = earlier.values.get(who, []) + numbers
            earlier.values[who] = [max(every)] if result.exact else every
    faults = dict.fromkeys(itertools.chain.from_iterable(part.faults for part in parts))
    return Found(list(results.values()), list(faults), facts=parts[-1].facts)


def lines_of(old: Found, new: Found) -> list[Line]:
    """Every figure that both have."""
    before = {(result.case, result.figure): result for result in old.results}
    return [
        Line.of(earlier, result, who)
        for result in new.results
        if (earlier := before.get((result.case, result.figure)))
        for who in result.values
        if who in earlier.values
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all work in both versions and print the table; 1 if something of the new one is worse, or fails."""
    options = parse(arguments)
    versions = Versions({"old": options.old, "new": options.new}, options.rounds, child_arguments(options))
    for place in versions.places.values():
        if not (place / "gradxform" / "__init__.py").exists():
            raise SystemExit(f"{place} holds no package gradxform: name a checkout, or the folder around the package")
    listed = versions.run("new", "--only", options.only, "--list")
    if listed.returncode:
        raise SystemExit(listed.stderr.strip())
    every = listed.stdout.splitlines()
    console, comparison = wide_console(), Comparison()
    end = time.monotonic() + options.budget
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for work in progress.track(every):
            if time.monotonic() > end:
                comparison.left_out.append(work)
                continue
            lines, found = versions.compare(work, lambda what: progress.update(progress.task_ids[0], description=what))
            comparison.lines += lines
            comparison.faults += [f"{version}: {fault}" for version, part in found.items() for fault in part.faults]
            comparison.versions |= {
                version: part.facts["gradxform"] for version, part in found.items() if "gradxform" in part.facts
            }
            if options.markdown:
                options.markdown.write_text(comparison.markdown())
            if options.save:
                saved = json.dumps(dataclasses.asdict(comparison), indent=1, ensure_ascii=False)
                options.save.write_text(saved + "\n")
    comparison.show(console)
    failed = any(fault.startswith("new: ") for fault in comparison.faults)
    return int(failed or any(line.worse for line in comparison.lines))


def child_arguments(options: argparse.Namespace) -> tuple[str, ...]:
    """What `run.py` is told besides."""
    given = {"--preset": options.preset, "--size": options.size, "--rounds": options.samples}
    told = itertools.chain.from_iterable((name, str(value)) for name, value in given.items() if value)
    return (*told, *(["--quick"] if options.quick else []))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Measure every row of the benchmark with two versions of gradxform by turns, on one machine. "
        "Exit status 1 if the quartiles of a time of the new one lie wholly above those of the old one, an exact "
        "figure grew, or the new one fails. About 25 minutes on 2 CPUs."
    )
    parser.add_argument("old", metavar="OLD", type=Path, help="the folder that holds the old gradxform/")
    parser.add_argument(
        "new", metavar="NEW", type=Path, nargs="?", default=HERE.parent, help="the new one; by default this checkout"
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=int,
        default=3,
        help="turns of each version, every one a new process (3; fewer only show that it runs)",
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=5, help="rounds of the compiled steps in each turn (5)"
    )
    parser.add_argument("--preset", metavar="NAME", help="see run.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", metavar="PATTERN", default="", help="see run.py")
    parser.add_argument("--size", metavar="N", type=int, help="see run.py")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, default=1500, help="begin no row after that, and name it (1500)"
    )
    parser.add_argument("--markdown", metavar="FILE", type=new_file, help="write the table, after every row")
    parser.add_argument("--save", metavar="FILE", type=new_file, help="write all figures as JSON, after every row")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
