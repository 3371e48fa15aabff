"""A bound of infinity, a common default for "no clip", changes no bit of an update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from tests.support.trees import assert_same

pytestmark = pytest.mark.once

INF = float("inf")
CLIPS = {
    "value": gx.clip_by_value,
    "leaf": gx.clip_by_leaf_norm,
    "global": gx.clip_by_global_norm,
    "param": gx.clip_by_param_norm,
    "param, without eps": lambda bound: gx.clip_by_param_norm(bound, eps=0.0),
    "average": lambda bound: gx.clip_by_average_norm(bound, warmup=1, max_norm=bound),
    "zscore": lambda bound: gx.clip_by_zscore(1e9, warmup=1, max_norm=bound),
}
BOUNDS = {
    "number": lambda: INF,
    "numpy": lambda: np.float32(np.inf),
    "array": lambda: jnp.asarray(jnp.inf),
    "live": lambda: gx.live(INF),
    "schedule": lambda: lambda step: jnp.where(step < 0, 1.0, jnp.inf),
}
PARAMS = {"w": jnp.zeros((2, 3)), "z": jnp.zeros(2, complex)}
UPDATES = {"w": jnp.array([[3e38, -1.0, 1e-30], [0.0, -0.0, 3e38]]), "z": jnp.array([3.0 + 4.0j, 0.0])}


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_infinite_bound_changes_nothing(clip, bound, how):
    tx = clip(bound())
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = how(tx.update)(UPDATES, state, PARAMS)
        assert_same(updates, UPDATES)


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("name", ["value", "leaf", "global", "param"])
@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_what_is_not_finite_stays_as_it_is_beside_what_is(name, bound, bad):
    updates = jnp.array([[bad, 1.0], [2.0, -3.0]])
    tx = CLIPS[name](bound())
    actual = tx.update(updates, tx.init(updates), jnp.ones((2, 2)))[0]
    if name == "value" or np.isinf(bad):
        np.testing.assert_array_equal(actual, updates)
    else:  # the norm is NaN, and a NaN shows
        assert np.isnan(actual[0, 0])


def test_a_live_bound_goes_to_infinity_and_back():
    tx = gx.clip_by_global_norm(gx.live(INF))
    update = jnp.array([3.0, 4.0])
    state = tx.init(update)
    assert_same(tx.update(update, state)[0], update)
    state = gx.set_hyperparams(state, max_norm=1.0)
    np.testing.assert_allclose(tx.update(update, state)[0], update / 5, rtol=1e-6)
    assert_same(tx.update(update, gx.set_hyperparams(state, max_norm=INF))[0], update)


@pytest.mark.parametrize("clip", [gx.clip_by_value, gx.clip_by_leaf_norm, gx.clip_by_global_norm])
@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30])
def test_the_next_rule_guards_its_squares_behind_an_infinite_bound(clip, size):
    update = jnp.array([size, -size])
    alone, behind = (tx.update(update, tx.init(update))[0] for tx in (gx.adam(0.1), gx.chain(clip(INF), gx.adam(0.1))))
    assert_same(behind, alone)


def test_nothing_is_reported_as_clipped():
    tx = gx.observe(gx.chain(gx.clip_by_global_norm(INF), gx.sgd(0.1)))
    state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))[1]
    assert gx.metrics(state)["clipped"] == 0


@pytest.mark.parametrize("bound", [0.0, -1.0, -INF, float("nan")])
@pytest.mark.parametrize("clip", list(CLIPS.values())[:4])
def test_other_bounds_are_refused_still(clip, bound):
    with pytest.raises(ValueError, match=r"must be in \(0, inf\], got"):
        clip(bound)


def test_the_derivative_is_that_of_no_clip():
    def after(update, clip):
        return jnp.sum(clip.update(update, clip.init(update), jnp.ones(2))[0] ** 2)

    for clip in (gx.clip_by_value, gx.clip_by_leaf_norm, gx.clip_by_global_norm, gx.clip_by_param_norm):
        for bound in BOUNDS.values():
            assert_same(jax.grad(after)(jnp.array([3.0, 0.0]), clip(bound())), jnp.array([6.0, 0.0]))
