"""Packed small leaves train as if each were by itself, to the bit, and their state can be exchanged."""

from __future__ import annotations

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gradxform as gx
from tests.eight_devices import outcomes_of, report
from tests.strategies import assert_same, signature

SIZE = 16
SHAPES = {"kernel": (3, 4), "bias": (4,), "scalar": (), "large": (5, 8)}


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    layers = [{name: rng.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(2)]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), layers)


PARAMS = start()


def gradients(number, params=PARAMS):
    rng = np.random.default_rng(number)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def walk(tx, params=PARAMS, steps=2):
    state = tx.init(params)
    for number in range(steps):
        params, state = gx.step(tx, gradients(number, params), state, params)
    return params, state


def sign(threshold):
    def update(update, state, param, step):
        return jnp.where(jnp.abs(update) > step.threshold, jnp.sign(update), 0), state

    return gx.lift(gx.no_slots, update, threshold=threshold)


EXACT = {
    "adamw": gx.adamw(0.1),
    "momentum": gx.sgd(0.1, momentum=0.9, nesterov=True),
    "predicate": gx.adamw(0.1, weight_decay=0.5, mask=lambda path, leaf: leaf.ndim > 1 and path[0] == "0"),
    "groups": gx.by_path(
        {".*bias": {"learning_rate": gx.times(0.5)}, "0/kernel": gx.freeze(), "1/scalar": gx.sgd(0.1)},
        default=gx.adamw(optax.linear_schedule(0.1, 0.0, 5)),
    ),
    "leaf norms of some": gx.by_path({".*kernel": gx.clip_by_leaf_norm(1.0)}, default=gx.adamw(0.1)),
    "own rule": gx.chain(sign(0.5), gx.scale_by_learning_rate(0.1)),
}


@pytest.mark.parametrize("tx", EXACT.values(), ids=EXACT)
def test_updates_and_states_are_the_bits_of_the_plain_transformation(tx):
    packed = gx.packed(tx, SIZE)
    plain = walk(tx)
    params, state = walk(packed)
    assert_same(params, plain[0])
    assert_same(gx.unpack_state(packed, state, params), plain[1])
    assert_same(gx.pack_state(packed, plain[1], params), state)
    updates, _ = packed.update(gradients(2), state, params)
    assert_same(updates, tx.update(gradients(2), plain[1], plain[0])[0])
    assert signature(state) == signature(packed.init(PARAMS))


def mixed():
    first, second = start()
    return [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), first), second]


@pytest.mark.parametrize("params", [start(jnp.bfloat16), mixed()], ids=["bfloat16", "mixed"])
def test_low_precision_parameters(params):
    tx, packed = EXACT["adamw"], gx.packed(EXACT["adamw"], SIZE)
    expected, plain = walk(tx, params, 2)
    actual, state = walk(packed, params, 2)
    assert_same(actual, expected)
    assert_same(gx.unpack_state(packed, state, params), plain)
    grads = gradients(2, params)
    assert_same(packed.update(grads, state, params)[0], tx.update(grads, plain, params)[0])


def test_a_global_norm_is_of_all_leaves():
    tx = gx.chain(gx.clip_by_global_norm(0.5), gx.adamw(0.1))
    packed = gx.packed(tx, SIZE)
    for one, other in zip(jax.tree.leaves(walk(packed)[0]), jax.tree.leaves(walk(tx)[0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)  # the norm may differ in its last bit
    clip = gx.packed(gx.clip_by_global_norm(0.5), SIZE)
    clipped, _ = clip.update(gradients(0), clip.init(PARAMS), PARAMS)
    norm = np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(clipped)]))
    assert float(norm) == pytest.approx(0.5, rel=1e-6)


WRAPPERS = {
    "skip_nonfinite": gx.skip_nonfinite,
    "accumulate": lambda tx: gx.accumulate(tx, 2),
    "observe": gx.observe,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_goes_around_it(wrap):
    tx = wrap(gx.adamw(0.1))
    packed = wrap(gx.packed(gx.adamw(0.1), SIZE))
    (params, state), (expected, plain) = walk(packed, steps=3), walk(tx, steps=3)
    assert_same(params, expected)
    assert_same(gx.unpack_state(packed, state, params), plain)
    assert_same(gx.pack_state(packed, plain, params), state)


def test_a_bad_step_changes_no_bit():
    tx = gx.skip_nonfinite(gx.packed(gx.adamw(0.1), SIZE))
    params, state = walk(tx)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    new_params, new_state = gx.step(tx, bad, state, params)
    assert_same((new_params, new_state.inner), (params, state.inner))


def test_hyperparameters_metrics_description_and_maps():
    tx = gx.adamw(gx.live(0.1), mask=".*kernel")
    packed = gx.packed(tx, SIZE)
    params, state = walk(packed)
    state = gx.set_hyperparams(state, learning_rate=0.0)
    assert_same(gx.step(packed, gradients(2), state, params)[0], params)
    assert "learning_rate" in gx.metrics(state)
    plain, found = (gx.describe(some, PARAMS, show=False) for some in (tx, gx.observe(packed)))
    assert [leaf.state_bytes for leaf in found.leaves] == [leaf.state_bytes for leaf in plain.leaves]
    assert [leaf.hyperparameters for leaf in found.leaves] == [leaf.hyperparameters for leaf in plain.leaves]
    marked = optax.tree_map_params(packed, lambda moment: "moment", state, transform_non_params=lambda leaf: "other")
    assert set(jax.tree.leaves((marked.mu, marked.nu))) == {"moment"}
    assert set(jax.tree.leaves((marked.count, marked.hyperparams))) == {"other"}
    assert gx.packed(gx.adamw(0.1)) == gx.packed(gx.adamw(0.1)) != gx.packed(gx.adamw(0.1), SIZE)
    assert repr(gx.packed(gx.scale(2.0))) == "packed(scale(2.0))"
    assert repr(gx.packed(gx.scale(2.0), SIZE)) == "packed(scale(2.0), max_size=16)"


def test_scan_vmap_donation_and_checkpoints():
    tx = gx.packed(gx.adamw(0.1), SIZE)
    rows = jax.tree.map(lambda *some: jnp.stack(some), *(gradients(number) for number in range(3)))

    def step(carry, gradient):
        return gx.step(tx, gradient, carry[1], carry[0]), None

    loop, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, rows))((PARAMS, tx.init(PARAMS)))
    donated = jax.tree.map(jnp.array, (PARAMS, tx.init(PARAMS)))
    jitted = jax.jit(lambda carry, gradient: step(carry, gradient)[0], donate_argnums=0)
    for number in range(3):
        donated = jitted(donated, gradients(number))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (PARAMS, tx.init(PARAMS)))
    twice = both
    for number in range(3):
        twice = jax.vmap(lambda carry, gradient: step(carry, gradient)[0], (0, None))(twice, gradients(number))
    for other in (loop, jax.tree.map(lambda leaf: leaf[1], twice)):
        for a, b in zip(jax.tree.leaves(donated), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # XLA contracts differently in each program
    _, state = walk(tx)
    assert_same(pickle.loads(pickle.dumps(state)), state)
    assert_same(flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state)), state)


def test_nothing_small_is_the_plain_transformation():
    tx = gx.packed(gx.adamw(0.1), 1)
    large = [{"large": layer["large"]} for layer in PARAMS]
    assert_same(walk(tx, large), walk(gx.adamw(0.1), large))
    assert_same(gx.unpack_state(tx, tx.init(large), large), gx.adamw(0.1).init(large))
    assert tx.init({}).mu == {}


def test_all_parameters_as_one_array():
    flat, unravel = ravel_pytree(PARAMS)
    tx = gx.adamw(0.1)
    grads, _ = ravel_pytree(gradients(0))
    params, _ = gx.step(tx, grads, tx.init(flat), flat)
    assert_same(unravel(params), gx.step(tx, gradients(0), tx.init(PARAMS), PARAMS)[0])


TX = gx.packed(gx.adamw(0.1), SIZE)


def test_leaves_with_a_rule_for_whole_leaves_stay_as_they_are():
    tx = gx.packed(gx.by_path({".*kernel": gx.clip_by_leaf_norm(1.0)}, default=gx.adamw(0.1)), SIZE)
    assert [flat.shape for flat in tx.init(PARAMS).mu.packed] == [(10,)]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gx.packed(optax.adam(0.1)), TypeError, "optax.chain & chain(optax_tx, packed(tx))"),
        (lambda: gx.packed(gx.skip_nonfinite(gx.adamw(0.1))), TypeError, "skip_nonfinite(packed(tx))"),
        (lambda: gx.packed(0.1), TypeError, "tx of packed & 0.1"),
        (lambda: gx.packed(gx.adamw(0.1), 0), ValueError, "max_size & 0"),
        (lambda: gx.packed(gx.adamw(0.1), 1.5), TypeError, "max_size & 1.5"),
        (
            lambda: gx.packed(gx.clip_by_leaf_norm(1.0)).init(PARAMS),
            ValueError,
            "leaf_norm & params[0]['bias']",
        ),
        (lambda: gx.packed(gx.clip_by_average_norm()).init(PARAMS), ValueError, "clip_by_average_norm & nothing to do"),
        (lambda: gx.packed(gx.clip_by_param_norm()).init(PARAMS), ValueError, "clip_by_param_norm"),
        (lambda: gx.packed(scalar_state()).init(PARAMS), ValueError, "scalar_state"),
        (lambda: TX.update(PARAMS, TX.init(PARAMS)), ValueError, "packed needs the parameters"),
        (lambda: TX.update(PARAMS, gx.adamw(0.1).init(PARAMS), PARAMS), TypeError, "state.nu & pack_state"),
        (lambda: TX.update(PARAMS, gx.sgd(0.1).init(PARAMS), PARAMS), TypeError, "state is State"),
        (
            lambda: TX.update(PARAMS, TX.init(PARAMS[:1]), PARAMS),
            ValueError,
            "state.nu.packed[0] & [34]",
        ),
        (lambda: gx.unpack_state(gx.adamw(0.1), (), PARAMS), TypeError, "unpack_state & gx.packed"),
        (lambda: gx.unpack_state(TX, gx.sgd(0.1).init(PARAMS), PARAMS), TypeError, "unpack_state & mu"),
        (lambda: gx.pack_state(TX, TX.init(PARAMS), PARAMS), TypeError, "packed already"),
        (lambda: gx.pack_state(TX, gx.adamw(0.1).init(PARAMS[:1]), PARAMS), ValueError, "state.nu[1]"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words.split(" & "):
        assert word in str(caught.value)


def scalar_state():
    def update(update, state, param, step):
        return update, state

    return gx.lift(lambda param: {"total": jnp.zeros(())}, update)


# On eight devices


def sharded_parameters_under_jit_are_those_of_one_device():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    params = {"kernel": jnp.ones((8, 2)), "bias": jnp.arange(3.0), "large": jnp.ones((8, 16))}
    specs = {"kernel": PartitionSpec("x"), "bias": PartitionSpec(), "large": PartitionSpec(None, "x")}
    spread = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    tx = gx.packed(gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1)), SIZE)
    state = tx.init(spread)
    assert state.mu.packed[0].sharding.is_fully_replicated
    assert state.mu.others["large"].sharding == spread["large"].sharding
    step = jax.jit(lambda params, state, grads: gx.step(tx, grads, state, params))
    alone, alone_state = params, tx.init(params)
    for number in range(3):
        grads = gradients(number, params)
        there = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in grads.items()}
        spread, state = step(spread, state, there)
        alone, alone_state = step(alone, alone_state, grads)
    assert spread["large"].sharding.is_equivalent_to(NamedSharding(mesh, specs["large"]), 2)
    for one, other in zip(jax.tree.leaves((spread, state)), jax.tree.leaves((alone, alone_state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)  # a norm summed in another order


CHECKS = {"jit": sharded_parameters_under_jit_are_those_of_one_device}


def test_on_eight_devices():
    assert outcomes_of(__file__) == dict.fromkeys(CHECKS)


if __name__ == "__main__":
    report(CHECKS)
