"""The doors of `lift`: a small rule for each, in every setting that a rule may be in, walks as NumPy does."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from tests.support import doors
from tests.support.doors import GRADIENTS, LOSSES, PARAMS, RULES, STEPS, WAYS, assert_near, only
from tests.support.trees import assert_close, assert_same, gradient, signature

pytestmark = pytest.mark.once

DOORS = pytest.mark.parametrize("door", RULES)
LOW = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)


@functools.cache
def expected(door: str) -> Any:
    return RULES[door][1](PARAMS, GRADIENTS)


@pytest.mark.parametrize("way", WAYS)
@DOORS
def test_a_rule_does_what_numpy_does(door, way):
    params, state = WAYS[way](RULES[door][0], PARAMS, GRADIENTS)
    assert_near(params, expected(door))
    assert signature(state) == signature(RULES[door][0].init(PARAMS))


AROUND = {
    "three": lambda tx: gx.observe(gx.skip_nonfinite(gx.accumulate(tx, 1))),
    "groups": lambda tx: gx.skip_spikes(gx.by_path({"kernel|gain": tx}, default=tx), watch="both"),
}


@pytest.mark.parametrize("wrapper", AROUND)
@DOORS
def test_a_rule_does_the_same_in_wrappers(door, wrapper):
    tx = AROUND[wrapper](RULES[door][0])
    params, state = doors.donated(tx, PARAMS, GRADIENTS)  # a state that held a buffer twice could not be donated
    assert_near(params, expected(door))
    assert signature(state) == signature(tx.init(PARAMS))


@DOORS
def test_a_frozen_leaf_counts_nowhere(door):
    others = [name for name in PARAMS if name != "gain"]
    if door == "key":
        pytest.skip("a frozen leaf has a key, which nobody draws from")
    tx = gx.chain(gx.freeze("gain"), RULES[door][0])
    huge = {**GRADIENTS, "gain": jnp.full_like(GRADIENTS["gain"], jnp.nan)}
    params, state = doors.compiled(tx, PARAMS, huge)
    assert_same(params["gain"], PARAMS["gain"])
    assert_near(only(params, *others), RULES[door][1](only(PARAMS, *others), only(GRADIENTS, *others)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@DOORS
def test_a_bad_step_changes_no_bit(door):
    tx = gx.skip_nonfinite(RULES[door][0])
    middle = 1
    bad = {**GRADIENTS, "gain": GRADIENTS["gain"].at[middle].set(jnp.inf)}
    left_out = jax.tree.map(lambda leaf: jnp.asarray(np.delete(leaf, middle, 0)), (GRADIENTS, LOSSES))
    skipped = doors.compiled(tx, PARAMS, bad)
    without = doors.compiled(tx, PARAMS, *left_out)
    assert int(skipped[1].skipped) == 1
    assert_same((skipped[0], skipped[1].inner), (without[0], without[1].inner))


@DOORS
def test_a_rule_sees_the_mean_of_mini_batches(door):
    tx = gx.accumulate(RULES[door][0], 2)
    spread = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0) * _halves(leaf.ndim), GRADIENTS)
    params, _ = doors.compiled(tx, PARAMS, spread, jnp.repeat(LOSSES, 2) * _halves(1))
    assert_near(params, expected(door))


def _halves(ndim: int) -> jax.Array:
    return jnp.tile(jnp.array([0.5, 1.5]), STEPS).reshape(-1, *[1] * (ndim - 1))


@pytest.mark.parametrize("door", ["totals", "extra", "slots"])
def test_a_rule_sees_the_sum_of_mini_batches(door):
    tx = gx.accumulate(RULES[door][0], 2, reduction="sum")
    spread = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0) / 2, GRADIENTS)
    params, _ = doors.compiled(tx, PARAMS, spread, jnp.repeat(LOSSES, 2))
    assert_near(params, expected(door))


@DOORS
def test_a_rule_and_its_state_are_pickled_and_printed(door):
    tx = RULES[door][0]
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    copied, kept = pickle.loads(pickle.dumps(tx)), pickle.loads(pickle.dumps(state))
    assert copied == tx
    assert repr(copied) == repr(tx)
    assert_same(kept, state)
    args = gradient(GRADIENTS, 0), kept, params
    assert_same(copied.update(*args, value=1.0), tx.update(*args, value=1.0))


@DOORS
def test_what_a_rule_keeps_is_told_in_bytes(door):
    tx = RULES[door][0]
    told = gx.describe(tx, PARAMS, show=False)
    arrays = jax.tree.leaves(tx.init(PARAMS))
    assert told.state_bytes == sum(leaf.nbytes for leaf in arrays)
    shared = {"totals": 4 + 4 + 4 + 8, "gather alone": 8, "key": 4 + 8}
    assert told.shared_bytes == shared.get(door, 4)
    by_path = {leaf.path: leaf.state_bytes for leaf in told.leaves}
    assert by_path["kernel"] == {"totals": 2 * 48, "slots": 4 * (4 + 3), "view": 48}.get(door, 0)


LOW_PRECISION = {
    "compensated": lambda tx: gx.compensated(tx, "int16"),
    "master_weights": gx.master_weights,
    "stochastic_rounding": lambda tx: gx.stochastic_rounding(tx, 0),
}


@pytest.mark.parametrize(
    ("door", "name"),
    [*((door, "master_weights") for door in RULES), *(("totals", name) for name in LOW_PRECISION)],
)
def test_a_rule_trains_bfloat16_parameters(door, name):
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), LOW)
    params, _ = doors.donated(LOW_PRECISION[name](RULES[door][0]), LOW, GRADIENTS)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(jnp.bfloat16)}
    # one rounding to 8 bits; of a sum that is rounded at every step, one for each, up or down
    assert_near(params, RULES[door][1](start, GRADIENTS), rtol=2**-8 if name != "stochastic_rounding" else 2**-5)


@pytest.mark.parametrize("door", ["totals", "slots", "view"])
def test_bfloat16_parameters_without_a_wrapper_are_rounded_once_a_step(door):
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), LOW)
    one = jax.tree.map(lambda leaf: leaf[:1], (GRADIENTS, LOSSES))
    wide, _ = doors.donated(RULES[door][0], start, *one)
    narrow, _ = doors.donated(RULES[door][0], LOW, *one)
    assert_near(narrow, wide, rtol=2**-8)


@DOORS
def test_members_of_a_batch_with_live_values_of_their_own_walk_alone(door):
    tx = (
        gx.chain(RULES[door][0], gx.scale(gx.live(1.0)))
        if door != "view"
        else gx.chain(gx.scale(gx.live(1.0)), RULES[door][0])
    )
    state = tx.init(PARAMS)
    factors = jnp.array([0.5, 2.0])
    states = jax.vmap(lambda factor: gx.set_hyperparams(state, **{_live_name(state): factor}))(factors)

    def member(state: Any) -> Any:
        return doors.scanned(tx, PARAMS, GRADIENTS, state=state)

    together = jax.jit(jax.vmap(member))(states)
    for index in range(len(factors)):
        alone = jax.jit(member)(jax.tree.map(lambda leaf, index=index: leaf[index], states))
        own = jax.tree.map(lambda leaf, index=index: leaf[index], together)
        assert_close(own, alone, rtol=1e-4)


def _live_name(state: Any) -> str:
    [name] = gx.get_hyperparams(state)
    return name
