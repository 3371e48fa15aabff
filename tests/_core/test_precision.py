"""Every dtype and every size of gradient: finite, of the right sign, bounded, rounded once."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support import chex
from tests.support.tables import OPTIMIZERS, RATE, WITHOUT_EPS, built, entry_of
from tests.support.trees import assert_same, walk

SIZES = [0.0, 1e-38, 1e-25, 1e-8, 1.0, 300.0, 6e4, 1e20, 1e30]
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64]
LOW = [jnp.float16, jnp.bfloat16]
UP_TO_FLOAT32 = [*LOW, jnp.float32, jnp.complex64]

# The longest a step can be, in learning rates, after three equal gradients: 1/√(1 − γ) for RMSProp, which starts
# with v = (1 − γ)·g², times 1 + β + β² with momentum; m̂ for NAdam looks ahead by β²/(1 − β²) at the first step.
LONGEST = {
    "adagrad(α)": 1.0,
    "rmsprop(α)": 10**0.5,
    "rmsprop(α, centered=True, momentum=0.9)": 0.09**-0.5 * (1 + 0.9 + 0.81),
    "adam(α)": 1.0,
    "adam(α, nesterov=True)": 1.5,
    "adamw(α)": 1.0,
    "adam_l2(α)": 1.0,
}
LONGEST |= {f"{name[:-1]}, eps=0.0)": bound for name, bound in LONGEST.items()}

EVERY = OPTIMIZERS | WITHOUT_EPS
every_optimizer = pytest.mark.parametrize(("name", "tx"), EVERY.items(), ids=EVERY)
# One factor for all gradients, by which those far below the largest may come to nothing.
ONE_FACTOR = {"polyak_sgd", "lbfgs"}


def noisy(name: str) -> bool:
    """Whether it adds noise, which may lead uphill."""
    return "key" in entry_of(name).arguments


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)


def precision_of(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """float64 exists only under x64."""
    return jax.enable_x64(dtype == jnp.float64)


def in_double(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.complex128)


def gradients_in(dtype: Any) -> np.ndarray:
    """Both signs of every size that is finite in `dtype`; complex ones point along 0.6 + 0.8i."""
    direction = 0.6 + 0.8j if jnp.issubdtype(dtype, jnp.complexfloating) else 1.0
    sizes = [size for size in SIZES if size < float(jnp.finfo(dtype).max)]
    return (np.array([*sizes, *(-size for size in sizes)]) * direction).astype(dtype)


@every_dtype
@every_optimizer
def test_steps_are_finite_bounded_and_downhill(name, tx, dtype):
    with precision_of(dtype):
        grads = gradients_in(dtype)
        params = np.zeros_like(grads)  # so that weight decay adds nothing
        updates, state = walk(tx, params, np.stack([grads] * 3))
        chex.assert_tree_all_finite((updates, state))
        bound = LONGEST.get(name, np.inf) * RATE
        moving = 0.99 * np.abs(grads).max() if entry_of(name).name in ONE_FACTOR else 1e-9
        for step, update in enumerate(updates):
            assert update.dtype == dtype
            if noisy(name):
                continue
            rounding = 8 * float(jnp.finfo(dtype).eps)  # from g to u there are about eight roundings
            assert (np.abs(in_double(update)) <= bound * (1 + rounding)).all()
            along = np.real(in_double(update) * np.conj(in_double(grads)))
            assert (along <= 0).all()
            if (entry_of(name).name, step) != ("soap", 0):  # which only makes its bases
                assert (along[np.abs(grads) > moving] < 0).all()
            assert (np.asarray(update)[grads == 0] == 0).all()


@pytest.mark.parametrize("name", [name for name in WITHOUT_EPS if name in LONGEST])
def test_steps_without_eps_are_bounded_at_every_power_of_ten(name):
    grads = jnp.asarray(10.0 ** np.arange(-37, 38), jnp.float32)
    updates, _ = walk(WITHOUT_EPS[name], jnp.zeros_like(grads), jnp.stack([grads] * 3))
    for update in updates:
        # where g² leaves the normal range, v has few digits: half of them lost is a factor of √2 at most
        assert (jnp.abs(update) <= RATE * LONGEST[name] * 2**0.5).all()


# The state


def floats(state: Any) -> list[Any]:
    """All of a state but its counters and seeds."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


@every_dtype
@every_optimizer
def test_moments_are_at_least_float32(name, tx, dtype):
    with precision_of(dtype):
        moments = floats(tx.init(jnp.ones(2, dtype)))
        wide = {jnp.float64: {np.float64}, jnp.complex64: {np.complex64, np.float32}}
        assert {leaf.dtype.type for leaf in moments} <= wide.get(dtype, {np.float32})


NARROW = {
    name: f"{name[:-1]}, {argument}=dtype)"
    for name in OPTIMIZERS
    for argument in ("state_dtype", "accumulator_dtype")
    if argument in entry_of(name).arguments and len(OPTIMIZERS[name].init(jnp.ones(2))) > 2
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NARROW)
def test_state_dtype_is_the_dtype_of_every_moment_but_squares_have_no_room_in_float16(name, dtype):
    params = jnp.ones(2)
    averages = "schedule_free" in name  # its state_dtype is that of z alone
    if dtype == "float16" and "nu" in OPTIMIZERS[name].init(params)._fields and not averages:
        with pytest.raises(ValueError, match="use bfloat16"):
            built(NARROW[name], dtype=dtype)
        return
    updates, state = walk(built(NARROW[name], dtype=dtype), params, jnp.full((3, 2), 6e4))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.z if averages else state[1:])} == {jnp.dtype(dtype)}
    assert {update.dtype for update in updates} == {jnp.dtype(jnp.float32)}
    chex.assert_tree_all_finite(updates)


def test_mu_dtype_is_the_dtype_of_the_first_moment_only():
    state = gx.adam(0.1, mu_dtype=jnp.bfloat16).init(jnp.ones(2))
    assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float32)
    state = gx.adamw(0.1, mu_dtype=jnp.float32, state_dtype="bfloat16").init(jnp.ones(2))
    assert (state.mu.dtype, state.nu.dtype) == (jnp.float32, jnp.bfloat16)


def test_a_low_precision_moment_is_rounded_once_per_step_to_a_neighbour():
    tx = gx.scale_by_momentum(0.9, state_dtype="bfloat16")
    state = tx.init(jnp.zeros(()))

    @jax.vmap
    def at_step(count):
        return tx.update(jnp.asarray(1 / 3, jnp.float32), state._replace(count=count))

    # the draw depends on the number and the step: the same number at 1000 steps
    updates, after = at_step(jnp.arange(1000, dtype=jnp.int32))
    exact = np.float32(1 / 3) * np.float32(1 - 0.9)
    below = float(np.array(np.float32(exact).view(np.uint32) & 0xFFFF0000, np.uint32).view(np.float32))
    above = below + 2.0**-12  # the step of bfloat16 at 1/30
    assert set(np.unique(after.mu).astype(float)) == {below, above}
    assert below < exact < above
    # the mean of 1000 draws: five standard errors
    share = (exact - below) / (above - below)
    assert abs((np.asarray(after.mu, float) == above).mean() - share) < 5 * (share * (1 - share) / 1000) ** 0.5
    # the update is made of what is stored
    np.testing.assert_array_equal(updates, np.asarray(after.mu, np.float32))


# The arithmetic


CHAINS = [*OPTIMIZERS.values(), gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1, weight_decay=0.1))]


@pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("tx", CHAINS, ids=repr)
def test_low_precision_is_float32_rounded_once(tx, dtype):
    random = np.random.default_rng(0)
    params = jnp.asarray(random.normal(size=(64,)), dtype)
    gradients = jnp.asarray(random.normal(size=(3, 64)), dtype)
    low, low_state = walk(tx, params, gradients)
    full, full_state = walk(tx, params.astype(jnp.float32), gradients.astype(jnp.float32))
    # one rounding is at most half of eps; the float32 steps themselves may differ in a last bit
    half = float(jnp.finfo(dtype).eps) / 2 + 1e-6
    for a, b in zip(low, full, strict=True):
        tiny = float(jnp.finfo(dtype).smallest_subnormal)
        np.testing.assert_allclose(in_double(a), in_double(b), rtol=half, atol=tiny)
    for a, b in zip(jax.tree.leaves(low_state), jax.tree.leaves(full_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_gradients_may_be_wider_than_params():
    updates, _ = walk(gx.sgd(0.1), jnp.zeros(2, jnp.bfloat16), jnp.asarray([[1 / 3, 1e-30]], jnp.float32), steps=1)
    assert_same(updates, [(jnp.asarray([1 / 3, 1e-30]) * jnp.float32(-0.1)).astype(jnp.bfloat16)])


@pytest.mark.parametrize("position", [0, 1, 2])
def test_foreign_stages_see_and_give_updates_in_the_dtype_of_the_params(position):
    seen = []

    def watch(updates: Any, params: Any) -> Any:
        seen.append(updates.dtype)
        return updates.astype(jnp.float16)

    stages = [gx.scale(2.0), gx.scale_by_momentum(0.5)]
    stages.insert(position, optax.stateless(watch))
    params = jnp.zeros(2, jnp.bfloat16)
    tx = gx.chain(*stages)
    updates, _ = tx.update(jnp.ones(2, jnp.float32), tx.init(params), params)
    assert (seen, updates.dtype) == ([jnp.bfloat16], jnp.bfloat16)


def test_identity_gives_the_dtype_of_the_params():
    updates, _ = walk(gx.identity(), jnp.zeros(2, jnp.bfloat16), jnp.ones((1, 2), jnp.float32), steps=1)
    assert updates[0].dtype == jnp.bfloat16


def test_an_update_too_large_for_the_params_becomes_the_largest_they_hold():
    updates, _ = walk(gx.sgd(0.1), jnp.zeros(2, jnp.float16), jnp.asarray([[1e30, -1e30]], jnp.float32), steps=1)
    assert_same(updates, [jnp.asarray([-65504, 65504], jnp.float16)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@every_optimizer
def test_infinities_and_nan_are_shown(name, tx, value):
    gradients = jnp.asarray([[value, 1.0], [1.0, 1.0]])
    (update, _), _ = walk(tx, jnp.zeros(2), gradients, steps=2)
    assert not jnp.isfinite(update[0])
    # Adafactor bounds the size of each leaf itself, which is unknown then
    assert jnp.isfinite(update[1]) == ("clipping_threshold" not in entry_of(name).arguments)


@every_optimizer
def test_nan_stays_where_there_is_a_memory_of_it(name, tx):
    # not in the first step, of which SOAP takes nothing but its bases
    (*_, update), state = walk(tx, jnp.zeros(2), jnp.asarray([[1.0, 1.0], [np.nan, 1.0], [1.0, 1.0]]))
    assert jnp.isnan(update[0]) == bool(floats(state))


@pytest.mark.parametrize("clip", [gx.clip_by_value, gx.clip_by_leaf_norm, gx.clip_by_global_norm])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.complex64])
def test_clipping_shows_nan(clip, dtype):
    grads = jnp.asarray([np.nan, 1.0], dtype)
    assert jnp.isnan(clip(1.0).update(grads, clip(1.0).init(grads))[0][0])


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("clip", [gx.clip_by_leaf_norm, gx.clip_by_global_norm])
def test_a_norm_neither_overflows_nor_underflows(clip, size):
    grads = jnp.asarray([3.0, 4.0]) * size
    tx = clip(size)
    # a norm, a quotient and a product: three roundings of 2⁻²⁴ and one of the scaled sum
    np.testing.assert_allclose(tx.update(grads, tx.init(grads))[0], np.array([0.6, 0.8]) * size, rtol=3e-7)


# Counters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_counter_stops_at_its_largest_value(name):
    tx, params = OPTIMIZERS[name], jnp.zeros(2)
    largest = jnp.asarray(2**31 - 1, jnp.int32)
    updates, state = walk(tx, params, jnp.ones((2, 2)), steps=2, state=tx.init(params)._replace(count=largest - 1))
    assert state.count == largest
    chex.assert_tree_all_finite(updates)
    assert all((update < 0).all() for update in updates)


def test_a_schedule_is_not_called_with_a_negative_step():
    tx = gx.sgd(optax.linear_schedule(0.0, 1.0, 10))
    state = tx.init(jnp.zeros(2))._replace(count=jnp.asarray(2**31 - 1, jnp.int32))
    _, state = walk(tx, jnp.zeros(2), jnp.ones((2, 2)), steps=2, state=state)
    assert gx.get_hyperparams(state)["learning_rate"] == 1.0


# Leaves that are no JAX arrays


A_FEW = pytest.mark.parametrize("name", ["sgd(α)", "momentum(α)", "adagrad(α)", "adamw(α)"])


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@A_FEW
def test_python_floats_are_leaves(name, x64):
    with jax.enable_x64(x64):
        params = {"a": 2.0, "b": 0.5}
        tx = OPTIMIZERS[name]
        state = tx.init(params)
        updates, state = tx.update({"a": 1.0, "b": -1.0}, state, params)
        assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in jax.tree.leaves((updates, state)))
        new = gx.apply_updates(params, updates)
        assert new["a"] < 2.0
        assert new["b"] > 0.5
        assert new["a"].dtype == jnp.result_type(float)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
@A_FEW
def test_numpy_arrays_are_leaves(name, dtype, x64):
    with jax.enable_x64(x64):
        params, gradients = np.ones(2, dtype), np.ones((3, 2), dtype)
        ours = walk(OPTIMIZERS[name], params, gradients)
        assert_same(ours, walk(OPTIMIZERS[name], jnp.asarray(params), jnp.asarray(gradients)))


# θ ← θ + u


@pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: np.dtype(dtype).name)
def test_apply_updates_rounds_once(dtype):
    eps = float(jnp.finfo(dtype).eps)
    # half of eps is a tie, which goes to the even neighbour, 1; so would a little more, if it were rounded before
    updates = 0.5 * eps * jnp.asarray([1.0, 1.0 + eps / 4, 1.0 - eps / 4], jnp.float32)
    assert_same(gx.apply_updates(jnp.ones(3, dtype), updates), jnp.asarray([1.0, 1.0 + eps, 1.0], dtype))


@pytest.mark.parametrize("update", UP_TO_FLOAT32, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("param", UP_TO_FLOAT32, ids=lambda dtype: np.dtype(dtype).name)
def test_apply_updates_keeps_the_dtype_of_the_params(param, update):
    if param != jnp.complex64 and update == jnp.complex64:
        with pytest.raises(TypeError, match="complex64"):
            gx.apply_updates(jnp.ones(2, param), jnp.ones(2, update))
    else:
        assert_same(gx.apply_updates(jnp.ones(2, param), jnp.ones(2, update)), jnp.full(2, 2, param))


def test_apply_updates_stays_finite():
    largest = jnp.asarray([65504.0], jnp.float16)
    assert_same(gx.apply_updates(largest, largest), largest)
    assert jnp.isnan(gx.apply_updates(largest, jnp.asarray([np.nan], jnp.float16))).all()
    assert jnp.isinf(gx.apply_updates(largest, jnp.asarray([np.inf], jnp.float16))).all()
