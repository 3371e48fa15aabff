"""Patterns for the paths of leaves, and tables of groups: the leaves that each of several patterns matches."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from gradxform._core import trees
from gradxform._core.arguments import is_a
from gradxform._core.folding import listed


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Leaves whose whole ``a/b/0/c`` path a regular expression matches."""

    expression: re.Pattern[str]

    @property
    def label(self) -> str:
        """What a group of these leaves is called."""
        return self.expression.pattern

    def takes(self, path: str, leaf: Any) -> bool:
        return self.expression.fullmatch(path) is not None

    def __call__(self, params: Any, leaves: list[Any], structure: Any) -> list[bool]:
        paths = trees.paths(structure)
        chosen = [self.takes(path, None) for path in paths]
        if paths and not any(chosen):
            raise ValueError(self.unmatched("mask", paths))
        return chosen

    def unmatched(self, who: str, paths: tuple[str, ...]) -> str:
        """The message for a pattern that matches no path."""
        meant = _meant(self.expression, paths)
        remedy = f": did you mean {meant}?" if meant else ""
        return f"{who} {self!r} matches none of the paths {listed(paths)}; it must match a whole path{remedy}"

    def __repr__(self) -> str:
        plain = self.expression == re.compile(self.expression.pattern)
        return repr(self.expression.pattern if plain else self.expression)


def _meant(expression: re.Pattern[str], paths: tuple[str, ...]) -> str | None:
    """What a pattern that matches nothing may have meant, written as Python; a pattern that matches some path."""
    for text, written in _candidates(expression.pattern, paths):
        try:
            candidate = re.compile(text, expression.flags)
        except re.error:
            continue
        if any(map(candidate.fullmatch, paths)):
            return written
    return None


def _candidates(text: str, paths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Patterns that a user may have meant by `text`, the likely ones first, each with the way to write it."""
    names = list(dict.fromkeys(name for path in paths for name in path.split("/")))
    near = [difflib.get_close_matches(text, texts, n=1) for texts in (paths, names)]
    parts = "/".join(re.findall(r"\w+", text)), text.partition("/")[2]
    likely = [text, parts[0], *map(re.escape, near[0]), parts[1], *map(re.escape, near[1])]
    for pattern in filter(None, likely):
        whole = f"(?:{pattern})" if "|" in pattern else pattern
        for wider in (pattern, f"{whole}/.*", f".*/{whole}", f".*/{whole}/.*"):
            yield wider, repr(wider)
        if set("*?") & set(pattern):
            yield glob(pattern).pattern, f"gx.glob({pattern!r})"
        yield f"(?i:{pattern})", repr(f"(?i:{pattern})")
    if text:
        yield f".*(?:{text}).*", repr(f".*{text}.*" if "|" not in text else f".*(?:{text}).*")


def compiled(name: str, pattern: str | re.Pattern[str]) -> Pattern:
    """A pattern from what a user wrote; `name` is what messages call it."""
    try:
        return Pattern(re.compile(pattern))
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no regular expression: {error}; for globs use gx.glob") from None


def glob(pattern: str) -> re.Pattern[str]:
    """A path pattern with wildcards: ``*`` and ``?`` within one name, ``**`` across ``/``, ``**/`` any number of names.

    For every argument that takes a regular expression over paths.

    Args:
      pattern: Such as ``encoder/*/kernel``.

    Raises:
      TypeError: if ``pattern`` is no string.

    Example:
      >>> import gradxform as gx
      >>> gx.glob("encoder/*/kernel").fullmatch("encoder/layer_0/kernel") is not None
      True
    """
    if not is_a(pattern, str):
        raise TypeError(f"pattern must be a string, got {pattern!r}")
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"((?:^|(?<=/))\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))


KeyT = TypeVar("KeyT", bound="Key", covariant=True)


class Key(Protocol):
    """What tells which leaves a group has: a path pattern, or a predicate."""

    @property
    def label(self) -> str: ...

    def takes(self, path: str, leaf: Any) -> bool: ...

    def unmatched(self, who: str, paths: tuple[str, ...]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Table(Generic[KeyT]):
    """Groups of leaves, one for each key: the leaves that it takes.

    If there is a default, the leaves that no key takes are one more group, the last.
    """

    who: str
    """The function that the groups were given to, for messages."""
    keys: tuple[KeyT, ...]
    has_default: bool
    default: str = "default"
    """The name of the default group, and of the argument that says what it gets."""

    def __call__(self, structure: Any, leaves: Sequence[Any]) -> tuple[int, ...]:
        """The group of each leaf; raises if a key takes no leaf, or a leaf has no group or two."""
        if all(isinstance(key, Pattern) for key in self.keys):
            return _groups_of_paths(self, structure)
        return self.grouped(trees.paths(structure), leaves)

    def matches(self, path: str, leaf: Any) -> list[int]:
        """The keys that take a leaf, as indices."""
        return [i for i, key in enumerate(self.keys) if key.takes(path, leaf)]

    def grouped(self, paths: tuple[str, ...], leaves: Sequence[Any]) -> tuple[int, ...]:
        """The group of each leaf."""
        groups: list[int] = []
        for path, leaf in zip(paths, leaves, strict=True):
            matches = self.matches(path, leaf)
            if len(matches) > 1:
                both = " and ".join(repr(self.keys[i]) for i in matches)
                raise ValueError(f"{self.who}: {both} both match {path!r}; make the patterns exclude one another")
            if not matches and not self.has_default:
                shown = [*map(repr, self.keys[:6]), *(["…"] if len(self.keys) > 6 else [])]
                raise ValueError(
                    f"{self.who}: no pattern matches {path!r}, of {', '.join(shown)}; add one or give {self.default}="
                )
            groups.append(matches[0] if matches else len(self.keys))
        for i, key in enumerate(self.keys):
            if paths and i not in groups:
                raise ValueError(key.unmatched(f"{self.who}: pattern", paths))
        return tuple(groups)

    def check(self, groups: frozenset[int], leaves: list[Any], structure: Any) -> None:
        """Raise if a leaf of these groups is not what the table says of it; this table says nothing but paths."""

    def order(self) -> list[int]:
        """The order in which groups are named: the default first, so that a stage it shares has the default's name."""
        groups = list(range(len(self.keys)))
        return [len(groups), *groups] if self.has_default else groups

    def names(self) -> list[str]:
        return [key.label for key in self.keys]

    def label(self, group: int) -> str:
        """What the group is called."""
        return (*self.names(), self.default)[group]


@functools.lru_cache(maxsize=256)
def _groups_of_paths(table: Table[Pattern], structure: Any) -> tuple[int, ...]:
    paths = trees.paths(structure)
    return table.grouped(paths, (None,) * len(paths))


def patterns_of(who: str, patterns: Iterable[Any]) -> tuple[Pattern, ...]:
    """What users wrote as path patterns."""
    return tuple(pattern_of(who, pattern) for pattern in patterns)


def pattern_of(who: str, pattern: Any) -> Pattern:
    """What a user wrote as a path pattern."""
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(f"{who}: a pattern must be a string or a compiled regular expression, got {pattern!r}")
    return compiled(f"{who}: pattern", cast("str | re.Pattern[str]", pattern))
