"""Every optimizer and transformation walks with its naive twin, and the claims about them hold."""

from __future__ import annotations

import functools
import inspect
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import gradxform as gx
from tests.twins import elementwise as twins

pytestmark = pytest.mark.once

# Fifty steps round θ fifty times, by at most 2⁻²⁴ = 6e-8, and the moments as often: 3e-6 if every rounding
# went the same way, 7.4e-7 measured. In float64 2⁻⁵³ takes its place: 5.6e-15 and, measured, 5.6e-16.
TOLERANCE = {"float32": 2e-6, "float64": 4e-15}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


class Call(NamedTuple):
    """A call that means the same in gradxform and in the module of its twins."""

    name: str
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={_show(value)}' for key, value in self.arguments.items())})"

    def ours(self) -> gx.Transformation:
        inner = {key: value.ours() if isinstance(value, Call) else value for key, value in self.arguments.items()}
        return getattr(gx, self.name)(**inner)

    def twin(self) -> Any:
        inner = {key: value.twin() if isinstance(value, Call) else value for key, value in self.arguments.items()}
        return functools.partial(getattr(twins, self.name), **inner)


def _show(value: Any) -> str:
    return value.__name__ if callable(value) else repr(value)


def call(name: str, **arguments: Any) -> Call:
    return Call(name, arguments)


def falling(step):
    return 0.1 * jnp.exp(-0.05 * jnp.asarray(step, float))


def rising(step):
    return 0.9 - 0.4 / (1.0 + jnp.asarray(step, float))


OPTIMIZERS = [
    call("sgd", learning_rate=0.01),
    call("sgd", learning_rate=falling),
    call("sgd", learning_rate=0.001, momentum=0.9),
    call("sgd", learning_rate=0.001, momentum=0.9, nesterov=True),
    call("sgd", learning_rate=0.01, momentum=0.5, dampening=0.25),
    call("sgd", learning_rate=0.01, momentum=rising, dampening=falling, nesterov=True),
    call("momentum", learning_rate=0.01),
    call("momentum", learning_rate=falling, decay=0.5, nesterov=True),
    call("momentum", learning_rate=0.01, decay=0.0),
    call("adagrad", learning_rate=0.1),
    call("adagrad", learning_rate=falling, initial_accumulator_value=0.1, eps=1e-3),
    call("adagrad", learning_rate=0.1, eps=1e-3, eps_in_sqrt=True),
    call("adagrad", learning_rate=0.1, eps=0.0),
    call("rmsprop", learning_rate=0.1),
    call("rmsprop", learning_rate=falling, decay=0.99, eps_in_sqrt=False),
    call("rmsprop", learning_rate=0.1, decay=rising, initial_scale=1.0),
    call("rmsprop", learning_rate=0.1, bias_correction=True),
    call("rmsprop", learning_rate=0.1, eps=1e-3, centered=True),
    call("rmsprop", learning_rate=0.1, eps=1e-3, eps_in_sqrt=False, centered=True),
    call("rmsprop", learning_rate=0.01, momentum=0.9),
    call("rmsprop", learning_rate=falling, momentum=0.5, nesterov=True),
    call("adam", learning_rate=0.1),
    call("adam", learning_rate=falling, b1=0.95, b2=0.98),
    call("adam", learning_rate=0.1, b1=rising, b2=0.9),
    call("adam", learning_rate=0.1, b1=0.0, b2=0.0, eps=1e-3),
    call("adam", learning_rate=0.1, eps=1e-2, eps_root=1e-4),
    call("adam", learning_rate=0.1, eps=0.0),
    call("adam", learning_rate=0.1, nesterov=True),
    call("adam", learning_rate=falling, b1=0.8, b2=0.99, nesterov=True),
    call("adamw", learning_rate=0.1),
    call("adamw", learning_rate=falling, b1=0.95, b2=0.98, weight_decay=0.5),
    call("adamw", learning_rate=0.1, eps_root=1e-4, weight_decay=falling, nesterov=True),
    call("adam_l2", learning_rate=0.1),
    call("adam_l2", learning_rate=falling, b1=0.95, b2=0.98, weight_decay=0.5),
    call("adam_l2", learning_rate=0.1, eps_root=1e-4, weight_decay=falling, nesterov=True),
    call("accumulate", tx=call("sgd", learning_rate=0.01), every=1),
    call("accumulate", tx=call("sgd", learning_rate=falling, momentum=0.5), every=4),
    call("accumulate", tx=call("adamw", learning_rate=0.1, weight_decay=0.5), every=3),
]

TRANSFORMATIONS = [
    call("scale", factor=-0.5),
    call("scale", factor=falling),
    call("scale_by_schedule", schedule=falling),
    call("scale_by_learning_rate", learning_rate=0.3),
    call("scale_by_learning_rate", learning_rate=falling),
    call("scale_by_momentum"),
    call("scale_by_momentum", decay=0.5, nesterov=True),
    call("scale_by_momentum", decay=0.99, debias=True),
    call("scale_by_momentum", decay=rising, nesterov=True, debias=True),
    call("scale_by_momentum", decay=0.5, dampening=0.0),
    call("scale_by_momentum", decay=0.5, dampening=0.3, nesterov=True),
    call("bias_correction"),
    call("bias_correction", decay=0.999),
    call("bias_correction", decay=rising),
    call("normalize_by_rms"),
    call("normalize_by_rms", decay=0.0),
    call("normalize_by_rms", decay=0.9, eps=0.0, debias=True),
    call("normalize_by_rms", decay=0.9, eps=falling, eps_root=0.1, initial_scale=2.0),
    call("normalize_by_rms", decay=0.9, eps=1e-2, centered=True),
    call("normalize_by_rms", decay=0.9, of=call("scale_by_momentum", decay=0.8, debias=True), debias=True),
    call("normalize_by_rms", of=call("normalize_by_rss")),
    call("normalize_by_rss"),
    call("normalize_by_rss", eps=0.0, eps_root=0.1, initial_accumulator_value=0.5),
    call("normalize_by_rss", of=call("scale_by_momentum", nesterov=True)),
    call("scale_by_adam"),
    call("scale_by_adam", b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-3, nesterov=True),
    call("clip_by_value", max_value=0.5),
    call("clip_by_value", max_value=falling),
    call("clip_by_leaf_norm", max_norm=1.5),
    call("clip_by_leaf_norm", max_norm=falling),
]

ON_ALL_LEAVES = [call("clip_by_global_norm", max_norm=20.0), call("clip_by_global_norm", max_norm=falling)]

COMPLEX = [
    call("sgd", learning_rate=0.01, momentum=0.9),
    call("rmsprop", learning_rate=0.1),
    call("adam", learning_rate=0.1),
    call("adam_l2", learning_rate=0.1, weight_decay=0.5, nesterov=True),
]

WITH_PARAMS = [
    call(name, weight_decay=weight_decay)
    for name in ("add_decoupled_weight_decay", "add_l2_regularization")
    for weight_decay in (0.1, falling)
]


# Those whose reference is no walk of one array are compared in files of their own.
ELSEWHERE = {
    "wrappers/test_parity_guards.py": {"clip_by_average_norm", "clip_by_param_norm", "clip_by_zscore", "skip_spikes"},
    "wrappers/test_guards.py": {"skip_nonfinite"},
    "wrappers/test_observe.py": {"observe"},
    "optimizers/matrix/test_muon.py": {"muon", "normalize_by_neuron", "normuon", "orthogonalize"},
    "wrappers/quantization/test_quantization.py": {"quantize_state"},
    "wrappers/test_low_precision.py": {"compensated", "master_weights", "stochastic_rounding"},
}


def test_every_public_optimizer_and_transformation_has_a_twin():
    functions = {name: value for name, value in vars(gx).items() if inspect.isfunction(value)}
    public = {
        name
        for name, function in functions.items()
        if function.__annotations__.get("return") == "Transformation" and "._core." not in function.__module__
    }
    walked = {case.name for case in (*OPTIMIZERS, *TRANSFORMATIONS, *ON_ALL_LEAVES, *WITH_PARAMS)}
    assert walked | {name for names in ELSEWHERE.values() for name in names} == public
    for file, names in ELSEWHERE.items():
        text = (pathlib.Path(__file__).parents[1] / file).read_text(encoding="utf-8")
        assert all(f"gx.{name}" in text for name in names), file


@pytest.mark.parametrize("case", OPTIMIZERS, ids=repr)
def test_optimizer_walks_with_its_twin(case, dtype):
    theta, gradients = twins.example(dtype)
    assert_close(twins.walk(case.ours(), theta, gradients), case.twin()(wide(theta), wide(gradients)), dtype)


def test_centered_and_debiased_variance_is_of_the_corrected_moments():
    # The variance of the first gradient is 0, found as the difference of squares of up to 1e5, which float64
    # knows within 1e-11; the steps are that much off where ε is 0.1.
    case = call("rmsprop", learning_rate=0.01, eps=0.1, centered=True, bias_correction=True)
    theta, gradients = twins.example("float64")
    with jax.enable_x64(True):
        path = twins.walk(case.ours(), theta, gradients)
    np.testing.assert_allclose(path, case.twin()(theta, gradients), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["adamw", "adam_l2"])
@pytest.mark.parametrize("mask", [".*kernel", lambda path, leaf: leaf.ndim > 1], ids=["pattern", "predicate"])
def test_masked_leaves_walk_with_the_twin_without_decay(name, mask, dtype):
    params, gradients = map(twins.as_tree, twins.example(dtype))
    path = twins.walk(getattr(gx, name)(0.1, weight_decay=0.5, mask=mask), params, gradients)
    for leaf, weight_decay in (("kernel", 0.5), ("bias", 0.0)):
        twin = getattr(twins, name)
        assert_close(path[leaf], twin(wide(params[leaf]), wide(gradients[leaf]), 0.1, weight_decay=weight_decay), dtype)


@pytest.mark.parametrize("case", TRANSFORMATIONS, ids=repr)
def test_transformation_gives_what_its_twin_gives(case, dtype):
    _, updates = twins.example(dtype)
    assert_close(twins.transform(case.ours(), updates), case.twin()(wide(updates)), dtype)


@pytest.mark.parametrize("case", ON_ALL_LEAVES, ids=repr)
def test_global_clip_gives_what_its_twin_gives(case, dtype):
    updates = twins.as_tree(twins.example(dtype)[1])
    results = twins.transform(case.ours(), updates)
    expected = case.twin()(list(zip(wide(updates["kernel"]), wide(updates["bias"]), strict=True)))
    for name, leaves in zip(("kernel", "bias"), zip(*expected, strict=True), strict=True):
        assert_close(results[name], np.stack(leaves), dtype)


@pytest.mark.parametrize("case", WITH_PARAMS, ids=repr)
def test_decay_adds_what_its_twin_adds(case, dtype):
    theta, updates = twins.example(dtype)
    params, updates = twins.as_tree(theta), twins.as_tree(updates)
    tx = getattr(gx, case.name)(**case.arguments, mask={"kernel": True, "bias": False})
    results = twins.transform(tx, updates, params)
    assert_close(results["kernel"], case.twin()(wide(updates["kernel"]), wide(params["kernel"])), dtype)
    np.testing.assert_array_equal(results["bias"], updates["bias"])


@pytest.mark.parametrize("case", COMPLEX, ids=repr)
def test_complex_parameters_walk_with_the_twin(case, dtype):
    theta, gradients = (x + 1j * np.flip(x) for x in twins.example(dtype))
    assert_close(twins.walk(case.ours(), theta, gradients), case.twin()(wide(theta), wide(gradients)), dtype)


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


def assert_close(actual, expected, dtype):
    """Each element to the tolerance, relative to the largest it has been, or to 1."""
    assert actual.dtype == (np.result_type(dtype, np.complex64) if np.iscomplexobj(expected) else dtype)
    error = np.abs(actual - expected) / np.maximum(1, np.abs(expected).max(axis=0))
    assert error.max() <= TOLERANCE[dtype]
