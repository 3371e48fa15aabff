"""What users read in an optimizer state, and what they set in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from gradxform._core.arguments import check_range, check_real, visible_dtype
from gradxform._core.body import Body, Wrapper, body_of
from gradxform._core.chain import Chain
from gradxform._core.hyperparameters import Hyperparameter
from gradxform._core.passes import TreePass
from gradxform._core.shown import Path, Place, absent, distinct, holders, located, numbered, replaced
from gradxform._core.trees import concrete


def get_hyperparams(state: Any, tx: optax.GradientTransformation | None = None) -> dict[str, jax.Array]:
    """The current value of every hyperparameter that an optimizer state shows, and the constants of its optimizer.

    A state shows what changes: live values, and what follows a schedule. The constants are known to ``tx`` alone.

    Args:
      state: Any optimizer state: ours, nested in wrappers, or inside another library's chain.
      tx: The transformation that the state is of, to show its constants as well. Those inside another library's
        transformations are not known, and zeros that switch something off are left out, as in `describe`.

    Returns:
      0-d arrays by name: the value that the last step used, or before the first step, the value that it will use.
      A name that occurs in several states has its place before it, e.g. ``1/learning_rate``, or ``./learning_rate`` in
      the outermost; a name that occurs several times in one state is numbered, ``learning_rate_1``.

    Raises:
      TypeError: if ``tx`` is no transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import gradxform as gx
      >>> tx = gx.momentum(optax.linear_schedule(0.5, 0.0, 10), decay=0.9)
      >>> state = gx.skip_nonfinite(tx).init(jnp.zeros(3))
      >>> print(gx.get_hyperparams(state))
      {'learning_rate': Array(0.5, dtype=float32)}
      >>> print(gx.get_hyperparams(state, tx))
      {'learning_rate': Array(0.5, dtype=float32), 'decay': Array(0.9, dtype=float32)}
    """
    shown = {name: place.value for name, place in located(state).items()}
    if tx is None:
        return shown
    found = [
        (path or (".",), name, hyperparameter)
        for path, constants in _constants(body_of("tx", tx), ())
        for name, hyperparameter in zip(numbered([h.shown_as for h in constants]), constants, strict=True)
    ]
    names = distinct([(path, name, hyperparameter.shown_as) for path, name, hyperparameter in found])
    numbers = [jnp.asarray(hyperparameter.number, visible_dtype()) for *_, hyperparameter in found]
    return shown | dict(zip(numbered(names, reserved=shown), numbers, strict=True))


def _constants(body: Body, path: Path) -> Iterator[tuple[Path, list[Hyperparameter]]]:
    """The hyperparameters that no state shows, after the path of the state of the chain that they belong to."""
    if isinstance(body, Wrapper):
        yield from _constants(body.tx, (*path, "inner"))
    elif isinstance(body, Chain):
        yield path, body.constants
        for each in body.passes:
            if isinstance(each, TreePass):
                yield from _constants(each.stage.body, (*path, each.field))


def set_hyperparams(state: Any, values: Mapping[str, Any] | None = None, /, **named: Any) -> Any:
    """A copy of an optimizer state in which live hyperparameters have new values.

    What follows a schedule is not set: to start another schedule at this step, and go on with the moments, build the
    optimizer anew with ``optax.join_schedules([old, new], [int(state.count)])``. Its states fit.

    Args:
      state: Any optimizer state: ours, nested in wrappers, or inside another library's chain.
      values: Numbers or 0-d arrays by name, for names that are no Python identifiers.
      **named: The same as keywords. A bare name sets every hyperparameter of that name; a name with a place or number,
        as `get_hyperparams` shows it, sets only that one. Those of a group of `by_path` are named
        ``<pattern>/learning_rate``.

    Raises:
      KeyError: if the state has no such hyperparameter; the message lists those it has.
      ValueError: if a hyperparameter of that name follows a schedule, or the value is out of range or not a scalar.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import gradxform as gx
      >>> tx = gx.chain(gx.sgd(gx.live(0.1)), gx.scale(gx.live(2.0)))
      >>> state = gx.set_hyperparams(tx.init(jnp.zeros(2)), learning_rate=0.5, factor=4.0)
      >>> print(tx.update(jnp.ones(2), state)[0])
      [-2. -2.]
    """
    places = located(state)
    new: dict[tuple[int, str], Any] = {}
    for name, value in {**(values or {}), **named}.items():
        matches = {key: place for key, place in places.items() if name in (key, place.shown.name, place.shown.bare)}
        matches = {name: places[name]} if name in places else matches
        if not matches:
            raise KeyError(absent(name, places))
        _check_settable(matches)
        for key, place in matches.items():
            where = id(place.holder), place.shown.key
            if where in new:
                raise ValueError(f"{key} is set twice: by its full name, and by the name that it shares with others")
            new[where] = _checked(name, value, place)
    return replaced(state, new)


def _check_settable(matches: Mapping[str, Place]) -> None:
    """Raise if any match follows a schedule."""
    scheduled = [key for key, place in matches.items() if place.shown.within is None]
    if not scheduled:
        return
    live = [key for key in matches if key not in scheduled]
    others = f"; by its full name {', '.join(live)} can be set" if live else ""
    raise ValueError(f"{', '.join(scheduled)} {matches[scheduled[0]].why_not}{others}")


def _checked(name: str, value: Any, place: Place) -> Any:
    check_real(name, value)
    assert place.shown.within is not None
    check_range(name, value, place.shown.within)
    old = place.value
    if jnp.shape(value) != jnp.shape(old):
        raise ValueError(f"{name} must have shape {jnp.shape(old)}, got {jnp.shape(value)}")
    new = jnp.array(value, dtype=jnp.asarray(old).dtype)  # a copy: the user's array must not be donated with the state
    sharding = getattr(old, "sharding", None)
    if isinstance(sharding, NamedSharding) and concrete(old) and concrete(new):
        new = jax.device_put(new, sharding)
    return jax.tree.structure(old).unflatten([new])


def metrics(state: Any) -> dict[str, jax.Array]:
    """All that an optimizer state tells of the last step, as a flat dict for any tracker.

    Args:
      state: Any optimizer state: ours, nested in wrappers, or inside another library's chain, such as a Flax
        `TrainState`'s or `nnx.Optimizer`'s ``opt_state``.

    Returns:
      0-d arrays by name: what `observe` measured, the counters of `skip_nonfinite`, `skip_spikes` and `accumulate`, and
      the hyperparameters of `get_hyperparams`. A name that occurs more than once has its place in the state before it.

    Example: see `observe`.
    """
    found = [(path, name, value) for path, holder in holders(state, _tells) for name, value in holder.metrics.items()]
    names = distinct([(path, name, name) for path, name, _ in found])
    every = {**dict(zip(names, [value for *_, value in found], strict=True)), **get_hyperparams(state)}
    return {name: jnp.asarray(value[...] if hasattr(value, "__getitem__") else value) for name, value in every.items()}


def _tells(state: Any) -> bool:
    return hasattr(state, "_fields") and isinstance(getattr(state, "metrics", None), Mapping)
