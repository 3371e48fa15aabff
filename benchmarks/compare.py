"""What changed between two runs: ``python benchmarks/compare.py OLD.json NEW.json``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from results import Found, Result, load
from rich.console import Console
from rich.table import Table

LEAST = 0.03
"""A ratio that changed by less is taken for the same, however narrow its quartiles."""


class Change(NamedTuple):
    """One figure of one contender that is not what it was."""

    verdict: str
    """faster, slower, less, more."""
    where: str
    old: str
    new: str

    @property
    def regression(self) -> bool:
        """Whether an exact figure of this library grew."""
        return self.verdict == "more" and " gradxform" in self.where


def changes(old: Found, new: Found) -> Iterator[Change]:
    """Every exact figure that changed, and every ratio that did beyond the spread."""
    before = {(result.case, result.figure): result for result in old.results}
    for result in new.results:
        earlier = before.get((result.case, result.figure))
        if earlier is None or earlier.base != result.base:
            continue
        for name in result.values:
            if name in earlier.values:
                change = (_exact if result.exact else _time)(earlier, result, name)
                if change is not None:
                    yield change


def _exact(old: Result, new: Result, name: str) -> Change | None:
    before, now = old.values[name][0], new.values[name][0]
    if before == now:
        return None
    return Change("more" if now > before else "less", _where(new, name), f"{before:.6g}", f"{now:.6g}")


def _time(old: Result, new: Result, name: str) -> Change | None:
    if name == new.base:
        return None
    before, now = (np.quantile(result.ratios(name), (0.25, 0.5, 0.75)) for result in (old, new))
    apart = before[2] < now[0] or now[2] < before[0]
    if not apart or abs(now[1] / before[1] - 1) < LEAST:
        return None
    return Change("slower" if now[1] > before[1] else "faster", _where(new, name), _spread(before), _spread(now))


def _where(result: Result, name: str) -> str:
    return f"{result.case}: {name}, {result.figure}"


def _spread(quartiles: np.ndarray) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def missing(old: Found, new: Found) -> list[str]:
    """What the old run has and the new one has not."""
    names = [
        {(result.case, name, result.figure) for result in found.results for name in result.values}
        for found in (old, new)
    ]
    return [f"{case}: {name}, {figure}" for case, name, figure in sorted(names[0] - names[1])]


def show(old: Found, new: Found, console: Console) -> int:
    """Print the changes; 1 if an exact figure of this library grew or nothing can be said, else 0."""
    if old.facts.get("sizes") != new.facts.get("sizes"):
        console.print("The runs are of different sizes and can't be compared.")
        return 1
    names = [name for name in {**old.facts, **new.facts} if name not in ("date", "gradxform")]
    differ = [f"{n} {old.facts.get(n)} → {new.facts.get(n)}" for n in names if old.facts.get(n) != new.facts.get(n)]
    if differ:
        console.print(f"Warning: the runs are not of the same machine and versions: {'; '.join(differ)}")
    found = list(changes(old, new))
    table = Table("", "what", "old", "new", title="Changed exactly, or beyond the spread", title_justify="left")
    for change in found:
        bad = change.verdict in ("slower", "more")
        table.add_row(change.verdict, change.where, change.old, change.new, style="red" if bad else "green")
    console.print(table if found else "Nothing changed beyond the spread.")
    gone = missing(old, new)
    if gone:
        console.print(f"Not in the new run: {len(gone)} figures, such as {gone[0]}")
    regressions = sum(change.regression for change in found)
    if regressions:
        console.print(f"{regressions} exact figures of gradxform grew.")
    return int(regressions > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files."""
    parser = argparse.ArgumentParser(
        description="What became slower or faster beyond the spread between two runs of run.py --save, and every exact "
        "figure that changed. Ratios to the base of each run are compared, not times, so that a slower machine "
        "cancels. Exit status 1 if an exact figure of gradxform grew."
    )
    parser.add_argument("old", metavar="OLD.json", type=Path)
    parser.add_argument("new", metavar="NEW.json", type=Path)
    options = parser.parse_args(arguments)
    return show(load(options.old), load(options.new), Console())


if __name__ == "__main__":
    raise SystemExit(main())
