"""Against batches that do not fit: gather gradients, step once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform._core import encoded
from gradxform._core.arguments import axes, count_of, names, one_of, visible_dtype
from gradxform._core.body import Transformation, Wrapper, body_of
from gradxform._core.call import Call, Report
from gradxform._core.compiled import increment
from gradxform._core.extras import extras_of, with_finite
from gradxform._core.hyperparameters import live
from gradxform._core.leaves import Leaf, Leaves, masked, no_update
from gradxform._core.lift import lift
from gradxform._core.measures import all_finite
from gradxform._core.rule import Array, RuleState, Step
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform._core.trees import ANEW, concrete, unless
from gradxform._core.values import scheduled
from gradxform.numerics.arithmetic import cast, lerp


class AccumulateState(NamedTuple):
    """What `accumulate` carries from one mini-batch to the next."""

    pending: jax.Array
    """Gradients seen since the last step, int32."""
    kept: jax.Array
    """Those of them that were finite and are in the mean, int32."""
    dropped: jax.Array
    """Gradients left out since `init` because they were not finite, int32."""
    steps: Any
    """Steps taken since `init`, int32, where ``every`` is a schedule of them."""
    mean: Any
    """The mean so far, or that of the last step, a tree like the parameters, in at least float32."""
    extra: dict[str, Any] | None
    """The means of extra arguments such as ``value``, by name; None if none is read."""
    inner: Any
    """The state of the accumulated transformation."""

    hyperparams = inner_hyperparams

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """For `gradxform.metrics`."""
        return {"dropped": self.dropped}


def accumulate(
    tx: optax.GradientTransformation,
    every: int | Callable[[Any], Any],
    *,
    reduction: str = "mean",
    extra: Sequence[str] = (),
    axis_name: str | Sequence[str] | None = None,
) -> Transformation:
    """ḡ = mean of the finite ones of g₁, …, gₖ,  u ← tx(ḡ) at every k-th call, −0 at the others.

    With k mini-batches of equal size that make up the data set, ``accumulate(sgd(α), every=k)`` is gradient
    descent on the full batch at the memory of a mini-batch. The inner transformation runs, and its
    schedules and moments advance, only at every k-th call. A gradient that is not finite is left out of the mean
    and counted; if none of the k is finite, the inner transformation gets the last one, so that the failure shows.
    A leaf whose gradient is None at the call that steps stays as it is.

    Extra arguments that the inner transformation's rules read, such as the loss in ``update(…, value=loss)``, reach
    them as the mean over the same mini-batches, also where gradients are summed; a mini-batch with one that is not
    finite is left out. Other extra arguments are handed on as the last call gave them.

    Args:
      tx: Any transformation.
      every: k ≥ 1, calls per step; or a schedule of it, a function of the number of steps taken so far, such as
        `optax.piecewise_constant_schedule`. If more gradients are pending than it asks for, the next call steps.
      reduction: ``"mean"``, or ``"sum"`` of the gradients in place of their mean.
      extra: Names of further extra arguments to average, which a transformation of another library reads:
        ``accumulate(optax.polyak_sgd(), 4, extra=("value",))``.
      axis_name: See `skip_nonfinite`.

    Returns:
      A transformation whose state has ``pending`` (gradients seen since the last step), ``kept`` (those in the
      mean), ``dropped`` (those left out since `init`), ``steps`` (taken so far, if ``every`` is a schedule), ``mean``
      (float32 at least, shaped like the parameters, nothing for frozen ones), ``extra`` (the means of extra arguments)
      and ``inner``.

    Raises:
      TypeError, ValueError: if ``every`` is no whole number of at least 1 or function, or ``reduction`` none of these.

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
    every = every if callable(every) else count_of("every", every)
    reduction = one_of("reduction", reduction, "mean", "sum")
    return Transformation.of(Accumulate(body, every, reduction, names("extra", extra), axes("axis_name", axis_name)))


@dataclasses.dataclass(frozen=True, repr=False)
class Accumulate(Wrapper):
    """The body of `accumulate`."""

    every: int | Callable[[Any], Any]
    reduction: str = "mean"
    given: tuple[str, ...] = dataclasses.field(default=(), metadata={"written": "extra"})
    """Names of extra arguments that the inner transformation reads without saying so."""
    axis_name: tuple[str, ...] | None = None

    @property
    def extra(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.tx.extra, *self.given)))

    like_params: ClassVar[tuple[str, ...]] = ("mean",)

    def init(self, params: Any) -> AccumulateState:
        pending, kept, dropped, steps = (jnp.zeros((), jnp.int32) for _ in range(4))
        leaves, structure = jax.tree.flatten(params)
        trained = [not rests for rests in self.tx.frozen(params)]
        mean = _MEAN.init(masked(trained, params, leaves, structure)).mean
        steps = steps if callable(self.every) else None
        extra = {name: jnp.zeros((), visible_dtype()) for name in self.extra} or None
        return AccumulateState(pending, kept, dropped, steps, mean, extra, self.tx.init(params))

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        check_state_type("accumulate", state, AccumulateState)
        if params is None and self.needs_params:
            raise ValueError(
                "accumulate wraps a transformation that needs the parameters: call update(updates, state, params)"
            )
        frozen = self.tx.frozen(updates if params is None else params)
        leaves = Leaves.of(updates, params, frozen)
        gradient, seen = self._seen(leaves, frozen, updates, state, params, call)
        call = call.but(extra_args={**call.extra_args, **(seen.extra or {})})
        due = call.also(seen.pending >= self._calls(state))
        if concrete(due):
            return self._stepped(leaves, gradient, seen, params, call) if due else self._waiting(leaves, seen, call)
        return encoded.cond(
            due,
            lambda: self._stepped(leaves, gradient, seen, params, call.within_branch()),
            lambda: self._waiting(leaves, seen, call),
        )

    def _seen(
        self, leaves: Leaves, frozen: list[bool], updates: Any, state: AccumulateState, params: Any, call: Call
    ) -> tuple[Any, AccumulateState]:
        """What the inner transformation gets, this gradient included, and the state with this gradient in its mean."""
        acts = [not rests for rests in frozen]
        extra = extras_of(repr(self.tx), self.extra, call)
        good = all_finite(leaves, acts, call, self.name, self.axis_name or ())
        finite = with_finite(good, extra.values()).astype(jnp.int32)
        given = [leaf.update for leaf in leaves.leaves]
        rounded, after, _ = _MEAN.body.step(
            masked(acts, leaves.structure.unflatten(given), given, leaves.structure),
            _MEAN_STATE(count=state.kept, values={"finite": finite.astype(visible_dtype())}, mean=state.mean),
            None if params is None else masked(acts, params, [leaf.param for leaf in leaves.leaves], leaves.structure),
            Call({}, call.accepted),
        )
        counted: dict[str, Any] = {
            "pending": state.pending + 1,
            "kept": state.kept + finite,
            "dropped": state.dropped + (1 - finite),
            "extra": _means(state.extra, extra, state.kept, finite),
        }
        counted = unless(call.accepted, {name: getattr(state, name) for name in counted}, counted)
        means = leaves.structure.flatten_up_to(rounded if params is None else after.mean)
        pairs = zip(means, leaves.leaves, strict=True)
        each = [None if leaf.update is None else self._reduced(mean, counted["kept"]) for mean, leaf in pairs]
        gradient = leaves.structure.unflatten(each)
        return gradient, state._replace(**counted, mean=self._begun(leaves, acts, state, after.mean, call))

    def _begun(self, leaves: Leaves, acts: list[bool], state: AccumulateState, mean: Any, call: Call) -> Any:
        """The mean, 0 for leaves without a gradient at the first call, at which others forget that of the last step."""
        rests = [act and leaf.update is None for act, leaf in zip(acts, leaves.leaves, strict=True)]
        if not any(rests):
            return mean
        first = call.also(state.kept == 0)
        each = zip(rests, leaves.structure.flatten_up_to(mean), strict=True)
        return leaves.structure.unflatten([jnp.where(first, 0, own) if rest else own for rest, own in each])

    def _stepped(
        self, leaves: Leaves, gradient: Any, seen: AccumulateState, params: Any, call: Call
    ) -> tuple[Any, AccumulateState, Report]:
        """The step of the inner transformation."""
        result, inner, report = self.tx.step(gradient, seen.inner, params, call)
        results = [
            cast(each, self._dtype(leaf)) if self._adds(leaf, call) else each
            for leaf, each in zip(leaves.leaves, leaves.structure.flatten_up_to(result), strict=True)
        ]
        pending, kept = jnp.zeros_like(seen.pending), jnp.zeros_like(seen.kept)  # one array could be donated only once
        steps = None if seen.steps is None else increment(seen.steps)
        seen = seen._replace(pending=pending, kept=kept, steps=steps, inner=inner)
        return leaves.result(call.wants, results), seen, report

    def _calls(self, state: AccumulateState) -> Any:
        """How many calls make up the step in progress."""
        if not callable(self.every):
            return self.every
        if state.steps is None:
            raise ValueError(f"state.steps is None, and every is a schedule of the steps taken; {ANEW}")
        calls = scheduled("the schedule every of accumulate", self.every, state.steps)
        return jnp.ceil(jnp.asarray(calls, jnp.float32)).astype(jnp.int32)

    def _reduced(self, mean: Array, kept: Array) -> Array:
        """What the inner transformation gets: the mean of `kept` gradients, or their sum."""
        return mean if self.reduction == "mean" else mean * kept.astype(mean.real.dtype)

    def _waiting(self, leaves: Leaves, seen: AccumulateState, call: Call) -> tuple[Any, AccumulateState, Report]:
        """The result of a call at which no step is due."""
        results = [
            no_update(leaf.update if leaf.param is None else leaf.param, self._dtype(leaf))
            if self._adds(leaf, call)
            else leaf.param
            for leaf in leaves.leaves
        ]
        return leaves.result(call.wants, results), seen, {name: jnp.zeros((), jnp.float32) for name in self.reports}

    def _adds(self, leaf: Leaf, call: Call) -> bool:
        """Whether an update of the leaf is wanted, not the new parameter."""
        return leaf.update is not None and not leaf.gives_param(call.wants)

    def _dtype(self, leaf: Leaf) -> Any:
        """The dtype of the inner transformation's updates."""
        return leaf.arithmetic if self.lands else leaf.final


def _means(means: dict[str, Any] | None, extra: dict[str, Any], kept: Array, finite: Array) -> dict[str, Any] | None:
    """The means of extra arguments over the gradients that are kept, this one included if it is finite."""
    if not extra:
        return None
    if means is None or means.keys() != extra.keys():
        raise ValueError(f"state.extra has {sorted(means or ())}, this transformation averages {sorted(extra)}; {ANEW}")
    first, number = kept == 0, (kept + 1).astype(visible_dtype())
    new = {name: jnp.where(first, value, lerp(means[name], value, 1 / number)) for name, value in extra.items()}
    return {name: jnp.where((finite > 0) | first, value, means[name]) for name, value in new.items()}


def _zeros(param: Array) -> RuleState:
    return {"mean": jnp.zeros_like(param)}


def _average(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    first = step.number == 1  # the first gradient replaces the old mean, so nobody needs to reset it
    mean = jnp.where(first, update, lerp(state["mean"], update, 1 / step.number))
    # while no gradient was finite, the last one stands for the mean, so that the failure shows
    mean = step.keep("mean", jnp.where((step.finite > 0) | first, mean, state["mean"]))
    return mean, {"mean": mean}


_MEAN = lift(_zeros, _average, finite=live(1.0))
_MEAN_STATE = type(jax.eval_shape(_MEAN.init, ()))
