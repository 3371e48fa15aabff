"""What is evaluated is the average that the twin keeps, through every wrapper; and nothing comes after it."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform.optimizers.schedule_free import warmup
from tests.twins import elementwise as twins
from tests.twins.averaging import Averages

pytestmark = pytest.mark.once


@pytest.mark.parametrize("b1", [0.9, 0.5, 1.0])
@pytest.mark.parametrize("weight_lr_power", [0.0, 2.0])
def test_the_average_is_that_of_the_twin(b1, weight_lr_power):
    with jax.enable_x64(True):
        theta, gradients = twins.example("float64")
        rate = warmup(0.1, 10)
        tx, averages = gx.schedule_free(gx.sgd(rate), rate, b1, weight_lr_power), Averages(theta, b1, weight_lr_power)
        params, state = jnp.asarray(theta), tx.init(jnp.asarray(theta))
        update = jax.jit(tx.update)
        for t, gradient in enumerate(gradients, 1):
            updates, state = update(gradient, state, params)
            params = gx.apply_updates(params, updates)
            averages.move(-twins.at(rate, t) * gradient, twins.at(rate, t), t)
            # fifty roundings of numbers of up to some dozens, which 1/β₁ doubles
            np.testing.assert_allclose(gx.eval_params(tx, state, params), averages.x, rtol=0, atol=1e-12)
    assert np.abs(averages.x - averages.y).max() > 1e-2 or b1 == 1.0


def test_the_average_of_equal_weights_is_the_mean():
    tx, z = gx.schedule_free(gx.sgd(0.5), 0.5), []
    params = jnp.asarray([1.0, -1.0])
    state = tx.init(params)
    for step in range(8):
        updates, state = tx.update(jnp.asarray([step, -1.0]), state, params)
        params = gx.apply_updates(params, updates)
        z.append(state.z)
    np.testing.assert_allclose(gx.eval_params(tx, state, params), np.mean(z, axis=0), rtol=1e-6)


def test_a_step_at_a_rate_of_zero_counts_for_nothing():
    tx = gx.schedule_free_sgd(1.0, warmup_steps=2)
    params = jnp.asarray([1.0])
    updates, state = tx.update(params, tx.init(params), params)
    assert (updates[0], state.weight_sum) == (0.0, 0.0)
    assert gx.eval_params(tx, state, params)[0] == 1.0


def test_a_warmup_is_a_schedule_of_its_own():
    rate = warmup(0.5, 4)
    assert [float(rate(t)) for t in range(6)] == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert pickle.loads(pickle.dumps(rate)) is warmup(0.5, 4)
    assert repr(rate) == "warmup(0.5, 4)"
    assert gx.schedule_free_adamw(0.5, 4) == gx.schedule_free_adamw(0.5, 4) != gx.schedule_free_adamw(0.5, 5)


@pytest.mark.parametrize("rate", [lambda step: 0.1, gx.live(0.1)], ids=["schedule", "live"])
@pytest.mark.parametrize("optimizer", [gx.schedule_free_sgd, gx.schedule_free_adamw])
def test_a_warmup_goes_with_a_number(optimizer, rate):
    with pytest.raises(TypeError, match="warmup_steps goes with a learning_rate that is a number"):
        optimizer(rate, warmup_steps=3)
    with pytest.raises(ValueError, match="warmup_steps"):
        optimizer(0.1, warmup_steps=0)
