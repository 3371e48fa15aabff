"""What a run leaves: figures by case and contender, their ratios, and the file they are kept in. No JAX here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
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
class Saved:
    """A run, and what its numbers depend on."""

    facts: dict[str, str]
    results: list[Result]


def new_file(name: str) -> Path:
    """An argument that names a file to write; its folder is made before anything is measured."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(path: Path, facts: dict[str, str], results: Sequence[Result]) -> None:
    """Write a run as JSON."""
    saved = {"facts": facts, "results": [dataclasses.asdict(result) for result in results]}
    path.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Saved:
    """Read what `save` wrote."""
    saved = json.loads(path.read_text())
    return Saved(saved["facts"], [Result(**result) for result in saved["results"]])
