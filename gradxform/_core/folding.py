"""Many paths in few words: ``blocks/{0…11}/kernel``."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence

_NUMBER = re.compile(r"(\d+)")


def folded(paths: Sequence[str], features: Sequence[Hashable] | None = None) -> list[tuple[str, list[int]]]:
    """Rows of paths that differ only in their numbers: the text of a row, and the places of its paths.

    Args:
      paths: All different.
      features: What else must be equal in a row: one feature per path.
    """
    alike: dict[Hashable, list[int]] = {}
    for place, path in enumerate(paths):
        feature = None if features is None else features[place]
        alike.setdefault((_NUMBER.sub("#", path), feature), []).append(place)
    rows: list[tuple[str, list[int]]] = []
    for places in alike.values():
        columns = zip(*(_NUMBER.split(paths[place]) for place in places), strict=True)
        parts = [sorted(set(column), key=len) for column in columns]
        whole = math.prod(map(len, parts)) == len(places)
        rows += [("".join(map(_range, parts)), places)] if whole else [(paths[place], [place]) for place in places]
    return rows


def listed(paths: Sequence[str]) -> str:
    """Paths for a message: folded, and cut after a few."""
    rows = [text or "''" for text, _ in folded(paths)]
    shown = [row for i, row in enumerate(rows[:6]) if len("".join(rows[:i])) < 120]
    return ", ".join(shown) if len(shown) == len(rows) else f"{', '.join(shown)}, … ({len(paths)} paths)"


def _range(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(map(int, parts))
    consecutive = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{{{numbers[0]}…{numbers[-1]}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"
