"""The public face of the machinery: `lift` makes a transformation of a rule, `chain` composes transformations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from gradxform._core.arguments import axes, state_float_dtype
from gradxform._core.body import Transformation, body_of
from gradxform._core.chain import Chain, chain_of
from gradxform._core.hyperparameters import Hyperparameter
from gradxform._core.keys import seed_of
from gradxform._core.masks import MaskLike, mask_of
from gradxform._core.rule import Array, Branch, Measure, Rule, RuleState, Step, stateless
from gradxform._core.stages import Stage, TreeStage
from gradxform._core.trees import concrete


def chain(*transformations: optax.GradientTransformation | optax.MultiSteps) -> Transformation:
    """u ← tₙ(… t₂(t₁(g))): apply transformations one after the other, as one.

    Neighbouring transformations of this library become one pass over the tree with one ``count``; other
    ``(init, update)`` pairs, such as optax's, run between them on whole trees and keep their state in the field
    ``inner``. `chain` is associative and `identity` is its unit.

    Args:
      *transformations: Any number of ``(init, update)`` pairs, or of objects that have both, such as
        `optax.MultiSteps`.

    Raises:
      TypeError: if an argument is no such pair.

    Example:
      >>> import gradxform as gx
      >>> gx.chain(gx.clip_by_global_norm(1.0), gx.scale_by_learning_rate(0.1))
      chain(clip_by_global_norm(1.0), scale_by_learning_rate(0.1))
    """
    named = ((f"argument {i} of chain", tx) for i, tx in enumerate(transformations, start=1))
    return Transformation.of(chain_of(tuple(stage for name, tx in named for stage in stages_of(name, tx))))


def identity() -> Transformation:
    """u ← u: the unit of `chain`.

    Example:
      >>> import gradxform as gx
      >>> gx.chain(gx.identity(), gx.scale(2.0)) == gx.scale(2.0)
      True
    """
    return chain()


def lift(
    init: Callable[[Array], RuleState] | None,
    update: Callable[[Array, RuleState, Array | None, Step], tuple[Array, RuleState]],
    *,
    constructor: Callable[..., Any] | None = None,
    prepare: Callable[[Step], Mapping[str, Any]] | None = None,
    measure: Callable[[Array], Mapping[str, Array]] | Measure | None = None,
    totals: Callable[[Array, RuleState, Array | None, Step], Mapping[str, Any]] | None = None,
    gather: Callable[[Mapping[str, Any], Step], Mapping[str, Any]] | None = None,
    memory: Mapping[str, Any] | None = None,
    extra: Sequence[str] = (),
    key: Any = None,
    slots: Sequence[str] | None = None,
    view: Callable[[RuleState, Array, Step], Array] | None = None,
    last: bool = False,
    beside: Mapping[str, optax.GradientTransformation] | None = None,
    when: Callable[[Step], Any] | None = None,
    reports: Sequence[str] = (),
    axis_name: str | Sequence[str] | None = None,
    mask: MaskLike | None = None,
    whole: bool = False,
    fits: Callable[[tuple[int, ...], Any], str | None] | None = None,
    batched: bool | None = False,
    needs_params: bool = False,
    at_most: str | None = None,
    rescales: str | None = None,
    state_dtype: Any = None,
    **arguments: Any,
) -> Transformation:
    """(u, s) ← update(u, s, θ, step) on every array of a tree: make a transformation of a rule for one array.

    The rule sees one array at a time, in at least float32. All else is done for it: any tree, checks
    with the leaf's name, low-precision parameters, a state whose signature never changes, schedules and
    live values, fusion with its neighbours in a `chain`, one trace per shape.

    Args:
      init: ``init(param)`` gives the state for one array, a dict of arrays by name; None if there is
        none. The names become fields of the state; ``mu`` and ``nu`` are the first and second moment. A `Slot` in place
        of an array tells how it is divided, what it holds and its dtype. `init` is also called with shapes alone, to
        learn the names and shapes of what it gives, and with that of a 0-d array unless there are ``slots``.
      update: ``update(update, state, param, step)`` gives the new update, of the same shape, and the new
        state. ``param`` is None where the caller passed no params. ``step.number`` is 1 at the first
        update; ``step.<name>`` is the current value of an argument. ``step.keep``, see `Step`, saves memory.
      prepare: ``prepare(step)`` gives scalars that are computed once per step, as further ``step.<name>``. It also
        finds the number of the step as int32, ``step.count``.
      measure: ``measure(update)`` gives scalars of one array, before `update` runs on any, as ``step.<name>``; or a
        `Measure`, which can also tell how those of a sharded array's parts make those of the whole.
      totals: ``totals(update, state, param, step)`` gives numbers or small arrays that are added up over all leaves
        and over shards, before `update` runs on any; a `Norm` among them becomes the norm of all leaves.
      gather: ``gather(measured, step)`` turns what was measured, stacked over all leaves, or the totals into scalars
        for every leaf, as further ``step.<name>``. Without `measure` and `totals` it gets {}, once per step.
      memory: What the rule remembers of all leaves, by name, each with its first value: a number, an array, or a
        function of the list of the parameters it acts on. `totals` and `gather` read the old value as ``step.<name>``;
        `gather` returns the next one under the same name, which `update` reads. They are fields of the state.
      extra: Names of extra arguments of ``update`` that the rule reads as ``step.<name>``, real scalars: with
        ``extra=("value",)`` users call ``update(…, value=loss)``. `accumulate` gives the mean over its mini-batches.
      key: The seed of random numbers, a whole number or a key; then ``step.key`` is a key for this array and this
        step, the same on any mesh, inside `jax.shard_map` another for each shard. The state has ``seed``, of uint32.
      slots: All names that `init` may give, if which of them depends on the shape: where it leaves one out, or gives
        None, that leaf has no such state.
      view: ``view(state, param, step)`` gives the parameter to evaluate, for `eval_params`; ``step.number`` is the
        number of steps taken, and of all else ``step`` has arguments and memory.
      beside: Transformations by name that get the same input, with states of their own, which are fields of the state:
        the rule reads the update that one makes of its array as ``step.<name>``, in the parameter's dtype.
      when: ``when(step)`` tells whether these take a step; where it is False their states stay, and their updates
        are 0. ``step`` has the arguments, the extra arguments and what `prepare` gave.
      last: Whether nothing may follow in a chain, because the rule relies on where its updates lead.
      reports: Which of the scalars that `gather` returns `observe` shows.
      axis_name: Axes of a mesh; see `clip_by_global_norm`. It takes a `Measure` with ``across``.
      mask: Which leaves the rule acts on; see `add_decoupled_weight_decay`.
      whole: Whether `update` needs whole arrays, for a norm or a product of matrices: inside `jax.shard_map` a
        shard then raises.
      fits: ``fits(shape, dtype)`` tells what is wrong with a leaf, such as ``"has shape (3,), not two axes"``, for an
        error that names it; None if `update` can take it.
      batched: Whether leaves of one shape go through the chain stacked, with `update` under `jax.vmap`. None does so
        where products of matrices gain by it, on GPUs and TPUs, for leaves of up to 2²⁰ elements.
      needs_params: Whether `update` reads ``param``.
      at_most: The name of an argument that bounds the magnitudes of the new update, up to rounding. The next rule
        finds its value as ``step.at_most``, infinity if it is not constant or outside `jax.jit`, and need not guard
        against larger ones.
      rescales: The name of a scalar from `gather`, if all that `update` does is to multiply by it: then the norms of
        its results are known to be those of its input times the scalar.
      constructor: The function that calls `lift`, for `repr` and messages: its name is the rule's, and arguments
        at their defaults are left out. Default: the function in which `update` is defined.
      state_dtype: A floating-point dtype that the state is kept in; default that of the arithmetic.
      **arguments: What the rule reads from ``step``. Floats, 0-d arrays, `live` values and what has a range, such as
        ``positive(x)``, are hyperparameters; with a range they may be schedules or whole numbers too. Other
        whole numbers, strings, booleans, tuples, functions and None are fixed options; a transformation is a branch,
        which the rule calls as ``direction, new = step.of(update, state["of"], param)`` if it is named ``of``.

    Raises:
      TypeError, ValueError: if an argument is no number or branch, or out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> def scale_by_sign(floor: float) -> gx.Transformation:
      ...     def update(update, state, param, step):
      ...         return jnp.where(jnp.abs(update) > step.floor, jnp.sign(update), 0), state
      ...     return gx.lift(None, update, floor=floor)
      >>> tx = scale_by_sign(0.5)
      >>> tx
      scale_by_sign(0.5)
      >>> print(tx.update(jnp.array([3.0, -1.0, 0.2]), tx.init(jnp.zeros(3)))[0])
      [ 1. -1.  0.]
    """
    if axis_name is not None and measure is None and totals is None and key is None:
        raise TypeError("axis_name goes with measure, totals or key: give one of them, or neither")
    if measure is not None and totals is not None:
        raise TypeError("measure and totals are two ways to look at all leaves: give one of them")
    if totals is not None and gather is None:
        raise TypeError("totals go with gather, which makes scalars of them: give it, or neither")
    if measure is not None and not isinstance(measure, Measure):
        measure = Measure(measure)
    if axis_name and measure is not None and measure.across is None:
        raise TypeError("axis_name needs a way to combine the numbers of shards: give measure=Measure(of, across)")
    if gather is None and (memory or reports or rescales):
        raise TypeError("memory, reports and rescales go with gather: give it, or neither")
    if at_most is not None and at_most not in arguments:
        raise TypeError(f"at_most must name an argument of the rule, got {at_most!r}; there are {sorted(arguments)}")
    name = (
        constructor.__name__
        if constructor
        else getattr(update, "__qualname__", type(update).__name__).partition(".")[0]
    )
    _check_names(name, (*arguments, *(memory or {}), *extra, *(beside or {})))
    if when is not None and not beside:
        raise TypeError("when goes with beside: give it, or neither")
    rule = Rule(
        name=name,
        constructor=constructor,
        init=stateless if init is None else init,
        update=update,
        prepare=prepare,
        measure=measure,
        totals=totals,
        gather=gather,
        memory=tuple((memory_name, _first_value(value)) for memory_name, value in (memory or {}).items()),
        extra=tuple(extra),
        seed=seed_of("key", key),
        slots=None if slots is None else tuple(sorted(slots)),
        view=view,
        last=last,
        beside=tuple((key, body_of(f"{key} beside {name}", tx)) for key, tx in (beside or {}).items()),
        when=when,
        reports=tuple(reports),
        axis_name=axes("axis_name", axis_name),
        mask=mask_of(mask),
        whole=whole,
        fits=fits,
        batched=batched,
        needs_params=needs_params,
        at_most=at_most,
        rescales=rescales,
        state_dtype=state_float_dtype("state_dtype", state_dtype),
        arguments=tuple((key, _argument(name, key, value)) for key, value in arguments.items()),
        kinds=tuple(map(_kind, arguments.values())),
    )
    return Transformation.of(chain_of((rule,)))


_STEP_NAMES = ("number", "count", "at_most", "keep", "key")


def _check_names(rule: str, names: Sequence[str]) -> None:
    """Raise if two things that a rule reads from its step have one name."""
    for name in names:
        if name in _STEP_NAMES:
            raise ValueError(f"{rule}: every step has {name!r} itself; give the argument, memory or extra another name")
        if names.count(name) > 1:
            raise ValueError(f"{rule}: {name!r} is given twice among arguments, memory and extra")


def _first_value(value: Any) -> Any:
    """The first value of what a rule remembers: a number, nested tuples of them, or a function."""
    if callable(value):
        return value
    if not concrete(value):
        raise TypeError(f"the first value of what a rule remembers must be known when it is built, got {value}")
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if np.ndim(value) else float(value)


def _argument(rule: str, key: str, value: Any) -> Any:
    if isinstance(value, optax.GradientTransformation):
        stages = stages_of(key, value)
        for stage in stages:
            if not isinstance(stage, Rule) or stage.gathers or stage.freezes or stage.seed or stage.view:
                raise TypeError(
                    f"{key} of {rule} must be made of transformations that act on one array at a time; "
                    f"put {stage!r} beside {rule} in the chain"
                )
        return Branch(tuple(stage for stage in stages if isinstance(stage, Rule)))
    if isinstance(value, np.integer):
        return int(value)
    if value is None or isinstance(value, bool | str | int | tuple) or callable(value):
        return value
    parameter = value if isinstance(value, Hyperparameter) else Hyperparameter(value)
    return parameter.named(key)


def _kind(value: Any) -> Any:
    """The types of whole numbers and booleans, for 0 is False, and which of them a rule got must not be forgotten."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return type(value) if isinstance(value, int) else None


def branch(name: str, tx: Any) -> Transformation:
    """A transformation that a rule applies to its own input; None is the identity."""
    return chain() if tx is None else Transformation.of(chain_of(stages_of(name, tx)))


def stages_of(name: str, tx: Any) -> tuple[Stage, ...]:
    """The stages that a transformation adds to a chain."""
    body = body_of(name, tx)
    return body.stages if isinstance(body, Chain) else (TreeStage(body),)
