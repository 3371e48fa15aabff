"""Numbers that steer an optimizer: schedules, live values, and what the state shows of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import flax.serialization
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


@pytest.mark.parametrize(
    "value", [gx.live(0.1), gx.live(jnp.asarray(0.1)), lambda step: 0.1, lambda step: np.float32(0.1)]
)
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_shown_values_are_strong_float32_scalars_or_float64_under_x64(value, x64):
    with jax.enable_x64(x64):
        tx = gx.adam(value)
        params = jnp.ones(2, jnp.bfloat16)
        _, state = tx.update(params, tx.init(params))
        for some in (tx.init(params), state):
            rate = some.hyperparams["learning_rate"]
            assert (rate.shape, rate.dtype, rate.weak_type) == ((), jnp.result_type(float), False)


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
    assert shown(state) == {"b1": 0.25}


# Numbers


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.array(0.5), np.float16(0.5)])
def test_numpy_scalars_are_constants(value):
    assert gx.sgd(value) == gx.sgd(0.5)
    assert repr(gx.sgd(value)) == "scale_by_learning_rate(0.5)"


@pytest.mark.parametrize("value", [1, np.int32(1), jnp.asarray(1), jnp.asarray(1.0)])
def test_whole_numbers_and_arrays_are_numbers(value):
    tx = gx.sgd(value)
    updates, _ = tx.update(ONE, tx.init(ONE))
    assert updates[0] == -1.0


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
        assert state._fields == ("count", "mu", "nu")


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
    assert shown(state) == {"learning_rate_1": 2.0, "learning_rate_2": 3.0}
    assert updates[0] == 6.0


def test_numbered_names_can_be_set():
    tx = gx.chain(gx.sgd(gx.live(2.0)), gx.sgd(gx.live(3.0)))
    state = gx.set_hyperparams(tx.init(ONE), learning_rate_2=5.0)
    assert shown(state) == {"learning_rate_1": 2.0, "learning_rate_2": 5.0}
    assert tx.update(ONE, state)[0][0] == 10.0


def test_one_value_used_twice_is_shown_once():
    rate = gx.live(2.0)
    tx = gx.chain(gx.sgd(rate), gx.sgd(rate))
    state = gx.set_hyperparams(tx.init(ONE), learning_rate=3.0)
    assert shown(state) == {"learning_rate": 3.0}
    assert tx.update(ONE, state)[0][0] == 9.0


def test_a_foreign_state_without_hyperparameters_has_none():
    assert gx.get_hyperparams(optax.adam(0.1).init(ONE)) == {}


# A state holds only what changes


KERNEL = {"head": {"kernel": jnp.ones(2)}, "b": jnp.ones(1)}
HALF = gx.times(0.5)
SCHEDULE = optax.linear_schedule(1.0, 0.0, 4)


@pytest.mark.parametrize(
    ("tx", "fields", "keys"),
    [
        (gx.adamw(1e-3), "count mu nu", None),
        (gx.sgd(jnp.asarray(1e-3)), "count", None),
        (gx.adamw(1e-3, b1=gx.live(0.9)), "count values mu nu", "b1"),
        (gx.adam(gx.live(1e-3)), "count values mu nu", "learning_rate"),
        (gx.adam(SCHEDULE), "count values mu nu", "scheduled/learning_rate"),
        (gx.adam(SCHEDULE, b1=gx.live(0.9)), "count values mu nu", "b1 scheduled/learning_rate"),
        (gx.chain(optax.clip(1.0), gx.sgd(1e-3)), "count inner", None),
        (gx.chain(gx.sgd(gx.live(1.0)), gx.sgd(gx.live(2.0))), "count values", "learning_rate_1 learning_rate_2"),
        (gx.chain(gx.sgd(jnp.asarray(0.5)), gx.sgd(gx.live(1.0))), "count values", "learning_rate"),
        (
            gx.by_path({"head/kernel": {"learning_rate": HALF}}, default=gx.sgd(gx.live(1.0))),
            "count values",
            "learning_rate scheduled/head/kernel/learning_rate",
        ),
        (gx.by_path({"head/kernel": {"learning_rate": HALF}}, default=gx.sgd(jnp.asarray(1.0))), "count", None),
        (
            gx.by_path({"head/kernel": {"learning_rate": gx.live(2.0)}}, default=gx.sgd(1.0)),
            "count values",
            "head/kernel/learning_rate",
        ),
    ],
)
def test_a_state_holds_only_what_changes(tx, fields, keys):
    state = tx.init(KERNEL)
    assert state._fields == tuple(fields.split())
    if keys is None:
        assert not hasattr(state, "hyperparams")
    else:
        assert sorted(state.values) == keys.split()
        assert sorted(state.hyperparams) == sorted(key.removeprefix("scheduled/") for key in keys.split())
    _, after = jax.jit(tx.update)(KERNEL, state, KERNEL)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_group_may_be_called_scheduled():
    tx = gx.by_path({"scheduled": gx.sgd(gx.live(1.0))}, default=gx.sgd(SCHEDULE))
    params = {"scheduled": ONE, "w": ONE}
    state = gx.set_hyperparams(tx.init(params), {"scheduled/learning_rate": 3.0})
    updates, state = tx.update(params, state, params)
    assert updates == {"scheduled": -3.0, "w": -1.0}
    assert shown(state) == {"scheduled/learning_rate": 3.0, "learning_rate": 1.0}


@pytest.mark.parametrize("name", ["count", "values", "hyperparams"])
def test_what_every_state_has_is_no_name_for_an_array_of_a_rule(name):
    tx = gx.lift(lambda param: {name: param}, lambda u, s, p, step: (u, s))
    with pytest.raises(ValueError, match=f"{name!r}.*another name"):
        tx.init(ONE)


def test_optax_sets_and_gets_a_live_value():
    tx = gx.chain(gx.clip_by_global_norm(9.0), gx.sgd(gx.live(0.5)))
    state = optax.tree_utils.tree_set(tx.init(ONE), learning_rate=jnp.float32(0.25))
    assert optax.tree_utils.tree_get(state, "learning_rate") == 0.25
    assert tx.update(ONE, state)[0][0] == -0.25


@pytest.mark.parametrize(
    "tx",
    [
        gx.sgd(0.5),
        gx.sgd(SCHEDULE),
        gx.accumulate(gx.chain(gx.clip_by_global_norm(1.0), gx.adam(SCHEDULE)), every=2),
        gx.chain(gx.sgd(gx.live(0.5)), gx.sgd(gx.live(0.5))),
        gx.by_path({"b": {"learning_rate": HALF}}, default=gx.sgd(SCHEDULE)),
        gx.by_path({"b": {"learning_rate": gx.live(0.5)}}, default=gx.sgd(0.5)),
    ],
)
def test_optax_sets_nothing_that_would_be_ignored(tx):
    with pytest.raises(KeyError, match="learning_rate"):
        optax.tree_utils.tree_set(tx.init(PARAMS), learning_rate=jnp.float32(0.25))


WRITES = {
    "item": lambda state: state.hyperparams.__setitem__("learning_rate", 0.1),
    "del": lambda state: state.hyperparams.__delitem__("learning_rate"),
    "update": lambda state: state.hyperparams.update(learning_rate=0.1),
    "|=": lambda state: state.hyperparams.__ior__({"learning_rate": 0.1}),
    "setdefault": lambda state: state.hyperparams.setdefault("learning_rate", 0.1),
    "pop": lambda state: state.hyperparams.pop("learning_rate"),
    "popitem": lambda state: state.hyperparams.popitem(),
    "clear": lambda state: state.hyperparams.clear(),
}
AROUND = {
    "alone": lambda tx: tx,
    "accumulate": lambda tx: gx.accumulate(tx, every=1),
    "skip_nonfinite": gx.skip_nonfinite,
    "observe": gx.observe,
    "quantize_state": lambda tx: gx.quantize_state(tx, min_size=256),
    "compensated": gx.compensated,
    "optax in chain": lambda tx: gx.chain(optax.identity(), gx.skip_nonfinite(tx)),
}
HALVES = jnp.ones(256, jnp.bfloat16)
around = pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)


@around
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_shown_cannot_be_written(wrap, write):
    state = wrap(gx.adam(gx.live(0.5))).init(HALVES)
    with pytest.raises(TypeError, match=r"read-only.*gx\.set_hyperparams\(state, learning_rate=…\)"):
        write(state)


@around
def test_what_follows_a_schedule_says_so_when_written(wrap):
    state = wrap(gx.adam(SCHEDULE)).init(HALVES)
    with pytest.raises(TypeError, match=r"learning_rate follows a schedule.*learning_rate=gx\.live\(…\)"):
        state.hyperparams["learning_rate"] = 0.1


@around
def test_a_constant_is_not_shown_and_the_error_says_who_shows_it(wrap):
    state = wrap(gx.adam(0.5)).init(HALVES)
    assert not hasattr(state, "hyperparams")
    with pytest.raises(AttributeError, match=r"gx\.get_hyperparams\(state, tx\).*gx\.live"):
        state.hyperparams["learning_rate"] = 0.1


@around
def test_a_constant_beside_what_is_shown_is_a_key_error_with_the_remedy(wrap):
    state = wrap(gx.adam(0.5, b1=gx.live(0.9))).init(HALVES)
    assert list(state.hyperparams) == ["b1"]
    for access in (lambda: state.hyperparams["learning_rate"], lambda: gx.set_hyperparams(state, learning_rate=0.1)):
        with pytest.raises(KeyError, match=r"learning_rate.*b1.*gx\.live\(…\)"):
            access()
    with pytest.raises(TypeError, match=r"learning_rate.*gx\.live\(…\)"):
        state.hyperparams["learning_rate"] = 0.1


def test_the_field_that_was_cannot_be_replaced():
    for tx in (gx.sgd(0.5), gx.sgd(gx.live(0.5))):
        with pytest.raises(TypeError, match=r"gx\.set_hyperparams.*gx\.live"):
            tx.init(ONE)._replace(hyperparams={"learning_rate": 0.1})
        with pytest.raises(AttributeError, match=r"gx\.set_hyperparams"):
            tx.init(ONE).hyperparams = {"learning_rate": 0.1}


def test_a_name_that_is_no_identifier_is_set_as_a_mapping():
    state = gx.by_path({"b": {"learning_rate": gx.live(2.0)}}, default=gx.sgd(1.0)).init(PARAMS)
    with pytest.raises(TypeError, match=r"gx\.set_hyperparams\(state, \{'b/learning_rate': …\}\)"):
        state.hyperparams["b/learning_rate"] = 0.1


def test_what_is_shown_reads_like_a_dict():
    state = gx.adam(gx.live(0.5), b1=SCHEDULE).init(ONE)
    expected = {"b1": jnp.float32(1.0), "learning_rate": jnp.float32(0.5)}
    assert state.hyperparams == expected == dict(state.hyperparams) == gx.get_hyperparams(state)
    assert repr(gx.sgd(gx.live(0.5)).init(ONE).hyperparams) == "{'learning_rate': Array(0.5, dtype=float32)}"
    for copied in (pickle.loads(pickle.dumps(state.hyperparams)), copy.deepcopy(state.hyperparams)):
        assert copied == expected
    assert jax.tree.map(float, state.hyperparams) == {"b1": 1.0, "learning_rate": 0.5}
    assert jax.jit(lambda state: state.hyperparams)(state) == expected


# Injected by optax


INJECTED = {
    "alone": lambda tx: tx,
    "gx.chain": lambda tx: gx.chain(gx.clip_by_global_norm(9.0), tx),
    "gx.skip_nonfinite": gx.skip_nonfinite,
    "optax.chain": lambda tx: optax.chain(optax.identity(), tx),
}
injected = pytest.mark.parametrize("wrap", INJECTED.values(), ids=INJECTED)


@injected
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_an_injected_rate_stands_in_one_place_and_acts_at_every_step(wrap, compiled):
    tx = wrap(optax.inject_hyperparams(gx.adam)(0.5))
    step = jax.jit(tx.update) if compiled else tx.update
    with jax.numpy_dtype_promotion("standard"):  # inject_hyperparams casts with the leaves' dtypes
        state = tx.init(ONE)
        for rate in (0.5, 0.25, 2.0):
            state = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(rate))
            updates, state = step(ONE, state, ONE)
            np.testing.assert_allclose(updates, [-rate], rtol=1e-6)  # equal gradients: m̂/√v̂ is 1
            assert len(optax.tree_utils.tree_get_all_with_path(state, "learning_rate")) == 1
            assert shown(state)["learning_rate"] == rate


def test_a_chain_around_what_optax_injects_shows_it_and_refuses_to_be_written():
    state = gx.chain(gx.clip_by_global_norm(9.0), optax.inject_hyperparams(gx.sgd)(0.5)).init(ONE)
    assert state.hyperparams["learning_rate"] == 0.5
    with pytest.raises(TypeError, match=r"gx\.set_hyperparams\(state, learning_rate=…\)"):
        state.hyperparams["learning_rate"] = 0.1
    assert gx.set_hyperparams(state, learning_rate=0.25).hyperparams["learning_rate"] == 0.25


# What cannot be set


@pytest.mark.parametrize(
    ("tx", "name", "message"),
    [
        (gx.sgd(SCHEDULE), "learning_rate", r"learning_rate follows a schedule.*learning_rate=gx\.live\(…\)"),
        (
            gx.by_path({"b": {"learning_rate": HALF}}, default=gx.sgd(gx.live(1.0))),
            "b/learning_rate",
            r"b/learning_rate follows.*learning_rate=gx\.live\(…\)",
        ),
        (
            optax.inject_hyperparams(gx.sgd)(SCHEDULE),
            "learning_rate",
            "learning_rate follows .*number in its place",
        ),
        (gx.chain(optax.inject_hyperparams(optax.sgd)(SCHEDULE)), "learning_rate", "learning_rate follows"),
        (
            gx.chain(gx.sgd(gx.live(1.0)), gx.sgd(SCHEDULE)),
            "learning_rate",
            "learning_rate_2 follows.*learning_rate_1 can be set",
        ),
        (
            gx.chain(gx.sgd(gx.live(1.0)), optax.inject_hyperparams(optax.sgd)(SCHEDULE)),
            "learning_rate",
            r"inner/learning_rate follows.*\./learning_rate can be set",
        ),
        (
            optax.chain(gx.sgd(gx.live(1.0)), gx.chain(gx.sgd(SCHEDULE), gx.sgd(gx.live(1.0)))),
            "learning_rate",
            "1/learning_rate_1 follows.*0/learning_rate, 1/learning_rate_2 can be set",
        ),
    ],
)
def test_what_follows_a_schedule_is_not_set_in_silence(tx, name, message):
    with jax.numpy_dtype_promotion("standard"):  # see above
        state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        gx.set_hyperparams(state, {name: 0.1})


@pytest.mark.parametrize(
    ("tx", "name", "update"),
    [
        (gx.chain(gx.sgd(gx.live(1.0)), gx.sgd(SCHEDULE)), "learning_rate_1", 3.0),
        (gx.chain(gx.sgd(gx.live(1.0)), optax.inject_hyperparams(optax.sgd)(SCHEDULE)), "./learning_rate", 3.0),
        (gx.chain(gx.sgd(gx.live(1.0)), optax.inject_hyperparams(optax.sgd)(2.0)), "./learning_rate", 6.0),
        (gx.chain(gx.sgd(gx.live(1.0)), optax.inject_hyperparams(optax.sgd)(2.0)), "learning_rate", 9.0),
        (gx.chain(gx.sgd(gx.live(1.0)), gx.sgd(gx.live(2.0))), "learning_rate_2", 3.0),
        (gx.chain(gx.sgd(gx.live(1.0)), gx.sgd(gx.live(2.0))), "learning_rate", 9.0),
        (optax.chain(gx.sgd(gx.live(1.0)), gx.chain(gx.scale(gx.live(2.0)), gx.sgd(gx.live(2.0)))), "factor", 6.0),
        (
            optax.chain(gx.sgd(gx.live(1.0)), gx.chain(gx.sgd(gx.live(2.0)), gx.sgd(gx.live(2.0)))),
            "learning_rate",
            -27.0,
        ),
    ],
)
def test_a_bare_name_sets_every_live_value_and_a_full_one_its_own(tx, name, update):
    with jax.numpy_dtype_promotion("standard"):  # see above
        state = gx.set_hyperparams(tx.init(ONE), {name: 3.0})
        assert tx.update(ONE, state)[0][0] == update


def test_nothing_is_set_twice():
    state = gx.chain(gx.sgd(gx.live(1.0)), gx.sgd(gx.live(2.0))).init(ONE)
    with pytest.raises(ValueError, match="learning_rate_2 is set twice"):
        gx.set_hyperparams(state, {"learning_rate_2": 3.0}, learning_rate=5.0)


# Constants


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (gx.scale(2.0), {"factor": 2.0}),
        (gx.sgd(0.5), {"learning_rate": 0.5}),
        (gx.sgd(0.0), {"learning_rate": 0.0}),
        (gx.adam(0.5, b1=0.25, b2=0.5), {"learning_rate": 0.5, "b1": 0.25, "b2": 0.5, "eps": jnp.float32(1e-8)}),
        (gx.sgd(gx.live(0.5)), {"learning_rate": 0.5}),
        (gx.sgd(jnp.asarray(0.5)), {"learning_rate": 0.5}),
        (gx.momentum(SCHEDULE, 0.5), {"learning_rate": 1.0, "decay": 0.5}),
        (gx.chain(gx.sgd(0.5), gx.sgd(gx.live(2.0))), {"learning_rate": 2.0, "learning_rate_2": 0.5}),
        (gx.chain(gx.scale(2.0), gx.scale(4.0), gx.scale(2.0)), {"factor_1": 2.0, "factor_2": 4.0}),
        (gx.accumulate(gx.skip_nonfinite(gx.sgd(0.5)), every=2), {"learning_rate": 0.5}),
        (
            gx.chain(gx.scale(2.0), gx.accumulate(gx.chain(gx.sgd(0.5), gx.scale(4.0)), every=2)),
            {"./factor": 2.0, "learning_rate": 0.5, "inner/inner/factor": 4.0},
        ),
        (gx.chain(gx.sgd(0.5), optax.sgd(2.0)), {"learning_rate": 0.5}),
        (optax.sgd(2.0), {}),
        (
            gx.by_path({"b": {"learning_rate": HALF}, "c": gx.scale(4.0)}, default=gx.sgd(0.5)),
            {"learning_rate": 0.5, "b/learning_rate": 0.25, "c/factor": 4.0},
        ),
        (
            gx.by_path({"b": {"learning_rate": HALF}}, default=gx.sgd(jnp.asarray(0.5))),
            {"learning_rate": 0.5, "b/learning_rate": 0.25},
        ),
    ],
)
def test_constants_are_shown_by_state_and_transformation(tx, expected):
    state = tx.init(PARAMS)
    found = gx.get_hyperparams(state, tx)
    assert found == expected
    assert {(value.shape, value.dtype) for value in found.values()} <= {((), np.dtype(np.float32))}
    assert found.items() >= gx.get_hyperparams(state).items()


# Resuming, and starting a schedule anew


def test_a_checkpoint_of_a_constant_does_not_fit_a_live_value():
    saved = gx.adam(0.1).init(PARAMS)
    tx = gx.adam(gx.live(0.01))
    with pytest.raises(TypeError, match=r"'values'.*learning_rate.*live or scheduled.*constant"):
        tx.update(PARAMS, pickle.loads(pickle.dumps(saved)), PARAMS)
    with pytest.raises(TypeError, match=r"'values'.*learning_rate.*live or scheduled.*constant"):
        gx.adam(0.1).update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="values"):
        flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(saved))


@pytest.mark.parametrize("through", ["pickle", "flax"])
def test_a_restored_live_value_is_the_checkpoints_and_can_be_set(through):
    saved, tx = gx.adam(gx.live(0.1)).init(ONE), gx.adam(gx.live(0.01))
    if through == "pickle":
        state = pickle.loads(pickle.dumps(saved))
    else:
        state = flax.serialization.from_bytes(tx.init(ONE), flax.serialization.to_bytes(saved))
    updates, state = tx.update(ONE, state, ONE)
    np.testing.assert_allclose(updates, [-0.1], rtol=1e-6)  # m̂/(√v̂ + 1e-8) of equal gradients is 1
    updates, state = tx.update(ONE, gx.set_hyperparams(state, learning_rate=0.01), ONE)
    np.testing.assert_allclose(updates, [-0.01], rtol=1e-6)  # see above


def test_a_restored_constant_is_the_optimizers():
    saved = gx.adam(0.1).init(ONE)
    updates, _ = gx.adam(0.01).update(ONE, pickle.loads(pickle.dumps(saved)), ONE)
    np.testing.assert_allclose(updates, [-0.01], rtol=1e-6)  # see above


@pytest.mark.parametrize("wrap", [lambda tx: tx, gx.skip_nonfinite], ids=["alone", "wrapped"])
def test_a_schedule_starts_anew_while_moments_and_bias_correction_go_on(wrap):
    old, new = optax.linear_schedule(1.0, 0.0, 10), optax.linear_schedule(0.5, 0.0, 5)
    gradients = jnp.asarray([[0.5], [-2.0], [1.0], [4.0], [-0.25]])
    before, after = gradients[:3], gradients[3:]
    _, state = walk(wrap(gx.adam(old)), ONE, before, steps=3)
    count = int(optax.tree_utils.tree_get(state, "count"))
    updates, state = walk(wrap(gx.adam(optax.join_schedules([old, new], [count]))), ONE, after, steps=2, state=state)
    steady, expected = walk(wrap(gx.adam(1.0)), ONE, gradients, steps=5)  # the same direction at the rate 1
    rates = jnp.asarray([0.5, 0.4])  # the new schedule's first two
    np.testing.assert_allclose(jnp.ravel(jnp.stack(updates)), rates * jnp.ravel(jnp.stack(steady[3:])), rtol=1e-6)
    for name in ("count", "mu", "nu"):
        assert_same(optax.tree_utils.tree_get(state, name), optax.tree_utils.tree_get(expected, name))
