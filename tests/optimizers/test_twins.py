"""Every optimizer and transformation walks with its naive twin, and the claims about them hold."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform.catalog import evaluate
from tests.support.tables import EVERYTHING, RATE, entry_of
from tests.support.twins import ELSEWHERE, TWINS, data_of, twin_of
from tests.twins import elementwise as twins

pytestmark = pytest.mark.once

# Fifty steps round θ fifty times, by at most 2⁻²⁴ = 6e-8, and the moments as often: 3e-6 if every rounding
# went the same way, 7.4e-7 measured. In float64 2⁻⁵³ takes its place: 5.6e-15 and, measured, 5.6e-16.
TOLERANCE = {"float32": 2e-6, "float64": 4e-15}
# Muon's products multiply what was rounded off by up to 8, five times: float32 says little. Measured 1.2e-13.
# The eigenvectors of SOAP are as good as their eigenvalues are apart: 3.0e-13.
OF_MATRICES = 1e-12


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def falling(step):
    return 0.1 * jnp.exp(-0.05 * jnp.asarray(step, float))


def rising(step):
    return 0.9 - 0.4 / (1.0 + jnp.asarray(step, float))


NAMES = {"α": RATE, "falling": falling, "rising": rising}

# Every row of the catalog that has a twin, and the options one by one
WALKED = [text for text in EVERYTHING if (twin := TWINS.get(entry_of(text).name)) and data_of(twin)]
# Where gradients are of no convex function, it divides by differences that are nothing but rounding.
CONVEX = {"lbfgs"}
MATRICES = [text for text in WALKED if entry_of(text).sees == "matrix"]
OPTIONS = [
    "sgd(0.01)",
    "sgd(falling)",
    "sgd(0.01, momentum=0.5, dampening=0.25)",
    "sgd(0.01, momentum=rising, dampening=falling, nesterov=True)",
    "momentum(falling, decay=0.5, nesterov=True)",
    "momentum(0.01, decay=0.0)",
    "adagrad(falling, initial_accumulator_value=0.1, eps=1e-3)",
    "adagrad(0.1, eps=1e-3, eps_in_sqrt=True)",
    "adagrad(0.1, eps=0.0)",
    "rmsprop(falling, decay=0.99, eps_in_sqrt=False)",
    "rmsprop(0.1, decay=rising, initial_scale=1.0)",
    "rmsprop(0.1, bias_correction=True)",
    "rmsprop(0.1, eps=1e-3, centered=True)",
    "rmsprop(0.1, eps=1e-3, eps_in_sqrt=False, centered=True)",
    "rmsprop(0.01, momentum=0.9)",
    "rmsprop(falling, momentum=0.5, nesterov=True)",
    "adam(falling, b1=0.95, b2=0.98)",
    "adam(0.1, b1=rising, b2=0.9)",
    "adam(0.1, b1=0.0, b2=0.0, eps=1e-3)",
    "adam(0.1, eps=1e-2, eps_root=1e-4)",
    "adam(0.1, eps=0.0)",
    "adam(falling, b1=0.8, b2=0.99, nesterov=True)",
    "adamw(falling, b1=0.95, b2=0.98, weight_decay=0.5)",
    "adamw(0.1, eps_root=1e-4, weight_decay=falling, nesterov=True)",
    "adam_l2(falling, b1=0.95, b2=0.98, weight_decay=0.5)",
    "adam_l2(0.1, eps_root=1e-4, weight_decay=falling, nesterov=True)",
    "accumulate(sgd(0.01), every=1)",
    "accumulate(sgd(falling, momentum=0.5), every=4)",
    "accumulate(adamw(0.1, weight_decay=0.5), every=3)",
    "scale(-0.5)",
    "scale(falling)",
    "scale_by_learning_rate(falling)",
    "scale_by_momentum(0.5, nesterov=True)",
    "scale_by_momentum(0.99, debias=True)",
    "scale_by_momentum(rising, nesterov=True, debias=True)",
    "scale_by_momentum(0.5, dampening=0.0)",
    "scale_by_momentum(0.5, dampening=0.3, nesterov=True)",
    "bias_correction(0.999)",
    "bias_correction(rising)",
    "normalize_by_rms(0.0)",
    "normalize_by_rms(0.9, eps=0.0, debias=True)",
    "normalize_by_rms(0.9, eps=falling, eps_root=0.1, initial_scale=2.0)",
    "normalize_by_rms(0.9, eps=1e-2, centered=True)",
    "normalize_by_rms(of=normalize_by_rss())",
    "normalize_by_rss(eps=0.0, eps_root=0.1, initial_accumulator_value=0.5)",
    "normalize_by_rss(of=scale_by_momentum(nesterov=True))",
    "nadam(falling, b1=0.8, b2=0.99, eps=1e-3)",
    "nadam(0.1, b1=0.8, b2=0.99, eps_root=1e-4, momentum_decay=0.1)",
    "lion(falling, b1=0.5, b2=0.8, weight_decay=0.5)",
    "lion(0.1, b1=rising, b2=rising, weight_decay=falling)",
    "scale_by_momentum(0.99, blend=0.9)",
    "scale_by_momentum(rising, blend=falling)",
    "scale_by_momentum(0.9, nesterov=True, debias=True, momentum_decay=0.01)",
    "adafactor(0.1)",
    "adafactor(None, 2, decay_rate=1.0)",
    "adafactor(falling, 2, 0.5, momentum=0.8, weight_decay_rate=0.01)",
    "adafactor(0.1, 2, multiply_by_parameter_scale=False, clipping_threshold=None, eps=1e-3)",
    "adafactor(0.1, 2, factored=False, weight_decay_rate=falling)",
    "normalize_by_factored_rms(1.0, 0, 2, 1e-2)",
    'normalize_by_factored_rms(rising, min_dim_size_to_factor=2, axes="last")',
    "clip_by_leaf_rms(falling)",
    "scale_by_param_rms(10.0)",
    "scale_by_polyak(c, 1e-3, ε)",
    'scale_by_polyak(2.0, variant="sps+")',
    "polyak_sgd(1e-4, falling, c, eps=1e-3)",
    "polyak_sgd(f_min=2.0)",
    'polyak_sgd(f_min=2.0, variant="sps+")',
    "prodigy(falling, 0.8, 0.99, eps=1e-3, d0=1e-3, d_coef=0.5)",
    "prodigy(b3=0.9, weight_decay=0.1)",
    "prodigy(rising, safeguard_warmup=True)",
    "schedule_free(sgd(falling), falling)",
    "schedule_free(momentum(0.1), 0.1, 0.5, 0.0)",
    "schedule_free(adagrad(0.1), 0.1, b1=1.0)",
    "schedule_free_sgd(0.01, warmup_steps=10, b1=0.8, weight_decay=0.1)",
    "schedule_free_sgd(falling, weight_lr_power=1.0)",
    "schedule_free_adamw(0.1, 5, weight_decay=0.1)",
    "schedule_free_adamw(falling, b1=0.5, b2=0.9, eps=1e-3)",
    "average_schedule_free(falling, 0.5, 1.0)",
    "soap(falling, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5)",
    "soap(0.1, every=3, shampoo_beta=0.5)",
    'soap(0.1, every=4, renewal="eigh", max_size=3)',
    "soap(0.1, every=2, eps=1e-3, kl=True)",
    "scale_by_adam(b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-3, nesterov=True)",
    "clip_by_value(falling)",
    "clip_by_leaf_norm(1.5)",
    "clip_by_leaf_norm(falling)",
    "clip_by_global_norm(20.0)",
    "clip_by_global_norm(falling)",
    "add_decoupled_weight_decay(falling)",
    "add_l2_regularization(falling)",
]
LEAVES = [text for text in (*WALKED, *OPTIONS) if entry_of(text).sees == "leaf"]
DOWNHILL = [
    "prodigy(1.0, d0=0.01)",
    "prodigy(0.5, 0.8, 0.9, d0=0.1, d_coef=0.5, weight_decay=0.1, safeguard_warmup=True)",
    "lbfgs(α, memory_size=3)",
    "lbfgs(0.3)",
    "lbfgs(0.3, 1, scale_init_precond=False)",
    "schedule_free(sgd(0.3), 0.3)",
]
COMPLEX = [
    "sgd(0.01, momentum=0.9)",
    "rmsprop(0.1)",
    "adam(0.1)",
    "adam_l2(0.1, weight_decay=0.5, nesterov=True)",
    "nadam(0.1, momentum_decay=0.1)",
    "lion(0.1)",
    "adafactor(0.1)",
    "polyak_sgd(1e-4)",
    "prodigy(1.0, d0=0.1)",
    "schedule_free_sgd(0.01)",
    "soap(0.1)",
]


def special(text: str) -> bool:
    """Whether it wants a matrix, or gradients that belong together."""
    return text in MATRICES or entry_of(text).name in CONVEX


def ours_and_twins(text: str, theta: Any, gradients: Any) -> tuple[Any, Any]:
    """The walk of a call over one array, or what it makes of each gradient; and its twin's, in double precision.

    What sees all leaves sees the array in two leaves, and comes to the same.
    """
    tx, data = evaluate(text, **NAMES), {"theta": theta, "gradients": gradients, "updates": gradients}
    several = entry_of(text).sees == "tree" and theta.ndim == 1
    ours = {name: twins.as_tree(array) for name, array in data.items()} if several else data
    if "gradients" in data_of(TWINS[entry_of(text).name]):
        path = twins.walk(tx, ours["theta"], ours["gradients"])
    else:
        path = twins.transform(tx, ours["updates"], ours["theta"])
    return twins.as_array(path), twin_of(text, **NAMES)(**{name: wide(array) for name, array in data.items()})


@pytest.mark.parametrize("text", dict.fromkeys(text for text in (*WALKED, *OPTIONS) if not special(text)))
def test_it_walks_with_its_twin(text, dtype):
    assert_close(*ours_and_twins(text, *twins.example(dtype)), TOLERANCE[dtype])


@pytest.mark.parametrize("text", dict.fromkeys([*MATRICES, *LEAVES]))
def test_it_walks_with_its_twin_on_a_matrix(text):
    matrices = (twins.as_tree(array)["kernel"] for array in twins.example("float64"))
    with jax.enable_x64(True):
        assert_close(*ours_and_twins(text.replace(".*kernel", ""), *matrices), OF_MATRICES)


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x + 1j * np.flip(x)], ids=["real", "complex"])
@pytest.mark.parametrize("text", DOWNHILL)
def test_it_walks_down_a_parabola_with_its_twin(text, of, dtype):
    """Gradients of one convex function, whose curvatures and distance are estimated: those that the twin meets."""
    theta = of(twins.example(dtype)[0])
    curvatures, path, gradients = np.exp(np.sin(theta.real)), [wide(theta)], []
    for _ in range(30):
        gradients.append((curvatures * path[-1]).astype(theta.dtype))
        path = twin_of(text, **NAMES)(theta=wide(theta), gradients=wide(gradients))
    assert np.abs(path[-1]).max() < 0.7 * np.abs(theta).max()
    # inner products of differences, which are rounded too; measured 7.3e-7 and 3.6e-15
    assert_close(*ours_and_twins(text, theta, np.array(gradients)), 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("text", ["lbfgs(0.1, 1)", "lbfgs(0.1, 3)"])
def test_pairs_that_would_make_the_hessian_indefinite_are_left_out(text):
    with jax.enable_x64(True):
        theta, gradients = twins.example("float64")
        path, expected = ours_and_twins(text, theta, gradients)
        curvatures = np.sum(np.diff(expected[:-1], axis=0) * np.diff(gradients[1:], axis=0), axis=1)
        assert 3 < np.sum(curvatures < 0) < 46
        # it divides by curvatures that may be small beside their terms; measured 2e-15
        assert_close(path, expected, 1e-13)


@pytest.mark.parametrize("file", ELSEWHERE)
def test_what_has_no_walk_of_an_array_is_compared_in_a_file_of_its_own(file):
    text = (pathlib.Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    assert [name for name in ELSEWHERE[file] if f"gx.{name}" not in text] == []


def test_centered_and_debiased_variance_is_of_the_corrected_moments():
    # The variance of the first gradient is 0, found as the difference of squares of up to 1e5, which float64
    # knows within 1e-11; the steps are that much off where ε is 0.1.
    text = "rmsprop(0.01, eps=0.1, centered=True, bias_correction=True)"
    with jax.enable_x64(True):
        path, expected = ours_and_twins(text, *twins.example("float64"))
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["adamw", "adam_l2"])
@pytest.mark.parametrize("mask", [".*kernel", lambda path, leaf: leaf.ndim > 1], ids=["pattern", "predicate"])
def test_masked_leaves_walk_with_the_twin_without_decay(name, mask, dtype):
    params, gradients = map(twins.as_tree, twins.example(dtype))
    path = twins.walk(getattr(gx, name)(0.1, weight_decay=0.5, mask=mask), params, gradients)
    for leaf, weight_decay in (("kernel", 0.5), ("bias", 0.0)):
        twin = getattr(twins, name)
        expected = twin(wide(params[leaf]), wide(gradients[leaf]), 0.1, weight_decay=weight_decay)
        assert_close(path[leaf], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["add_decoupled_weight_decay", "add_l2_regularization"])
def test_a_mask_leaves_other_leaves_as_they_are(name, dtype):
    params, updates = map(twins.as_tree, twins.example(dtype))
    results = twins.transform(getattr(gx, name)(0.1, mask={"kernel": True, "bias": False}), updates, params)
    expected = getattr(twins, name)(wide(updates["kernel"]), wide(params["kernel"]), 0.1)
    assert_close(results["kernel"], expected, TOLERANCE[dtype])
    np.testing.assert_array_equal(results["bias"], updates["bias"])


@pytest.mark.parametrize("text", COMPLEX)
def test_complex_parameters_walk_with_the_twin(text, dtype):
    assert_close(*ours_and_twins(text, *(x + 1j * np.flip(x) for x in twins.example(dtype))), TOLERANCE[dtype])


def test_momentum_then_normalisation_is_not_adam():
    gradients = np.array([1.0, -1.0, 1.0], np.float32)
    of_the_average = gx.chain(
        gx.scale_by_momentum(0.9), gx.bias_correction(0.9), gx.normalize_by_rms(0.999, debias=True)
    )
    adam = gx.chain(gx.adam(1.0), gx.scale(-1.0))
    assert float(twins.transform(of_the_average, gradients)[-1]) == pytest.approx(0.551, abs=5e-4)
    assert float(twins.transform(adam, gradients)[-1]) == pytest.approx(0.336, abs=5e-4)


def test_adamw_shrinks_all_weights_alike_and_l2_does_not():
    theta = np.array([1.0, 1.0])
    gradients = np.random.default_rng(0).standard_normal((20, 2)) * np.array([1e-2, 1e2])

    def last(name, weight_decay):
        with jax.enable_x64(True):
            return twins.walk(getattr(gx, name)(0.01, weight_decay=weight_decay), theta, gradients)[-1]

    shrunk, shrunk_by_l2 = (last(name, 0.0) - last(name, 0.1) for name in ("adamw", "adam_l2"))
    # Σ α·λ·θ over the steps, by which the weights differ only as far as their gradients moved θ by then
    assert shrunk == pytest.approx(20 * 0.01 * 0.1, rel=0.1)
    assert shrunk_by_l2[0] > 100 * shrunk_by_l2[1] > 0


def test_weight_without_gradient_decays_at_the_rate_of_any_other():
    params, lost = np.array([2.0, 2.0], np.float32), []
    for weight_decay in (0.0, 0.1):
        tx = gx.adamw(0.5, weight_decay=weight_decay)
        lost.append(tx.update(jnp.array([0.0, 1e6]), tx.init(params), params)[0])
    # one float32 rounding of steps of size 0.5
    np.testing.assert_allclose(lost[1] - lost[0], -0.5 * 0.1 * params, rtol=0, atol=6e-8)


def test_zero_decay_divides_each_gradient_by_its_size():
    _, gradients = twins.example(np.float32)
    results = twins.transform(gx.normalize_by_rms(decay=0.0, eps=1e-3), gradients)
    # square, root, sum and quotient: four roundings of 6e-8
    np.testing.assert_allclose(results, gradients / (np.abs(gradients) + 1e-3), rtol=2.5e-7)


def test_accumulated_sgd_is_gradient_descent_on_the_whole_data_set():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = load_digits(return_X_y=True)
    every = 8
    images, labels = jnp.asarray(images[:1792] / 16, jnp.float32), jnp.asarray(labels[:1792])
    params = {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}

    @jax.jit
    @jax.grad
    def gradient(params, images, labels):
        logits = images @ params["weights"] + params["bias"][None]
        scores = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))

    def train(tx, parts):
        current, state = params, tx.init(params)
        for _ in range(5):
            for some_images, some_labels in zip(jnp.split(images, parts), jnp.split(labels, parts), strict=True):
                updates, state = tx.update(gradient(current, some_images, some_labels), state, current)
                current = gx.apply_updates(current, updates)
        return current

    whole, in_parts = train(gx.sgd(0.5), 1), train(gx.accumulate(gx.sgd(0.5), every=every), every)
    assert float(jnp.abs(whole["weights"]).max()) > 0.1
    for name in params:
        # the same sums in another order: a few float32 roundings of values below 1
        np.testing.assert_allclose(in_parts[name], whole[name], rtol=0, atol=1e-6)


def wide(array):
    return np.asarray(array, np.complex128 if np.iscomplexobj(array) else np.float64)


def assert_close(actual, expected, tolerance):
    """Each element to the tolerance, relative to the largest it has been, or to 1."""
    dtype = np.result_type(float if jax.config.jax_enable_x64 else np.float32)
    assert actual.dtype == (np.result_type(dtype, np.complex64) if np.iscomplexobj(expected) else dtype)
    error = np.abs(actual - expected) / np.maximum(1, np.abs(expected).max(axis=0))
    assert error.max() <= tolerance
