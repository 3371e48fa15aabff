"""What a run leaves: figures by case and contender, their ratios, and the file they are kept in. No JAX here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypeAlias

import numpy as np

Values: TypeAlias = dict[str, list[float]]
"""By contender the repeats in seconds, or one exact number."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One figure of everybody in one case."""

    case: str
    figure: str
    base: str
    values: Values
    exact: bool = False

    def ratios(self, who: str, base: str | None = None) -> list[float]:
        """In each round who's value divided by the base's; nothing where the base's is 0."""
        pairs = zip(self.values[who], self.values[base or self.base], strict=True)
        return [value / other for value, other in pairs if other]

    def ratio(self, who: str, base: str | None = None) -> float | None:
        """Their median."""
        ratios = self.ratios(who, base)
        return float(np.median(ratios)) if ratios else None


@dataclasses.dataclass(frozen=True)
class Found:
    """What was measured, what could not be, and what the numbers depend on."""

    results: list[Result] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    """Who failed, or came to something else than the others, and how: a line each."""
    left_out: list[str] = dataclasses.field(default_factory=list)
    """The work for which there was no time."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """What each piece of work took, all told."""
    facts: dict[str, str] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Found) -> Found:
        """One after the other."""
        return Found(
            self.results + other.results,
            self.faults + other.faults,
            self.left_out + other.left_out,
            self.seconds | other.seconds,
            self.facts | other.facts,
        )


def new_file(name: str) -> Path:
    """An argument that names a file to write; its folder is made before anything is measured."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(path: Path, found: Found) -> None:
    """Write a run as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Found:
    """Read what `save` wrote."""
    saved = json.loads(path.read_text())
    return Found(**{**saved, "results": [Result(**result) for result in saved["results"]]})
