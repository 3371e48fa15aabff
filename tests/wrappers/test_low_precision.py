"""Parameters and moments below float32 follow the float32 run: in the mean, or as far as their residual reaches."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform.numerics import rounding
from tests.support import chex
from tests.support.eight_devices import on_eight_devices
from tests.support.trees import gradient, signature, walk

pytestmark = pytest.mark.once

LOW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FORMS = {
    "stochastic": lambda tx: gx.stochastic_rounding(tx, 0),
    "bfloat16": gx.compensated,
    "int8": lambda tx: gx.compensated(tx, "int8"),
    "int16": lambda tx: gx.compensated(tx, "int16"),
    "master": gx.master_weights,
}
NEAREST = {name: form for name, form in FORMS.items() if name != "stochastic"}
every_low = pytest.mark.parametrize("dtype", LOW)
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# one without a residual, one with a rounded one, one with a copy
some_forms = pytest.mark.parametrize("name", ["stochastic", "int8", "master"])

MIXED = {
    "bfloat16": jnp.asarray([[1.0, -2.0, 0.3], [-0.0, 1e-3, 500.0]], jnp.bfloat16),
    "float16": jnp.asarray([1.0, -0.0, 3e-6, -40.0], jnp.float16),
    "float32": jnp.asarray([1.0, -0.0, 1e-30], jnp.float32),
    "complex64": jnp.asarray([1.0 + 2.0j, -3.0j], jnp.complex64),
}
TREE = {"a": MIXED["bfloat16"], "b": MIXED["bfloat16"][0]}
MOMENTUM = gx.sgd(0.1, momentum=0.9)

RANDOM = np.random.default_rng(0)
START, ANYWHERE = (RANDOM.normal(size=(2, 2000)) * 10.0 ** RANDOM.uniform(-6, 4, (2, 2000))).astype(np.float32)


def gradients_for(params, steps=4, dtype=None):
    """Normal gradients for each step, stacked."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=(steps, *p.shape)), dtype or p.dtype), params)


def steps(tx, params, gradients, state=None):
    """The parameters and the state after a step per gradient."""
    state = tx.init(params) if state is None else state
    for step in range(len(jax.tree.leaves(gradients)[0])):
        updates, state = tx.update(gradient(gradients, step), state, params)
        params = gx.apply_updates(params, updates)
    return params, state


@functools.partial(jax.jit, static_argnums=0)
def scanned(tx, params, gradients):
    """The same in `lax.scan`."""

    def step(carry, grads):
        updates, state = tx.update(grads, carry[1], carry[0])
        return (gx.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]


# A transformation that stands still and keeps the parameters that it saw.
SPY = optax.GradientTransformation(
    lambda params: params, lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), params)
)


def stands_for(form, params, state):
    """The float32 values that low-precision parameters and their residuals stand for."""
    wide = jax.tree.map(jnp.float32, params)
    return form(SPY).update(wide, state._replace(inner=wide), params)[1].inner


def assert_bits(left: Any, right: Any) -> None:
    """The same structure, dtypes and bits, those of −0 included."""
    assert signature(left) == signature(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).reshape(-1).view(np.uint8) for x in (a, b)))


def in_double(x):
    return np.asarray(x).astype(np.float64)


def lenient():
    """Foreign code promotes, as JAX lets it by default."""
    return jax.numpy_dtype_promotion("standard")


# One rounding

DRAWS = 1 << 16


def random_bits(shape):
    return rounding.random_bits(jnp.uint32(1), shape)


@every_low
def test_only_the_two_neighbours_occur_and_the_mean_is_right(dtype):
    values = np.float32([1.001, -1.001, 3.3, -1e-4, 6.1e-5, 3e-6, -2.2e-8, 1e-9, 4321.7, -60001.0])  # subnormals too
    shape = (len(values), DRAWS)
    rounded = rounding.round_to(jnp.broadcast_to(values[:, None], shape), dtype, random_bits(shape))
    for value, draws in zip(values, in_double(rounded), strict=True):
        near = value.astype(LOW[dtype])
        other = np.nextafter(near, LOW[dtype](np.inf if near < value else -np.inf))
        low, high = sorted(in_double([near, other]))
        assert set(np.unique(draws)) == {low, high}
        # A draw that is low or high with the right mean has this deviation. The seed is fixed; five standard errors
        # are exceeded by one honest seed in two million, and by a probability that is wrong by 0.01.
        deviation = np.sqrt((value - low) * (high - value))
        assert abs(draws.mean() - value) <= 5 * deviation / np.sqrt(DRAWS)


@every_low
def test_every_number_of_the_dtype_is_a_fixed_point(dtype):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(LOW[dtype]).astype(np.float32)  # −0, infinities and NaN too
    flushed = (numbers != 0) & (np.abs(numbers) < np.finfo(np.float32).smallest_normal)  # by XLA
    numbers = jnp.asarray(numbers[~flushed])
    for bits in (None, random_bits(numbers.shape), *(jnp.full(numbers.shape, x, jnp.uint32) for x in (0, 2**32 - 1))):
        rounded = rounding.round_to(numbers, dtype, bits)
        number = ~jnp.isnan(numbers)
        assert_bits(rounded[number], numbers[number])
        assert jnp.isnan(rounded[~number]).all()


@every_low
def test_without_bits_it_is_the_nearest_number_as_numpy_finds_it(dtype):
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25]
    values = np.concatenate([ANYWHERE, ANYWHERE * 1e-6, ties]).astype(np.float32)
    assert_bits(rounding.round_to(jnp.asarray(values), dtype), jnp.asarray(values.astype(LOW[dtype]), jnp.float32))


@every_low
def test_what_is_too_large_becomes_the_largest_number(dtype):
    largest = np.float32(jnp.finfo(dtype).max)
    beyond = jnp.asarray([np.nextafter(largest, np.float32(np.inf)), 3.4e38], jnp.float32)
    for bits in (None, jnp.full(2, 2**32 - 1, jnp.uint32)):
        np.testing.assert_array_equal(rounding.round_to(beyond, dtype, bits), largest)
        np.testing.assert_array_equal(rounding.round_to(-beyond, dtype, bits), -largest)


def assert_unrelated(streams):
    """No two streams are correlated, nor one with itself, at any distance between their elements."""
    size = streams.shape[1]
    standard = (streams - streams.mean(axis=1, keepdims=True)) / streams.std(axis=1, keepdims=True)
    spectra = np.fft.rfft(standard, axis=1)
    for index, spectrum in enumerate(spectra):
        correlations = np.fft.irfft(spectra[index:] * spectrum.conj(), size, axis=1) / size
        correlations[0, 0] = 0  # with itself at distance 0
        # of about a million honest correlations the largest is some 5 standard errors; a repetition would be 64
        assert np.abs(correlations).max() * np.sqrt(size) < 6.5


def test_the_bits_of_steps_leaves_and_elements_are_unrelated():
    params = {name: jnp.ones((64, 64), jnp.bfloat16) for name in "abc"}
    halfway = jax.tree.map(lambda p: jnp.full((8, *p.shape), -(2.0**-8), jnp.float32), params)
    updates, _ = walk(gx.stochastic_rounding(gx.sgd(1.0), jax.random.key(0)), params, halfway, steps=8)
    assert_unrelated(np.stack([in_double(leaf).ravel() for tree in updates for leaf in tree.values()]))


def test_the_bits_of_steps_leaves_and_moments_are_unrelated():
    # the bits are a hash of the number and the step: numbers that differ by less than they are rounded by
    numbers = np.random.default_rng(0).uniform(1.002, 1.0021, (3, 64, 64))
    params = {name: jnp.asarray(some, jnp.float32) for name, some in zip("abc", numbers, strict=True)}
    tx = gx.normalize_by_rms(0.0, of=gx.scale_by_momentum(0.0, state_dtype="bfloat16"), state_dtype="bfloat16")
    state, moments = tx.init(params), []
    for _ in range(4):
        _, state = tx.update(params, state)
        moments += [in_double(leaf).ravel() for leaf in jax.tree.leaves((state.mu, state.nu))]
    assert_unrelated(np.stack(moments))


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    params, gradients = jnp.ones(64, jnp.bfloat16), jnp.full((1, 64), -(2.0**-8), jnp.float32)
    keys = (3, np.int64(3), jax.random.key(3), jax.random.PRNGKey(3))
    updates = [walk(gx.stochastic_rounding(gx.sgd(1.0), key), params, gradients, steps=1)[0][0] for key in keys]
    assert_bits(updates[0], updates[1])
    assert_bits(updates[2], updates[3])
    assert (updates[0] != updates[2]).any()


# Where it runs does not matter

# Numbers for which float32 rounds no sum and no product, so that it does not matter how they are compiled.
EXACT = {"a": jnp.ones((4, 16), jnp.bfloat16), "b": jnp.full((8,), -0.75, jnp.float16)}
EXACT_GRADIENTS = jax.tree.map(
    lambda p: jnp.asarray(np.random.default_rng(p.size).integers(-32, 32, (6, *p.shape)) / 16, p.dtype), EXACT
)


@every_form
def test_jit_scan_vmap_and_donation_change_no_bit(form):
    tx = form(gx.sgd(2.0**-9, momentum=0.5, accumulator_dtype="bfloat16"))
    expected = steps(tx, EXACT, EXACT_GRADIENTS)
    assert_bits(scanned(tx, EXACT, EXACT_GRADIENTS), expected)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return gx.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, EXACT)
    state = tx.init(params)
    for index in range(6):
        params, state = step(params, state, gradient(EXACT_GRADIENTS, index))
    assert_bits((params, state), expected)

    other = jax.tree.map(jnp.negative, EXACT)
    both = jax.vmap(functools.partial(scanned, tx), in_axes=(0, None))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), EXACT, other), EXACT_GRADIENTS
    )
    assert_bits(gradient(both, 0), expected)
    assert_bits(gradient(both, 1), steps(tx, other, EXACT_GRADIENTS))


def test_vmap_over_seeds_gives_each_run_its_own_noise():
    tx, params = FORMS["stochastic"](gx.sgd(2.0**-9)), EXACT["a"]
    state = tx.init(params)

    def update(seed):
        return tx.update(params, state._replace(seed=seed), params)[0]

    seeds = jnp.asarray([1, 2], jnp.uint32)
    updates = jax.vmap(update)(seeds)
    for seed, alone in zip(seeds, updates, strict=True):
        assert_bits(alone, update(seed))
    assert (updates[0] != updates[1]).any()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import gradxform as gx
import optax

mesh = Mesh(np.array(jax.devices()), ("x",))
assert mesh.size == 8
random = np.random.default_rng(0)
specs = {"rows": P("x"), "columns": P(None, "x"), "wide": P("x")}
params = {
    "rows": jnp.asarray(random.normal(size=(16, 3)), jnp.bfloat16),
    "columns": jnp.asarray(random.normal(size=(3, 16)), jnp.float16),
    "wide": jnp.asarray(random.normal(size=8), jnp.float32),
}

def sharded(tree, mesh=mesh):
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}

def run(update, params, state):
    for _ in range(2):
        updates, state = update(params, state, params)
        params = gx.apply_updates(params, updates)
    return params, state

def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]

for wrap in (lambda tx: gx.stochastic_rounding(tx, 0), lambda tx: gx.compensated(tx, "int8"), gx.master_weights):
    tx = wrap(gx.momentum(1e-3, state_dtype="bfloat16"))
    expected = bits(run(tx.update, params, tx.init(params)))
    for update in (tx.update, jax.jit(tx.update)):
        result = run(update, sharded(params), tx.init(sharded(params)))
        assert bits(result) == expected, tx
        for tree in (result[0], result[1].residual, result[1].inner.mu):
            for name, leaf in tree.items():
                if isinstance(leaf, jax.Array):
                    assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), leaf.ndim), (tx, name)

# parameters that something inside moves outside of a rule's compiled call
typed = Mesh(mesh.devices, ("x",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(typed):
    for tx in (gx.compensated(optax.sgd(1e-3)), gx.master_weights(gx.observe(gx.momentum(1e-3)))):
        expected = bits(run(tx.update, params, tx.init(params))[0])
        there = sharded(params, typed)
        for update in (tx.update, jax.jit(tx.update)):
            assert bits(run(update, there, tx.init(there))[0]) == expected, tx
print("sharded")
"""


def test_eight_devices_give_the_bits_of_one():
    assert on_eight_devices("-c", SHARDED) == "sharded\n"


@every_form
def test_the_state_keeps_its_signature(form):
    tx = form(MOMENTUM)
    updates, state = tx.update(MIXED, tx.init(MIXED), MIXED)
    assert signature(state) == signature(tx.init(MIXED))
    wide = {"bfloat16": "float32", "float16": "float32", "float32": "float32", "complex64": "complex64"}
    assert {name: str(leaf.dtype) for name, leaf in updates.items()} == wide


@every_form
def test_a_restored_state_goes_on_with_the_same_bits(form):
    serialization = pytest.importorskip("flax.serialization")
    tx, gradients = form(gx.momentum(1e-3, state_dtype="bfloat16")), gradients_for(TREE)
    params, state = steps(tx, TREE, jax.tree.map(lambda leaf: leaf[:2], gradients))
    restored = serialization.from_bytes(tx.init(TREE), serialization.to_bytes(state))
    rest = jax.tree.map(lambda leaf: leaf[2:], gradients)
    assert_bits(steps(tx, params, rest, jax.tree.map(jnp.asarray, restored)), steps(tx, TREE, gradients))


# Steps that plain bfloat16 loses

STEPS = 300
ELEMENTS = 512
ADAMW = {"gx": gx.adamw(1e-3), "optax": optax.adamw(1e-3)}

# How far the values trained may be off the float32 run: every step is rounded to a whole number of the residual's
# units without bias, so that the deviation grows with √STEPS, by half a unit each time at most; five of these for the
# worst element. Between ½ and 1 half a step of bfloat16 is 2⁻⁹, and the unit of its bfloat16 residual 2⁻¹⁷. int16 and
# the copy are as fine as float32: each of the two runs may round off half of 2⁻²⁴ per sum, of which they have two.
DRIFT = {
    "bfloat16": 5 * STEPS**0.5 * 2.0**-18,
    "int8": 5 * STEPS**0.5 * 2.0**-10 / 127,
    "int16": STEPS * 2.0**-23,
    "master": STEPS * 2.0**-23,
}


def follow(tx, dtype):
    """The weights, from 1, after gradients that take them down by about 0.15, each its own way."""
    gradients = jnp.asarray(np.random.default_rng(0).normal(0.5, 1.0, (STEPS, ELEMENTS)), jnp.bfloat16)
    with lenient():
        return scanned(tx, jnp.ones(ELEMENTS, dtype), gradients.astype(dtype))


@functools.cache
def in_float32(whose):
    weights = in_double(follow(ADAMW[whose], jnp.float32)[0])
    assert weights.max() < 0.95
    return weights


@pytest.mark.parametrize("whose", ADAMW)
def test_a_plain_bfloat16_weight_of_one_never_moves(whose):
    assert (follow(ADAMW[whose], jnp.bfloat16)[0] == 1).all()


@pytest.mark.parametrize("whose", ADAMW)
@pytest.mark.parametrize("name", NEAREST)
def test_with_a_residual_a_bfloat16_weight_follows_the_float32_run(name, whose):
    params, state = follow(FORMS[name](ADAMW[whose]), jnp.bfloat16)
    values = in_double(stands_for(FORMS[name], params, state))
    assert np.abs(values - in_float32(whose)).max() <= DRIFT[name]
    assert np.abs(values - in_double(params)).max() <= 2.0**-9


@pytest.mark.parametrize("whose", ADAMW)
def test_stochastically_rounded_a_bfloat16_weight_follows_the_float32_run_in_the_mean(whose):
    params, _ = follow(FORMS["stochastic"](ADAMW[whose]), jnp.bfloat16)
    errors = in_double(params) - in_float32(whose)
    # the elements have noise of their own: five standard errors of their mean
    assert abs(errors.mean()) <= 5 * errors.std() / np.sqrt(ELEMENTS)
    # as above, with bfloat16's own steps of 2⁻⁸ for units
    assert np.abs(errors).max() <= 5 * STEPS**0.5 * 2.0**-9


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_steps_smaller_than_a_unit_of_the_residual_are_kept_in_the_mean(name):
    gradients = jnp.full((STEPS, ELEMENTS), 2.0**-22).at[0].set(2.0**-9 - 2.0**-12)  # from where the units are large
    params, state = scanned(FORMS[name](gx.sgd(1.0)), jnp.ones(ELEMENTS, jnp.bfloat16), gradients)
    values = in_double(stands_for(FORMS[name], params, state))
    expected = 1 - in_double(gradients[:, 0]).sum()
    assert abs(values.mean() - expected) <= 5 * values.std() / np.sqrt(ELEMENTS)  # standard errors
    assert expected < 1 - 2.0**-9 + 2.0**-12 - 10 * values.std() / np.sqrt(ELEMENTS)  # where nearest would stay


def test_int16_is_as_fine_as_float32():
    random = np.random.default_rng(0)
    values, small = (
        jnp.asarray(x, jnp.float32) for x in (random.uniform(1, 1.99, 512), random.normal(size=(1000, 512)))
    )
    gradients = jnp.concatenate([-values[None], 2.0**-20 * small])  # to the values, then eight of their ulps a step
    ends = []
    for name in ("int16", "master"):
        params, state = scanned(FORMS[name](gx.sgd(1.0)), jnp.zeros(512, jnp.bfloat16), gradients)
        ends.append(in_double(stands_for(FORMS[name], params, state)))
    # 32767 parts stand for 32768 float32 numbers, so that one step in many ends an ulp off; measured 5 in the mean
    assert np.sqrt(np.mean(np.square(ends[0] - ends[1]))) <= 16 * 2.0**-23


# A model that learns


class Digits:
    """Handwritten digits, and a network with one hidden layer that computes in float32 whatever its parameters are."""

    def __init__(self, steps=500, batch=64, hidden=32):
        x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
        random = np.random.default_rng(0)
        self.x, self.y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
        self.batches = jnp.asarray(random.integers(len(x), size=(steps, batch)))
        self.params = {
            "w1": random.normal(size=(64, hidden)) * (2 / 64) ** 0.5, "b1": np.zeros(hidden),
            "w2": random.normal(size=(hidden, 10)) * (2 / hidden) ** 0.5, "b2": np.zeros(10),
        }  # fmt: skip

    def loss(self, params, x, y):
        w1, b1, w2, b2 = (params[name].astype(jnp.float32) for name in ("w1", "b1", "w2", "b2"))
        logits = jax.nn.relu(x @ w1 + b1[None]) @ w2 + b2[None]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))

    def trained(self, tx, dtype, seeds=None):
        """The loss on all digits after the last step; for several seeds, their mean."""
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.params)

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(self.loss)(params, self.x[batch], self.y[batch])
            updates, state = tx.update(grads, state, params)
            return (gx.apply_updates(params, updates), state), None

        def run(state):
            (last, _), _ = jax.lax.scan(step, (params, state), self.batches)
            return self.loss(last, self.x, self.y)

        state = tx.init(params)
        if seeds is None:
            return jax.jit(run)(state)
        return jax.jit(jax.vmap(lambda seed: run(state._replace(seed=seed))))(seeds).mean()


def test_a_network_in_bfloat16_learns_as_it_does_in_float32():
    digits, tx = Digits(), gx.adamw(1e-3)
    expected = digits.trained(tx, jnp.float32)
    losses = {name: digits.trained(form(tx), jnp.bfloat16) for name, form in NEAREST.items()}
    # the loss after one run with stochastic rounding deviates by 0.6 %, the mean of 16 by a quarter of that
    seeds = jnp.arange(16, dtype=jnp.uint32)
    losses["stochastic"] = digits.trained(FORMS["stochastic"](tx), jnp.bfloat16, seeds)
    for name, loss in losses.items():
        assert abs(loss / expected - 1) < 0.01, name
    assert digits.trained(tx, jnp.bfloat16) > 1.5 * expected


# Landing


@every_low
@every_form
def test_whoever_adds_the_updates_lands_on_the_numbers_chosen(form, dtype):
    start, tx = jnp.asarray(START, dtype), form(gx.sgd(1.0))
    grads = start.astype(jnp.float32) - ANYWHERE
    updates, state = tx.update(grads, tx.init(start), start)
    value = start.astype(jnp.float32) - grads  # ANYWHERE, rounded once
    first_bits = rounding.random_bits(rounding.seed_for(state.seed - rounding.next_seed(jnp.uint32(0)), 0), value.shape)
    chosen = rounding.round_to(value, dtype, first_bits if form is FORMS["stochastic"] else None).astype(dtype)
    assert_bits(gx.apply_updates(start, updates), chosen)
    with lenient():
        assert_bits(optax.apply_updates(start, updates), chosen)


# A residual's resolution, in halves of the distance to the next number: a part of an integer one, the last of the
# eight significant bits of a bfloat16 one.
UNIT = {"bfloat16": 2.0**-8 * 2, "int8": 1 / 127, "int16": 1 / 32767, "master": 0.0}


@every_low
@pytest.mark.parametrize("name", NEAREST)
def test_parameter_and_residual_stand_for_the_float32_value(name, dtype):
    form, zeros = FORMS[name], jnp.zeros(ANYWHERE.shape, dtype)
    params, state = steps(form(gx.sgd(1.0)), zeros, -jnp.asarray(ANYWHERE)[None])
    half = in_double(rounding.half_step(params.astype(jnp.float32), dtype))
    errors = in_double(stands_for(form, params, state)) - in_double(ANYWHERE)
    # one unit; the sum of parameter and residual is a float32
    assert (np.abs(errors) <= UNIT[name] * half + 2.0**-24 * np.abs(ANYWHERE) * (name != "master")).all()
    if name in ("bfloat16", "int8"):  # coarser than float32, but without bias: five standard errors
        relative = errors / half
        assert abs(relative.mean()) <= 5 * relative.std() / np.sqrt(len(relative))


@pytest.mark.parametrize(
    "inner",
    [
        gx.adamw(0.1),
        gx.chain(gx.clip_by_global_norm(0.5), gx.momentum(0.1)),
        gx.accumulate(gx.sgd(0.1), every=2),
        optax.sgd(0.1),
    ],
    ids=["adamw", "clipped", "accumulated", "optax"],
)
def test_the_float32_copy_is_the_float32_run(inner):
    gradients = gradients_for(TREE, dtype=jnp.float32)
    params, state = steps(gx.master_weights(inner), TREE, gradients)
    full = jax.tree.map(jnp.float32, TREE)
    inner_state = inner.init(full)
    for index in range(
        len(jax.tree.leaves(gradients)[0])
    ):  # the copy moves as gx.step moves parameters: rounded once, after the sum
        full, inner_state = gx.step(inner, gradient(gradients, index), inner_state, full)
    assert_bits(state.residual, full)
    assert_bits(state.inner, inner_state)
    assert_bits(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), full))


# Special values


@pytest.mark.parametrize("inner", [gx.sgd(0.1), gx.adam(1e-3), optax.sgd(0.1)], ids=["sgd", "adam", "optax"])
@every_form
def test_parameters_without_a_gradient_keep_every_bit(form, inner):
    params = {name: jnp.concatenate([MIXED[name].ravel(), jnp.asarray([np.inf, -np.inf], name)]) for name in LOW}
    after, _ = steps(form(inner), params, jax.tree.map(lambda p: jnp.zeros((2, *p.shape), p.dtype), params))
    assert_bits(after, params)


@every_low
@every_form
def test_a_value_that_is_not_trained_rests(form, dtype):
    """Decoding and encoding it again at every step would let it drift."""
    tx, zeros = form(gx.sgd(1.0)), jnp.zeros(ANYWHERE.shape, dtype)
    params, state = steps(tx, zeros, -jnp.asarray(ANYWHERE)[None])
    after, rested = steps(tx, params, jnp.zeros((2, *zeros.shape)), state)
    assert_bits((after, rested.residual), (params, state.residual))


@every_form
def test_wide_leaves_are_trained_as_without_a_wrapper(form):
    gradients, wide = gradients_for(MIXED), ("float32", "complex64")
    params, _ = steps(form(MOMENTUM), MIXED, gradients)
    expected, _ = steps(MOMENTUM, *({name: tree[name] for name in wide} for tree in (MIXED, gradients)))
    assert_bits({name: params[name] for name in wide}, expected)


@every_form
def test_what_is_not_finite_is_shown_and_stays_alone(form):
    params, _ = steps(form(gx.sgd(0.1)), jnp.ones(3, jnp.bfloat16), jnp.asarray([[np.nan, np.inf, 1.0]], jnp.bfloat16))
    assert jnp.isnan(params[0])
    assert params[1] == -jnp.inf
    assert jnp.isfinite(params[2])


@every_form
def test_float16_parameters_saturate_and_come_back(form):
    tx, largest = form(gx.sgd(1.0)), jnp.asarray([65504, -65504], jnp.float16)
    params, state = steps(tx, largest, jnp.asarray([[-1e4, 1e4]], jnp.float32))
    assert_bits(params, largest)
    params, _ = steps(tx, params, jnp.asarray([[1e4, -1e4]] * 2, jnp.float32), state)
    assert (jnp.abs(params) < 5.6e4).all()  # all but the copy forget what did not fit


@pytest.mark.parametrize("form", NEAREST.values(), ids=NEAREST)
def test_a_parameter_that_is_set_from_outside_stays_where_it_is_set(form):
    params, state = steps(form(gx.sgd(0.25)), jnp.full(3, 100.0, jnp.bfloat16), jnp.ones((1, 3), jnp.bfloat16))
    params = params.at[:2].set(jnp.asarray([0.0, 1e-3], jnp.bfloat16))
    after, _ = steps(form(gx.sgd(0.25)), params, jnp.zeros((1, 3), jnp.bfloat16), state)
    assert_bits(after, params)


def test_the_float32_copy_of_a_parameter_that_is_set_from_outside_starts_again():
    tx, ones, step = gx.master_weights(gx.sgd(1e-3)), jnp.ones(3, jnp.bfloat16), np.float32(1e-3)
    params, state = steps(tx, ones, ones[None])
    _, state = tx.update(ones, state, params.at[1].set(5.0))
    np.testing.assert_array_equal(state.residual, [1 - step - step, 5 - step, 1 - step - step])


# Frameworks

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)


@some_forms
def test_a_linen_train_state_walks_as_the_pair_does(name):
    linen, train_state = pytest.importorskip("flax.linen"), pytest.importorskip("flax.training.train_state")
    model, tx = linen.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.float32), FORMS[name](MOMENTUM)
    with lenient():
        params = model.init(jax.random.key(0), X)["params"]
        start = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        gradients = gradients_for(start.params)
        end = start
        for step in range(4):
            end = end.apply_gradients(grads=gradient(gradients, step))
    assert_bits((end.params, end.opt_state), steps(tx, start.params, gradients))


@some_forms
def test_an_nnx_optimizer_walks_as_the_pair_does(name):
    nnx = pytest.importorskip("flax.nnx")
    model, tx = nnx.Linear(4, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16), FORMS[name](MOMENTUM)
    start, optimizer = nnx.state(model, nnx.Param), nnx.Optimizer(model, tx, wrt=nnx.Param)
    params, gradients = nnx.to_pure_dict(start), gradients_for(start)
    with lenient():
        for step in range(4):
            optimizer.update(model, gradient(gradients, step))
    expected, state = steps(tx, params, nnx.to_pure_dict(gradients))
    assert_bits(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected)
    assert_bits(jax.tree.leaves(optimizer.opt_state), jax.tree.leaves(state))


@every_form
def test_equinox_that_widens_the_parameters_is_refused_with_the_remedy(form):
    eqx = pytest.importorskip("equinox")
    model = jax.tree.map(jnp.bfloat16, eqx.nn.Linear(4, 3, key=jax.random.key(0)))
    for tx in (form(gx.sgd(0.1)), form(gx.chain(gx.sgd(0.1), gx.freeze("bias")))):  # what is frozen stays bfloat16
        updates, state = tx.update(model, tx.init(model), model)
        assert gx.apply_updates(model, updates).weight.dtype == jnp.bfloat16
        with lenient():
            wider = eqx.apply_updates(model, updates)
        with pytest.raises(ValueError, match=r"if it was before.*equinox\.apply_updates.*gradxform's or optax's"):
            tx.update(wider, state, wider)


@pytest.mark.parametrize("form", NEAREST.values(), ids=NEAREST)
def test_one_leaf_that_became_wider_is_named(form):
    tx, wider = form(gx.sgd(0.1)), MIXED | {"float16": MIXED["float16"].astype(jnp.float32)}
    with pytest.raises(
        ValueError, match=r"params\['float16'\] is float32\[4\], which the state was not made for; if it"
    ):
        tx.update(wider, tx.init(MIXED), wider)


# What it costs

BYTES = {"stochastic": 0, "bfloat16": 2, "int8": 1, "int16": 2, "master": 4}


@pytest.mark.parametrize("inner", ADAMW.values(), ids=ADAMW)
@pytest.mark.parametrize("name", FORMS)
def test_bytes_per_low_precision_parameter(name, inner):
    wide = {name: jax.ShapeDtypeStruct((10, 7), jnp.float32) for name in ("bfloat16", "float16", "float32")}
    mixed = {name: jax.ShapeDtypeStruct(leaf.shape, name) for name, leaf in wide.items()}
    found, without = gx.describe(FORMS[name](inner), mixed, show=False), gx.describe(inner, wide, show=False)
    for leaf, other in zip(found.leaves, without.leaves, strict=True):
        assert leaf.state_bytes - other.state_bytes == (0 if leaf.path == "float32" else leaf.size * BYTES[name])
    assert found.shared_bytes - without.shared_bytes == 4  # the seed
    alone = gx.describe(FORMS[name](inner), {"bfloat16": mixed["bfloat16"]}, show=False)
    assert alone.state_bytes_per_parameter == without.state_bytes_per_parameter + BYTES[name]


@pytest.mark.parametrize(
    "freezing",
    [gx.chain(MOMENTUM, gx.freeze("a")), gx.by_path({"a": gx.freeze()}, MOMENTUM)],
    ids=["freeze", "by_path"],
)
@some_forms
def test_frozen_leaves_cost_nothing_and_keep_every_bit(name, freezing):
    tx, gradients = FORMS[name](freezing), gradients_for(TREE)
    assert [leaf.state_bytes for leaf in gx.describe(tx, TREE, show=False).leaves][:1] == [0]
    params, state = steps(tx, TREE, gradients)
    assert_bits(params["a"], TREE["a"])
    assert state.residual["a"] == optax.MaskedNode()
    assert_bits(params["b"], steps(FORMS[name](MOMENTUM), TREE, gradients)[0]["b"])


# Composition


@every_form
def test_a_chain_that_ends_in_a_wrapper_is_the_wrapper_of_the_chain(form):
    clip, gradients = gx.clip_by_global_norm(0.5), gradients_for(TREE)
    params, state = steps(gx.chain(clip, form(MOMENTUM)), TREE, gradients)
    expected, inside = steps(form(gx.chain(clip, MOMENTUM)), TREE, gradients)
    assert_bits((params, state.inner.residual), (expected, inside.residual))


@pytest.mark.parametrize("following", [gx.scale(0.5), optax.scale(0.5)], ids=["gx", "optax"])
@pytest.mark.parametrize(
    "tx",
    [
        *(form(gx.sgd(0.1)) for form in FORMS.values()),
        gx.chain(gx.scale(2.0), gx.chain(gx.scale(2.0), gx.master_weights(gx.sgd(0.1)))),
        gx.by_path({"a": gx.master_weights(gx.sgd(0.1))}, default=gx.sgd(0.1)),
        gx.accumulate(gx.master_weights(gx.sgd(0.1)), every=2),
        gx.skip_nonfinite(gx.master_weights(gx.sgd(0.1))),
        gx.observe(gx.master_weights(gx.sgd(0.1))),
    ],
    ids=lambda tx: repr(tx).partition("(")[0],
)
def test_nothing_may_follow_in_a_chain(tx, following):
    with pytest.raises(TypeError, match=r"must be the last stage.*scale\(.*\) before it or inside it"):
        gx.chain(tx, following)


@some_forms
def test_accumulated_pairs_of_equal_gradients_are_single_steps(name):
    tx, gradients = FORMS[name](MOMENTUM), gradients_for(TREE)
    twice = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), gradients)
    params, state = steps(gx.accumulate(tx, every=2), TREE, twice)
    assert_bits((params, state.inner), steps(tx, TREE, gradients))


@some_forms
def test_a_skipped_step_changes_no_bit(name):
    tx, gradients = FORMS[name](MOMENTUM), gradients_for(MIXED)
    params, state = steps(gx.skip_nonfinite(tx), MIXED, gradients)
    assert_bits((params, state.inner), steps(tx, MIXED, gradients))
    bad = gradient(gradients, slice(1)) | {"float16": jnp.full((1, 4), np.nan, jnp.float16)}
    after, skipped = steps(gx.skip_nonfinite(tx), params, bad, state)
    assert skipped.skipped == 1
    assert_bits((after, skipped.inner), (params, state.inner))


@some_forms
def test_an_observed_step_is_the_same_step(name):
    tx, gradients = FORMS[name](MOMENTUM), gradients_for(TREE)
    params, state = steps(gx.observe(tx), TREE, gradients)
    assert_bits((params, state.inner), steps(tx, TREE, gradients))
    updates, observed = gx.observe(tx).update(gradient(gradients, 0), state, params)
    norm = np.sqrt(sum(np.square(in_double(leaf)).sum() for leaf in updates.values()))
    np.testing.assert_allclose(gx.metrics(observed)["update_norm"], norm, rtol=1e-6)  # a float32 norm


@some_forms
def test_a_group_with_a_wrapper_beside_a_group_without(name):
    wrapped, plain, gradients = FORMS[name](MOMENTUM), gx.momentum(0.1), gradients_for(TREE)
    tx = gx.by_path({"a": wrapped}, default=plain)
    params, state = steps(tx, TREE, gradients)
    for leaf, alone in (("a", wrapped), ("b", plain)):
        assert_bits(params[leaf], steps(alone, TREE[leaf], gradients[leaf])[0])
    updates, _ = tx.update(gradient(gradients, 0), state, params)
    assert {leaf: str(update.dtype) for leaf, update in updates.items()} == {"a": "float32", "b": "bfloat16"}


# Moments

COPIES = 1024
MOMENTS = {
    "rmsprop": functools.partial(gx.rmsprop, 0.0, decay=0.999),
    "adagrad": functools.partial(gx.adagrad, 0.0),
    "adam": functools.partial(gx.adam, 0.0),
    "momentum": functools.partial(gx.momentum, 0.0, decay=0.99),
}


@pytest.mark.parametrize(("update", "right"), [(lambda v: 0.999 * v + 0.001, 0.95), (lambda v: v + 1, 3000)])
def test_a_moment_rounded_to_nearest_sticks(update, right):
    """What ours are rounded stochastically for: an average of squares of 1, as in RMSProp, and a sum, as in AdaGrad."""

    def step(v, _):
        return update(v.astype(jnp.float32)).astype(jnp.bfloat16), None

    stuck, _ = jax.lax.scan(step, jnp.bfloat16(0), length=3000)
    assert step(stuck, None)[0] == stuck < 0.6 * right


# A hundredth of the small gradients are below the normal numbers of float16; squares it cannot hold at all.
@pytest.mark.parametrize(
    ("build", "dtype", "size"),
    [*((build, "bfloat16", 1.0) for build in MOMENTS.values()), (MOMENTS["momentum"], "float16", 1e-3)],
    ids=[*MOMENTS, "momentum in float16"],
)
def test_low_precision_moments_follow_the_float32_ones_in_the_mean(build, dtype, size):
    gradients = jnp.asarray(size * np.random.default_rng(0).normal(0.5, 1.0, (1000, 1)), jnp.float32)

    def moments(tx, copies):
        # the bits are a hash of the number and the step, so each copy starts at another; bias corrections are 1 by then
        starts = 10**6 + 1000 * jnp.arange(copies, dtype=jnp.int32)

        @jax.jit
        @jax.vmap
        def walked(count):
            state = tx.init(jnp.zeros(1))._replace(count=count)
            return jax.lax.scan(lambda state, g: (tx.update(g, state)[1], None), state, gradients)[0]

        state = walked(starts)
        return {name: in_double(state._asdict()[name]) for name in ("mu", "nu") if name in state._fields}

    full = moments(build(), 1)
    for name, draws in moments(build(state_dtype=dtype), COPIES).items():
        # every step is linear in the moment, so that its mean is the float32 one: five standard errors of the
        # copies, each with noise of its own, and the float32 roundings
        assert draws.std() > 0
        assert abs(draws.mean() - full[name]) <= 5 * draws.std() / np.sqrt(COPIES) + 1000 * 2.0**-24 * abs(full[name])
