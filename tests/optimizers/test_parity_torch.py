"""The same steps as torch.optim, option by option, where both mean the same."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import gradxform as gx
from gradxform import catalog
from gradxform.catalog import evaluate
from tests.support.tables import counterparts
from tests.support.torch import Deferred, parameter, torch, walk_in_torch
from tests.twins import elementwise as twins

pytestmark = pytest.mark.once

# Both sides round θ and the moments at each of fifty steps, by 2⁻²⁴ or 2⁻⁵³; relative to the largest that an
# element has been, or to 1. Measured 5.4e-7 and 3.0e-15.
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def assert_same_walk(tx, optimizer, dtype, tolerance=None):
    theta, gradients = twins.example(dtype)
    ours, theirs = twins.walk(tx, theta, gradients), walk_in_torch(optimizer, theta, gradients)
    error = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs).max(axis=0))
    assert ours.dtype == theirs.dtype
    assert error.max() <= (tolerance or TOLERANCE[dtype])


@counterparts("torch", catalog.OPTIMIZERS)
def test_the_counterpart_takes_the_same_steps(entry, ours, theirs, dtype):
    # torch keeps the product of NAdam's β₁ in float32 always
    tolerance = TOLERANCE["float32" if "NAdam" in theirs else dtype]
    assert_same_walk(evaluate(ours), evaluate(theirs, torch, optim=Deferred(torch.optim)), dtype, tolerance)


def test_the_counterparts_of_clips_are_compared_below():
    others = [entry for entry in catalog.CATALOG.values() if entry not in catalog.OPTIMIZERS]
    assert {entry.name for entry in others if not isinstance(entry.torch, str)} == {
        "clip_by_value",
        "clip_by_global_norm",
    }


def grid(**options):
    """Every combination of the options, one dict each."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def show(options):
    return ",".join(f"{key}={value}" for key, value in options.items())


@pytest.mark.parametrize(
    "options",
    [{}, *grid(momentum=[0.5, 0.9], nesterov=[False, True]), *grid(momentum=[0.9], dampening=[0.3, 1.0])],
    ids=show,
)
def test_sgd(options, dtype):
    assert_same_walk(gx.sgd(0.01, **options), lambda params: torch.optim.SGD(params, lr=0.01, **options), dtype)


@pytest.mark.parametrize("options", grid(initial_accumulator_value=[0.0, 0.1], eps=[1e-10, 1e-2]), ids=show)
def test_adagrad(options, dtype):
    assert_same_walk(gx.adagrad(0.1, **options), lambda params: torch.optim.Adagrad(params, lr=0.1, **options), dtype)


# Centered, v − m² cancels, and torch takes its root unguarded: ε keeps small what both round off.
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("options", [{"centered": False, "eps": 1e-8}, {"centered": True, "eps": 1e-3}], ids=show)
def test_rmsprop(options, momentum, dtype):
    assert_same_walk(
        gx.rmsprop(0.01, decay=0.99, eps_in_sqrt=False, momentum=momentum or None, **options),
        lambda params: torch.optim.RMSprop(params, lr=0.01, alpha=0.99, momentum=momentum, **options),
        dtype,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gx.sgd(0.01, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.01, 0.9, 0, 0.1, nesterov=True)),
        (gx.adagrad(0.1, eps=1e-10), lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1)),
        (gx.rmsprop(0.01, 0.99, eps_in_sqrt=False), lambda p: torch.optim.RMSprop(p, 0.01, weight_decay=0.1)),
    ],
    ids=["sgd", "adagrad", "rmsprop"],
)
def test_weight_decay_of_all_but_adamw_is_l2_regularization(ours, theirs, dtype):
    assert_same_walk(gx.chain(gx.add_l2_regularization(0.1), ours), theirs, dtype)


ADAM = grid(betas=[(0.9, 0.999), (0.5, 0.9)], eps=[1e-8, 1e-2])


@pytest.mark.parametrize("options", ADAM, ids=show)
def test_adam(options, dtype):
    ours = gx.adam(0.1, *options["betas"], eps=options["eps"])
    assert_same_walk(ours, lambda params: torch.optim.Adam(params, lr=0.1, **options), dtype)


@pytest.mark.parametrize("options", ADAM, ids=show)
def test_adam_with_weight_decay_is_adam_l2(options, dtype):
    ours = gx.adam_l2(0.1, *options["betas"], eps=options["eps"], weight_decay=0.1)
    assert_same_walk(ours, lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.1, **options), dtype)


@pytest.mark.parametrize("options", ADAM, ids=show)
def test_adamw(options, dtype):
    ours = gx.adamw(0.1, *options["betas"], eps=options["eps"], weight_decay=0.1)
    assert_same_walk(ours, lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, **options), dtype)


def test_adamw_with_a_schedule(dtype):
    def optimizer(params):
        stepper = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(stepper, 1.0, 0.0, total_iters=50)
        stepper.register_step_post_hook(lambda *_: schedule.step())
        return stepper

    assert_same_walk(gx.adamw(lambda step: 0.1 * (1.0 - step.astype(dtype) / 50), weight_decay=0.1), optimizer, dtype)


def test_nadam_once_torchs_momentum_schedule_has_ended(dtype):
    # torch's μₜ = β₁(1 − ½·0.96^(t·momentum_decay)) is Dozat's constant β₁ in the limit only. The product of
    # the μₜ that it keeps is float32 always, hence no better in float64.
    def optimizer(params):
        return torch.optim.NAdam(params, lr=0.1, momentum_decay=1e6)

    assert_same_walk(gx.adam(0.1, nesterov=True), optimizer, dtype, TOLERANCE["float32"])


def test_clip_by_global_norm_is_clip_grad_norm(dtype):
    gradients = twins.as_tree(twins.example(dtype)[1])
    ours = twins.transform(gx.clip_by_global_norm(100.0), gradients)
    norms = []
    for t in range(50):
        params = {name: parameter(leaf[t], leaf[t]) for name, leaf in gradients.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(params.values(), 100.0)))
        for name, param in params.items():
            # torch divides by norm + 1e-6; the norm and the quotient round a few times
            np.testing.assert_allclose(ours[name][t], param.grad, rtol=1e-6 / norms[-1] + TOLERANCE[dtype] / 4)
    assert min(norms) < 100.0 < max(norms)


def test_clip_by_value_is_clip_grad_value(dtype):
    gradients = twins.example(dtype)[1]
    param = parameter(gradients, gradients)
    torch.nn.utils.clip_grad_value_([param], 0.5)
    np.testing.assert_array_equal(twins.transform(gx.clip_by_value(0.5), gradients), param.grad)
