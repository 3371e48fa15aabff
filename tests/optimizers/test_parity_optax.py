"""The same steps as optax, option by option, and the same arguments: switching is changing an import."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform import catalog
from gradxform.catalog import evaluate
from tests.support.tables import counterparts
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


def assert_same_walk(ours, theirs, params, gradients, bound, curvatures=None):
    path = twins.walk(ours, params, gradients, curvatures)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integer counts by floats
        their_path = twins.walk(theirs, params, gradients, curvatures)
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


# The counterparts that the catalog names; some keep float32 numbers of their own in optax: the mean, Muon's rate,
# Adafactor's decay.
IN_FLOAT32 = {"accumulate": 1e-7, "muon": 1e-7, "adafactor": 1e-6, "normalize_by_factored_rms": 1e-6}


@counterparts("optax")
def test_the_counterpart_takes_the_same_steps(entry, ours, theirs):
    params, gradients = map(twins.as_tree, twins.example("float64"))
    if entry.sees == "matrix":
        params, gradients = ({"kernel": tree["kernel"]} for tree in (params, gradients))
    curvatures = None
    if "lbfgs" in entry.name:
        # down a parabola: where two gradients would make H indefinite, optax takes them in, and we leave them out
        curvatures, gradients = jax.tree.map(lambda leaf: np.exp(np.sin(leaf)), params), zeros(gradients)
    with jax.enable_x64(True):
        bound = IN_FLOAT32.get(entry.name, tolerance(ours, "float64"))
        assert_same_walk(evaluate(ours), evaluate(theirs, optax), params, gradients, bound, curvatures)


def zeros(tree):
    return jax.tree.map(np.zeros_like, tree)


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
    (
        "adafactor",
        "dtype_momentum",
    ): "float32 would take float64 leaves their digits, complex ones their imaginary part",
    ("lbfgs", "linesearch"): "a line search asks for value, grad and value_fn in every call; its user writes it",
    ("noisy_sgd", "key"): "a number, as there is no other optimizer that cannot be built without one",
}
# What optax has, and we have not.
WITHOUT = {
    ("nadam", "nesterov"): "without it, it is adam",
    ("noisy_sgd", "seed"): "key takes a number, too",
}


COMMON = [entry.name for entry in (*catalog.OPTIMIZERS, catalog.CATALOG["scale_by_adam"]) if hasattr(optax, entry.name)]


@pytest.mark.parametrize("name", COMMON)
def test_arguments_are_optaxs(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (gx, optax))
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [key for key, p in ours.items() if p.kind is by_position] == [
        key for key, p in theirs.items() if p.kind is by_position
    ]
    assert {(name, key) for key in theirs.keys() - ours.keys()} == {place for place in WITHOUT if place[0] == name}
    differing = {(name, key) for key, p in theirs.items() if key in ours and ours[key].default != p.default}
    assert differing == {place for place in OTHER_DEFAULTS if place[0] == name}
