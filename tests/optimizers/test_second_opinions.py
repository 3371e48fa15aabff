"""The same steps as in other packages, where optax and torch.optim have no counterpart, or mean something else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from tests.support.torch import torch, walk_in_torch
from tests.twins import elementwise as twins

pytestmark = pytest.mark.once

# Both sides round θ and the moments at each of fifty steps, by 2⁻²⁴ or 2⁻⁵³; relative to the largest that an element
# has been, or to 1.
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def package():
    return pytest.importorskip("pytorch_optimizer")


def assert_close(ours, theirs, tolerance):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        assert (np.abs(one - other) / np.maximum(1, np.abs(other).max(axis=0))).max() <= tolerance


def tree_of(dtype):
    return tuple(map(twins.as_tree, twins.example(dtype)))


@pytest.mark.parametrize("momentum_decay", [0.004, 0.1])
def test_nadam_with_torchs_schedule_of_momenta(momentum_decay, dtype):
    theta, gradients = twins.example(dtype)
    ours = twins.walk(gx.nadam(0.1, 0.8, 0.99, momentum_decay=momentum_decay), theta, gradients)
    options = {"lr": 0.1, "betas": (0.8, 0.99), "momentum_decay": momentum_decay}
    theirs = walk_in_torch(lambda params: torch.optim.NAdam(params, **options), theta, gradients)
    # torch keeps the product of its momenta in float32 always
    assert_close(ours, theirs, TOLERANCE["float32"])


@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(0.05, 0.0), (0.5, 0.1)])
def test_adafactor_as_torch_has_it(learning_rate, weight_decay, dtype):
    params, gradients = tree_of(dtype)
    ours = gx.chain(
        gx.normalize_by_factored_rms(min_dim_size_to_factor=1, axes="last"),
        gx.clip_by_leaf_rms(1.0),
        gx.scale_by_param_rms(),
        gx.scale_by_schedule(lambda count: jnp.minimum(learning_rate, (count + 1.0) ** -0.5)),
        gx.add_decoupled_weight_decay(learning_rate * weight_decay),
        gx.scale(-1.0),
    )

    def optimizer(params):
        return torch.optim.Adafactor(params, lr=learning_rate, weight_decay=weight_decay)

    path = twins.walk(ours, params, gradients)
    assert_close(path, walk_in_torch(optimizer, params, gradients), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(3, 4, 5), (5, 4, 3), (2, 3, 3)], ids=str)
def test_adafactor_of_more_than_two_axes_as_torch_has_it(shape, dtype):
    random = np.random.default_rng(5)
    theta, gradients = random.standard_normal(shape).astype(dtype), random.standard_normal((9, *shape)).astype(dtype)
    ours = gx.chain(
        gx.normalize_by_factored_rms(min_dim_size_to_factor=1, axes="last"),
        gx.clip_by_leaf_rms(1.0),
        gx.scale_by_param_rms(),
        gx.scale_by_learning_rate(0.05),
    )
    theirs = walk_in_torch(lambda params: torch.optim.Adafactor(params, lr=0.05, weight_decay=0.0), theta, gradients)
    assert_close(twins.walk(ours, theta, gradients), theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion(weight_decay, dtype, package):
    params, gradients = tree_of(dtype)
    ours = twins.walk(gx.lion(0.1, 0.8, 0.95, weight_decay=weight_decay), params, gradients)
    options = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    assert_close(ours, walk_in_torch(lambda p: package.Lion(p, **options), params, gradients), TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"safeguard_warmup": True}, {"d_coef": 0.5}], ids=str)
def test_prodigy(options, package):
    # gradients that point one way, so that the estimate grows; it is float32 in the package always
    params, gradients = jax.tree.map(np.abs, tree_of("float32"))
    tx = gx.prodigy(d0=1e-3, **options)
    theirs = walk_in_torch(lambda p: package.Prodigy(p, d0=1e-3, bias_correction=True, **options), params, gradients)
    ours = twins.walk(tx, params, gradients)
    # fifty steps of d₀ are 0.05
    assert np.abs(ours["bias"][-1] - params["bias"]).max() > 0.2, "the estimate has grown"
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3), (5,)], ids=str)
def test_soap(shape, every, dtype, package):
    random = np.random.default_rng(6)
    theta, gradients = random.standard_normal(shape), random.standard_normal((20, *shape))
    theta, gradients = theta.astype(dtype), gradients.astype(dtype)
    # theirs adds ε to a root that is not corrected
    ours = twins.walk(gx.soap(0.01, 0.9, 0.95, 1e-12, weight_decay=0.0, every=every), theta, gradients)
    options = {"betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.0, "precondition_frequency": every}
    theirs = walk_in_torch(lambda params: package.SOAP(params, lr=0.01, **options), theta, gradients)
    np.testing.assert_array_equal(ours[0], theta)
    # theirs decomposes in float32 always
    assert_close(ours, theirs, TOLERANCE["float32"])


def rising(steps, rate):
    """The warmup of the package, which starts from α/k; optax's starts from 0."""
    return lambda count: rate * jnp.minimum((count + 1.0) / max(steps, 1), 1.0)


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_schedule_free(name, weight_decay, warmup_steps, dtype, package):
    params, gradients = tree_of(dtype)
    rate = rising(warmup_steps, 0.05)
    stages = [] if name == "ScheduleFreeSGD" else [gx.normalize_by_rms(0.95, eps_root=1e-15, debias=True)]
    inner = gx.chain(*stages, gx.add_decoupled_weight_decay(weight_decay), gx.scale_by_learning_rate(rate))
    tx = gx.schedule_free(inner, rate, 0.8)
    options = {"lr": 0.05, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
    options |= {"momentum": 0.8} if name == "ScheduleFreeSGD" else {"betas": (0.8, 0.95)}
    made = []

    def optimizer(params):
        made.append(getattr(package, name)(params, **options))
        return made[0]

    path, theirs = twins.walk(tx, params, gradients), walk_in_torch(optimizer, params, gradients)
    # x = θ + (1/β₁ − 1)·(θ − z) is found anew in each step, which rounds it a few times more
    assert_close(path, theirs, 2 * TOLERANCE[dtype])
    made[0].eval()
    leaves = [param.detach().numpy()[None] for param in made[0].param_groups[0]["params"]]
    averages = averages_of(tx, params, gradients)
    assert_close(jax.tree.map(lambda leaf: np.asarray(leaf)[None], averages), leaves, 2 * TOLERANCE[dtype])
    assert np.abs(averages["kernel"] - path["kernel"][-1]).max() > 1e-3, "they are other parameters"


def averages_of(tx, params, gradients):
    """What is evaluated after all steps."""

    @jax.jit
    def last(params, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (gx.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), gradients)
        return gx.eval_params(tx, state, params)

    return last(params, gradients)
