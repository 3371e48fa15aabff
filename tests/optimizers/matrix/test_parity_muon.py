"""The same steps as torch.optim.Muon, pytorch_optimizer's Muon and NorMuon, muon-optimizer, and optax.contrib.muon."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.twins import elementwise as twins

pytestmark = pytest.mark.once

# Both sides take five steps in float32 on matrices of at most 24 rows, each step multiplying what was rounded off by up
# to 8.2; then a learning rate of 0.02 and twelve steps. Measured 2e-6.
TOLERANCE = 2e-5


def example(shape, steps=12):
    random = np.random.default_rng(7)
    return random.normal(size=shape).astype(np.float32), random.normal(size=(steps, *shape)).astype(np.float32)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


# PyTorch; its weights are (out, in)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")


def walk_in_torch(torch, build, theta, gradients):
    param = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    stepper, path = build([param]), []
    for gradient in gradients:
        param.grad = torch.from_numpy(gradient.copy())
        stepper.step()
        path.append(param.detach().numpy().copy())
    return np.stack(path)


@pytest.fixture
def in_float32(torch, monkeypatch):
    """torch's iteration without its rounding to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())


@pytest.mark.parametrize("shape", [(6, 6), (6, 15), (15, 6)], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"beta": 0.5, "nesterov": False, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": False}),
        ({"scale": "adam_rms", "weight_decay": 0.3}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3}),
        ({"coefficients": (2.0, -1.5, 0.5), "steps": 8}, {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8}),
    ],
    ids=str,
)
def test_torch(ours, theirs, shape, torch, in_float32):
    theta, gradients = example(shape)
    ours, theirs = {"weight_decay": 0.0, **ours}, {"weight_decay": ours.get("weight_decay", 0.0), **theirs}
    path = twins.walk(gx.muon(0.02, {"": "out in"}, **ours), theta, gradients)
    assert_close(path, walk_in_torch(torch, lambda p: torch.optim.Muon(p, lr=0.02, **theirs), theta, gradients))


def test_torch_as_it_is(torch):
    theta, gradients = example((6, 15))
    path = twins.walk(gx.muon(0.02, {"": "out in"}), theta, gradients)
    theirs = walk_in_torch(torch, lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.0), theta, gradients)
    # a step of 0.02 whose elements, of a third on average, bfloat16 gives with an error of 2⁻⁸ to 2⁻⁵, twelve times
    assert_close(path, theirs, 12 * 0.02 * 2**-5)


@pytest.mark.parametrize("shape", [(6, 6), (6, 15), (15, 6), (6, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("method", "schedule"),
    [("newton_schulz", "original"), ("polar_express", "polar_express_safer"), ("gram", "polar_express_safer")],
)
def test_pytorch_optimizers_products(method, schedule, shape, torch):
    matrix = pytest.importorskip("pytorch_optimizer.optimizer.utils.matrix")
    function = matrix.zero_power_via_gram_newton_schulz if method == "gram" else matrix.zero_power_via_newton_schulz_5
    update, steps = example(shape)[0], 5 if method == "newton_schulz" else 8
    layout = "out in" if len(shape) == 2 else "out in in in"
    tx = gx.orthogonalize(layout, method=method, steps=steps)
    ours, _ = tx.update(jnp.asarray(update), tx.init(update))
    theirs = function(
        torch.from_numpy(update.reshape(len(update), -1)),
        num_steps=steps,
        weights=schedule,
        safety_factor=1.0 if method == "newton_schulz" else 1.02,
        dtype=torch.float32,
    )
    assert_close(ours, theirs.numpy().reshape(shape))


@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (6, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("Muon", {}, {}),
        ("Muon", {"scale": "adam_rms", "beta": 0.9, "weight_decay": 0.1}, {"use_adjusted_lr": True, "momentum": 0.9}),
        ("NorMuon", {"eps": 1e-10}, {}),
        (
            "NorMuon",
            {"beta2": 0.7, "nesterov": False, "weight_decay": 0.1, "scale": "adam_rms", "eps": 1e-4},
            {"beta2": 0.7, "nesterov": False, "use_adjusted_lr": True, "eps": 1e-4},
        ),
    ],
    ids=str,
)
def test_pytorch_optimizer(name, ours, theirs, shape, torch, monkeypatch):
    package = pytest.importorskip("pytorch_optimizer")
    matrix = pytest.importorskip("pytorch_optimizer.optimizer.utils.matrix")
    function = matrix.zero_power_via_newton_schulz_5  # in bfloat16 by default
    monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], torch.float32))
    theta, gradients = example(shape)
    theirs = {"weight_decay": ours.get("weight_decay", 0.0), "foreach": False, **theirs}
    layout = "out in" if len(shape) == 2 else "out in in in"
    path = twins.walk(getattr(gx, name.lower())(0.02, {"": layout}, **ours), theta, gradients)

    def build(params):
        return getattr(package, name)([{"params": params, "lr": 0.02, "use_muon": True, **theirs}], foreach=False)

    # NorMuon's ε of 1e-4 is of 1/√6, not of s times that: 1e-3 of a step
    tolerance = TOLERANCE if ours.get("eps") != 1e-4 else 12 * 0.02 * 1e-3
    assert_close(path, walk_in_torch(torch, build, theta, gradients), tolerance)


# optax.contrib.muon: moments are corrected, which the lookahead alone can tell, and matrices are (in, out)


@pytest.fixture
def lenient():
    """optax mixes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("scale", "consistent_rms"), [("jordan", None), ("adam_rms", 0.2)])
@pytest.mark.parametrize("shape", [(6, 15), (15, 6)], ids=str)
def test_optax(nesterov, scale, consistent_rms, shape, lenient):
    theta, gradients = example(shape)
    ours = gx.chain(
        gx.scale_by_momentum(0.9, nesterov=nesterov, debias=True),
        gx.orthogonalize(scale=scale, eps=1e-8),
        gx.add_decoupled_weight_decay(0.1),
        gx.scale_by_learning_rate(0.02),
    )
    options = {"beta": 0.9, "weight_decay": 0.1, "nesterov": nesterov, "consistent_rms": consistent_rms}
    theirs = twins.walk(optax.contrib.muon(0.02, **options), theta, gradients)
    assert_close(twins.walk(ours, theta, gradients), theirs)
    if not nesterov:
        own = gx.muon(0.02, "", beta=0.9, nesterov=False, weight_decay=0.1, scale=scale)
        assert_close(twins.walk(own, theta, gradients), theirs)


def test_optax_dimension_numbers(lenient):
    theta, gradients = example((3, 4, 2, 5), steps=4)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3))
    theirs = optax.contrib.muon(0.02, beta=0.9, nesterov=False, muon_weight_dimension_numbers=numbers)
    ours = gx.muon(0.02, {"": "each in out out"}, beta=0.9, nesterov=False)
    assert_close(twins.walk(ours, theta, gradients), twins.walk(theirs, theta, gradients))
