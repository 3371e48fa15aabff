"""Against single bad batches: leave parameters and state as they were, count them, and log an error if it goes on."""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core.arguments import axes, count_of, number_in, positive_range
from gradxform._core.body import Transformation, Wrapper, body_of
from gradxform._core.call import Call, Report
from gradxform._core.compiled import increment
from gradxform._core.extras import extra_of, extras_of, with_finite
from gradxform._core.leaves import Leaves
from gradxform._core.measures import all_finite, global_norm
from gradxform._core.state import check_state_type, inner_hyperparams
from gradxform._core.trees import ANEW, unless
from gradxform.numerics.arithmetic import cast

_LOG = logging.getLogger("gradxform")


class SkipState(NamedTuple):
    """What `skip_nonfinite` and `skip_spikes` carry from step to step."""

    skipped: jax.Array
    """Steps skipped since `init`, int32."""
    skipped_in_a_row: jax.Array
    """Bad steps since the last good step, int32."""
    norms: Any
    """The last global norms of the gradient, float32, if `skip_spikes` watches them."""
    losses: Any
    """The last losses, float32, if `skip_spikes` watches them."""
    seen: Any
    """Steps recorded in `norms` and `losses`, int32."""
    inner: Any
    """The state of the guarded transformation."""

    hyperparams = inner_hyperparams

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """For `gradxform.metrics`."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}


def skip_nonfinite(
    tx: optax.GradientTransformation, max_consecutive: int = 10, *, axis_name: str | Sequence[str] | None = None
) -> Transformation:
    """u ← tx(g) where ‖g‖ is finite, else −0: a step with NaN or infinity changes no bit of parameters and state.

    Skipped steps are counted. After ``max_consecutive`` in a row the next bad step is taken as it comes, so that
    the loss shows it, and an error is logged (logger ``gradxform``), under ``jit`` as well.

    Args:
      tx: Any transformation.
      max_consecutive: How many bad steps in a row are skipped, at least 1.
      axis_name: Mesh axes whose shards skip a step together, or take it together. `jax.shard_map` knows them by
        itself; under ``pmap`` and ``check_vma=False`` they must be named.

    Returns:
      A transformation whose state has ``skipped``, ``skipped_in_a_row`` and ``inner``.

    Raises:
      TypeError, ValueError: if ``max_consecutive`` is no whole number of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.skip_nonfinite(gx.sgd(0.1, momentum=0.9))
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(jnp.ones(2)))
      >>> print(updates, state.inner.mu, state.skipped)
      [-0. -0.] [0. 0.] 1
    """
    body = body_of("tx of skip_nonfinite", tx)
    return Transformation.of(
        SkipNonfinite(body, count_of("max_consecutive", max_consecutive), axes("axis_name", axis_name))
    )


def skip_spikes(
    tx: optax.GradientTransformation,
    threshold: float = 6.0,
    window: int = 128,
    *,
    watch: str = "norm",
    max_consecutive: int = 10,
    axis_name: str | Sequence[str] | None = None,
) -> Transformation:
    """u ← tx(g) where x ≤ mean(x₋ₖ…x₋₁) + c·std(x₋ₖ…x₋₁), else −0: x is the gradient's norm, the loss, or both.

    A step whose global norm or loss lies far above those of the last steps changes no bit of parameters and state.
    Skipped values enter the statistics, so that a lasting change of level becomes the new level; values that are
    not finite are skipped and do not enter. The first ``window // 2 - 1`` steps, but at least 2, are taken if finite.

    Args:
      tx: Any transformation.
      threshold: c > 0, in standard deviations.
      window: k ≥ 2, how many steps are looked back upon.
      watch: ``"norm"``, ``"loss"`` or ``"both"``; the loss is what ``update(…, value=loss)`` passes.
      max_consecutive: See `skip_nonfinite`.
      axis_name: See `clip_by_global_norm`, whose norm it is.

    Returns:
      A transformation whose state has ``skipped``, ``skipped_in_a_row``, the last ``norms`` and ``losses``, how
      many were ``seen``, and ``inner``.

    Raises:
      TypeError, ValueError: if an argument is out of its range, or the loss is watched and ``update`` gets none.

    References:
      Groeneveld et al. 2024, arXiv 2402.00838, and its successors' SkipStepOptimizer: mean + 6σ of 128 steps.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.skip_spikes(gx.sgd(0.1), window=4)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.1, 0.9, 1.0, 1000.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(updates, state.skipped)
      [-0.] 1
    """
    if watch not in ("norm", "loss", "both"):
        raise ValueError(f"watch must be 'norm', 'loss' or 'both', got {watch!r}")
    if count_of("window", window) < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    return Transformation.of(
        SkipSpikes(
            body_of("tx of skip_spikes", tx),
            count_of("max_consecutive", max_consecutive),
            axes("axis_name", axis_name),
            number_in("threshold", threshold, positive_range()),
            window,
            watch,
        )
    )


@dataclasses.dataclass(frozen=True, repr=False)
class _Skip(Wrapper):
    """The body of a guard: it takes a step, or leaves everything as it was."""

    max_consecutive: int = 10
    axis_name: tuple[str, ...] | None = None

    @abc.abstractmethod
    def judged(self, state: SkipState, leaves: Leaves, acts: list[bool], call: Call) -> tuple[jax.Array, SkipState]:
        """Whether the step is good, and the state in which this step is recorded."""

    def empty(self) -> dict[str, Any]:
        """The state's fields for what is recorded, before the first step."""
        return {"norms": None, "losses": None, "seen": None}

    def init(self, params: Any) -> SkipState:
        skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(2))
        return SkipState(skipped, in_a_row, **self.empty(), inner=self.tx.init(params))

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        check_state_type(self.name, state, SkipState)
        frozen = self.tx.frozen(updates if params is None else params)
        leaves = Leaves.of(updates, params, frozen)
        good, after = self.judged(state, leaves, [not rests for rests in frozen], call)
        good = with_finite(good, extras_of(repr(self.tx), self.tx.extra, call).values())
        gives_up = ~good & (state.skipped_in_a_row >= self.max_consecutive)
        accepted = good | gives_up
        _report(call.also(gives_up), state.skipped_in_a_row, name=self.name)
        result, inner, report = self.tx.step(updates, state.inner, params, call.but(accepted=call.also(accepted)))
        after = after._replace(
            skipped=jnp.where(accepted, state.skipped, increment(state.skipped)),
            skipped_in_a_row=jnp.where(good, 0, increment(state.skipped_in_a_row)),
            inner=None,
        )
        return result, unless(call.accepted, state._replace(inner=None), after)._replace(inner=inner), report


class SkipNonfinite(_Skip):
    """The body of `skip_nonfinite`."""

    def judged(self, state: SkipState, leaves: Leaves, acts: list[bool], call: Call) -> tuple[jax.Array, SkipState]:
        return all_finite(leaves, acts, call, self.name, self.axis_name or ()), state


@dataclasses.dataclass(frozen=True, repr=False)
class SkipSpikes(_Skip):
    """The body of `skip_spikes`."""

    threshold: float = 6.0
    window: int = 128
    watch: str = "norm"

    def empty(self) -> dict[str, Any]:
        dtypes = {"norms": jnp.float32, "losses": jnp.float32, "seen": jnp.int32}
        shapes = self._shapes().items()
        return {name: None if shape is None else jnp.zeros(shape, dtypes[name]) for name, shape in shapes}

    def _shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """The shapes of what is recorded; None for what is not watched."""
        norms, losses = ((self.window,) if self.watch in (which, "both") else None for which in ("norm", "loss"))
        return {"norms": norms, "losses": losses, "seen": ()}

    def judged(self, state: SkipState, leaves: Leaves, acts: list[bool], call: Call) -> tuple[jax.Array, SkipState]:
        self._check(state)
        latest = {"norms": global_norm(leaves, acts, call, self.name, self.axis_name)}
        if self.watch != "norm":
            latest["losses"] = cast(extra_of("skip_spikes", "value", call), jnp.float32)
        watched = {name: cast(x, jnp.float32) for name, x in latest.items() if getattr(state, name) is not None}
        finite = jnp.stack([jnp.isfinite(x) for x in latest.values()]).all()
        usual = [self._usual(getattr(state, name), x, state.seen) for name, x in watched.items()]
        place = jnp.arange(self.window, dtype=jnp.int32) == state.seen % self.window
        kept = {name: jnp.where(place & finite, x, getattr(state, name)) for name, x in watched.items()}
        seen = jnp.where(finite, increment(state.seen), state.seen)
        return finite & jnp.stack(usual).all(), state._replace(**kept, seen=seen)

    def _check(self, state: SkipState) -> None:
        """Raise unless the state has the shapes of this window and of what is watched."""
        for name, expected in self._shapes().items():
            found = None if (kept := getattr(state, name)) is None else np.shape(kept)
            if found != expected:
                raise ValueError(
                    f"state.{name} has shape {found}, here {expected}: the state is of another window, watch or guard; "
                    f"{ANEW}"
                )

    def _usual(self, past: jax.Array, latest: jax.Array, seen: jax.Array) -> jax.Array:
        """Whether `latest` is no spike above the `past`, of which `seen` values are filled; True for the first ones."""
        number = jnp.minimum(seen, self.window).astype(jnp.float32)
        filled = jnp.arange(self.window, dtype=jnp.int32) < seen
        mean = jnp.sum(jnp.where(filled, past, 0)) / jnp.maximum(number, 1)
        squares = jnp.sum(jnp.where(filled, jnp.square(past - mean), 0))
        deviation = jnp.sqrt(squares / jnp.maximum(number - 1, 1))
        return (number < max(2, self.window // 2 - 1)) | (latest - mean <= self.threshold * deviation)


@functools.partial(jax.jit, static_argnames="name")
def _report(gives_up: jax.Array, in_a_row: jax.Array, name: str) -> None:
    failure = functools.partial(_report_failure, name=name)
    jax.lax.cond(gives_up, lambda: jax.debug.callback(failure, gives_up, in_a_row), lambda: None)


def _report_failure(gives_up: Any, in_a_row: Any, *, name: str) -> None:
    if np.any(gives_up):
        _LOG.error("%s: %d bad steps in a row; this one is taken as it comes", name, np.max(in_a_row) + 1)
