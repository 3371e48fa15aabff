"""What an argument that does not fit may be: the message says it, with the remedy."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint
import pytest

import gradxform as gx
from tests.support.trees import assert_close

pytestmark = pytest.mark.once

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
TRANSFORMATIONS = {
    "chain": gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1)),
    "accumulate": gx.accumulate(gx.adam(0.1), every=2),
    "skip": gx.skip_nonfinite(gx.adam(0.1)),
    "observe": gx.observe(gx.adam(0.1)),
    "compensated": gx.compensated(gx.adam(0.1)),
    "quantized": gx.quantize_state(gx.adam(0.1)),
    "groups": gx.by_path({"w": gx.adam(0.1)}, default=gx.freeze()),
}
everywhere = pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)


def raised(error: type[Exception], call: Any, *words: str) -> None:
    with pytest.raises(error) as found:
        call()
    for word in words:
        assert word in str(found.value)
    assert len(str(found.value)) < 500


# Swapped


CALLS = {
    "updates": ("update(updates, state, params)", lambda tx, state: tx.update(state, GRADS, PARAMS)),
    "params": ("update(updates, state, params)", lambda tx, state: tx.update(GRADS, PARAMS, state)),
    "grads of step": ("step(tx, grads, state, params)", lambda tx, state: gx.step(tx, state, GRADS, PARAMS)),
    "params of step": ("step(tx, grads, state, params)", lambda tx, state: gx.step(tx, GRADS, PARAMS, state)),
    "params of init": ("init(params)", lambda tx, state: tx.init(state)),
    "params of apply_updates": ("apply_updates(params, updates)", lambda tx, state: gx.apply_updates(state, PARAMS)),
}


@everywhere
@pytest.mark.parametrize("argument", CALLS)
def test_a_state_in_the_place_of_updates_or_params(tx, argument):
    order, call = CALLS[argument]
    for made in (tx, optax.adam(0.1), optax.sgd(0.1), optax.scale_by_adam(), optax.chain(optax.clip(1.0), tx)):
        state = made.init(PARAMS)
        words = (
            f"{argument.split()[0]} is an optimizer's state, {type(state).__name__}",
            f"swapped? The call is {order}",
        )
        raised(TypeError, functools.partial(call, tx, state), *words)


@everywhere
@pytest.mark.parametrize("params", [PARAMS, [PARAMS["w"]], PARAMS["w"]], ids=["dict", "list", "array"])
def test_parameters_in_the_place_of_the_state(tx, params):
    raised(TypeError, lambda: tx.update(GRADS, params), f"state is {type(params).__name__}", "parameters", "swapped")


# Of another library, or of none


@everywhere
@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (optax.adam(0.1), "state is tuple & it is optax's (ScaleByAdamState)"),
        (optax.adamw(optax.linear_schedule(1.0, 0.0, 9)), "optax's (ScaleByAdamState, ScaleByScheduleState)"),
        (optax.sgd(0.1), "it is optax's (EmptyState)"),
        (optax.scale_by_adam(), "state is ScaleByAdamState & it is optax's"),
        (optax.inject_hyperparams(optax.adam)(0.1), "optax's (InjectStatefulHyperparamsState)"),
        (optax.chain(optax.trace(0.9), optax.adam(0.1)), "optax's (TraceState, ScaleByAdamState)"),
    ],
    ids=["adam", "adamw", "sgd", "bare", "injected", "nested"],
)
def test_optax_states_must_be_made_anew(tx, theirs, words):
    raised(
        TypeError, lambda: tx.update(GRADS, theirs.init(PARAMS["w"]), PARAMS), *words.split(" & "), "tx.init(params)"
    )


@everywhere
def test_a_state_restored_without_a_target_says_what_the_target_is(tx, tmp_path):
    state = tx.init(PARAMS)
    restored = [
        flax.serialization.to_state_dict(state),
        flax.serialization.msgpack_restore(flax.serialization.to_bytes(state)),
    ]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored.append(checkpointer.restore(tmp_path / "state"))
    for one in [*restored, list(state)]:
        raised(
            TypeError,
            lambda one=one: tx.update(GRADS, one, PARAMS),
            "without a target",
            "jax.eval_shape(tx.init, params)",
        )
    target = jax.eval_shape(tx.init, PARAMS)
    tx.update(GRADS, flax.serialization.from_state_dict(target, restored[0]), PARAMS)


class Own(NamedTuple):
    """A state of some other optimizer."""

    count: Any


@everywhere
@pytest.mark.parametrize("state", [None, (), Own(0), gx.scale(1.0).init(PARAMS)], ids=["None", "empty", "own", "ours"])
def test_other_states_are_to_be_its_own(tx, state):
    raised(TypeError, lambda: tx.update(GRADS, state, PARAMS), "state is", "pass what its", "init or update returned")


@pytest.mark.parametrize(
    ("grads", "words"),
    [({"w": 1.0}, "state.nu['b']"), ({**GRADS, "c": 1.0}, "state.nu['c'] is missing"), ([1.0], "state.nu[0]")],
    ids=["less", "more", "other"],
)
def test_a_gradient_of_other_parameters_does_not_blame_the_state(grads, words):
    tx = gx.adam(0.1)
    raised(ValueError, lambda: tx.update(grads, tx.init(PARAMS)), words, "pass the gradient of those that init got")


# What is no transformation


@pytest.mark.parametrize("build", [gx.chain, gx.skip_nonfinite, gx.observe], ids=["chain", "skip", "observe"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([gx.clip_by_value(1.0), gx.sgd(0.1)], "unpack it with *, as in chain(*transformations)"),
        ((optax.clip(1.0), gx.sgd(0.1), gx.sgd(0.2)), "unpack it with *"),
        ([gx.adam(0.1)] * 100, "…; unpack it with *"),
        (gx.adam, "call it first: adam(…)"),
        (optax.MultiSteps, "call it first: MultiSteps(…)"),
        ("adam", "got 'adam'"),
        ({"lr": 0.1}, "got {'lr': 0.1}"),
    ],
    ids=["list", "tuple", "long list", "function", "class", "name", "dict"],
)
def test_what_is_no_transformation_says_how_to_make_it_so(build, value, words):
    raised(TypeError, lambda: build(value), "must be a transformation", words)


# Objects with an init and an update


class Pair:
    """An optimizer as an object, whose update takes a number besides or does not."""

    def init(self, params: Any) -> Any:
        return jnp.zeros(())

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return jax.tree.map(lambda u: -extra_args.get("rate", 0.5) * u, updates), state + 1


class Plain(Pair):
    """The same without more arguments."""

    def update(self, updates: Any, state: Any, params: Any = None) -> Any:
        return super().update(updates, state, params)


@pytest.mark.parametrize(
    ("wrap", "factor"),
    [
        (lambda tx: gx.chain(gx.scale(2.0), tx), 2),
        (lambda tx: gx.skip_nonfinite(tx), 1),
        (lambda tx: gx.by_path({".*": tx}), 1),
        (lambda tx: gx.by_path({"w": tx}, default=tx), 1),
        (lambda tx: gx.observe(gx.chain(tx)), 1),
    ],
    ids=["chain", "skip", "group", "groups", "observe"],
)
def test_objects_that_have_an_init_and_an_update_are_transformations(wrap, factor):
    for made, options, rate in ((Pair(), {"rate": 0.25}, 0.25), (Pair(), {}, 0.5), (Plain(), {"rate": 0.25}, 0.5)):
        tx = wrap(made)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **options)
        assert (updates["w"] == -rate * factor).all()
        assert tx == wrap(made)


def test_multisteps_goes_where_optax_takes_it():
    steps = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    ours, theirs = gx.chain(gx.clip_by_value(0.5), steps), optax.chain(optax.clip(0.5), steps.gradient_transformation())
    states = [tx.init(PARAMS) for tx in (ours, theirs)]
    for grads in (GRADS, jax.tree.map(lambda g: 0.25 * g, GRADS)):
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its count
            pairs = [jax.jit(tx.update)(grads, state, PARAMS) for tx, state in zip((ours, theirs), states, strict=True)]
        states = [state for _, state in pairs]
        assert_close(pairs[0][0], pairs[1][0], rtol=1e-6)
    assert repr(ours) == "chain(clip_by_value(0.5), optax.MultiSteps(…))"
    assert len(gx.describe(steps, PARAMS, show=False).leaves) == 2
