"""Against training blind: norms, ratios and counts of every step, in a state that `scan` carries."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core import trees
from gradxform._core.arguments import axes, one_of, visible_dtype
from gradxform._core.body import Transformation, Wrapper, body_of
from gradxform._core.call import Call, Report
from gradxform._core.encoded import EncodedParam, decoded
from gradxform._core.leaves import Leaves
from gradxform._core.measures import bad_leaves, global_norm, leaf_norms, total
from gradxform._core.patterns import Pattern, Table, patterns_of
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform._core.trees import unless


class ObserveState(NamedTuple):
    """What `observe` carries from step to step."""

    metrics: dict[str, jax.Array]
    """Those of the last step, by name; see `observe`."""
    inner: Any
    """The state of the observed transformation."""

    hyperparams = inner_hyperparams


def observe(
    tx: optax.GradientTransformation,
    by: str | Mapping[str, str | re.Pattern[str]] | None = None,
    *,
    of: str = "all",
    axis_name: str | Sequence[str] | None = None,
) -> Transformation:
    """u ← tx(g), and ‖g‖, ‖u‖, ‖θ‖, ‖u‖/‖θ‖ into the state, where `metrics` finds them.

    The metrics are float32 scalars (float64 under x64) of the last step, of the leaves that are not frozen:

    - ``grad_norm``, ``update_norm``, ``param_norm`` and ``update_ratio``, the update's norm over the parameters';
    - ``nonfinite``, how many leaves of the gradient hold a NaN or an infinity;
    - ``clipped``, 1 where `clip_by_global_norm` or `clip_by_zscore` in ``tx`` shortened the gradient, else 0.

    A norm that clipping or a guard within ``tx`` takes as well is taken once.

    Args:
      tx: Any transformation.
      by: Which parts to measure besides the whole: ``"leaf"``, ``"group"`` (those of `by_path` in ``tx``), or a dict
        from names to path patterns, whose leaves may overlap; adds ``grad_norm/<name>`` and so on. None for no parts.
      of: ``"all"``, or ``"gradient"`` for ``grad_norm``, ``nonfinite`` and what ``tx`` tells alone; the norm is known
        already where ``tx`` clips or guards. The norms of update and parameters need the update as an array of its own,
        which a compiled step does not have otherwise; on a CPU a step of AdamW takes three times the time.
      axis_name: See `clip_by_global_norm`.

    Returns:
      A transformation whose state has ``metrics`` and ``inner``.

    Raises:
      TypeError, ValueError: if ``by`` is none of these, a pattern matches no leaf, or ``update`` gets no params.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.observe(gx.chain(gx.clip_by_global_norm(1.0), gx.sgd(gx.live(0.1))))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> for name, value in gx.metrics(state).items():
      ...     print(f"{name} {value:.2f}")
      clipped 1.00
      grad_norm 10.00
      nonfinite 0.00
      param_norm 5.00
      update_norm 0.10
      update_ratio 0.02
      learning_rate 0.10
    """
    parts: Any = by
    if isinstance(by, Mapping):
        who = "by of observe"
        tables = {str(name): Table(who, patterns_of(who, [key]), has_default=True) for name, key in by.items()}
        parts = Parts(tuple(tables.items()))
    elif by not in (None, "leaf", "group"):
        raise TypeError(f"by must be 'leaf', 'group', a dict from names to patterns, or None, got {by!r}")
    body = body_of("tx of observe", tx)
    return Transformation.of(Observe(body, parts, one_of("of", of, *_MEASURED), axes("axis_name", axis_name)))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Leaves told apart by patterns."""

    tables: tuple[tuple[str, Table[Pattern]], ...]

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: {table.keys[0]!r}' for name, table in self.tables)}}}"


@dataclasses.dataclass(frozen=True, repr=False)
class Observe(Wrapper):
    """The body of `observe`."""

    by: str | Parts | None = None
    of: str = "all"
    axis_name: tuple[str, ...] | None = None

    def init(self, params: Any) -> ObserveState:
        acts = [not rests for rests in self.tx.frozen(params)]
        names = self._names(self._parts(params, jax.tree.structure(params), acts))
        nothing = {name: jnp.zeros((), visible_dtype()) for name in sorted([*names, *self.reports])}
        return ObserveState(nothing, self.tx.init(params))

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        check_state_type(self.name, state, ObserveState)
        if params is None:
            raise ValueError("observe needs the parameters: call update(updates, state, params)")
        frozen = self.tx.frozen(params)
        leaves, acts = Leaves.of(updates, params, frozen), [not rests for rests in frozen]
        whole = self.by is None and self.axis_name is None

        def norms(of: Leaves) -> jax.Array:
            if whole:
                return global_norm(of, acts, call, self.name, None)[None]
            return leaf_norms(of, acts, call, self.name, self.axis_name)

        gradient = norms(leaves)
        nonfinite = bad_leaves(leaves, acts, gradient[0], call)[None] if whole else ~jnp.isfinite(gradient)
        others: tuple[jax.Array, ...] = ()
        if self.of == "gradient":
            result, inner, report = self.tx.step(updates, state.inner, params, call)
        else:
            values = leaves.structure.unflatten([decoded(leaf.param) for leaf in leaves.leaves])
            stepped, inner, report = self.tx.step(updates, state.inner, values, call.but(wants="updates"))
            moves = leaves.updated(leaves.structure.flatten_up_to(stepped))
            weights = leaves.updated(jax.tree.leaves(values))
            others, result = (norms(moves), norms(weights)), self._landed(stepped, leaves, moves, call)
        parts = self._parts(params, leaves.structure, acts)
        chosen = [[True]] if whole else parts.values()
        places = tuple(tuple(np.flatnonzero(part).tolist()) for part in chosen)
        values = _metrics(places, visible_dtype(), gradient, nonfinite, *others)
        # arrays of their own: an observer within another one keeps the same report, and both may be donated
        told = {name: jnp.array(value, visible_dtype()) for name, value in report.items()}
        metrics = dict(sorted((dict(zip(self._names(parts), values, strict=True)) | told).items()))
        return result, ObserveState(unless(call.accepted, state.metrics, metrics), inner), report

    def _landed(self, stepped: Any, leaves: Leaves, moves: Leaves, call: Call) -> Any:
        """What is wanted, made of the updates."""
        if call.wants == "updates" and not any(isinstance(leaf.param, EncodedParam) for leaf in leaves.leaves):
            return stepped
        results = [
            moved.moved(call.accepted) if leaf.update is not None and leaf.gives_param(call.wants) else moved.update
            for leaf, moved in zip(leaves.leaves, moves.leaves, strict=True)
        ]
        return leaves.result(call.wants, results)

    def _names(self, parts: Iterable[str]) -> list[str]:
        """The names of the metrics of all parts, in the order of `_metrics`."""
        return [f"{name}/{part}" if part else name for part in parts for name in _MEASURED[self.of]]

    def _parts(self, params: Any, structure: Any, acts: list[bool]) -> dict[str, list[bool]]:
        """For each part, by name, which of the leaves that count belong to it; the empty name has all of them."""
        parts: dict[str, list[bool]] = {}
        if isinstance(self.by, Parts):
            parts = {name: [group == 0 for group in table(structure, [])] for name, table in self.by.tables}
        elif self.by == "leaf":
            paths = trees.paths(structure)
            parts = {path: [path == other for other in paths] for path in paths}
        elif self.by == "group":
            groups = [assigned.group for assigned in self.tx.assign(params)]
            parts = {group: [group == other for other in groups] for group in groups if group}
        parts = {"": [True] * len(acts), **parts}
        counted = {name: list(itertools.compress(flags, acts)) for name, flags in parts.items()}
        return {name: flags for name, flags in counted.items() if not name or any(flags)}


_MEASURED = {
    "all": ("grad_norm", "nonfinite", "update_norm", "param_norm", "update_ratio"),
    "gradient": ("grad_norm", "nonfinite"),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _metrics(
    parts: tuple[tuple[int, ...], ...],
    dtype: Any,
    gradient: jax.Array,
    nonfinite: jax.Array,
    *others: jax.Array,
) -> list[jax.Array]:
    """The metrics of every part; a part is the places of its norms among all."""
    alone = [part[0] for part in parts if len(part) == 1]
    together = [np.asarray(part, np.int32) for part in parts if len(part) != 1]
    order = np.argsort(sorted(range(len(parts)), key=lambda i: len(parts[i]) == 1))

    def of_parts(norms: jax.Array, over: Callable[[jax.Array], jax.Array]) -> jax.Array:
        several = [over(norms[places]).astype(dtype)[None] for places in together]
        return jnp.concatenate([*several, norms[np.asarray(alone, np.int32)].astype(dtype)])[order]

    columns = [of_parts(gradient, total), of_parts(nonfinite.astype(dtype), jnp.sum)]
    if others:
        steps, weights = (of_parts(norms, total) for norms in others)
        columns += [steps, weights, jnp.where(weights > 0, steps / jnp.where(weights > 0, weights, 1), 0)]
    return list(jnp.stack(columns, axis=1).ravel())
