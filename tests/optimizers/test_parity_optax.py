"""The same steps as optax, option by option, and the same arguments: switching is changing an import."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.twins import elementwise as twins

pytestmark = pytest.mark.once


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def tolerance(name, dtype):
    """Relative to the largest that an element has been, or to 1.

    Both sides round θ and the moments at each of fifty steps, by 2⁻²⁴ or 2⁻⁵³; measured 6e-7 and 5e-15. In
    float32 optax's 1 − β₂ᵗ is off by 2e-5 in the first steps, half of which is in θ.
    """
    return 1e-14 if dtype == "float64" else 2e-5 if "adam" in name else 2e-6


def assert_same_walk(ours, theirs, params, gradients, bound):
    path = twins.walk(ours, params, gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integer counts by floats
        their_path = twins.walk(theirs, params, gradients)
    for leaf, their_leaf in zip(jax.tree.leaves(path), jax.tree.leaves(their_path), strict=True):
        error = np.abs(leaf - their_leaf) / np.maximum(1, np.abs(their_leaf).max(axis=0))
        assert leaf.dtype == their_leaf.dtype
        assert error.max() <= bound


def falling(step):
    return 0.1 * jnp.exp(-0.05 * jnp.asarray(step, float))


# The arguments mean the same to both modules.
SAME_ARGUMENTS = [
    ("sgd", {"learning_rate": 0.01}),
    ("sgd", {"learning_rate": falling}),
    ("sgd", {"learning_rate": falling, "momentum": 0.9}),
    ("sgd", {"learning_rate": 0.001, "momentum": 0.9, "nesterov": True}),
    ("rmsprop", {"learning_rate": 0.1}),
    ("rmsprop", {"learning_rate": falling, "decay": 0.99, "eps": 1e-4, "eps_in_sqrt": False}),
    ("rmsprop", {"learning_rate": 0.1, "initial_scale": 1.0, "bias_correction": True}),
    ("rmsprop", {"learning_rate": 0.1, "eps": 1e-3, "centered": True}),
    ("rmsprop", {"learning_rate": 0.1, "eps": 1e-2, "eps_in_sqrt": False, "centered": True, "initial_scale": 1.0}),
    ("rmsprop", {"learning_rate": 0.01, "momentum": 0.9}),
    ("rmsprop", {"learning_rate": 0.01, "momentum": 0.5, "nesterov": True}),
    ("adam", {"learning_rate": 0.1}),
    ("adam", {"learning_rate": falling, "b1": 0.95, "b2": 0.98, "eps": 1e-3}),
    ("adam", {"learning_rate": 0.1, "eps": 1e-2, "eps_root": 1e-3}),
    ("adam", {"learning_rate": 0.1, "nesterov": True}),
    ("adamw", {"learning_rate": 0.1}),
    ("adamw", {"learning_rate": falling, "weight_decay": 0.5}),
    ("adamw", {"learning_rate": 0.1, "weight_decay": falling, "nesterov": True}),
]


@pytest.mark.parametrize(("name", "arguments"), SAME_ARGUMENTS)
def test_same_call_same_walk(name, arguments, dtype):
    ours, theirs = (getattr(module, name)(**arguments) for module in (gx, optax))
    assert_same_walk(ours, theirs, *twins.example(dtype), tolerance(name, dtype))


# The same step under another name, or with an option that optax does not have.
OTHER_NAMES = {
    "adagrad": (gx.adagrad(0.1, 0.1, eps_in_sqrt=True), optax.adagrad(0.1)),
    "adagrad, large eps": (gx.adagrad(0.1, 0.5, 1e-2, eps_in_sqrt=True), optax.adagrad(0.1, 0.5, 1e-2)),
    "momentum": (gx.momentum(0.01), optax.chain(optax.ema(0.9, debias=False), optax.scale_by_learning_rate(0.01))),
    "nadam": (gx.adam(0.1, nesterov=True), optax.nadam(0.1)),
    "nadam, other betas": (gx.adam(falling, 0.5, 0.9, nesterov=True), optax.nadam(falling, 0.5, 0.9)),
    "nadamw": (gx.adamw(0.1, weight_decay=0.1, nesterov=True), optax.nadamw(0.1, weight_decay=0.1)),
    "adam_l2": (gx.adam_l2(0.1, weight_decay=0.1), optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1))),
    "trace": (gx.scale_by_momentum(0.5, dampening=0.0), optax.trace(0.5)),
    "trace, nesterov": (gx.scale_by_momentum(0.5, dampening=0.0, nesterov=True), optax.trace(0.5, nesterov=True)),
    "ema": (gx.scale_by_momentum(0.9, debias=True), optax.ema(0.9)),
    "ema, not debiased": (gx.scale_by_momentum(0.99), optax.ema(0.99, debias=False)),
    "scale_by_rms": (gx.normalize_by_rms(0.9, 0.0, eps_root=1e-8), optax.scale_by_rms(0.9, 1e-8)),
    "scale_by_rss": (gx.normalize_by_rss(0.0, eps_root=1e-7, initial_accumulator_value=0.1), optax.scale_by_rss()),
    "scale_by_adam": (gx.scale_by_adam(), optax.scale_by_adam()),
    "clip": (gx.clip_by_value(0.5), optax.clip(0.5)),
    "add_decayed_weights": (gx.add_decoupled_weight_decay(0.1), optax.add_decayed_weights(0.1)),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_same_step_same_walk(name):
    with jax.enable_x64(True):
        assert_same_walk(*OTHER_NAMES[name], *twins.example("float64"), tolerance(name, "float64"))


def test_rmsprop_centered_and_debiased():
    # the variance of the first gradient is 0, found as the difference of squares of up to 1e5, in float64 within 1e-11
    arguments = {"learning_rate": 0.01, "eps": 1e-2, "centered": True, "bias_correction": True}
    with jax.enable_x64(True):
        assert_same_walk(gx.rmsprop(**arguments), optax.rmsprop(**arguments), *twins.example("float64"), 1e-11)


@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_accumulate_is_multi_steps(inner, dtype):
    ours, theirs = (getattr(module, inner)(falling) for module in (gx, optax))
    theirs = optax.MultiSteps(theirs, 4, accumulator_dtype=dtype).gradient_transformation()
    assert_same_walk(gx.accumulate(ours, every=4), theirs, *twins.example(dtype), tolerance(inner, dtype))


@pytest.mark.parametrize("name", ["adamw", "nadamw"])
def test_adamw_with_a_mask_and_a_schedule(name, dtype):
    params, gradients = map(twins.as_tree, twins.example(dtype))
    arguments = {"learning_rate": falling, "weight_decay": 0.5, "mask": {"kernel": True, "bias": False}}
    ours, theirs = gx.adamw(**arguments, nesterov=name == "nadamw"), getattr(optax, name)(**arguments)
    assert_same_walk(ours, theirs, params, gradients, tolerance(name, dtype))


def test_clip_by_global_norm_takes_one_norm_of_all_leaves(dtype):
    params, gradients = map(twins.as_tree, twins.example(dtype))
    ours, theirs = gx.clip_by_global_norm(50.0), optax.clip_by_global_norm(50.0)
    assert_same_walk(ours, theirs, params, gradients, tolerance("clip", dtype))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_first_moment_in_bfloat16(name):
    # optax also multiplies β·m in bfloat16, so that each of the fifty steps, which are of size α = 0.1, may
    # differ by an ulp of 2⁻⁸
    ours, theirs = (getattr(module, name)(0.1, mu_dtype=jnp.bfloat16) for module in (gx, optax))
    assert_same_walk(ours, theirs, *twins.example("float32"), 50 * 0.1 * 2**-8)


# Why a default is not optax's.
OTHER_DEFAULTS = {
    ("adagrad", "initial_accumulator_value"): "0 in the paper, as in torch",
}


def common_optimizers():
    functions = {name: value for name, value in vars(gx).items() if inspect.isfunction(value)}
    return [
        name
        for name, function in functions.items()
        if function.__module__.startswith("gradxform.optimizers.") and hasattr(optax, name)
    ]


@pytest.mark.parametrize("name", common_optimizers())
def test_arguments_are_optaxs(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (gx, optax))
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [key for key, p in ours.items() if p.kind is by_position] == [
        key for key, p in theirs.items() if p.kind is by_position
    ]
    assert theirs.keys() <= ours.keys()
    differing = {(name, key) for key, p in theirs.items() if ours[key].default != p.default}
    assert differing == {place for place in OTHER_DEFAULTS if place[0] == name}


def test_the_optimizers_of_both_are_these():
    assert sorted(common_optimizers()) == ["adagrad", "adam", "adamw", "rmsprop", "scale_by_adam", "sgd"]
