"""Noise has the distribution that it should, is other noise everywhere, and the same wherever a run goes on.

The checks that need eight devices run once as a script, in a process whose CPU poses as so many.
"""

from __future__ import annotations

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradxform as gx
from tests.support.eight_devices import judge, outcomes_of, report
from tests.support.trees import assert_same

pytestmark = pytest.mark.once

COUNT = 100_000
ZEROS = {"kernel": jnp.zeros((100, 500)), "bias": jnp.zeros(COUNT // 2)}


def noise(tx, steps=1, zeros=ZEROS, state=None):
    """What is added to gradients of zero in each step, stacked, and the last state."""
    state, found = tx.init(zeros) if state is None else state, []
    for _ in range(steps):
        updates, state = tx.update(zeros, state, zeros)
        found.append(updates)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found), state


def all_of(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def correlation(one, other):
    return abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1])


@pytest.mark.parametrize(("eta", "gamma"), [(0.01, 0.55), (4.0, 0.0), (1e-6, 2.0)])
def test_mean_and_deviation_are_those_that_fade(eta, gamma):
    found, _ = noise(gx.add_noise(eta, gamma, key=3), steps=3)
    for t in (1, 2, 3):
        numbers = all_of(jax.tree.map(lambda leaf, t=t: leaf[t - 1], found))
        deviation = math.sqrt(eta / t**gamma)
        # of n numbers the mean has the deviation σ/√n, and the deviation σ/√(2n): each to five of them
        assert abs(numbers.mean()) < 5 * deviation / math.sqrt(COUNT)
        assert abs(numbers.std() - deviation) < 5 * deviation / math.sqrt(2 * COUNT)
        assert abs(np.mean(np.abs(numbers) < deviation) - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / COUNT)


def test_it_grows_with_the_root_of_eta_and_fades_with_the_step_exactly():
    one, _ = noise(gx.add_noise(1.0, 0.0), steps=4)
    large, _ = noise(gx.add_noise(4.0, 0.0), steps=4)
    fading, _ = noise(gx.add_noise(1.0, 2.0), steps=4)
    for name, leaf in one.items():
        np.testing.assert_array_equal(large[name], 2 * leaf)
        for t in (1, 2, 4):
            np.testing.assert_array_equal(fading[name][t - 1], leaf[t - 1] / t)
        # (1/3)·z rounds once more than z/3
        np.testing.assert_allclose(fading[name][2], leaf[2] / 3, rtol=2e-7)


def test_no_eta_is_no_noise():
    found, _ = noise(gx.add_noise(0.0, 0.55), steps=2)
    np.testing.assert_array_equal(all_of(found), np.zeros(2 * COUNT))


def test_the_gradient_passes_and_noisy_sgd_goes_down_it():
    grads = jax.tree.map(jnp.ones_like, ZEROS)
    tx = gx.add_noise(0.01, 0.55, key=5)
    added, _ = tx.update(grads, tx.init(ZEROS))
    alone, _ = noise(tx)
    sgd = gx.noisy_sgd(0.5, 0.01, 0.55, key=5)
    moved, _ = sgd.update(grads, sgd.init(ZEROS))
    for name, leaf in alone.items():
        np.testing.assert_allclose(added[name], 1 + leaf[0], rtol=0, atol=2e-7)  # a float32 rounding of numbers near 1
        np.testing.assert_array_equal(moved[name], -0.5 * added[name])


def test_leaves_steps_stages_and_seeds_have_other_numbers():
    # two columns of n numbers that have nothing to do with one another correlate by 1/√n
    limit = 5 / math.sqrt(COUNT // 2)
    alike = {"a": jnp.zeros(COUNT // 2), "b": jnp.zeros(COUNT // 2)}
    tx = gx.add_noise(1.0, 0.0)
    first, _ = noise(tx, steps=2, zeros=alike)
    assert correlation(first["a"][0], first["b"][0]) < limit
    assert correlation(first["a"][0], first["a"][1]) < limit
    twice, _ = noise(gx.chain(tx, tx), zeros=alike)
    assert correlation(twice["a"][0] - first["a"][0], first["a"][0]) < limit
    other, _ = noise(gx.add_noise(1.0, 0.0, key=1), zeros=alike)
    assert correlation(other["a"][0], first["a"][0]) < limit


def test_a_run_that_goes_on_from_a_saved_state_has_the_same_numbers():
    serialization = pytest.importorskip("flax.serialization")
    zeros = {"a": jnp.zeros(7), "b": jnp.zeros((2, 3))}
    for tx in (gx.add_noise(1.0, 0.5, key=3), gx.noisy_sgd(0.1, key=jax.random.key(8))):
        _, middle = noise(tx, steps=2, zeros=zeros)
        expected = noise(tx, steps=2, zeros=zeros, state=middle)
        for restored in (
            pickle.loads(pickle.dumps(middle)),
            serialization.from_bytes(tx.init(zeros), serialization.to_bytes(middle)),
        ):
            restored = jax.tree.map(jnp.asarray, restored)
            assert_same(noise(tx, steps=2, zeros=zeros, state=restored), expected)


def test_the_seed_in_the_state_is_what_counts():
    """An optimizer that is built with another seed goes on with that of the state."""
    _, state = noise(gx.add_noise(1.0, 0.5, key=3))
    expected, _ = noise(gx.add_noise(1.0, 0.5, key=3), state=state)
    found, _ = noise(gx.add_noise(1.0, 0.5, key=4), state=state)
    assert_same(*(jax.tree.map(jnp.asarray, tree) for tree in (found, expected)))


def test_a_number_and_its_key_are_one_seed():
    keys = (3, jax.random.key(3), jax.random.PRNGKey(3))
    found = [noise(gx.add_noise(1.0, 0.5, key=key))[0] for key in keys]
    for other in found[1:]:
        assert_same(*(jax.tree.map(jnp.asarray, tree) for tree in (found[0], other)))


def test_members_with_other_seeds_have_other_numbers():
    zeros = jnp.zeros(COUNT // 10)

    @jax.jit
    @jax.vmap
    def member(key):
        tx = gx.noisy_sgd(1.0, 1.0, 0.0, key=key)
        return tx.update(zeros, tx.init(zeros))[0]

    keys = jax.random.split(jax.random.key(0), 3)
    together = member(keys)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert correlation(together[one], together[other]) < 5 / math.sqrt(len(zeros))
    alone = gx.noisy_sgd(1.0, 1.0, 0.0, key=keys[1])
    np.testing.assert_allclose(together[1], alone.update(zeros, alone.init(zeros))[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_noise_of_other_dtypes(dtype):
    zeros = jnp.zeros(COUNT, dtype)
    numbers = np.asarray(noise(gx.add_noise(4.0, 0.0), zeros=zeros)[0][0])
    assert numbers.dtype == dtype
    # a complex number has two parts of half the variance
    variance = np.mean(np.abs(numbers.astype(np.complex64)) ** 2)
    assert variance == pytest.approx(4.0, rel=5 * math.sqrt(2 / COUNT))


@pytest.mark.parametrize("key", [None, 1.0, "seed", True, jnp.zeros(2), jax.random.split(jax.random.key(0), 2)])
def test_what_is_no_seed_raises(key):
    with pytest.raises(TypeError, match="key must be a whole number or a key"):
        gx.add_noise(1.0, 0.5, key=key)


# On eight devices


CHECKS = {}
SPECS = {"rows": P("x", None), "columns": P(None, "x"), "same": P()}
SHAPES = {"rows": (16, 8), "columns": (8, 16), "same": (16,)}


def check(function):
    CHECKS[function.__name__] = function
    return function


def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def zeros_of(shapes):
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


TX = gx.noisy_sgd(1.0, 1.0, 0.5, key=9)


@check
def a_mesh_has_the_numbers_of_one_device():
    expected, _ = noise(TX, steps=2, zeros=zeros_of(SHAPES))
    params = {name: jax.device_put(leaf, NamedSharding(mesh(), SPECS[name])) for name, leaf in zeros_of(SHAPES).items()}
    for update in (TX.update, jax.jit(TX.update)):
        state = TX.init(params)
        for t in range(2):
            updates, state = update(params, state, params)
            for name, leaf in updates.items():
                # the numbers are the same, and round once more or less
                np.testing.assert_allclose(leaf, expected[name][t], rtol=1e-6, atol=1e-7)


@check
def shards_have_other_numbers_and_copies_the_same():
    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh(), in_specs=(SPECS,), out_specs=SPECS)
    def in_shards(params):
        return TX.update(params, TX.init(params), params)[0]

    found = in_shards(zeros_of(SHAPES))  # JAX itself sees to it that "same" is
    parts = [np.split(np.asarray(found["rows"]), 8, axis=0), np.split(np.asarray(found["columns"]), 8, axis=1)]
    for of_leaf in parts:
        flat = [part.tobytes() for part in of_leaf]
        assert len(set(flat)) == 8
    alone, _ = noise(TX, zeros=zeros_of(SHAPES))
    np.testing.assert_allclose(found["same"], alone["same"][0], rtol=1e-6, atol=1e-7)


# pytest's side


@pytest.fixture(scope="session")
def outcomes():
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(name, outcomes):
    judge(outcomes[name])


if __name__ == "__main__":
    report(CHECKS)
