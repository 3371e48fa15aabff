"""Packages for inference and minimisation arrive with ours where they arrive with optax's transformations."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("blackjax")
pytest.importorskip("numpyro")
pytest.importorskip("optimistix")

import blackjax
import numpyro
import optimistix
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import gradxform as gx
from tests.support.chex import assert_trees_all_close as assert_close

pytestmark = pytest.mark.once

with warnings.catch_warnings():
    # its last release says so on every import
    warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
    jaxopt = pytest.importorskip("jaxopt")

BETAS = {"b1": 0.5, "b2": 0.75}  # exact in float32, so that 1 - b2**t is not what the two libraries differ by


@pytest.fixture(autouse=True)
def lenient():
    """Foreign code promotes and broadcasts, as JAX lets it by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# numpyro


DATA = jnp.array([0.5, 1.5, 2.0, 0.0])  # with a standard normal prior the mean is normal(4/5, 1/5)


def model(data):
    mean = numpyro.sample("mean", numpyro.distributions.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        numpyro.sample("observed", numpyro.distributions.Normal(mean, 1.0), obs=data)


def inference(tx):
    return SVI(model, AutoNormal(model), tx, Trace_ELBO(num_particles=32))


def test_svi_walks_as_it_does_with_optax():
    wrapped = numpyro.optim.optax_to_numpyro(gx.adam(0.1, **BETAS))
    theirs, ours, ours_wrapped = (
        inference(tx).run(jax.random.key(0), 50, DATA, progress_bar=False)
        for tx in (optax.adam(0.1, **BETAS), gx.adam(0.1, **BETAS), wrapped)
    )
    # 50 steps of at most 0.1, each rounded a dozen times at 2**-24, change losses with a slope below 10
    assert_close(ours.losses, theirs.losses, rtol=0, atol=5e-5)
    assert_close(ours.params, theirs.params, rtol=0, atol=5e-6)
    assert_close((ours_wrapped.losses, ours_wrapped.params), (ours.losses, ours.params), rtol=0, atol=0)


def test_svi_finds_the_posterior():
    svi = inference(gx.adam(optax.linear_schedule(0.1, 0.0, 200)))
    params = svi.run(jax.random.key(0), 200, DATA, progress_bar=False).params
    # the spread of a stochastic gradient's last steps; they start 0.62 and 0.35 away
    np.testing.assert_allclose(params["mean_auto_loc"], 4 / 5, rtol=0, atol=0.05)
    np.testing.assert_allclose(params["mean_auto_scale"], 5**-0.5, rtol=0, atol=0.05)


def test_svi_tells_a_foreign_stage_its_loss():
    plateau = optax.contrib.reduce_on_plateau(rtol=0.0, atol=1e-9)  # less than an ulp of the loss
    run = inference(gx.chain(gx.adam(0.1), plateau)).run(jax.random.key(0), 20, DATA, progress_bar=False)
    assert optax.tree_utils.tree_get(run.state.optim_state, "best_value") == run.losses.min()


def test_the_live_rate_in_an_svi_state_is_set_without_tracing_again():
    svi, traced = inference(gx.adam(gx.live(0.1))), []

    @jax.jit
    def step(state):
        traced.append(state)
        return svi.update(state, DATA)[0]

    state = step(svi.init(jax.random.key(0), DATA))
    halted = step(gx.set_hyperparams(state, learning_rate=0.0))
    assert_close(svi.get_params(halted), svi.get_params(state), rtol=0, atol=0)
    moved = step(gx.set_hyperparams(halted, learning_rate=0.1))
    assert svi.get_params(moved)["mean_auto_loc"] != svi.get_params(state)["mean_auto_loc"]
    assert len(traced) == 1


def test_a_stable_svi_update_keeps_the_state_where_the_loss_is_not_finite():
    svi = inference(gx.chain(gx.clip_by_global_norm(1.0), gx.adam(0.1)))
    update = jax.jit(svi.stable_update)
    before, _ = update(svi.init(jax.random.key(0), DATA), DATA)
    after, loss = update(before, DATA.at[0].set(jnp.nan))
    assert jnp.isnan(loss)
    assert optax.tree_utils.tree_get(after.optim_state, "count") == 1
    assert_close(after.optim_state, before.optim_state, rtol=0, atol=0)


# optimistix


TARGET = jnp.array([1.0, -2.0])
START = {"a": jnp.zeros(2), "b": jnp.zeros(())}
MINIMUM = {"a": TARGET, "b": jnp.float32(-1.0)}


def bowl(params, target):
    return jnp.sum(jnp.array([1.0, 4.0]) * (params["a"] - target) ** 2) + (params["b"] + 1) ** 2


def minimise(tx, target=TARGET, **options):
    solver = optimistix.OptaxMinimiser(tx, rtol=1e-5, atol=1e-5)
    return optimistix.minimise(bowl, solver, START, target, max_steps=1000, **options)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gx.adam(0.1), optax.adam(0.1)),
        (gx.adam(gx.live(0.1)), optax.adam(0.1)),
        (gx.adam(jnp.float32(0.1)), optax.adam(0.1)),
        (gx.adam(optax.linear_schedule(0.1, 0.01, 100)), optax.adam(optax.linear_schedule(0.1, 0.01, 100))),
        (
            gx.chain(gx.clip_by_global_norm(1.0), gx.sgd(0.1)),
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        ),
    ],
    ids=["number", "live", "array", "schedule", "chain"],
)
def test_optimistix_reaches_the_minimum(ours, theirs):
    solution, expected = minimise(ours), minimise(theirs)
    assert_close(solution.value, MINIMUM, rtol=0, atol=2e-3)  # it stops where a step changes the loss by 1e-5
    # optax's float32 1 - b2**t, off by 2e-5 of itself at first, bends the way by that much of the step of 0.1
    assert_close(solution.value, expected.value, rtol=0, atol=2e-5)
    assert abs(solution.stats["num_steps"] - expected.stats["num_steps"]) <= 1  # of about 150: a tie may tip


def test_optimistix_passes_what_a_line_search_needs():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
    solution = minimise(gx.chain(gx.sgd(1.0), search))
    expected = minimise(optax.chain(optax.sgd(1.0), search))
    assert_close(solution.value, MINIMUM, rtol=0, atol=1e-4)  # it stops where a step changes the loss by 1e-5
    assert solution.stats["num_steps"] == expected.stats["num_steps"]
    assert_close(solution.value, expected.value, rtol=1e-6)  # the same products, in another order


def test_optimistix_solves_several_at_once():
    targets = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    together = jax.vmap(lambda target: minimise(gx.adam(0.1), target).value)(targets)
    apart = [minimise(gx.adam(0.1), target).value for target in targets]
    assert_close(together["a"], np.stack([value["a"] for value in apart]), rtol=0, atol=1e-5)  # fused otherwise


# blackjax


CENTER, SPREAD = 1.5, 0.5


def log_density(position):
    return -0.5 * jnp.sum(((position["x"] - CENTER) / SPREAD) ** 2)


def variational(algorithm, tx, steps):
    approximation = algorithm(log_density, tx, 8)
    state = approximation.init({"x": jnp.zeros(2)})
    keys = jax.random.split(jax.random.key(0), steps)
    state, info = jax.lax.scan(lambda state, key: approximation.step(key, state), state, keys)
    return state.mu["x"], info.elbo


def stein(tx, steps):
    descent = blackjax.svgd(jax.grad(log_density), tx)
    state = descent.init({"x": jax.random.normal(jax.random.key(0), (8, 2))})
    state, _ = jax.lax.scan(lambda state, _: (descent.step(state), None), state, length=steps)
    return state.particles["x"].mean(axis=0), state.particles["x"]


BLACKJAX = {
    "meanfield_vi": functools.partial(variational, blackjax.meanfield_vi),
    "fullrank_vi": functools.partial(variational, blackjax.fullrank_vi),
    "svgd": stein,
}
every_blackjax = pytest.mark.parametrize("infer", BLACKJAX.values(), ids=BLACKJAX.keys())


@every_blackjax
def test_blackjax_walks_as_it_does_with_optax(infer):
    center, rest = infer(gx.adam(0.05, **BETAS), 10)
    expected_center, expected_rest = infer(optax.adam(0.05, **BETAS), 10)
    # 10 steps of 0.05, each rounded a dozen times at 2**-24; the slope of what is compared is below 10
    assert_close((center, rest), (expected_center, expected_rest), rtol=0, atol=1e-5)


@every_blackjax
def test_blackjax_finds_the_center(infer):
    center, _ = infer(gx.adam(optax.linear_schedule(0.1, 0.0, 200)), 200)
    np.testing.assert_allclose(center, [CENTER, CENTER], rtol=0, atol=0.05)  # the spread of stochastic last steps


def test_blackjax_tunes_the_trajectory_as_it_does_with_optax():
    warmup = blackjax.chees_adaptation(log_density, num_chains=8)
    positions = {"x": jax.random.normal(jax.random.key(0), (8, 2))}

    def tuned(tx):
        _, info = warmup.run(jax.random.key(1), positions, 0.1, tx, 20)
        state = info.adaptation_state
        return state.trajectory_length, optax.tree_utils.tree_get(state.optim_state, "mu")

    lengths, gradients = tuned(gx.adam(0.05, **BETAS))
    assert (gradients != 0).all()
    # 20 steps of 0.05 in the logarithm, each rounded a dozen times
    assert_close((lengths, gradients), tuned(optax.adam(0.05, **BETAS)), rtol=1e-5)


# jaxopt


def test_jaxopt_walks_as_it_does_with_optax():
    ours, theirs = (
        jaxopt.OptaxSolver(bowl, opt=adam(0.1, **BETAS), maxiter=20).run(START, TARGET)
        for adam in (gx.adam, optax.adam)
    )
    assert_close(ours.params, theirs.params, rtol=0, atol=2e-6)  # 20 steps of 0.1, each rounded a dozen times
    assert_close(ours.state.error, theirs.state.error, rtol=1e-5)  # a gradient norm, of slope 8 in the parameters


def test_jaxopt_reaches_the_minimum():
    solution = jaxopt.OptaxSolver(bowl, opt=gx.adam(0.1), maxiter=500, tol=1e-4).run(START, TARGET)
    assert solution.state.iter_num < 500
    assert_close(solution.params, MINIMUM, rtol=0, atol=5e-5)  # it stops at a gradient of 1e-4; the least slope is 2


def test_jaxopt_sets_the_live_rate_before_an_update():
    def halve(params, state, target):
        rate = state.internal_state.hyperparams["learning_rate"] / 2
        return params, state._replace(internal_state=gx.set_hyperparams(state.internal_state, learning_rate=rate))

    solver = jaxopt.OptaxSolver(bowl, opt=gx.sgd(gx.live(0.1)), pre_update=halve, maxiter=3)
    params, state = solver.run(START, TARGET)
    np.testing.assert_allclose(state.internal_state.hyperparams["learning_rate"], 0.1 / 8, rtol=1e-6)  # a float32
    left = (1 - 2 * 0.05) * (1 - 2 * 0.025) * (1 - 2 * 0.0125)  # each step leaves 1 - 2·rate of the way
    np.testing.assert_allclose(params["b"], left - 1, rtol=1e-6)  # a handful of float32 roundings
