"""accumulate: how many calls make a step, by a schedule or after a restart; and sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx


def walked(tx, gradients, state=None):
    state = tx.init(jnp.zeros(1)) if state is None else state
    updates = []
    for gradient in gradients:
        update, state = tx.update(jnp.array([gradient], jnp.float32), state)
        updates.append(float(update[0]))
    return updates, state


def two_then_three(step):
    return jnp.where(step < 1, 2, 3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("every", [two_then_three, optax.piecewise_constant_schedule(2.0, {1: 1.5})])
def test_a_schedule_of_steps_taken_says_how_many_calls_make_the_next(every, compiled):
    tx = gx.accumulate(gx.sgd(1.0), every)
    if compiled:
        tx = gx.Transformation(tx.init, jax.jit(tx.update))
    updates, state = walked(tx, range(1, 9))
    assert updates == [0, -1.5, 0, 0, -4, 0, 0, -7]
    assert (int(state.steps), int(state.pending)) == (3, 0)


def test_a_scheduled_state_scans():
    tx = gx.accumulate(gx.sgd(1.0), two_then_three)
    gradients = jnp.arange(1.0, 9.0)[:, None]
    _, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(1)), gradients)
    np.testing.assert_array_equal(updates[:, 0], [0, -1.5, 0, 0, -4, 0, 0, -7])


def test_a_number_needs_no_counter_of_steps():
    assert gx.accumulate(gx.sgd(1.0), 2).init(jnp.zeros(1)).steps is None
    state = gx.accumulate(gx.sgd(1.0), 2).init(jnp.zeros(1))
    with pytest.raises(ValueError, match=r"state\.steps is None"):
        gx.accumulate(gx.sgd(1.0), two_then_three).update(jnp.ones(1), state)


def test_the_sum_of_the_finite_gradients():
    tx = gx.accumulate(gx.sgd(1.0), 2, reduction="sum")
    updates, state = walked(tx, [1, 2, np.nan, 5])
    assert updates == [0, -3, 0, -5]
    assert int(state.dropped) == 1
    assert repr(tx) == "accumulate(scale_by_learning_rate(1.0), every=2, reduction='sum')"


def test_a_sum_is_the_mean_times_their_number_under_any_optimizer():
    summed = gx.accumulate(gx.chain(gx.clip_by_global_norm(10.0), gx.momentum(0.1)), 3, reduction="sum")
    mean = gx.accumulate(gx.chain(gx.scale(3.0), gx.clip_by_global_norm(10.0), gx.momentum(0.1)), 3)
    gradients = [1.0, -2.0, 4.0, 50.0, 60.0, 70.0]
    np.testing.assert_allclose(walked(summed, gradients)[0], walked(mean, gradients)[0], rtol=1e-6)


@pytest.mark.parametrize("pending", [1, 2, 3])
def test_a_state_restored_with_a_smaller_every_steps_at_the_next_call(pending):
    _, state = walked(gx.accumulate(gx.sgd(1.0), 4), [1.0] * pending)
    updates, state = walked(gx.accumulate(gx.sgd(1.0), 2), [1.0], state)
    assert updates == [-1.0]
    assert int(state.pending) == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 1.5}, TypeError, "every must be a whole number"),
        ({"every": 2, "reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum'"),
        ({"every": 2, "reduction": None}, TypeError, "reduction must be a string"),
    ],
)
def test_options_are_checked(options, error, words):
    with pytest.raises(error, match=words):
        gx.accumulate(gx.sgd(0.1), **options)


def test_a_schedule_that_gives_no_number_says_whose_it_is():
    tx = gx.accumulate(gx.sgd(0.1), lambda step: "two")
    with pytest.raises(TypeError, match="the schedule every of accumulate"):
        tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
