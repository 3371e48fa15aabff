"""What `observe` shows is what NumPy computes, in a state that `scan` carries and `metrics` finds."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support.trees import signature

pytestmark = pytest.mark.once

# Both sides round a norm to float32: a sum of at most ten squares, a root and a quotient.
RTOL = 1e-6

PARAMS = {
    "embed": {"table": jnp.asarray([[0.5, -2.0], [1.0, 3.0]])},
    "layers": [
        {"kernel": jnp.asarray([3.0, 4.0, -1.0]), "bias": jnp.asarray(2.0, jnp.float32)},
        {"kernel": jnp.ones(2)},
    ],
}
PATHS = ["embed/table", "layers/0/bias", "layers/0/kernel", "layers/1/kernel"]
GRADIENTS = [jax.tree.map(lambda leaf, scale=scale: scale * leaf + 0.5, PARAMS) for scale in (1.0, -3.0, 0.25)]
TRAINED = gx.by_path({"embed/.*": gx.freeze()}, default=gx.adamw(0.1))

KINDS = ("grad_norm", "update_norm", "param_norm", "update_ratio", "nonfinite")


def norm(leaves):
    return np.sqrt(sum(np.sum(np.abs(np.asarray(leaf, np.complex128)) ** 2) for leaf in leaves))


def by_hand(parts, gradient, update, params):
    """The metrics of each part, which is a list of places among the leaves."""
    metrics = {}
    for part, places in parts.items():
        grads, steps, weights = (
            [jax.tree.leaves(tree)[place] for place in places] for tree in (gradient, update, params)
        )
        values = {
            "grad_norm": norm(grads),
            "update_norm": norm(steps),
            "param_norm": norm(weights),
            "update_ratio": norm(steps) / norm(weights),
            "nonfinite": sum(not np.isfinite(leaf).all() for leaf in grads),
        }
        metrics |= {f"{kind}/{part}" if part else kind: value for kind, value in values.items()}
    return metrics


def assert_metrics(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=RTOL, err_msg=name)


EVERYTHING = gx.adamw(0.1)
GROUPS = gx.by_path({"embed/.*": gx.sgd(0.1), "layers/0/.*": {"weight_decay": 0.0}}, default=gx.adamw(0.1))
PARTS = {
    "nothing": (EVERYTHING, None, {"": [0, 1, 2, 3]}),
    "leaf": (EVERYTHING, "leaf", {"": [0, 1, 2, 3], **{path: [place] for place, path in enumerate(PATHS)}}),
    "group": (GROUPS, "group", {"": [0, 1, 2, 3], "embed/.*": [0], "layers/0/.*": [1, 2], "default": [3]}),
    "group without groups": (EVERYTHING, "group", {"": [0, 1, 2, 3]}),
    "overlapping patterns": (
        EVERYTHING,
        {"kernels": ".*kernel", "first": re.compile("layers/0/.*"), "glob": gx.glob("*/table")},
        {"": [0, 1, 2, 3], "kernels": [2, 3], "first": [1, 2], "glob": [0]},
    ),
    "leaf, one frozen": (TRAINED, "leaf", {"": [1, 2, 3], **{PATHS[place]: [place] for place in (1, 2, 3)}}),
    "group, one frozen": (TRAINED, "group", {"": [1, 2, 3], "default": [1, 2, 3]}),
    "pattern, one frozen": (TRAINED, {"all": ".*", "frozen": "embed/.*"}, {"": [1, 2, 3], "all": [1, 2, 3]}),
}


@pytest.mark.parametrize("name", PARTS)
def test_metrics_are_those_of_numpy(name):
    tx, by, parts = PARTS[name]
    observed = gx.observe(tx, by)
    state, update = observed.init(PARAMS), observed.update
    before = signature(state)
    assert all(value == 0 for value in state.metrics.values())
    params = PARAMS
    for gradient in GRADIENTS:
        updates, state = update(gradient, state, params)
        assert_metrics(state.metrics, by_hand(parts, gradient, updates, params))
        assert signature(state) == before
        params = gx.apply_updates(params, updates)
    bad = jax.tree.map(lambda leaf: jnp.where(leaf == 3.0, jnp.nan, leaf), GRADIENTS[0])
    bad["embed"]["table"] = jnp.full((2, 2), -jnp.inf)
    bad["layers"][0]["kernel"] = jnp.asarray([1.0, jnp.nan, 1.0])
    _, state = update(bad, state, params)
    for part, places in parts.items():
        assert state.metrics[f"nonfinite/{part}" if part else "nonfinite"] == sum(place in (0, 2) for place in places)


def test_updates_and_inner_state_are_those_without_it():
    tx = gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1))
    observed = gx.observe(tx, by="leaf")
    updates, state = observed.update(GRADIENTS[0], observed.init(PARAMS), PARAMS)
    expected, inner = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (updates, state.inner), (expected, inner))


def test_parameters_of_zero_have_the_ratio_zero():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = gx.observe(gx.sgd(0.1), by="leaf")
    _, state = tx.update(GRADIENTS[0], tx.init(params), params)
    for name, value in state.metrics.items():
        assert np.isfinite(value), name
    assert state.metrics["update_ratio"] == 0
    assert state.metrics["update_norm"] > 0


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_metrics_are_strongly_typed_scalars(x64):
    with jax.enable_x64(x64):
        tx = gx.observe(gx.chain(gx.clip_by_global_norm(1.0), gx.skip_nonfinite(gx.sgd(0.1))), by="leaf")
        params = {"half": jnp.ones(2, jnp.float16), "wide": jnp.ones(2), "complex": jnp.ones(2, jnp.complex64)}
        state = tx.init(params)
        _, after = jax.eval_shape(tx.update, params, state, params)
        assert signature(after) == signature(state)
        for name, value in gx.metrics(state).items():
            assert isinstance(value, jax.Array)
            dtype = jnp.int32 if name in ("skipped", "skipped_in_a_row") else jnp.result_type(float)
            assert (value.shape, value.dtype, value.weak_type) == ((), dtype, False)


# Clipping


@pytest.mark.parametrize(
    "clip",
    [gx.clip_by_global_norm(5.0), gx.clip_by_zscore(max_norm=5.0)],
    ids=["clip_by_global_norm", "clip_by_zscore"],
)
def test_clipped_tells_whether_the_gradient_was_shortened(clip):
    tx = gx.observe(gx.chain(clip, gx.sgd(0.1)))
    state = tx.init(PARAMS)
    for scale, clipped in ((0.1, 0), (100.0, 1), (0.1, 0)):
        gradient = jax.tree.map(lambda leaf, scale=scale: scale * leaf, PARAMS)
        _, state = tx.update(gradient, state, PARAMS)
        assert state.metrics["clipped"] == clipped
        # before clipping
        np.testing.assert_allclose(state.metrics["grad_norm"], norm(jax.tree.leaves(gradient)), rtol=RTOL)
        np.testing.assert_allclose(
            state.metrics["update_norm"], 0.1 * min(norm(jax.tree.leaves(gradient)), 5.0), rtol=RTOL
        )


def test_several_clippings_are_told_apart():
    tx = gx.observe(gx.chain(gx.clip_by_global_norm(1.0), gx.scale(10.0), gx.clip_by_global_norm(100.0), gx.sgd(0.1)))
    _, state = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    assert (state.metrics["clipped"], state.metrics["clipped_2"]) == (1, 0)


WRAPPERS = {
    "skip_nonfinite": gx.skip_nonfinite,
    "skip_spikes": gx.skip_spikes,
    "accumulate": lambda tx: gx.accumulate(tx, every=1),
    "chain": lambda tx: gx.chain(gx.scale(1.0), gx.skip_nonfinite(tx)),
    "by_path": lambda tx: gx.by_path({".*kernel": tx}, default=tx),
    "observe": lambda tx: gx.observe(tx, by="leaf"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_clipping_within_a_wrapper_is_told(name):
    tx = gx.observe(WRAPPERS[name](gx.chain(gx.clip_by_global_norm(1.0), gx.sgd(0.1))))
    state = tx.init(PARAMS)
    assert "clipped" in state.metrics
    _, state = tx.update(GRADIENTS[0], state, PARAMS)
    assert state.metrics["clipped"] == 1


# Nested


def step_of(tx):
    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        carry = gx.apply_updates(params, updates), state
        return carry, gx.metrics(state)

    return step


def test_scan_stacks_the_metrics_of_a_loop():
    guarded = gx.skip_nonfinite(gx.accumulate(gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(gx.live(0.1))), every=2))
    tx, gradients = gx.observe(guarded, by="leaf"), [*GRADIENTS, jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    carry = PARAMS, tx.init(PARAMS)
    names = sorted(gx.metrics(carry[1]))
    _, metrics = jax.lax.scan(step_of(tx), carry, stacked)
    assert sorted(metrics) == names
    assert {"grad_norm/layers/0/kernel", "clipped", "skipped", "dropped", "learning_rate"} <= set(names)
    for index, gradient in enumerate(gradients):
        carry, expected = step_of(tx)(carry, gradient)
        assert sorted(expected) == names
        for name, value in expected.items():
            # the same operations in two compiled programs, which may round the last bit otherwise
            np.testing.assert_allclose(metrics[name][index], value, rtol=RTOL, err_msg=name)
    np.testing.assert_array_equal(metrics["nonfinite"], [0, 0, 0, 4])
    np.testing.assert_array_equal(metrics["skipped"], [0, 0, 0, 1])
    np.testing.assert_array_equal(metrics["update_norm"] == 0, [True, False, True, True])


def test_within_accumulate_it_shows_the_last_step():
    tx = gx.accumulate(gx.observe(gx.sgd(0.1)), every=2)
    state = tx.init(PARAMS)
    for gradient, total in zip(GRADIENTS[:2], (0.0, None), strict=True):
        _, state = tx.update(gradient, state, PARAMS)
        shown = gx.metrics(state)["grad_norm"]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *GRADIENTS[:2])
        np.testing.assert_allclose(shown, norm(jax.tree.leaves(mean)) if total is None else total, rtol=RTOL)


def test_within_a_guard_it_shows_the_last_step_taken():
    tx = gx.skip_nonfinite(gx.observe(gx.sgd(0.1)))
    _, state = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    _, after = tx.update(jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS), state, PARAMS)
    assert gx.metrics(after) == gx.metrics(state) | {"skipped": 1, "skipped_in_a_row": 1}


@pytest.mark.parametrize("inside", [False, True], ids=["around", "within"])
def test_with_master_weights_it_sees_what_they_see(inside):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), GRADIENTS[0])
    tx = gx.master_weights(gx.observe(gx.sgd(1e-4))) if inside else gx.observe(gx.master_weights(gx.sgd(1e-4)))
    updates, state = tx.update(gradient, tx.init(params), params)
    # within, the float32 step; around, that of the bfloat16 parameters, which it is too small for
    step = optax.tree.scale(-1e-4, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)) if inside else updates
    metrics = gx.metrics(state)
    assert_metrics({name: metrics[name] for name in KINDS}, by_hand({"": [0, 1, 2, 3]}, gradient, step, params))
    assert (metrics["update_norm"] == 0) == (not inside)


def test_a_foreign_transformation_can_be_observed():
    tx = gx.observe(optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9)), by="leaf")
    state = tx.init(PARAMS)
    assert "clipped" not in state.metrics
    updates, state = tx.update(GRADIENTS[0], state, PARAMS)
    parts = {"": [0, 1, 2, 3], **{path: [place] for place, path in enumerate(PATHS)}}
    assert_metrics(state.metrics, by_hand(parts, GRADIENTS[0], updates, PARAMS))


# Where a tracker finds them


OBSERVED = gx.observe(gx.adamw(optax.linear_schedule(0.1, 0.0, 10)), by={"kernels": ".*kernel"})
NAMES = {*KINDS, *(f"{kind}/kernels" for kind in KINDS), "learning_rate"}
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def test_metrics_of_a_linen_train_state():
    linen, train_state = pytest.importorskip("flax.linen"), pytest.importorskip("flax.training.train_state")
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), X)["params"]
    trained = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=OBSERVED)
    gradient = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, X) ** 2))(params)
    trained = trained.apply_gradients(grads=gradient)
    metrics = gx.metrics(trained.opt_state)
    assert set(metrics) == NAMES
    np.testing.assert_allclose(metrics["grad_norm/kernels"], norm([gradient["kernel"]]), rtol=RTOL)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=RTOL)


def test_metrics_of_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OBSERVED, wrt=nnx.Param)
    gradient = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model)
    optimizer.update(model, gradient)
    metrics = gx.metrics(optimizer.opt_state)
    assert set(metrics) == NAMES
    assert all(isinstance(value, jax.Array) for value in metrics.values())
    np.testing.assert_allclose(metrics["grad_norm/kernels"], norm([gradient["kernel"][...]]), rtol=RTOL)


def test_metrics_within_an_optax_chain():
    tx = optax.chain(optax.clip(1.0), OBSERVED)
    _, state = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    metrics = gx.metrics(state)
    assert set(metrics) == NAMES
    clipped = jax.tree.leaves(optax.tree.clip(GRADIENTS[0], -1.0, 1.0))
    np.testing.assert_allclose(metrics["grad_norm"], norm(clipped), rtol=RTOL)


def test_two_observers_are_told_apart_by_their_places():
    tx = optax.chain(gx.observe(gx.clip_by_global_norm(1.0)), gx.observe(gx.sgd(gx.live(0.1))))
    _, state = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    metrics = gx.metrics(state)
    twice = {f"{place}/{kind}" for place in (0, 1) for kind in KINDS}
    assert set(metrics) == twice | {"clipped", "learning_rate"}
    np.testing.assert_allclose(metrics["0/grad_norm"], norm(jax.tree.leaves(GRADIENTS[0])), rtol=RTOL)
    np.testing.assert_allclose(metrics["0/update_norm"], 1.0, rtol=RTOL)
    np.testing.assert_allclose(metrics["1/grad_norm"], 1.0, rtol=RTOL)


def test_an_observer_within_an_observer_is_led_by_its_place():
    tx = gx.observe(gx.chain(gx.clip_by_global_norm(1.0), gx.observe(gx.sgd(0.1))))
    _, state = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    metrics = gx.metrics(state)
    inner = [name for name in metrics if name.endswith("/grad_norm")]
    assert len(inner) == 1
    np.testing.assert_allclose(metrics[inner[0]], 1.0, rtol=RTOL)
    np.testing.assert_allclose(metrics["grad_norm"], norm(jax.tree.leaves(GRADIENTS[0])), rtol=RTOL)


def test_a_leaf_without_a_gradient_has_norms_of_zero():
    tx = gx.observe(gx.sgd(0.5), by="leaf")
    params = {"a": jnp.ones(2), "b": jnp.full(1, 3.0), "c": jnp.ones(1)}
    _, state = tx.update({"a": None, "b": jnp.full(1, 4.0), "c": None}, tx.init(params), params)
    for name, expected in (("", 4), ("/a", 0), ("/b", 4), ("/c", 0)):
        assert state.metrics[f"grad_norm{name}"] == expected
        assert state.metrics[f"update_norm{name}"] == expected / 2
        assert state.metrics[f"nonfinite{name}"] == 0


def test_a_state_without_observer_has_counters_and_hyperparameters_only():
    tx = gx.skip_nonfinite(gx.accumulate(gx.sgd(gx.live(0.5)), every=2))
    assert gx.metrics(tx.init(PARAMS)) == {"skipped": 0, "skipped_in_a_row": 0, "dropped": 0, "learning_rate": 0.5}
    assert gx.metrics(optax.scale_by_adam().init(PARAMS)) == {}


# What raises


@pytest.mark.parametrize(
    ("by", "kind", "message"),
    [
        ("layer", TypeError, "by must be 'leaf', 'group', a dict.*'layer'"),
        (["kernel"], TypeError, r"by must be .*\['kernel'\]"),
        (True, TypeError, "by must be .*True"),
        ({"kernels": 3}, TypeError, "pattern.*3"),
        ({"kernels": "(.*"}, ValueError, r"'\(\.\*' is no regular expression"),
        ({"kernels": "kernel"}, ValueError, "'kernel' matches none of the paths embed/table, layers/0/bias"),
    ],
    ids=["str", "list", "bool", "no pattern", "no regular expression", "no match"],
)
def test_a_wrong_by_is_named(by, kind, message):
    with pytest.raises(kind, match=message):
        gx.observe(gx.sgd(0.1), by).init(PARAMS)


def test_without_params_it_says_what_to_call():
    tx = gx.observe(gx.sgd(0.1))
    with pytest.raises(ValueError, match=r"observe needs the parameters.*update\(updates, state, params\)"):
        tx.update(GRADIENTS[0], tx.init(PARAMS))


def test_the_state_of_another_transformation_is_refused():
    tx = gx.observe(gx.sgd(0.1))
    with pytest.raises(TypeError, match=r"state is State\(.*\), observe's is ObserveState"):
        tx.update(GRADIENTS[0], gx.sgd(0.1).init(PARAMS), PARAMS)


def test_the_gradient_alone():
    tx = gx.observe(gx.skip_nonfinite(gx.chain(gx.clip_by_global_norm(1.0), TRAINED)), by="leaf", of="gradient")
    _, state = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    trained = PATHS[1:]
    expected = {f"{kind}/{path}" for kind in ("grad_norm", "nonfinite") for path in trained}
    assert set(state.metrics) == expected | {"grad_norm", "nonfinite", "clipped"}
    with pytest.raises(ValueError, match="of must be one of 'all', 'gradient', got 'params'"):
        gx.observe(TRAINED, of="params")
