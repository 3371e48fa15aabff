"""The hyperparameters that states show, ours and other libraries', at any depth; and a view of them to read only."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax

from gradxform._core.arguments import Range

Path = tuple[str, ...]
"""Where a state stands within another one."""


class Shown(NamedTuple):
    """A hyperparameter that a state shows, because it changes."""

    key: str
    """Its key among the state's values."""
    name: str
    """What users call it: numbered where the state shows others of that name."""
    bare: str
    """The same without the number."""
    within: Range | None
    """What it may be set to; None where it follows a schedule."""


class Place(NamedTuple):
    """Where such a hyperparameter was found: the state that holds it, and its value."""

    holder: Any
    shown: Shown
    value: Any

    @property
    def why_not(self) -> str:
        """Why a hyperparameter that follows a schedule can't be set, and what to do."""
        if _foreign(self.holder):
            return "follows a schedule; to set it, build the optimizer with a number in its place"
        return f"follows a schedule or another hyperparameter; to set it, {_made_live(self.shown.bare)}"


def absent(name: str, shown: Iterable[str]) -> str:
    """The message for a hyperparameter that a state does not show: what is wrong, and what to do."""
    return (
        f"no hyperparameter {name!r} in this state, which shows {', '.join(shown) or 'none'}; {_CONSTANT}; to set it, "
        f"{_made_live(name)}"
    )


_CONSTANT = "a constant is not in the state, gx.get_hyperparams(state, tx) shows it"


def _made_live(name: str) -> str:
    """The remedy, with the argument's name, which is the hyperparameter's without its group."""
    return f"build the optimizer with {name.rpartition('/')[2]}=gx.live(…)"


def located(state: Any) -> dict[str, Place]:
    """Every hyperparameter in a state, by a name of its own: with its place before it where states share the name."""
    found = [
        (path or (".",), Place(holder, shown, _values(holder)[shown.key]))
        for path, holder in holders(state, _holds)
        for shown in _own(holder)
    ]
    names = distinct([(path, place.shown.name, place.shown.bare) for path, place in found])
    return dict(zip(names, [place for _, place in found], strict=True))


def distinct(found: Sequence[tuple[Path, str, str]]) -> list[str]:
    """The name of each (path, name, bare name), with the path before it if another path has either name too."""
    places: dict[str, set[Path]] = collections.defaultdict(set)
    for path, *names in found:
        for name in names:
            places[name].add(path)
    return [name if len(places[name] | places[bare]) == 1 else "/".join((*path, name)) for path, name, bare in found]


def numbered(names: Sequence[str], reserved: Collection[str] = ()) -> list[str]:
    """The names, told apart by numbers: learning_rate_1, learning_rate_2 for two alike; _2 for one in `reserved`."""
    used = {*names, *reserved}
    unique: list[str] = []
    for name in names:
        if names.count(name) > 1 or name in reserved:
            numbers = itertools.count(2 if name in reserved else 1)
            name = next(new for number in numbers if (new := f"{name}_{number}") not in used)
            used.add(name)
        unique.append(name)
    return unique


def replaced(state: Any, new: Mapping[tuple[int, str], Any]) -> Any:
    """A copy of `state` with the values that `new` has, by the id of the state that holds each, and its key there."""
    inner, structure = jax.tree.flatten(state, is_leaf=_below(state, _holds))
    rebuilt = structure.unflatten([replaced(node, new) if _holds(node) else node for node in inner])
    if not _holds(state):
        return rebuilt
    changed = {key: new.get((id(state), key), value) for key, value in _values(rebuilt).items()}
    return rebuilt._replace(**{"hyperparams" if _foreign(state) else "values": changed})


def holders(state: Any, holds: Callable[[Any], bool], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every state for which `holds` is true, the outermost first, each after its path."""
    if holds(state):
        yield path, state
    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_below(state, holds))
    for keys, node in nodes:
        if holds(node):
            yield from holders(node, holds, (*path, jax.tree_util.keystr(keys, simple=True, separator="/")))


def _below(state: Any, holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda node: node is not state and holds(node)


def _holds(state: Any) -> bool:
    """Whether a state itself has hyperparameters in a field, not only the states inside it."""
    field = "hyperparams" if _foreign(state) else "values"
    return field in getattr(state, "_fields", ()) and isinstance(getattr(state, field), Mapping)


def _values(holder: Any) -> Mapping[str, Any]:
    return holder.hyperparams if _foreign(holder) else holder.values


def _own(holder: Any) -> list[Shown]:
    if not _foreign(holder):
        return [shown for shown in type(holder)._shown if shown.key in holder.values]
    scheduled = getattr(holder, "hyperparams_states", ())  # by optax.inject_hyperparams
    return [Shown(name, name, name, None if name in scheduled else _ANY) for name in holder.hyperparams]


_ANY = Range(-float("inf"), float("inf"), closed_high=True)


def _foreign(state: Any) -> bool:
    """Whether a state is another library's, such as that of optax.inject_hyperparams."""
    return not hasattr(type(state), "_shown")


class Hyperparams(Mapping[str, jax.Array]):
    """What a state shows, by name: a mapping to read only, which `jax.tree.map` turns into a dict.

    Args:
      values: The values by name.
      why_not: For those that follow a schedule, why they can't be set.
    """

    __slots__ = ("_values", "_why_not")

    def __init__(self, values: Mapping[str, Any], why_not: Mapping[str, str]) -> None:
        self._values, self._why_not = dict(values), dict(why_not)

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self._values:
            raise KeyError(absent(name, self))
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def _refuse(self, *given: Any, **named: Any) -> NoReturn:
        """Raise, in place of every method that would write to a dict, and say what to call instead."""
        names = (*(given[0] if given and isinstance(given[0], Mapping) else given[:1]), *named, *self)
        name = str(names[0])
        if name not in self._values:
            raise TypeError(f"state.hyperparams is read-only; {absent(name, self)}")
        if name in self._why_not:
            raise TypeError(f"state.hyperparams is read-only; {name} {self._why_not[name]}")
        value = f"{name}=…" if name.isidentifier() else f"{{{name!r}: …}}"
        raise TypeError(f"state.hyperparams is read-only; call state = gx.set_hyperparams(state, {value})")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse


def _plain(names: tuple[str, ...], values: Iterable[Any]) -> Any:
    """What a mapped tree has in place of `Hyperparams`: a dict."""
    return dict(zip(names, values, strict=True))


jax.tree_util.register_pytree_with_keys(
    Hyperparams,
    lambda shown: ([(jax.tree_util.DictKey(name), shown[name]) for name in sorted(shown)], tuple(sorted(shown))),
    _plain,
)


def _read(state: Any) -> Mapping[str, jax.Array]:
    """The hyperparameters that change, at this step, for loggers to read; raises AttributeError if there are none."""
    places = located(state)
    if not places:
        raise AttributeError(
            f"this state shows no hyperparameters, for none is live or follows a schedule; {_CONSTANT}; to set one, "
            "build the optimizer with gx.live(…) in its place"
        )
    why_not = {name: place.why_not for name, place in places.items() if place.shown.within is None}
    return Hyperparams({name: place.value for name, place in places.items()}, why_not)


def _write(state: Any, value: Any) -> NoReturn:
    raise AttributeError(READ_ONLY)


READ_ONLY = (
    "state.hyperparams is read-only: gx.set_hyperparams(state, …) sets what was given to the optimizer as gx.live(…)"
)

shown_hyperparams = property(_read, _write)
"""The property `hyperparams` of every state of this library."""
