"""Numbers that steer an optimizer: schedules, live values, and what the state shows of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support import chex
from tests.support.trees import assert_close, assert_same, walk

pytestmark = pytest.mark.quick

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones(3)}
ONE = jnp.ones(1)


class Counted:
    """A schedule that writes down the steps it was asked for."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.asked: list[Any] = []

    def __call__(self, step: Any) -> Any:
        self.asked.append(step)
        return self.schedule(step)


def shown(state: Any) -> dict[str, float]:
    return {name: float(value) for name, value in gx.get_hyperparams(state).items()}


# Schedules


def test_a_schedule_is_asked_once_per_step_however_many_leaves_and_rules_use_it():
    rate, beta = Counted(optax.linear_schedule(1.0, 0.0, 4)), Counted(optax.constant_schedule(0.5))
    tx = gx.adamw(rate, b1=beta)  # b1 is used by the momentum and by its bias correction
    state = tx.init(PARAMS)
    for step in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
        assert [int(asked) for asked in rate.asked] == [0, *range(step + 1)]  # the first is init's
        assert len(beta.asked) == len(rate.asked)


def test_a_compiled_step_asks_while_it_is_traced_and_never_again():
    rate = Counted(optax.linear_schedule(1.0, 0.0, 4))
    tx = gx.sgd(rate)
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    for _ in range(4):
        _, state = step(PARAMS, state)
    assert len(rate.asked) == 2
    assert shown(state) == {"learning_rate": 0.25}


def test_the_state_shows_the_value_of_its_last_step_and_before_the_first_the_one_to_come():
    tx = gx.sgd(optax.linear_schedule(1.0, 0.0, 4))
    state = tx.init(ONE)
    assert shown(state) == {"learning_rate": 1.0}
    for expected in (1.0, 0.75, 0.5):
        updates, state = tx.update(ONE, state)
        assert shown(state) == {"learning_rate": expected}
        assert updates[0] == -expected


@pytest.mark.parametrize(
    "schedule", [lambda step: 1, lambda step: 0.5, lambda step: np.float64(0.5), lambda step: step]
)
def test_schedules_may_give_any_real_number(schedule):
    tx = gx.sgd(schedule)
    updates, state = tx.update(ONE, tx.init(ONE))
    assert updates[0] == -float(schedule(0))
    assert state.hyperparams["learning_rate"].dtype == jnp.float32


@pytest.mark.parametrize(
    "schedule",
    [optax.cosine_decay_schedule(0.1, 10), optax.piecewise_constant_schedule(0.1, {3: 0.5})],
    ids=["cosine", "piecewise"],
)
def test_schedules_of_optax_work_where_promotion_is_strict(schedule):
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    tx = gx.sgd(schedule)
    updates, _ = jax.jit(tx.update)(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -0.1, rtol=1e-7)  # the first step's rate, rounded once to float32


@pytest.mark.parametrize("value", [0.1, gx.live(0.1), lambda step: 0.1, np.float32(0.1), jnp.asarray(0.1)])
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_shown_values_are_strong_float32_scalars_or_float64_under_x64(value, x64):
    with jax.enable_x64(x64):
        tx = gx.adam(value)
        params = jnp.ones(2, jnp.bfloat16)
        _, state = tx.update(params, tx.init(params))
        for some in (tx.init(params), state):
            rate = some.hyperparams["learning_rate"]
            assert (rate.shape, rate.dtype, rate.weak_type) == ((), jnp.result_type(float), False)


def test_constants_other_than_the_learning_rate_are_not_shown():
    assert shown(gx.adamw(0.5).init(ONE)) == {"learning_rate": 0.5}
    assert shown(gx.scale(2.0).init(ONE)) == {}


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda h: gx.sgd(h(0.5), momentum=h(0.5), dampening=h(0.5)), "learning_rate momentum dampening"),
        (lambda h: gx.momentum(h(0.5), decay=h(0.5)), "learning_rate decay"),
        (lambda h: gx.adagrad(h(0.5), eps=h(0.5)), "learning_rate eps"),
        (lambda h: gx.adagrad(h(0.5), eps=h(0.5), eps_in_sqrt=True), "learning_rate eps"),
        (lambda h: gx.rmsprop(h(0.5), h(0.5), h(0.5), momentum=h(0.5)), "learning_rate decay eps momentum"),
        (lambda h: gx.rmsprop(h(0.5), eps=h(0.5), eps_in_sqrt=False), "learning_rate eps"),
        (lambda h: gx.adam(h(0.5), h(0.5), h(0.5), h(0.5), h(0.5)), "learning_rate b1 b2 eps eps_root"),
        (lambda h: gx.adam(h(0.5), h(0.5), h(0.5), nesterov=True), "learning_rate b1 b2"),
        (lambda h: gx.adamw(h(0.5), h(0.5), h(0.5), weight_decay=h(0.5)), "learning_rate b1 b2 weight_decay"),
        (lambda h: gx.adam_l2(h(0.5), h(0.5), h(0.5), weight_decay=h(0.5)), "learning_rate b1 b2 weight_decay"),
        (lambda h: gx.scale(h(0.5)), "factor"),
        (lambda h: gx.scale_by_momentum(h(0.5), dampening=h(0.5)), "decay dampening"),
        (lambda h: gx.bias_correction(h(0.5)), "decay"),
        (lambda h: gx.normalize_by_rms(h(0.5), h(0.5), eps_root=h(0.5)), "decay eps eps_root"),
        (lambda h: gx.normalize_by_rss(h(0.5), eps_root=h(0.5)), "eps eps_root"),
        (lambda h: gx.clip_by_value(h(0.5)), "max_value"),
        (lambda h: gx.clip_by_leaf_norm(h(0.5)), "max_norm"),
        (lambda h: gx.clip_by_global_norm(h(0.5)), "max_norm"),
        (lambda h: gx.add_decoupled_weight_decay(h(0.5)), "weight_decay"),
        (lambda h: gx.add_l2_regularization(h(0.5)), "weight_decay"),
    ],
)
def test_every_hyperparameter_may_change_and_is_shown_under_the_name_of_its_argument(build, names):
    constant = build(lambda value: value)
    gradients = jnp.asarray([[0.5, -2.0], [1.0, 4.0], [-0.25, 1.0]])
    expected = walk(constant, jnp.ones(2), gradients)[0]
    for changing in (gx.live, optax.constant_schedule, jnp.asarray):
        tx = build(changing)
        updates, state = walk(tx, jnp.ones(2), gradients)
        # log β in float32 in place of float64 loses half an ulp, which −expm1(t·log β) does not magnify
        assert_close(updates, expected, rtol=1e-6)
        if changing is not jnp.asarray:
            assert shown(state) == dict.fromkeys(names.split(), 0.5)


def test_moving_betas_are_those_of_the_step():
    # with γ = 0 the first moment is all there is: u = −m̂/|g|
    tx = gx.adam(1.0, b1=lambda step: jnp.where(step == 0, 0.5, 0.25), b2=0.0, eps=0.0)
    updates, state = walk(tx, ONE, jnp.asarray([[1.0], [3.0]]), steps=2)
    m = 0.25 * 0.5 + 0.75 * 3.0
    np.testing.assert_allclose(updates[1], [-m / (1 - 0.25**2) / 3.0], rtol=1e-6)  # a few roundings
    assert shown(state) == {"learning_rate": 1.0, "b1": 0.25}


# Numbers


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.array(0.5), np.float16(0.5)])
def test_numpy_scalars_are_constants(value):
    assert gx.sgd(value) == gx.sgd(0.5)
    assert repr(gx.sgd(value)) == "scale_by_learning_rate(0.5)"


@pytest.mark.parametrize("value", [1, np.int32(1), jnp.asarray(1), jnp.asarray(1.0)])
def test_whole_numbers_and_arrays_are_numbers(value):
    tx = gx.sgd(value)
    updates, state = tx.update(ONE, tx.init(ONE))
    assert updates[0] == -1.0
    assert shown(state) == {"learning_rate": 1.0}


def test_a_constant_is_used_in_the_precision_of_the_leaf():
    with jax.enable_x64(True):
        params = {"double": jnp.ones(1, jnp.float64), "single": jnp.ones(1, jnp.float32)}
        for rate in (0.1, gx.live(0.1), lambda step: 0.1):
            updates, _ = gx.sgd(rate).update(params, gx.sgd(rate).init(params))
            assert updates["double"][0] == -0.1
            assert updates["single"][0] == np.float32(-0.1)
        updates, _ = gx.momentum(1.0, decay=0.9).update(params, gx.momentum(1.0).init(params))
        assert updates["double"][0] == -(1 - 0.9)


def test_a_learning_rate_may_be_an_argument_of_a_compiled_function():
    @jax.jit
    def step(rate: jax.Array) -> Any:
        tx = gx.adam(rate)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    for rate in (0.1, 0.2):
        updates, state = step(rate)
        assert_close(updates, gx.adam(rate).update(PARAMS, gx.adam(rate).init(PARAMS))[0], rtol=1e-6)  # fused anew
        np.testing.assert_allclose(state.hyperparams["learning_rate"], rate, rtol=1e-7)


def test_a_loss_can_be_differentiated_by_the_learning_rate():
    def loss(rate: jax.Array) -> jax.Array:
        tx = gx.sgd(rate)
        params = jnp.asarray([2.0])
        updates, _ = tx.update(2 * params, tx.init(params), params)
        return jnp.sum(gx.apply_updates(params, updates) ** 2)

    # (2 − 4α)² has the derivative −8·(2 − 4α)
    np.testing.assert_allclose(jax.grad(loss)(0.1), -8 * 1.6, rtol=1e-6)


# Live values


def test_a_live_value_is_set_without_a_retrace():
    tx = gx.adamw(gx.live(0.5), weight_decay=gx.live(0.0))

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state: Any) -> Any:
        return tx.update(ONE, state, ONE)

    state = tx.init(ONE)
    for rate in (0.5, 0.25, 1):
        state = gx.set_hyperparams(state, learning_rate=rate)
        updates, state = step(state)
        np.testing.assert_allclose(updates, [-rate], rtol=1e-6)  # m̂/(√v̂ + 1e-8) of equal gradients is 1
        assert shown(state)["learning_rate"] == rate


def test_setting_makes_a_copy():
    tx = gx.sgd(gx.live(0.5))
    state = tx.init(ONE)
    gx.set_hyperparams(state, learning_rate=0.25)
    assert shown(state) == {"learning_rate": 0.5}
    assert_same(gx.set_hyperparams(state, learning_rate=0.5), state)


def test_values_of_a_mapping_are_set_like_keywords():
    state = gx.adam(gx.live(0.5), b1=gx.live(0.5)).init(ONE)
    assert_same(gx.set_hyperparams(state, {"b1": 0.25}), gx.set_hyperparams(state, b1=0.25))
    assert shown(gx.set_hyperparams(state, {"b1": 0.25}, learning_rate=1.0)) == {"b1": 0.25, "learning_rate": 1.0}


def test_live_values_can_be_mapped_over():
    tx = gx.adamw(gx.live(0.0), weight_decay=0.1)
    gradients = jnp.asarray([[0.5, -2.0], [1.0, 4.0], [-0.25, 1.0]])

    def train(rate: jax.Array) -> Any:
        state = gx.set_hyperparams(tx.init(jnp.ones(2)), learning_rate=rate)
        return walk(tx, jnp.ones(2), gradients, state=state)

    rates = jnp.asarray([0.1, 0.2, 0.7])
    together = jax.vmap(train)(rates)
    for i, rate in enumerate(rates):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), train(rate), rtol=1e-6)  # compiled apart


def test_a_stack_of_states_holds_a_stack_of_rates():
    tx = gx.sgd(gx.live(0.0))
    states = jax.vmap(lambda rate: gx.set_hyperparams(tx.init(ONE), learning_rate=rate))(jnp.asarray([1.0, 2.0]))
    updates, _ = jax.vmap(tx.update, in_axes=(None, 0))(ONE, states)
    np.testing.assert_array_equal(updates, [[-1.0], [-2.0]])


def test_scan_carries_a_live_value():
    tx = gx.sgd(gx.live(0.5))

    def step(state: Any, rate: jax.Array) -> Any:
        updates, state = tx.update(ONE, gx.set_hyperparams(state, learning_rate=rate))
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(ONE), jnp.asarray([1.0, 2.0]))
    np.testing.assert_array_equal(updates, [[-1.0], [-2.0]])
    assert shown(state) == {"learning_rate": 2.0}


# Inside other transformations


WRAPPERS = {
    "alone": lambda tx: tx,
    "gx.chain": lambda tx: gx.chain(gx.clip_by_value(9.0), gx.chain(gx.chain(tx), gx.scale(1.0))),
    "gx.chain of foreign": lambda tx: gx.chain(optax.identity(), tx, optax.identity()),
    "gx.accumulate": lambda tx: gx.accumulate(tx, every=1),
    "gx.accumulate in gx.chain": lambda tx: gx.chain(gx.accumulate(tx, every=1), gx.scale(1.0)),
    "optax.chain": lambda tx: optax.chain(optax.clip(9.0), tx),
    "optax.named_chain": lambda tx: optax.named_chain(("clip", optax.clip(9.0)), ("step", tx)),
    "optax.masked": lambda tx: optax.masked(tx, {"w": True, "b": True, "c": False}),
    "optax.partition": lambda tx: optax.partition(
        {"on": tx, "off": optax.set_to_zero()}, {"w": "on", "b": "on", "c": "off"}
    ),
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}
anywhere = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@anywhere
def test_live_values_are_found_and_set_anywhere(wrap):
    tx = wrap(gx.sgd(gx.live(0.5)))
    state = tx.init(PARAMS)
    assert shown(state) == {"learning_rate": 0.5}
    state = gx.set_hyperparams(state, learning_rate=0.25)
    assert shown(state) == {"learning_rate": 0.25}
    with jax.numpy_dtype_promotion("standard"):  # optax's wrappers mix int32 and float32
        updates, after = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(updates["w"], np.full((2, 3), -0.25))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert shown(after) == {"learning_rate": 0.25}


@anywhere
def test_schedules_are_shown_anywhere(wrap):
    tx = wrap(gx.sgd(optax.linear_schedule(1.0, 0.0, 4)))
    state = tx.init(PARAMS)
    for expected in (1.0, 0.75):
        with jax.numpy_dtype_promotion("standard"):  # see above
            _, state = tx.update(PARAMS, state, PARAMS)
        assert shown(state) == {"learning_rate": expected}


@pytest.mark.parametrize("build", [gx.sgd, gx.adamw, optax.sgd], ids=["gx.sgd", "gx.adamw", "optax.sgd"])
def test_what_optax_injects_can_be_set_too(build):
    with jax.numpy_dtype_promotion("standard"):  # inject_hyperparams casts with the leaves' dtypes
        tx = optax.inject_hyperparams(build)(0.5)
        state = gx.set_hyperparams(tx.init(ONE), learning_rate=0.25)
        assert shown(state)["learning_rate"] == 0.25
        updates, state = tx.update(ONE, state, jnp.zeros(1))
    np.testing.assert_allclose(updates, [-0.25], rtol=1e-6)  # AdamW divides the gradient by itself
    assert shown(state)["learning_rate"] == 0.25


def test_what_optax_injects_by_schedule_is_shown():
    with jax.numpy_dtype_promotion("standard"):  # see above
        tx = optax.inject_hyperparams(gx.sgd)(optax.linear_schedule(1.0, 0.0, 4))
        state = tx.init(ONE)
        for expected in (1.0, 0.75):
            updates, state = tx.update(ONE, state)
            assert updates[0] == -expected
            assert shown(state)["learning_rate"] == expected


# Names that occur more than once


def test_names_in_different_states_are_led_by_their_place():
    tx = optax.chain(gx.sgd(gx.live(1.0)), gx.scale(gx.live(3.0)), gx.sgd(gx.live(2.0)))
    state = tx.init(ONE)
    assert shown(state) == {"0/learning_rate": 1.0, "factor": 3.0, "2/learning_rate": 2.0}
    state = gx.set_hyperparams(state, {"2/learning_rate": 5.0})
    assert shown(state) == {"0/learning_rate": 1.0, "factor": 3.0, "2/learning_rate": 5.0}
    assert tx.update(ONE, state)[0][0] == 15.0


def test_a_bare_name_sets_all_of_that_name():
    state = optax.chain(gx.sgd(gx.live(1.0)), gx.sgd(gx.live(2.0))).init(ONE)
    assert shown(gx.set_hyperparams(state, learning_rate=5.0)) == {"0/learning_rate": 5.0, "1/learning_rate": 5.0}


def test_groups_are_led_by_their_labels():
    tx = optax.partition({"fast": gx.sgd(gx.live(1.0)), "slow": gx.sgd(gx.live(0.5))}, {"w": "fast", "b": "slow"})
    assert shown(tx.init({"w": ONE, "b": ONE})) == {
        "inner_states/fast/inner_state/learning_rate": 1.0,
        "inner_states/slow/inner_state/learning_rate": 0.5,
    }


def test_names_in_one_chain_are_numbered():
    tx = gx.chain(gx.sgd(optax.constant_schedule(2.0)), gx.sgd(optax.constant_schedule(3.0)))
    updates, state = tx.update(ONE, tx.init(ONE))
    assert shown(state) == {"learning_rate": 2.0, "learning_rate_2": 3.0}
    assert updates[0] == 6.0


def test_numbered_names_can_be_set():
    tx = gx.chain(gx.sgd(gx.live(2.0)), gx.sgd(gx.live(3.0)))
    state = gx.set_hyperparams(tx.init(ONE), learning_rate_2=5.0)
    assert shown(state) == {"learning_rate": 2.0, "learning_rate_2": 5.0}
    assert tx.update(ONE, state)[0][0] == 10.0


def test_one_value_used_twice_is_shown_once():
    rate = gx.live(2.0)
    tx = gx.chain(gx.sgd(rate), gx.sgd(rate))
    state = gx.set_hyperparams(tx.init(ONE), learning_rate=3.0)
    assert shown(state) == {"learning_rate": 3.0}
    assert tx.update(ONE, state)[0][0] == 9.0


def test_a_foreign_state_without_hyperparameters_has_none():
    assert gx.get_hyperparams(optax.adam(0.1).init(ONE)) == {}
