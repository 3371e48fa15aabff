"""Rules that see all leaves: totals, memory, `gather` alone; and extra arguments, such as the loss."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support import chex, doors
from tests.support.doors import GRADIENTS, PARAMS, STEPS, assert_near, dog, only, polyak, trained_dog
from tests.support.trees import assert_same, gradient

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import figures

pytestmark = pytest.mark.once

# Totals


def test_what_is_remembered_of_all_leaves():
    params, state = doors.compiled(trained_dog(), PARAMS, GRADIENTS)
    expected_params, remembered = doors.dog_twin(PARAMS, GRADIENTS)
    assert_near(params, expected_params)
    kept = {name: getattr(state, name) for name in remembered}
    assert_near(kept, remembered)


def test_groups_with_other_rates_share_the_totals():
    rates = {"kernel": 0.4, "gain": 4.0, "bias": 4.0, "temperature": 8.0}
    tx = gx.by_path(
        {"kernel": {"learning_rate": gx.times(0.1)}, "temp.*": {"learning_rate": 8.0}}, default=trained_dog()
    )
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    expected_params, remembered = doors.dog_twin(PARAMS, GRADIENTS, rates)
    assert_near(params, expected_params)
    assert_near({name: getattr(state, name) for name in remembered}, remembered)


def test_groups_whose_totals_differ_must_be_told_apart():
    groups = {"kernel": {"decay": 0.25}}
    with pytest.raises(ValueError, match="joint_norm=False"):
        gx.by_path(groups, default=trained_dog())
    tx = gx.by_path(groups, default=trained_dog(), joint_norm=False)
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    others = [name for name in PARAMS if name != "kernel"]
    for names, decay in ((["kernel"], 0.25), (others, 0.5)):
        alone, _ = doors.dog_twin(only(PARAMS, *names), only(GRADIENTS, *names), decay=decay)
        assert_near(only(params, *names), alone)
    assert state.farthest != state.farthest_2


def test_a_schedule_and_a_mask_reach_totals():
    tx = gx.chain(gx.freeze("kernel"), dog(lambda step: 0.5), gx.scale_by_learning_rate(4.0))
    others = [name for name in PARAMS if name != "kernel"]
    params, _ = doors.compiled(tx, PARAMS, GRADIENTS)
    assert_near(only(params, *others), doors.dog_twin(only(PARAMS, *others), only(GRADIENTS, *others))[0])


def test_a_leaf_without_a_gradient_counts_nowhere():
    tx = dog()
    state = tx.init(PARAMS)
    grads = gradient(GRADIENTS, 0)
    _, after = tx.update({**grads, "gain": None}, state, PARAMS)
    counted = sum(float(jnp.sum(jnp.square(leaf))) for name, leaf in grads.items() if name != "gain")
    np.testing.assert_allclose(after.squares, state.squares + counted, rtol=1e-6)


def test_observe_shows_what_a_rule_reports():
    tx = gx.observe(trained_dog())
    _, state = doors.compiled(tx, PARAMS, GRADIENTS)
    np.testing.assert_allclose(
        gx.metrics(state)["farthest"], doors.dog_twin(PARAMS, GRADIENTS)[1]["farthest"], rtol=1e-5
    )


def test_a_sum_of_squares_overflows_and_a_norm_does_not():
    def totals(update, state, param, step):
        return {"sum": jnp.sum(jnp.square(update)), "norm": gx.Norm(gx.numerics.norm(update))}

    def gather(total, step):
        return {"sum": total["sum"], "norm": total["norm"]}

    tx = gx.lift(
        None,
        lambda update, state, param, step: (update / step.norm, state),
        totals=totals,
        gather=gather,
        reports=("sum", "norm"),
        memory={"sum": 0.0, "norm": 0.0},
    )
    for sizes in ((3e30, 4e30), (3e-30, 4e-30)):
        large = {"a": jnp.full(1, sizes[0]), "b": jnp.full((1, 1), sizes[1])}
        updates, state = jax.jit(tx.update)(large, tx.init(large))
        assert float(state.sum) in (np.inf, 0.0)
        np.testing.assert_allclose(state.norm, 5 / 3 * sizes[0], rtol=1e-6)
        np.testing.assert_allclose([updates["a"][0], updates["b"][0, 0]], [0.6, 0.8], rtol=1e-6)


def test_totals_may_be_arrays_numbers_and_of_more_precise_leaves():
    def totals(update, state, param, step):
        return {"count": update.size, "leaves": 1, "moments": jnp.stack([jnp.sum(update), jnp.sum(update**2)])}

    def gather(total, step):
        mean = total["moments"][0] / total["count"]
        return {"mean": mean, "spread": total["moments"][1] / total["count"] - mean**2, "leaves": total["leaves"]}

    def update(update, state, param, step):
        return (update - step.mean) / jnp.sqrt(step.spread) * step.leaves, state

    tx = gx.lift(None, update, totals=totals, gather=gather)
    grads = gradient(GRADIENTS, 0)
    numbers = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in grads.values()])
    for run in (tx.update, jax.jit(tx.update)):
        updates, _ = run(grads, tx.init(PARAMS))
        exact = {n: (np.asarray(g, np.float64) - numbers.mean()) / numbers.std() * 4 for n, g in grads.items()}
        assert_near(updates, exact)
    with jax.enable_x64(True):
        mixed = {**grads, "bias": grads["bias"].astype(jnp.float64)}
        updates, _ = jax.jit(tx.update)(mixed, tx.init(mixed))
        assert {name: leaf.dtype for name, leaf in updates.items()} == {n: leaf.dtype for n, leaf in mixed.items()}
        assert_near(updates, exact)


def test_totals_of_complex_leaves():
    def totals(update, state, param, step):
        return {"square": jnp.sum(jnp.real(update * jnp.conj(update)))}

    def gather(total, step):
        return {"size": jnp.sqrt(total["square"])}

    tx = gx.lift(None, lambda u, s, p, step: (u / step.size, s), totals=totals, gather=gather)
    grads = {"a": jnp.array([3j]), "b": jnp.array([4.0])}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], [0.6j], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [0.8], rtol=1e-6)


def test_a_measure_of_nothing_still_gathers():
    calls = []

    def gather(measured, step):
        calls.append(measured)
        return {"twice": 2.0 * step.number}

    tx = gx.lift(None, lambda u, s, p, step: (step.twice * u, s), measure=lambda update: {}, gather=gather)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    assert calls == [{}]
    assert_same(updates, jax.tree.map(lambda leaf: 2 * leaf, PARAMS))


def test_memory_starts_from_the_parameters_that_the_rule_acts_on():
    seen: list[Any] = []

    def largest(params: Any) -> Any:
        seen.append([param.shape for param in params])
        return jnp.stack([jnp.max(jnp.abs(param)) for param in params]).max() * jnp.ones(2)

    tx = gx.lift(
        None,
        lambda u, s, p, step: (step.sizes[1] * u, s),
        gather=lambda measured, step: {"sizes": step.sizes * 2},
        memory={"sizes": largest},
        mask="kernel|bias",
    )
    params = {**PARAMS, "bias": PARAMS["bias"].astype(jnp.bfloat16)}
    state = tx.init(params)
    assert seen[-1] == [(3,), (4, 3)]
    updates, after = jax.jit(tx.update)(params, state, params)
    np.testing.assert_array_equal(after.sizes, 2 * state.sizes)
    np.testing.assert_allclose(updates["kernel"], 2 * state.sizes[0] * params["kernel"], rtol=1e-6)
    assert_same(updates["gain"], params["gain"])
    assert jax.eval_shape(tx.init, params).sizes.shape == (2,)


def test_memory_that_is_a_parameter_is_an_array_of_its_own():
    tx = gx.lift(
        None,
        lambda u, s, p, step: (step.first * u, s),
        gather=lambda measured, step: {"first": step.first},
        memory={"first": lambda params: params[0]},
    )
    params = jnp.array(2.0)
    assert tx.init(params).first.unsafe_buffer_pointer() != params.unsafe_buffer_pointer()


def test_an_array_as_memory_is_remembered_by_value():
    def built() -> gx.Transformation:
        return gx.lift(None, _last_two, gather=_shifted, memory={"past": np.array([[1.0, 2.0]])})

    tx = built()
    assert built() == tx
    updates, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    np.testing.assert_array_equal(state.past, [[2.0, 1.0]])
    assert_same(updates, jax.tree.map(lambda leaf: 2 * leaf, PARAMS))


def _shifted(measured, step):
    return {"past": jnp.stack([step.past[:, 1], step.number[None]], 1)}


def _last_two(update, state, param, step):
    return step.past[0, 0] * update, state


# What it costs


def by_step(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return gx.step(tx, grads, state, params)


COSTS = {
    "the update": (lambda u, s, p, step: {"size": gx.Norm(gx.numerics.norm(u)), "sum": jnp.sum(u)}, 0),
    "the parameter": (lambda u, s, p, step: {"size": gx.Norm(gx.numerics.norm(p)), "product": jnp.sum(u * p)}, 0),
    "what is kept": (lambda u, s, p, step: {"size": jnp.sum(jnp.square(p - s["start"]))}, 0),
    "the new moment": (lambda u, s, p, step: {"size": jnp.sum(jnp.abs(gx.numerics.lerp(s["mu"], u, 0.5)))}, 0),
    # nothing tells XLA to add this up before the moment is overwritten, so it keeps a copy (X4)
    "the old moment": (lambda u, s, p, step: {"size": jnp.sum(u * s["mu"])}, 1),
}
"""For what totals look at, the full-size copies of a step of 4 bytes per parameter each."""

GUARDS = {"alone": lambda tx: tx, "guarded": gx.skip_nonfinite, "accumulated": lambda tx: gx.accumulate(tx, 4)}


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="the figures are those of one version of XLA")
@pytest.mark.parametrize(
    ("what", "guard"),
    [*((what, "alone") for what in COSTS), ("the update", "guarded"), ("what is kept", "accumulated")],
)
def test_totals_cost_no_array(what, guard):
    totals, copies = COSTS[what]

    def update(update, state, param, step):
        mu = step.keep("mu", gx.numerics.lerp(state["mu"], update, 0.5))
        return -step.rate * mu, {"mu": mu, "start": state["start"]}

    tx = gx.lift(
        lambda param: {"mu": jnp.zeros_like(param), "start": param},
        update,
        totals=totals,
        gather=lambda total, step: {"rate": 1 / (1 + total["size"])},
        needs_params=True,
    )
    params = {
        "kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    found = figures.of_step(GUARDS[guard](tx), params, by_step, least=1 << 20)
    assert found.copies == copies
    assert found.temporaries < 0.01 + 4 * copies


def test_equal_leaves_are_traced_once():
    calls = []

    def totals(update, state, param, step):
        calls.append(update.shape)
        return {"sum": jnp.sum(update)}

    tx = gx.lift(
        None,
        lambda u, s, p, step: (u * step.sum, s),
        totals=totals,
        gather=lambda total, step: {"sum": total["sum"]},
    )
    params = {f"leaf {i}": jnp.full(3, float(i)) for i in range(20)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    assert len(calls) == 1
    np.testing.assert_allclose(updates["leaf 1"], np.full(3, 3.0 * 190), rtol=1e-6)


# Moments in codes and in bfloat16


def test_totals_decode_coded_moments():
    params = {"kernel": doors.draw(0, 64, 64), "bias": doors.draw(1, 8)}
    gradients = {"kernel": doors.draw(2, STEPS, 64, 64), "bias": doors.draw(3, STEPS, 8)}
    tx = gx.quantize_state(trained_dog())
    trained, state = doors.donated(tx, params, gradients)
    assert state.codes["mu"]["kernel"].dtype == jnp.int8
    assert_same(state.inner.start["kernel"], params["kernel"])  # kept exactly
    exact, remembered = doors.dog_twin(params, gradients)
    # a code is off by at most a hundredth of its block's largest number
    assert_near(trained, exact, rtol=1e-2)
    assert_near({"squares": state.inner.squares}, {"squares": remembered["squares"]})
    np.testing.assert_allclose(state.inner.products, remembered["products"], atol=1.0)  # of 4096 products


def test_totals_of_narrow_states():
    tx = gx.lift(
        lambda param: {"mu": jnp.zeros_like(param)},
        _keeps_narrow,
        totals=lambda u, s, p, step: {"sum": jnp.sum(s["mu"])},
        gather=lambda total, step: {"sum": total["sum"]},
        memory={"sum": 0.0},
        state_dtype=jnp.bfloat16,
    )
    ones = {"w": jnp.ones(4)}
    state = tx.init(ones)
    assert state.mu["w"].dtype == jnp.bfloat16
    _, state = jax.jit(tx.update)(ones, state)
    _, state = tx.update(ones, state)
    assert float(state.sum) == 4.0
    assert state.mu["w"].dtype == jnp.bfloat16


def _keeps_narrow(update, state, param, step):
    mu = step.keep("mu", state["mu"] + update)
    return mu, {"mu": mu}


# Extra arguments


def test_a_missing_extra_argument_is_named():
    for tx, who in (
        (polyak(), "polyak"),
        (gx.skip_nonfinite(polyak()), "polyak()"),
        (gx.accumulate(polyak(), 2), "polyak()"),
    ):
        state = tx.init(PARAMS)
        with pytest.raises(TypeError) as caught:
            tx.update(PARAMS, state, PARAMS)
        assert f"{who} reads 'value': call update(…, value=…); it got no extra argument" in str(caught.value)
        with pytest.raises(TypeError, match="it got loss"):
            tx.update(PARAMS, state, PARAMS, loss=1.0)
        with pytest.raises(ValueError, match=r"value must be a scalar, which .* reads, got shape \(2,\)"):
            tx.update(PARAMS, state, PARAMS, value=jnp.ones(2))
        with pytest.raises(TypeError, match="value must be a real number"):
            tx.update(PARAMS, state, PARAMS, value="low")
        with pytest.raises(TypeError, match="value must be a real number"):
            tx.update(PARAMS, state, PARAMS, value=1j)
    polyak().update(PARAMS, polyak().init(PARAMS), PARAMS, value=1, loss=2.0)  # a whole number; others may be there


def polyak_step(tx: Any, losses: Any, gradients: Any = None, compiled: bool = True) -> tuple[Any, Any]:
    params = {"w": jnp.zeros(2)}
    gradients = {"w": jnp.ones((len(losses), 2))} if gradients is None else gradients
    update = jax.jit(tx.update) if compiled else tx.update
    return doors.by_hand(tx, params, gradients, update, losses=jnp.array(losses))


AVERAGED = {
    "own": lambda **options: gx.accumulate(polyak(), 2, **options),
    "in a chain": lambda **options: gx.accumulate(gx.chain(gx.clip_by_global_norm(1e3), polyak()), 2, **options),
    "optax": lambda **options: gx.accumulate(optax.polyak_sgd(max_learning_rate=1e3), 2, extra=("value",), **options),
}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "by hand"])
@pytest.mark.parametrize("build", AVERAGED.values(), ids=AVERAGED)
def test_losses_of_one_and_three_are_two(build, compiled):
    params, state = polyak_step(build(), [1.0, 3.0], compiled=compiled)
    np.testing.assert_allclose(params["w"], [-1.0, -1.0], rtol=1e-5)  # −2/(1 + 1)·1
    assert float(state.extra["value"]) == 2.0
    params, _ = polyak_step(build(reduction="sum"), [1.0, 3.0], compiled=compiled)
    np.testing.assert_allclose(params["w"], [-0.5, -0.5], rtol=1e-5)  # −2/(4 + 4)·2


def test_without_extra_another_library_gets_the_last_loss():
    params, state = polyak_step(gx.accumulate(optax.polyak_sgd(max_learning_rate=1e3), 2), [1.0, 3.0])
    np.testing.assert_allclose(params["w"], [-1.5, -1.5], rtol=1e-5)
    assert state.extra is None


@pytest.mark.parametrize("build", AVERAGED.values(), ids=AVERAGED)
@pytest.mark.parametrize("bad", [0, 1])
def test_a_mini_batch_whose_loss_is_not_finite_is_left_out(build, bad):
    losses = [3.0, 3.0]
    losses[bad] = np.nan
    gradients = {"w": jnp.ones((2, 2)).at[bad].set(100.0)}
    params, state = polyak_step(build(), losses, gradients)
    np.testing.assert_allclose(params["w"], [-1.5, -1.5], rtol=1e-5)
    assert (int(state.dropped), float(state.extra["value"])) == (1, 3.0)


@pytest.mark.parametrize("build", [AVERAGED["own"], AVERAGED["in a chain"]])
def test_a_failure_of_all_mini_batches_shows(build):
    params, state = polyak_step(build(), [np.nan, np.inf])
    assert not np.isfinite(params["w"]).any()
    assert int(state.dropped) == 2


def test_the_next_step_averages_anew_and_a_guard_outside_keeps_the_mean():
    tx = gx.skip_nonfinite(gx.accumulate(polyak(), 2))
    params, state = polyak_step(tx, [1.0, np.nan, 3.0, 5.0, 5.0])
    np.testing.assert_allclose(params["w"], [-3.5, -3.5], rtol=1e-5)  # the second is no mini-batch at all
    assert (int(state.skipped), int(state.inner.dropped)) == (1, 0)


@pytest.mark.parametrize("wrapper", [gx.skip_nonfinite, gx.skip_spikes])
def test_a_loss_that_is_not_finite_is_a_bad_step(wrapper):
    tx = wrapper(gx.chain(polyak(), gx.scale_by_momentum(0.5)))
    update = jax.jit(tx.update)
    params = {"w": jnp.ones(2)}
    _, state = update(params, tx.init(params), params, value=1.0)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        updates, after = update(params, state, params, value=value)
        assert_same(after.inner, state.inner)
        np.testing.assert_array_equal(updates["w"], [-0.0, -0.0])
        assert int(after.skipped) == 1


def test_a_loss_that_nobody_reads_may_be_anything():
    tx = gx.skip_nonfinite(gx.sgd(0.1))
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.nan)
    assert int(state.skipped) == 0
    chex.assert_tree_all_finite(updates)


def test_a_state_of_other_extra_arguments_is_refused():
    tx = gx.accumulate(polyak(), 2)
    state = gx.accumulate(gx.scale(-1.0), 2).init(PARAMS)
    with pytest.raises(ValueError, match=r"state\.extra has \[\], this transformation averages \['value'\]"):
        tx.update(PARAMS, state._replace(inner=tx.init(PARAMS).inner), PARAMS, value=1.0)
