"""Against batches that do not fit: gather gradients, step once."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform.core.hyperparameters import count_of
from gradxform.core.lift import Transformation, branch, lift
from gradxform.core.rules import Array, Slots, Step
from gradxform.core.state import get_hyperparams
from gradxform.core.trees import concrete
from gradxform.numerics import lerp


class AccumulateState(NamedTuple):
    """What `accumulate` carries from one mini-batch to the next."""

    pending: jax.Array
    """Gradients gathered since the last step, int32."""
    mean: Any
    """Their mean so far, a tree like the parameters, in at least float32."""
    inner: Any
    """The state of the accumulated transformation."""

    @property
    def hyperparams(self) -> dict[str, jax.Array]:
        """Those of the inner state, for trackers that look at the top."""
        return get_hyperparams(self.inner)


def accumulate(tx: optax.GradientTransformation, every: int) -> Transformation:
    """ḡ = (g₁ + … + gₖ)/k,  u ← tx(ḡ) at every k-th call, 0 at the others.

    With k mini-batches of equal size that make up the data set, ``accumulate(sgd(α), every=k)`` is gradient
    descent on the full batch at the memory of a mini-batch. The inner transformation runs, and its
    schedules and moments advance, only at every k-th call.

    Args:
      tx: Any transformation.
      every: k ≥ 1, calls per step.

    Returns:
      A transformation whose state has ``pending`` (gradients gathered), ``mean`` (float32 at least, shaped
      like the parameters) and ``inner``.

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
      [0.] [-2.]
    """
    return Transformation.of(_Accumulate(branch("tx of accumulate", tx), count_of("every", every)))


@dataclasses.dataclass(frozen=True)
class _Accumulate:
    tx: Transformation
    every: int

    def init(self, params: Any) -> AccumulateState:
        mean = _RUNNING_MEAN.init(params)
        return AccumulateState(pending=mean.count, mean=mean.mean, inner=self.tx.init(params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if not isinstance(state, AccumulateState):
            raise TypeError(f"state is {type(state).__name__}, accumulate's is AccumulateState; pass what it returned")
        gathered = _RUNNING_MEAN.init(())._replace(count=state.pending, mean=state.mean)
        rounded, gathered = _RUNNING_MEAN.update(updates, gathered, params)
        mean = rounded if params is None else gathered.mean
        zeros = optax.tree.zeros_like

        def step() -> tuple[Any, AccumulateState]:
            stepped, inner = self.tx.update(mean, state.inner, params, **extra_args)
            return stepped, AccumulateState(zeros(gathered.count), zeros(gathered.mean), inner)

        def wait() -> tuple[Any, AccumulateState]:
            nothing = zeros(mean if params is None else params)
            return nothing, AccumulateState(gathered.count, gathered.mean, state.inner)

        due = gathered.count == self.every
        if concrete(due):
            return step() if due else wait()
        return jax.lax.cond(due, step, wait)

    def __repr__(self) -> str:
        return f"accumulate({self.tx!r}, every={self.every})"


def _zeros(param: Array) -> Slots:
    return {"mean": jnp.zeros_like(param)}


def _average(update: Array, state: Slots, param: Array | None, step: Step) -> tuple[Array, Slots]:
    mean = lerp(state["mean"], update, 1 / step.number)
    return mean, {"mean": mean}


_RUNNING_MEAN = lift(_zeros, _average)
