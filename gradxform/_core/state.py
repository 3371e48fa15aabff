"""The state of a lifted transformation: a NamedTuple of a counter, the hyperparameters that change, and moments."""

from __future__ import annotations

import collections
import functools
import threading
from typing import Any, ClassVar

from gradxform._core.explain import wrong_state
from gradxform._core.shown import READ_ONLY, Shown, shown_hyperparams


def state_type(slots: tuple[str, ...], shown: tuple[Shown, ...]) -> Any:
    """The class ``State(count, values, *slots)``, without `values` where no hyperparameter changes."""
    with _ONE_AT_A_TIME:  # else two threads might make two classes, each of which refuses the other's states
        return _state_type(slots, shown)


_ONE_AT_A_TIME = threading.Lock()
_RESERVED = ("count", "values", "hyperparams")


@functools.cache
def _state_type(slots: tuple[str, ...], shown: tuple[Shown, ...]) -> Any:
    for name in slots:
        if name in _RESERVED:
            raise ValueError(
                f"a rule keeps an array under the name {name!r}, which every state uses itself; give it another name"
            )
    own = ("count", "values") if shown else ("count",)
    fields = collections.namedtuple("State", (*own, *slots))  # pyright: ignore[reportUntypedNamedTuple] (its fields are known only now)

    class State(fields):
        """`count`: the updates done; `values`: the hyperparameters that change; a tree like the parameters per moment.

        `values` holds live values under their names, from where steps read them. It also holds what follows a schedule,
        under names such as ``scheduled/learning_rate``, for `hyperparams` to show.
        """

        __slots__ = ()
        _shown: ClassVar[tuple[Shown, ...]] = shown
        hyperparams = shown_hyperparams

        def _replace(self, **changes: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (final to pyright, not to Python)
            if "hyperparams" in changes:
                raise TypeError(READ_ONLY)
            return super()._replace(**changes)

        def __reduce__(self) -> Any:
            return _restore, (slots, shown, tuple(self))

    return State


def _restore(slots: tuple[str, ...], shown: tuple[Shown, ...], values: tuple[Any, ...]) -> Any:
    return state_type(slots, shown)(*values)


inner_hyperparams = shown_hyperparams
"""The property `hyperparams` of a wrapper's state: those of the states inside it, for trackers that look no deeper."""


def unique_names(names: list[str]) -> list[str]:
    """Number repeated names in order of appearance: mu, nu, mu_2; the numbered name is one that no other has."""
    seen: collections.Counter[str] = collections.Counter()
    unique: list[str] = []
    for name in names:
        seen[name] += 1
        while seen[name] > 1 and f"{name}_{seen[name]}" in (*names, *unique):
            seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def check_state_type(who: str, state: Any, expected: type[Any]) -> None:
    """Raise unless `state` is of the class that `who` keeps its state in."""
    if not isinstance(state, expected):
        raise TypeError(wrong_state(who, state, expected.__name__, expected._fields))
