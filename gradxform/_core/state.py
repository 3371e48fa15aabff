"""The state of a lifted transformation: a NamedTuple with one field per moment, and its hyperparameters."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gradxform._core.arguments import Range, check_range, check_real
from gradxform._core.explain import wrong_state
from gradxform._core.trees import concrete


def state_type(slots: tuple[str, ...], live: tuple[tuple[str, Range], ...]) -> Any:
    """The class ``State(count, hyperparams, *slots)``; `live` names what `set_hyperparams` may set."""
    with _ONE_AT_A_TIME:  # two threads would make two classes, and each refuse the states of the other
        return _state_type(slots, live)


_ONE_AT_A_TIME = threading.Lock()


@functools.cache
def _state_type(slots: tuple[str, ...], live: tuple[tuple[str, Range], ...]) -> Any:
    fields = collections.namedtuple("State", ("count", "hyperparams", *slots))  # pyright: ignore[reportUntypedNamedTuple] (its fields are known only now)

    class State(fields):
        """`count` updates done, this step's `hyperparams`, and one tree like the parameters per moment."""

        __slots__ = ()
        settable: ClassVar[Mapping[str, Range]] = dict(live)

        def __reduce__(self) -> Any:
            return _restore, (slots, live, tuple(self))

    return State


def _restore(slots: tuple[str, ...], live: tuple[tuple[str, Range], ...], values: tuple[Any, ...]) -> Any:
    return state_type(slots, live)(*values)


def unique_names(names: list[str]) -> list[str]:
    """Number repeated names in order of appearance: mu, nu, mu_2; with a number that no other name has."""
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


def get_hyperparams(state: Any) -> dict[str, jax.Array]:
    """The current value of every visible hyperparameter in an optimizer state.

    Args:
      state: Any optimizer state: ours, nested in wrappers, or inside foreign chains.

    Returns:
      Name to 0-d array: the value used in the last step, before the first step the one it will use.
      A name that occurs more than once is led by its place in the state, e.g. ``1/learning_rate``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import gradxform as gx
      >>> tx = optax.chain(optax.clip(1.0), gx.adam(optax.linear_schedule(0.5, 0.0, 10)))
      >>> print(gx.get_hyperparams(tx.init(jnp.zeros(3))))
      {'learning_rate': Array(0.5, dtype=float32)}
    """
    return {key: values[name] for key, (_, values, name) in _located(state, "hyperparams").items()}


def set_hyperparams(state: Any, values: Mapping[str, Any] | None = None, /, **named: Any) -> Any:
    """A copy of an optimizer state in which live hyperparameters have new values.

    Args:
      state: Any optimizer state: ours, nested in wrappers, or inside foreign chains.
      values: Name to number or 0-d array, for names that are no Python identifiers.
      **named: The same as keywords. A bare name sets every hyperparameter of that name; those of a group of
        `by_path` are named ``<pattern>/learning_rate``.

    Raises:
      KeyError: if the state has no such hyperparameter; the message lists those it has.
      ValueError: if the hyperparameter is not live, or the value is out of range or not a scalar.

    Example: see `live`.
    """
    places = {key: (holder, name) for key, (holder, _, name) in _located(state, "hyperparams").items()}
    new: dict[tuple[int, str], Any] = {}
    for name, value in {**(values or {}), **named}.items():
        matches = [place for key, place in places.items() if name in (key, place[1])]
        if not matches:
            raise KeyError(f"no hyperparameter {name!r} in this state; it has {', '.join(places) or 'none'}")
        if any(_foreign(holder) for holder, _ in matches):  # it feeds what our states within it only show
            matches = [(holder, local) for holder, local in matches if _foreign(holder) or local in holder.settable]
        for holder, local in matches:
            new[id(holder), local] = _checked(name, value, holder, local)
    return _replace(state, new)


def _checked(name: str, value: Any, holder: Any, local: str) -> Any:
    old = holder.hyperparams[local]
    check_real(name, value)
    if not _foreign(holder):
        if local not in holder.settable:
            raise ValueError(
                f"{name} is fixed by the optimizer, or a multiple of another one; "
                f"build it with {local.rpartition('/')[2]}=gx.live(…) to set it in the state"
            )
        check_range(name, value, holder.settable[local])
    if jnp.shape(value) != jnp.shape(old):
        raise ValueError(f"{name} must have shape {jnp.shape(old)}, got {jnp.shape(value)}")
    new = jnp.array(value, dtype=jnp.asarray(old).dtype)  # the user's own may not be donated with the state
    sharding = getattr(old, "sharding", None)
    if isinstance(sharding, NamedSharding) and concrete(old) and concrete(new):
        new = jax.device_put(new, sharding)
    return jax.tree.structure(old).unflatten([new])


@property
def inner_hyperparams(self: Any) -> dict[str, jax.Array]:
    """Those of the inner state, for trackers that look at the top."""
    return get_hyperparams(self.inner)


def metrics(state: Any) -> dict[str, jax.Array]:
    """All that an optimizer state tells of the last step, flat: for any tracker.

    Args:
      state: Any optimizer state: ours, nested in wrappers, or inside foreign chains, such as a Flax `TrainState`'s or
        `nnx.Optimizer`'s ``opt_state``.

    Returns:
      Name to 0-d array: what `observe` measured, the counters of `skip_nonfinite`, `skip_spikes` and `accumulate`, and
      the hyperparameters of `get_hyperparams`. A name that occurs more than once is led by its place in the state.

    Example: see `observe`.
    """
    found = {key: values[name] for key, (_, values, name) in _located(state, "metrics").items()}
    every = (found | get_hyperparams(state)).items()
    return {name: jnp.asarray(value[...] if hasattr(value, "__getitem__") else value) for name, value in every}


def _located(state: Any, attribute: str) -> dict[str, tuple[Any, Mapping[str, Any], str]]:
    """Every value in these dicts: its shortest distinct name, the state that holds it, the dict and its name there."""
    found = [
        (path, holder, getattr(holder, attribute), name)
        for path, holder in _holders(state, (), attribute)
        for name in getattr(holder, attribute)
    ]
    times = collections.Counter(name for *_, name in found)
    return {
        name if times[name] == 1 else "/".join((*path, name)): (holder, values, name)
        for path, holder, values, name in found
    }


def _holders(state: Any, path: tuple[str, ...], attribute: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every state with such a dict of its own, outermost first, and where it stands."""
    if _holds(state, attribute):
        yield path, state
    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_holds_below(state, attribute))
    for keys, node in nodes:
        if _holds(node, attribute):
            yield from _holders(node, (*path, jax.tree_util.keystr(keys, simple=True, separator="/")), attribute)


def _holds(state: Any, attribute: str) -> bool:
    """Whether a state has a dict of that name: hyperparameters as a field, for elsewhere they are another state's."""
    if attribute == "hyperparams" and attribute not in getattr(state, "_fields", ()):
        return False
    return hasattr(state, "_fields") and isinstance(getattr(state, attribute, None), Mapping)


def _foreign(holder: Any) -> bool:
    """Whether the hyperparameters are another library's, such as those of optax.inject_hyperparams."""
    return not hasattr(holder, "settable")


def _holds_below(state: Any, attribute: str) -> Callable[[Any], bool]:
    return lambda node: node is not state and _holds(node, attribute)


def _replace(state: Any, new: dict[tuple[int, str], Any]) -> Any:
    """`state` with the values `new` gives by holder and name."""
    inner, structure = jax.tree.flatten(state, is_leaf=_holds_below(state, "hyperparams"))
    rebuilt = structure.unflatten([_replace(node, new) if _holds(node, "hyperparams") else node for node in inner])
    if not _holds(state, "hyperparams"):
        return rebuilt
    changed = {name: new.get((id(state), name), value) for name, value in rebuilt.hyperparams.items()}
    return rebuilt._replace(hyperparams=changed)
