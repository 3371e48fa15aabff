"""The public face of the machinery: `lift` makes a transformation of a rule, `chain` composes transformations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from gradxform._core.arguments import axes, state_float_dtype
from gradxform._core.body import Transformation, body_of
from gradxform._core.chain import Chain, chain_of
from gradxform._core.hyperparameters import Hyperparameter, Option
from gradxform._core.masks import MaskLike, mask_of
from gradxform._core.rule import Array, Branch, Measure, Rule, RuleState, Step, stateless
from gradxform._core.stages import Stage, TreeStage


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
    gather: Callable[[Mapping[str, Array], Step], Mapping[str, Any]] | None = None,
    memory: Mapping[str, float] | None = None,
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
        none. The names become fields of the state; ``mu`` and ``nu`` are the first and second moment. It is also
        called with shapes alone, of any number of axes or none, to learn the names and shapes of what it gives.
      update: ``update(update, state, param, step)`` gives the new update, of the same shape, and the new
        state. ``param`` is None where the caller passed no params. ``step.number`` is 1 at the first
        update; ``step.<name>`` is the current value of an argument. ``step.keep``, see `Step`, saves memory.
      prepare: ``prepare(step)`` gives scalars that are computed once per step, as further ``step.<name>``.
      measure: ``measure(update)`` gives scalars of one array, before `update` runs on any, as ``step.<name>``; or a
        `Measure`, which can also tell how those of a sharded array's parts make those of the whole.
      gather: ``gather(measured, step)`` turns them, stacked over all leaves, into scalars for every leaf.
      memory: Scalars that the rule remembers of all leaves, by name, with their first values: `gather` reads
        ``step.<name>`` and returns the next value under the same name. They are fields of the state.
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
      **arguments: What the rule reads from ``step``. Numbers, 0-d arrays, schedules and `live` values are
        hyperparameters; strings, booleans and None are fixed options; a transformation is a branch, which
        the rule calls as ``direction, new = step.of(update, state["of"], param)`` if it is named ``of``.

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
    if measure is None and (gather is not None or axis_name is not None):
        raise TypeError("gather and axis_name go with measure: give it, or neither")
    if measure is not None and not isinstance(measure, Measure):
        measure = Measure(measure)
    if axis_name and measure is not None and measure.across is None:
        raise TypeError("axis_name needs a way to combine the numbers of shards: give measure=Measure(of, across)")
    if gather is None and (memory or reports or rescales):
        raise TypeError("memory, reports and rescales go with gather: give it, or neither")
    if at_most is not None and at_most not in arguments:
        raise TypeError(f"at_most must name an argument of the rule, got {at_most!r}; there are {sorted(arguments)}")
    name = constructor.__name__ if constructor else update.__qualname__.partition(".")[0]
    rule = Rule(
        name=name,
        constructor=constructor,
        init=stateless if init is None else init,
        update=update,
        prepare=prepare,
        measure=measure,
        gather=gather,
        memory=tuple((memory or {}).items()),
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
    )
    return Transformation.of(chain_of((rule,)))


def _argument(rule: str, key: str, value: Any) -> Any:
    if isinstance(value, optax.GradientTransformation):
        stages = stages_of(key, value)
        for stage in stages:
            if not isinstance(stage, Rule) or stage.measure or stage.freezes:
                raise TypeError(
                    f"{key} of {rule} must be made of transformations that act on one array at a time; "
                    f"put {stage!r} beside {rule} in the chain"
                )
        return Branch(tuple(stage for stage in stages if isinstance(stage, Rule)))
    if isinstance(value, Option):
        return value.value
    if value is None or isinstance(value, bool | str):
        return value
    parameter = value if isinstance(value, Hyperparameter) else Hyperparameter(value)
    return parameter.named(key)


def branch(name: str, tx: Any) -> Transformation:
    """A transformation that a rule applies to its own input; None is the identity."""
    return chain() if tx is None else Transformation.of(chain_of(stages_of(name, tx)))


def stages_of(name: str, tx: Any) -> tuple[Stage, ...]:
    """The stages that a transformation adds to a chain."""
    body = body_of(name, tx)
    return body.stages if isinstance(body, Chain) else (TreeStage(body),)
