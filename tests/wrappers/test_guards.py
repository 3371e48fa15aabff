"""Bad steps are skipped to the bit, counted and told; norms are right at any size, and taken once."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform.numerics import norms as euclidean
from tests.support.trees import assert_same, signature

pytestmark = pytest.mark.once

# Every kind of leaf, with an entry of −0.
PARAMS = {
    "half": jnp.asarray([1.0, -0.0, 2.0], jnp.float16),
    "brain": jnp.asarray([[1.0, -0.0]], jnp.bfloat16),
    "single": jnp.asarray(-0.0, jnp.float32),
    "complex": jnp.asarray([1 + 1j, complex(-0.0, -0.0)], jnp.complex64),
}
GRADIENT = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), PARAMS)
LEAVES = list(PARAMS)
BAD = [np.nan, np.inf, -np.inf]

GUARDED = {
    "native": gx.adamw(0.1),
    "with a memory of all leaves": gx.chain(gx.clip_by_zscore(), gx.clip_by_global_norm(1.0), gx.adam(0.1)),
    "low-precision state": gx.adagrad(0.1, state_dtype="bfloat16"),
    "foreign in a chain": gx.chain(gx.scale(2.0), optax.trace(0.9), gx.sgd(0.1)),
    "foreign with a key": optax.add_noise(0.1, 0.5, key=jax.random.key(0)),
    "accumulate": gx.accumulate(gx.adam(0.1), every=2),
    "master_weights": gx.master_weights(gx.adam(0.1)),
    "stochastic_rounding": gx.stochastic_rounding(gx.sgd(0.1), key=0),
    "by_path": gx.by_path({"half": {"weight_decay": 0.0}, "brain|single": gx.sgd(0.1)}, default=gx.adamw(0.1)),
    "observe": gx.observe(gx.sgd(0.1, momentum=0.9), by="leaf"),
}


def lenient(foreign=True):
    """Foreign code promotes, as JAX lets it by default."""
    return jax.numpy_dtype_promotion("standard" if foreign else "strict")


@functools.cache
def stepped(tx):
    """One training step, compiled: parameters and state from those before and a gradient."""

    @jax.jit
    def step(params, state, gradient, **extra_args):
        updates, state = tx.update(gradient, state, params, **extra_args)
        return gx.apply_updates(params, updates), state

    return step


def walk(tx, params, gradients, **extra_args):
    step, state = stepped(tx), tx.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient, **extra_args)
    return params, state


def with_value(tree, name, value):
    """The tree with one element of a leaf replaced."""
    leaf = tree[name]
    return tree | {name: leaf.at[(0,) * leaf.ndim].set(value)}


def bits(tree):
    """What tells −0 from 0."""
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return signature(leaves), [np.asarray(leaf).tobytes() for leaf in leaves]


# skip_nonfinite


@pytest.mark.parametrize("name", GUARDED)
def test_a_bad_step_changes_no_bit(name):
    tx = gx.skip_nonfinite(GUARDED[name], max_consecutive=100)
    with lenient("foreign" in name):
        step, bad = stepped(tx), 0
        params, state = step(PARAMS, tx.init(PARAMS), GRADIENT)
        before = bits((params, state.inner))
        negative = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), params)
        for leaf in LEAVES:
            for value in [*BAD, complex(0, np.nan)] if leaf == "complex" else BAD:
                bad += 1
                params, state = step(params, state, with_value(GRADIENT, leaf, value))
                assert bits((params, state.inner)) == before
                assert (state.skipped, state.skipped_in_a_row) == (bad, bad)
                zeros, _ = step(negative, state, with_value(GRADIENT, leaf, value))
                assert bits(zeros) == bits(negative)
        _, state = step(params, state, GRADIENT)
        assert (state.skipped, state.skipped_in_a_row) == (bad, 0)
        assert bits(state.inner) != before[1]


@pytest.mark.parametrize("name", ["with a memory of all leaves", "accumulate", "master_weights"])
def test_bad_steps_leave_no_trace_in_those_that_follow(name):
    tx = gx.skip_nonfinite(GUARDED[name], max_consecutive=100)
    good = [jax.tree.map(lambda leaf, scale=scale: leaf * scale, GRADIENT) for scale in (1.0, -2.0, 3.0)]
    bad = with_value(GRADIENT, "brain", np.nan)
    params, state = walk(tx, PARAMS, [bad, good[0], bad, bad, good[1], good[2], bad])
    expected, expected_state = walk(tx, PARAMS, good)
    assert bits((params, state.inner)) == bits((expected, expected_state.inner))
    assert (state.skipped, state.skipped_in_a_row, expected_state.skipped) == (4, 1, 0)


HUGE = {
    "float16": jnp.full(64, 65504, jnp.float16),
    "bfloat16": jnp.full(64, 3e38, jnp.bfloat16),
    "float32": jnp.full(64, 1e38, jnp.float32),
    "largest": jnp.full(3, np.finfo(np.float32).max),
    "complex64": jnp.full(64, 1e38 + 1e38j, jnp.complex64),
    "no element": jnp.zeros(0),
}


@pytest.mark.parametrize("guard", [gx.skip_nonfinite, gx.skip_spikes])
def test_huge_and_zero_gradients_are_not_bad(guard):
    tx = gx.chain(gx.clip_by_global_norm(1.0), guard(gx.sgd(1.0), max_consecutive=1))
    zero = jax.tree.map(jnp.zeros_like, HUGE)
    state, update = tx.init(zero), jax.jit(tx.update)
    for gradient in (HUGE, zero, HUGE):
        updates, state = update(gradient, state, zero)
        assert (state.inner.skipped, state.inner.skipped_in_a_row) == (0, 0)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert state.inner.inner.count == 3


def test_a_bad_gradient_of_a_frozen_leaf_is_no_bad_step():
    tx = gx.skip_nonfinite(gx.by_path({"half|single": gx.freeze()}, default=gx.sgd(0.1)))
    params, state = walk(tx, PARAMS, [with_value(with_value(GRADIENT, "half", np.nan), "single", np.inf)])
    assert state.skipped == 0
    assert bits([params[name] for name in ("half", "single")]) == bits([PARAMS[name] for name in ("half", "single")])
    assert params["brain"][0, 0] < PARAMS["brain"][0, 0]


TX = gx.skip_nonfinite(gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1)), max_consecutive=2)
WEIGHTS = {"w": jnp.asarray([1.0, -0.0]), "b": jnp.asarray(2.0, jnp.float32)}


def sequence(*good):
    """One gradient per step, along the first axis; not finite where the step is to be bad."""
    scale = jnp.where(jnp.asarray(good), jnp.arange(1.0, len(good) + 1), jnp.nan)
    return {"w": scale[:, None] * jnp.ones((1, 2)), "b": scale}


def scanned(tx, params, gradients):
    """Parameters and states after every step."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        carry = gx.apply_updates(params, updates), state
        return carry, carry

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]


run = jax.jit(functools.partial(scanned, TX))
runs = jax.jit(jax.vmap(functools.partial(scanned, TX), in_axes=(None, 0)))


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def test_without_params_a_bad_step_is_skipped_too():
    tx = gx.skip_nonfinite(gx.momentum(0.1))
    update = jax.jit(tx.update)
    _, state = update(WEIGHTS, tx.init(WEIGHTS))
    updates, after = update(with_value(WEIGHTS, "w", np.nan), state)
    assert bits(after.inner) == bits(state.inner)
    assert bits(updates) == bits(jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), WEIGHTS))


def test_scan_carries_the_counters():
    good = (1, 0, 0, 1, 0, 1, 1, 0)
    params, state = run(WEIGHTS, sequence(*good))
    np.testing.assert_array_equal(state.skipped, [0, 1, 2, 2, 3, 3, 3, 4])
    np.testing.assert_array_equal(state.skipped_in_a_row, [0, 1, 2, 0, 1, 0, 0, 1])
    for step, is_good in enumerate(good[1:], 1):
        now, before = (bits((at(params, index), at(state.inner, index))) for index in (step, step - 1))
        assert (now == before) == (not is_good)


def test_in_vmap_only_the_bad_member_skips():
    healthy, ill = sequence(1, 1, 1, 1), sequence(1, 0, 1, 1)
    params, state = runs(WEIGHTS, stacked(healthy, ill, healthy))
    np.testing.assert_array_equal(state.skipped, [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    assert bits(at(at((params, state.inner), 1), 1)) == bits(at(at((params, state.inner), 1), 0))
    assert bits(at((params, state), 0)) == bits(at((params, state), 2))
    alone, _ = runs(WEIGHTS, stacked(healthy, healthy, healthy))
    assert bits(at(alone, 0)) == bits(at(params, 0))


def test_buffers_can_be_donated():
    def step(params, state, gradient):
        updates, state = TX.update(gradient, state, params)
        return gx.apply_updates(params, updates), state

    results = []
    for donated in ((), (0, 1)):
        compiled = jax.jit(step, donate_argnums=donated)
        params = jax.tree.map(jnp.copy, WEIGHTS)
        state = TX.init(params)
        for index in range(3):
            params, state = compiled(params, state, at(sequence(1, 0, 1), index))
        results.append(bits((params, state)))
    assert results[0] == results[1]


# A failure that does not end


@pytest.fixture
def records(caplog):
    """The messages of the logger, once every callback has run."""

    def messages():
        jax.effects_barrier()
        found = [record for record in caplog.records if record.name == "gradxform"]
        assert all(record.levelno == logging.ERROR for record in found)
        return [record.getMessage() for record in found]

    return messages


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["skip_nonfinite", "skip_spikes"])
def test_after_max_consecutive_bad_steps_the_next_goes_through_and_is_told(kind, compiled, records):
    tx = getattr(gx, kind)(gx.sgd(0.1), max_consecutive=2)
    update = jax.jit(tx.update) if compiled else tx.update
    bad, state = with_value(WEIGHTS, "w", np.nan), tx.init(WEIGHTS)
    for _ in range(2):
        updates, state = update(bad, state, WEIGHTS)
        assert not np.isnan(updates["w"]).any()
    assert records() == []
    assert (state.skipped, state.inner.count) == (2, 0)
    updates, state = update(bad, state, WEIGHTS)
    assert np.isnan(updates["w"]).tolist() == [True, False]
    assert (state.skipped, state.skipped_in_a_row, state.inner.count) == (2, 3, 1)
    (message,) = records()
    assert message.startswith(f"{kind}: 3 bad steps in a row")
    _, state = update(WEIGHTS, state, WEIGHTS)
    assert state.skipped_in_a_row == 0
    update(bad, state, WEIGHTS)
    assert len(records()) == 1


def test_scan_tells_of_every_bad_step_that_goes_through(records):
    params, state = run(WEIGHTS, sequence(1, 0, 0, 1, 0, 0, 0, 0))
    np.testing.assert_array_equal(np.isnan(params["b"]), [0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(state.skipped, [0, 1, 2, 2, 3, 4, 4, 4])
    assert len(records()) == 2


def test_vmap_tells_of_the_members_that_fail_only(records):
    healthy, ill, failing = sequence(1, 1, 1, 1), sequence(1, 0, 0, 1), sequence(0, 0, 0, 1)
    runs(WEIGHTS, stacked(healthy, ill, healthy))
    assert records() == []
    runs(WEIGHTS, stacked(healthy, ill, failing))
    assert len(records()) == 1


def test_optax_apply_if_finite_walks_the_same():
    inner = optax.adam(0.1)
    ours, theirs = gx.skip_nonfinite(inner, max_consecutive=2), optax.apply_if_finite(inner, 2)
    gradients = sequence(1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1)
    with lenient():
        state, other = ours.init(WEIGHTS), theirs.init(WEIGHTS)
        update, other_update = jax.jit(ours.update), jax.jit(theirs.update)
        for step in range(13):
            updates, state = update(at(gradients, step), state, WEIGHTS)
            others, other = other_update(at(gradients, step), other, WEIGHTS)
            # the same operations in two compiled programs, which may round the last bit otherwise
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, others)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.inner, other.inner_state)
            assert state.skipped_in_a_row == other.notfinite_count
    assert (state.skipped, other.total_notfinite) == (6, 7)
    assert np.isnan(updates["b"])


def test_skipping_outside_jit_compiles_nothing_after_the_first_step():
    gradient, state = jax.tree.map(jnp.ones_like, WEIGHTS), TX.init(WEIGHTS)
    for _ in range(2):
        _, state = TX.update(gradient, state, WEIGHTS)
    with jax.log_compiles(), assert_quiet("jax"):
        TX.update(gradient, state, WEIGHTS)


@contextlib.contextmanager
def assert_quiet(name):
    """Nothing is logged by this logger or those below it."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(handler)
    assert [record.getMessage() for record in records] == []


# skip_spikes


STEPS = 40


@functools.cache
def spiking(tx):
    """Compiled: what becomes of a parameter of 1 and the state, for a gradient norm and a loss per step."""

    def step(carry, seen):
        param, state = carry
        norm, loss = seen
        updates, state = tx.update(norm, state, param, value=loss)
        carry = gx.apply_updates(param, updates), state
        return carry, carry

    return jax.jit(lambda norms, losses: jax.lax.scan(step, (jnp.ones(()), tx.init(jnp.ones(()))), (norms, losses))[1])


def ordinary(seed):
    """A series about 1 that spreads by a tenth."""
    return np.random.default_rng(seed).normal(1.0, 0.1, STEPS).astype(np.float32)


WATCHING = {
    watch: gx.skip_spikes(gx.momentum(0.1), window=16, max_consecutive=3, watch=watch)
    for watch in ("norm", "loss", "both")
}


@pytest.mark.parametrize("spike", [100.0, np.nan, np.inf])
@pytest.mark.parametrize("of", ["norm", "loss"])
@pytest.mark.parametrize("watch", WATCHING)
def test_a_spike_in_what_is_watched_is_skipped_to_the_bit(watch, of, spike):
    series = {"norm": ordinary(1), "loss": ordinary(2)}
    series[of][20] = spike
    params, states = spiking(WATCHING[watch])(series["norm"], series["loss"])
    watched = watch in (of, "both")
    # a gradient that is not finite is bad whatever is watched
    skipped = watched or (of == "norm" and not np.isfinite(spike))
    np.testing.assert_array_equal(states.skipped, np.arange(STEPS) >= 20 if skipped else np.zeros(STEPS))
    unchanged = bits(at((params, states.inner), 20)) == bits(at((params, states.inner), 19))
    assert unchanged == skipped
    # what is not finite is not recorded, be it watched or not
    recorded = np.isfinite(spike) or not skipped
    assert states.seen[-1] == STEPS - (not recorded)
    for name in ("norms", "losses"):
        kept = getattr(states, name)
        assert (kept is None) == (watch != "both" and not name.startswith(watch[:4]))
        assert kept is None or np.isfinite(kept).all()


def test_steps_are_taken_until_the_window_is_half_full():
    norms = ordinary(1)
    for step, skipped in ((6, 0), (7, 1)):  # with 16: from the 8th step on, seven values are known
        spiked = np.where(np.arange(STEPS) == step, 100, norms).astype(np.float32)
        _, states = spiking(WATCHING["norm"])(spiked, norms)
        assert states.skipped[-1] == skipped


def test_a_lasting_change_of_level_becomes_the_new_level():
    norms = np.where(np.arange(STEPS) < 20, 1, 10) * ordinary(1)
    _, states = spiking(WATCHING["norm"])(norms, norms)
    assert states.skipped[20] == 1
    assert states.skipped[-1] <= 2
    assert states.skipped_in_a_row[-1] == 0


def test_spikes_that_do_not_end_go_through():
    norms = ordinary(1)
    norms[20:24] = 1e3, 1e7, 1e11, 1e15
    params, states = spiking(WATCHING["norm"])(norms, norms)
    np.testing.assert_array_equal(states.skipped[19:24], [0, 1, 2, 3, 3])
    assert np.unique(params[19:23]).size == 1
    assert params[23] < -1e12


def test_a_drop_is_no_spike():
    norms = ordinary(1)
    norms[20] = 0.0
    _, states = spiking(WATCHING["norm"])(norms, norms)
    assert states.skipped[-1] == 0


def test_constant_values_are_no_spikes():
    _, states = spiking(WATCHING["both"])(np.full(STEPS, 0.1, np.float32), np.full(STEPS, 0.7, np.float32))
    assert states.skipped[-1] == 0


def test_a_gradient_beyond_float32_is_a_spike_and_not_the_end():
    with jax.enable_x64(True):
        tx = gx.skip_spikes(gx.sgd(0.1), window=4)
        state, update, skipped = tx.init(jnp.ones(1)), jax.jit(tx.update), []
        for norm in (1.0, 1.1, 0.9, 1.0, 1e100, 1.0, 1.1):
            _, state = update(jnp.full(1, norm), state, jnp.ones(1))
            skipped.append(int(state.skipped))
    assert skipped == [0, 0, 0, 0, 1, 1, 1]
    assert np.isfinite(state.norms).all()


@pytest.mark.parametrize("value", [2, 2.0, np.float64(2), jnp.float16(2), jnp.bfloat16(2), jnp.int32(2)], ids=repr)
def test_the_loss_may_be_any_real_scalar(value):
    tx = WATCHING["loss"]
    _, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), value=value)
    assert state.losses[0] == 2.0


@pytest.mark.parametrize(
    ("extra_args", "kind", "message"),
    [
        ({}, TypeError, "value=….*no extra argument"),
        ({"vlaue": 1.0, "other": 2}, TypeError, "value=….*vlaue, other"),
        ({"value": None}, TypeError, "value must be .* real .*None"),
        ({"value": "1.0"}, TypeError, "value must be .* real .*str"),
        ({"value": True}, TypeError, "value must be .* real .*bool"),
        ({"value": 1j}, TypeError, "value must be .* real .*complex"),
        ({"value": jnp.ones(1)}, ValueError, r"value must be a scalar, .*, got shape \(1,\)"),
    ],
    ids=["missing", "misspelt", "None", "str", "bool", "complex", "vector"],
)
@pytest.mark.parametrize("watch", ["loss", "both"])
def test_a_loss_that_is_none_raises(watch, extra_args, kind, message):
    tx = WATCHING[watch]
    with pytest.raises(kind, match=message):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), **extra_args)


# accumulate


@functools.cache
def micro_steps(tx):
    """Compiled: the updates and states after every micro-step."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (params, state), (updates, state)

    return jax.jit(lambda params, gradients: jax.lax.scan(step, (params, tx.init(params)), gradients)[1])


def accumulated(tx, params, gradients):
    return micro_steps(tx)(params, gradients)


def test_bad_gradients_are_left_out_of_the_mean():
    with jax.enable_x64(True):
        gradients = np.random.default_rng(0).normal(size=(12, 3))
        gradients[[1, 4, 7], [0, 2, 1]] = BAD
        gradients[5] = np.nan
        tx = gx.accumulate(gx.sgd(1.0), every=4)
        updates, states = accumulated(tx, jnp.zeros(3), jnp.asarray(gradients))
        for start in (0, 4, 8):
            batch = gradients[start : start + 4]
            good = batch[np.isfinite(batch).all(axis=1)]
            # float64: a mean of four terms, each with three roundings of 2⁻⁵³
            np.testing.assert_allclose(updates[start + 3], -good.mean(axis=0), rtol=0, atol=2e-15)
    np.testing.assert_array_equal(states.pending, [1, 2, 3, 0] * 3)
    np.testing.assert_array_equal(states.kept, [1, 1, 2, 0, 0, 0, 1, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(states.dropped, [0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4])
    assert (np.delete(updates, [3, 7, 11], axis=0) == 0).all()


def test_the_first_and_the_last_gradient_may_be_bad():
    for bad in ([0], [3], [0, 1, 2], [1, 2, 3]):
        gradients = np.full((4, 2), 3.0, np.float32)
        gradients[bad, 1] = np.nan
        updates, _ = accumulated(gx.accumulate(gx.sgd(1.0), every=4), jnp.zeros(2), jnp.asarray(gradients))
        np.testing.assert_array_equal(updates[3], [-3.0, -3.0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.complex64], ids=lambda dtype: np.dtype(dtype).name)
def test_a_bad_leaf_of_any_dtype_is_left_out(dtype):
    params = {"a": jnp.zeros(2, dtype), "b": jnp.zeros(2)}
    gradients = jax.tree.map(lambda leaf: jnp.stack([leaf + 1, leaf + 3]), params)
    gradients["a"] = gradients["a"].at[1, 0].set(np.inf)
    updates, states = accumulated(gx.accumulate(gx.sgd(1.0), every=2), params, gradients)
    assert_same(at(updates, 1), jax.tree.map(lambda leaf: leaf - 1, params))
    assert states.dropped[1] == 1


def test_if_all_gradients_are_bad_the_failure_shows():
    gradients = jnp.asarray([[np.nan, 1.0], [2.0, np.inf], [1.0, 1.0], [1.0, 1.0]])
    updates, states = accumulated(gx.accumulate(gx.momentum(0.1), every=2), jnp.zeros(2), gradients)
    assert not np.isfinite(updates[1]).all()
    np.testing.assert_array_equal(states.dropped, [1, 2, 2, 2])


def test_a_guard_inside_skips_what_is_bad_altogether():
    gradients = jnp.asarray([[np.nan, 1.0], [2.0, np.inf], [1.0, 1.0], [3.0, np.nan]])
    tx = gx.accumulate(gx.skip_nonfinite(gx.momentum(0.1)), every=2)
    updates, states = accumulated(tx, jnp.zeros(2), gradients)
    np.testing.assert_array_equal(updates[:3], np.zeros((3, 2)))
    np.testing.assert_allclose(updates[3], [-0.01, -0.01], rtol=2e-7)  # two roundings
    np.testing.assert_array_equal(states.inner.skipped, [0, 1, 1, 1])
    np.testing.assert_array_equal(states.inner.inner.count, [0, 0, 0, 1])
    np.testing.assert_array_equal(states.dropped, [1, 2, 2, 3])
    found = gx.metrics(at(states, 3))
    assert {name: float(found[name]) for name in ("dropped", "skipped", "skipped_in_a_row")} == {
        "dropped": 3, "skipped": 1, "skipped_in_a_row": 0,
    }  # fmt: skip


def test_a_guard_around_sees_every_gradient():
    gradients = jnp.asarray([[np.nan], [2.0], [4.0], [np.inf], [1.0], [1.0]])
    tx = gx.skip_nonfinite(gx.accumulate(gx.sgd(1.0), every=2))
    updates, states = accumulated(tx, jnp.zeros(1), gradients)
    np.testing.assert_array_equal(updates[:, 0], [0, 0, -3, 0, 0, -1])
    np.testing.assert_array_equal(states.skipped, [1, 1, 1, 2, 2, 2])
    assert states.inner.dropped[-1] == 0


def test_the_mean_holds_no_frozen_leaf():
    tx = gx.accumulate(gx.by_path({"big": gx.freeze()}, default=gx.sgd(1.0)), every=2)
    params = {"big": jnp.ones(1000), "w": jnp.ones(2)}
    state = tx.init(params)
    assert isinstance(state.mean["big"], optax.MaskedNode)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 + 2 + 1  # counters, mean and count
    gradient = {"big": jnp.full(1000, jnp.nan), "w": jnp.ones(2)}
    for _ in range(2):
        updates, state = tx.update(gradient, state, params)
    assert state.dropped == 0
    assert_same(gx.apply_updates(params, updates), {"big": jnp.ones(1000), "w": jnp.zeros(2)})


def test_nested_means_are_means_of_means():
    gradients = jnp.asarray([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, 7.0, 9.0])
    tx = gx.accumulate(gx.accumulate(gx.sgd(1.0), every=2), every=2)
    updates, states = accumulated(tx, jnp.zeros(()), gradients)
    np.testing.assert_array_equal(updates, [0, 0, 0, -((1 + 3) / 2 + 5) / 2, 0, 0, 0, -(7 + 9) / 2])
    np.testing.assert_array_equal(states.dropped, [0, 0, 1, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(states.inner.dropped, [0, 0, 0, 0, 0, 1, 1, 1])


def test_outside_jit_bad_gradients_are_left_out_the_same():
    tx, params = gx.accumulate(gx.momentum(0.1), every=3), jnp.ones(2)
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32).at[1, 0].set(jnp.nan)
    updates, states = accumulated(tx, params, gradients)
    state = tx.init(params)
    for step, gradient in enumerate(gradients):
        update, state = tx.update(gradient, state, params)
        # the same operations in two compiled programs, which may round the last bit otherwise
        np.testing.assert_allclose(update, updates[step], rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, at(states, step))


def test_bfloat16_gradients_are_averaged_in_float32():
    params = jnp.zeros(1, jnp.bfloat16)
    gradients = 1 + 2.0**-7 * jnp.arange(8.0)[:, None]  # each a bfloat16 number, but their mean is none
    _, states = accumulated(gx.accumulate(gx.sgd(1.0), every=9), params, gradients.astype(jnp.bfloat16))
    assert states.mean.dtype == jnp.float32
    # a running mean of eight numbers: a few roundings of 2⁻²⁴ each, 2⁻⁸ in bfloat16
    np.testing.assert_allclose(states.mean[-1], gradients.mean(axis=0), rtol=1e-6)


# The global norm


CLIPS = {
    "clip_by_global_norm": gx.clip_by_global_norm(1.0),
    "clip_by_zscore": gx.clip_by_zscore(max_norm=1.0),
    "clip_by_average_norm": gx.clip_by_average_norm(max_norm=1.0),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_norm_over_any_dtypes_is_right_at_any_size(name):
    tx = CLIPS[name]
    pattern = {
        "half": jnp.full(4096, 3.0, jnp.float16),
        "brain": jnp.full(4096, 3.0, jnp.bfloat16),
        "single": jnp.full(4096, 3.0, jnp.float32),
        "complex": jnp.full(2048, 3 + 3j, jnp.complex64),
    }
    update = jax.jit(tx.update)
    for power in (-14, 0, 13):  # float16 holds 2⁻¹⁴ to 2¹⁵; its squares, and sums of them, it does not
        gradient = jax.tree.map(lambda leaf, power=power: leaf * 2.0**power, pattern)
        updates, _ = update(gradient, tx.init(gradient), gradient)
        size = 3 * 2.0**power * 128
        for leaf, old in zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True):
            # a norm, a quotient and a product in float32, rounded once to the leaf's dtype
            np.testing.assert_allclose(
                np.asarray(leaf, np.complex64), np.asarray(old, np.complex64) * min(1, 1 / size),
                rtol=float(jnp.finfo(leaf.dtype).eps) / 2 + 3e-7,
            )  # fmt: skip


def test_a_norm_beyond_float32_counts_as_the_largest():
    gradient = {"a": jnp.full(100, 3e38), "b": jnp.full(100, -3e38)}
    for tx in (gx.clip_by_global_norm(1e3), gx.clip_by_zscore(max_norm=1e3), gx.clip_by_average_norm(max_norm=1e3)):
        updates, state = jax.jit(tx.update)(gradient, tx.init(gradient), gradient)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        expected = 1e3 * 3e38 / float(np.finfo(np.float32).max)
        np.testing.assert_allclose(updates["a"], expected, rtol=3e-7)  # a quotient and a product, and that of the limit
        np.testing.assert_allclose(updates["b"], -expected, rtol=3e-7)


@pytest.mark.parametrize("pattern", ["equal", "one above all others"])
def test_the_norm_of_a_large_array_is_right_from_the_smallest_to_the_largest_floats(pattern):
    size = 1 << 17
    assert size > euclidean.SMALL
    array = np.full(size, 1.5) if pattern == "equal" else np.full(size, 1.5 / 64)
    array[0] = 1.5
    smallest = -126 + (0 if pattern == "equal" else 6)
    powers = jnp.arange(smallest, 127 - 9)  # the norm is up to 363 times as large as the largest element

    @jax.jit
    def norms(power):
        scaled = jnp.ldexp(jnp.asarray(array, jnp.float32), power)
        return euclidean.norm(scaled), euclidean.joint_norms([[scaled]], scaled.dtype)[0]

    for found in jax.lax.map(norms, powers):
        expected = np.linalg.norm(array) * 2.0 ** np.arange(smallest, 127 - 9)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-6)  # a sum of 2¹⁷ squares


@pytest.mark.parametrize("name", [*CLIPS, "skip_nonfinite", "observe"])
def test_the_gradient_of_an_unused_parameter_is_no_nan(name):
    inner = CLIPS.get(name, gx.clip_by_global_norm(1.0))
    tx = {"skip_nonfinite": gx.skip_nonfinite, "observe": gx.observe}.get(name, lambda tx: tx)(inner)
    params = {"used": jnp.ones(3), "unused": jnp.ones((4, 5))}

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda params: 10 * jnp.sum(params["used"]))(params)
        return tx.update(gradient, state, params)

    updates, state = step(params, tx.init(params))
    np.testing.assert_allclose(updates["used"], np.full(3, 3**-0.5), rtol=3e-7)  # a norm, a quotient and a product
    np.testing.assert_array_equal(updates["unused"], np.zeros((4, 5)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# One norm for all who want it


def norms_in(jaxpr, counts=None):
    """How often a jaxpr measures a leaf, and how often it sums anything up."""
    counts = collections.Counter() if counts is None else counts
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            counts[equation.params["name"]] += 1
        counts[equation.primitive.name] += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                norms_in(getattr(value, "jaxpr", value), counts)
    return counts


def measured(tx):
    params = {name: jnp.ones(3) for name in "abcd"}
    counts = norms_in(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr)
    return counts["joint_measure"], counts["leaf_measure"]


def test_a_norm_that_several_want_is_taken_once():
    clipped = gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1))
    assert measured(clipped) == (1, 0)  # of all leaves at once
    assert measured(gx.skip_nonfinite(clipped)) == (1, 0)
    assert measured(gx.skip_nonfinite(gx.skip_spikes(clipped, window=2))) == (1, 0)
    assert measured(gx.chain(gx.clip_by_zscore(), gx.adamw(0.1))) == (1, 0)
    assert measured(gx.observe(gx.skip_nonfinite(clipped), of="gradient")) == (1, 0)
    assert measured(gx.observe(gx.skip_nonfinite(clipped))) == (3, 0)  # and of the update and the parameters
    # by leaf, three norms of each of four; what clips and guards makes its own of them
    assert measured(gx.observe(gx.skip_nonfinite(clipped), by="leaf")) == (0, 12)


def test_what_follows_a_change_is_measured_anew():
    twice = gx.chain(gx.clip_by_global_norm(1.0), gx.scale(2.0), gx.clip_by_global_norm(1.0))
    assert measured(twice) == (2, 0)
    updates, _ = twice.update(jnp.asarray([30.0, 40.0]), twice.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [0.6, 0.8], rtol=6e-7)  # twice a norm, a quotient and a product


@pytest.mark.parametrize("clip", [gx.clip_by_global_norm, gx.clip_by_leaf_norm])
def test_a_huge_finite_gradient_is_not_clipped_to_nothing(clip):
    grads = jnp.full(4, 1e38)
    updates, _ = clip(1.0).update(grads, clip(1.0).init(grads))
    # 1/2e38 would be flushed to zero; the smallest normal number in its place is too large by 2.4
    assert (updates > 0).all()
    assert np.linalg.norm(updates) < 4


def test_zscore_clips_again_after_a_norm_whose_square_overflows():
    tx = gx.clip_by_zscore(warmup=3, decay=0.5, max_norm=None)
    state = tx.init(jnp.zeros(1))
    for gradient in (1.0, 2.0, 1e25, *[1.0] * 200, 1e6):
        updates, state = tx.update(jnp.array([gradient]), state)
    assert jnp.isfinite(state.norm_variance)
    assert updates[0] < 10
