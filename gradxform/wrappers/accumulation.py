"""Against batches that do not fit: gather gradients, step once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform._core.arguments import axes, count_of, visible_dtype
from gradxform._core.body import Call, Report, Transformation, Wrapper, body_of
from gradxform._core.hyperparameters import live
from gradxform._core.leaves import Leaves, masked, trained, trained_leaves
from gradxform._core.lift import lift
from gradxform._core.meshes import divided_like
from gradxform._core.norms import all_finite
from gradxform._core.rule import Array, Slots, Step
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform._core.trees import concrete
from gradxform.numerics.arithmetic import cast, lerp, no_update


class AccumulateState(NamedTuple):
    """What `accumulate` carries from one mini-batch to the next."""

    pending: jax.Array
    """Gradients seen since the last step, int32."""
    kept: jax.Array
    """Those of them that were finite and are in the mean, int32."""
    dropped: jax.Array
    """Gradients left out since `init` because they were not finite, int32."""
    mean: Any
    """The mean so far, or that of the last step, a tree like the parameters, in at least float32."""
    inner: Any
    """The state of the accumulated transformation."""

    hyperparams = inner_hyperparams

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """For `gradxform.metrics`."""
        return {"dropped": self.dropped}


def accumulate(
    tx: optax.GradientTransformation, every: int, *, axis_name: str | Sequence[str] | None = None
) -> Transformation:
    """ḡ = mean of the finite ones of g₁, …, gₖ,  u ← tx(ḡ) at every k-th call, −0 at the others.

    With k mini-batches of equal size that make up the data set, ``accumulate(sgd(α), every=k)`` is gradient
    descent on the full batch at the memory of a mini-batch. The inner transformation runs, and its
    schedules and moments advance, only at every k-th call. A gradient that is not finite is left out of the mean
    and counted; if all k are, the inner transformation gets the last as it is, so that the failure shows.

    Args:
      tx: Any transformation.
      every: k ≥ 1, calls per step.
      axis_name: See `skip_nonfinite`.

    Returns:
      A transformation whose state has ``pending`` (gradients seen since the last step), ``kept`` (those in the
      mean), ``dropped`` (those left out since `init`), ``mean`` (float32 at least, shaped like the parameters,
      nothing for frozen ones) and ``inner``.

    Raises:
      TypeError, ValueError: if ``every`` is no whole number of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.accumulate(gx.sgd(1.0), every=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> first, state = tx.update(jnp.array([1.0]), state)
      >>> second, state = tx.update(jnp.array([3.0]), state)
      >>> print(first, second)
      [-0.] [-2.]
    """
    body = body_of("tx of accumulate", tx)
    return Transformation.of(Accumulate(body, count_of("every", every), axes("axis_name", axis_name)))


@dataclasses.dataclass(frozen=True, repr=False)
class Accumulate(Wrapper):
    """The body of `accumulate`."""

    every: int
    axis_name: tuple[str, ...] | None = None

    def init(self, params: Any) -> AccumulateState:
        pending, kept, dropped = (jnp.zeros((), jnp.int32) for _ in range(3))
        mean = _MEAN.init(trained(self.tx, params)).mean
        return AccumulateState(pending, kept, dropped, mean, self.tx.init(params))

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        leaves, seen, gradient = self._gathered(updates, state, params, call)
        dtypes = leaves.arithmetic if self.lands else leaves.final

        def due(_: Any, seen: AccumulateState) -> tuple[Any, Any, Report]:
            stepped, inner, report = self.tx.step(gradient(seen), seen.inner, params, Call(call.extra_args))
            given = [cast(one, dtype) for one, dtype in zip(jax.tree.leaves(stepped), dtypes, strict=True)]
            return leaves.structure.unflatten(given), inner, report

        like = leaves.updates if params is None else leaves.params
        nothing = [
            divided_like(one, no_update(jnp.zeros_like(one, dtype=dtype)))
            for one, dtype in zip(like, dtypes, strict=True)
        ]
        return self._when_due(due, leaves.structure.unflatten(nothing), seen)

    def advance(self, updates: Any, state: Any, params: Any, call: Call, taken: Any = None) -> tuple[Any, Any, Report]:
        if taken is not None:
            return super().advance(updates, state, params, call, taken)
        _, seen, gradient = self._gathered(updates, state, params, call)

        def due(params: Any, seen: AccumulateState) -> tuple[Any, Any, Report]:
            return self.tx.advance(gradient(seen), seen.inner, params, Call(call.extra_args))

        return self._when_due(due, params, seen)

    def _gathered(
        self, updates: Any, state: Any, params: Any, call: Call
    ) -> tuple[Leaves, AccumulateState, Callable[[AccumulateState], Any]]:
        """The leaves, the state with this gradient in it, and the gradient for the inner transformation."""
        check_state_type("accumulate", state, AccumulateState)
        if params is None and self.needs_params:
            raise ValueError("accumulate goes around what needs the parameters: call update(updates, state, params)")
        leaves = Leaves.of(updates, params)
        acts = trained_leaves(self.tx, params, updates)
        kept = all_finite(leaves, acts, call, self.name, self.axis_name or ()).astype(jnp.int32)
        rounded, after = _MEAN.update(
            masked(acts, updates, leaves.updates, leaves.structure),
            _MEAN_STATE(count=state.kept, values={"finite": kept.astype(visible_dtype())}, mean=state.mean),
            None if params is None else masked(acts, params, leaves.params, leaves.structure),
        )
        seen = state._replace(
            pending=state.pending + 1, kept=state.kept + kept, dropped=state.dropped + (1 - kept), mean=after.mean
        )

        def gradient(seen: AccumulateState) -> Any:
            means = leaves.structure.flatten_up_to(rounded if params is None else seen.mean)
            given = [
                jnp.where(seen.kept > 0, mean, cast(raw, mean.dtype)) if act else raw
                for act, mean, raw in zip(acts, means, leaves.updates, strict=True)
            ]
            return leaves.structure.unflatten(given)

        return leaves, seen, gradient

    def _when_due(
        self, step: Callable[[Any, AccumulateState], tuple[Any, Any, Report]], otherwise: Any, seen: AccumulateState
    ) -> tuple[Any, AccumulateState, Report]:
        """What `step` gives if this is the last gradient of the mean, else what there was."""

        def stepped(before: Any, seen: AccumulateState) -> tuple[Any, AccumulateState, Report]:
            result, inner, report = step(before, seen)
            zero = jnp.zeros_like(seen.pending)
            return result, seen._replace(pending=zero, kept=zero, inner=inner), report

        waited = otherwise, seen, {name: jnp.zeros((), jnp.float32) for name in self.reports}
        due = seen.pending == self.every
        if concrete(due):
            return stepped(otherwise, seen) if due else waited
        return jax.lax.cond(due, lambda: stepped(otherwise, seen), lambda: waited)


def _zeros(param: Array) -> Slots:
    return {"mean": jnp.zeros_like(param)}


def _average(update: Array, state: Slots, param: Array | None, step: Step) -> tuple[Array, Slots]:
    first = step.number == 1  # what the mean was before does not matter then, so nobody needs to reset it
    mean = jnp.where(first, update, lerp(state["mean"], update, 1 / step.number))
    mean = jnp.where(step.finite > 0, mean, state["mean"])
    return mean, {"mean": mean}


_MEAN = lift(_zeros, _average, finite=live(1.0))
_MEAN_STATE = type(jax.eval_shape(_MEAN.init, ()))
