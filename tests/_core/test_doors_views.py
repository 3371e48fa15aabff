"""`eval_params`: the parameters to evaluate, through everything that may stand around the rule that tells them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support import doors
from tests.support.doors import GRADIENTS, LOSSES, PARAMS, STEPS, assert_near, average_of, averaged, dog, draw, factored
from tests.support.trees import assert_same, gradient, signature

pytestmark = pytest.mark.once

SGD = gx.chain(gx.sgd(0.1), averaged())
WALK = doors.sgd_twin(PARAMS, GRADIENTS)


def trained(tx: Any, params: Any = PARAMS, gradients: Any = GRADIENTS) -> Any:
    """What `eval_params` gives, and the parameters, after all steps."""
    params, state = doors.donated(tx, params, gradients)
    return gx.eval_params(tx, state, params), params


AROUND = {
    "nothing": lambda tx: tx,
    "chain": lambda tx: gx.chain(gx.clip_by_global_norm(1e6), gx.identity(), tx),
    "skip_nonfinite": gx.skip_nonfinite,
    "skip_spikes": gx.skip_spikes,
    "accumulate": lambda tx: gx.accumulate(tx, 1),
    "observe": gx.observe,
    "by_path": lambda tx: gx.by_path({"kernel": {"learning_rate": gx.times(1.0)}}, default=tx),
    "groups": lambda tx: gx.by_path({"kernel": tx}, default=tx),
    "quantize_state": gx.quantize_state,
    "three": lambda tx: gx.observe(gx.skip_nonfinite(gx.accumulate(tx, 1))),
}


@pytest.mark.parametrize("name", AROUND)
def test_the_average_is_seen_through_everything(name):
    seen, params = trained(AROUND[name](SGD))
    assert_near(params, WALK[-1])
    assert_near(seen, average_of(WALK))
    assert signature(seen) == signature(params)


@pytest.mark.parametrize("name", ["nothing", "by_path", "three"])
def test_it_compiles_and_goes_under_vmap(name):
    tx = AROUND[name](SGD)
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    seen = gx.eval_params(tx, state, params)
    compiled = jax.jit(lambda s, p: gx.eval_params(tx, s, p))(state, params)
    np.testing.assert_allclose(compiled["kernel"], seen["kernel"], rtol=1e-6)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (state, params))
    both = jax.vmap(lambda s, p: gx.eval_params(tx, s, p))(*two)
    np.testing.assert_allclose(both["kernel"][1], seen["kernel"], rtol=1e-6)


def test_before_the_first_step_it_is_the_parameters():
    assert_same(gx.eval_params(SGD, SGD.init(PARAMS), PARAMS), PARAMS)


def test_in_the_middle_of_a_cycle_it_is_that_of_the_last_step():
    tx = gx.accumulate(SGD, 2)
    walk, params, state = [], PARAMS, tx.init(PARAMS)
    for number in range(STEPS):
        updates, state = tx.update(gradient(GRADIENTS, number), state, params)
        params = gx.apply_updates(params, updates)
        walk.append(params)
    assert int(state.pending) == 1
    assert_near(gx.eval_params(tx, state, params), walk[1])


def test_a_step_that_is_skipped_does_not_count():
    tx = gx.skip_nonfinite(SGD)
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    _, after = tx.update(bad, state, params)
    assert_same(gx.eval_params(tx, after, params), gx.eval_params(tx, state, params))


def test_groups_that_average_and_groups_that_do_not():
    tx = gx.by_path({"kernel": SGD, "gain": gx.freeze()}, default=gx.sgd(0.1))
    seen, params = trained(tx)
    assert_near({"kernel": seen["kernel"]}, {"kernel": average_of(WALK)["kernel"]})
    assert_same({n: seen[n] for n in seen if n != "kernel"}, {n: params[n] for n in params if n != "kernel"})
    assert_same(seen["gain"], PARAMS["gain"])


def test_groups_that_average_otherwise():
    tx = gx.by_path({"kernel": {"decay": 0.9}}, default=SGD)
    seen, _ = trained(tx)
    assert_near({"kernel": seen["kernel"]}, {"kernel": average_of(WALK, 0.9)["kernel"]})
    assert_near({"bias": seen["bias"]}, {"bias": average_of(WALK)["bias"]})


def test_frozen_leaves_functions_and_whole_numbers_are_themselves():
    params = {**PARAMS, "function": jnp.tanh, "steps": jnp.arange(3), "gain": PARAMS["gain"]}
    tx = gx.chain(gx.freeze("steps|gain"), SGD)
    state = tx.init(params)
    grads = {**gradient(GRADIENTS, 0), "function": None, "steps": None}
    updates, state = tx.update(grads, state, params)
    new = gx.apply_updates(params, updates)
    seen = gx.eval_params(tx, state, new)
    assert seen["function"] is jnp.tanh
    assert_same((seen["steps"], seen["gain"]), (params["steps"], params["gain"]))
    np.testing.assert_allclose(seen["kernel"], new["kernel"], rtol=1e-6)


def test_coded_moments_and_a_kept_average():
    params, gradients = {"kernel": draw(0, 64, 64)}, {"kernel": draw(1, STEPS, 64, 64)}
    tx = gx.quantize_state(gx.chain(gx.momentum(0.1), averaged()))
    params, state = doors.donated(tx, params, gradients)
    assert state.codes["mu"]["kernel"].dtype == jnp.int8
    alone = gx.chain(gx.scale(0.0), averaged())
    kept = alone.init(params)._replace(count=state.inner.count, average=state.inner.average)
    assert_same(gx.eval_params(tx, state, params), gx.eval_params(alone, kept, params))


def test_a_coded_average_is_decoded():
    params, gradients = {"kernel": draw(0, 64, 64)}, {"kernel": draw(1, STEPS, 64, 64)}
    walk = doors.sgd_twin(params, gradients)
    tx = gx.quantize_state(SGD, fields={"average": "signed"})
    params, state = doors.donated(tx, params, gradients)
    assert state.codes["average"]["kernel"].dtype == jnp.int8
    seen = gx.eval_params(tx, state, params)
    assert seen["kernel"].dtype == jnp.float32
    assert_near(seen, average_of(walk), rtol=2e-2)


LOW = {
    "compensated": lambda tx: gx.compensated(tx, "int16"),
    "compensated in bfloat16": gx.compensated,
    "master_weights": gx.master_weights,
    "stochastic_rounding": lambda tx: gx.stochastic_rounding(tx, 0),
    "guarded": lambda tx: gx.skip_nonfinite(gx.master_weights(gx.observe(tx))),
    "coded": lambda tx: gx.quantize_state(gx.master_weights(tx)),
    "around codes": lambda tx: gx.master_weights(gx.quantize_state(tx)),
}


@pytest.mark.parametrize("name", LOW)
def test_low_precision_parameters_are_averaged_in_float32_and_seen_in_their_own_dtype(name):
    narrow = {n: leaf if n == "gain" else leaf.astype(jnp.bfloat16) for n, leaf in PARAMS.items()}
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    tx = LOW[name](SGD)
    seen, params = trained(tx, narrow)
    assert signature(seen) == signature(params)
    rounding = 2**-5 if name == "stochastic_rounding" else 2**-8
    assert_near(seen, average_of(doors.sgd_twin(start, GRADIENTS)), rtol=rounding)


def test_a_view_reads_the_exact_parameter_of_a_low_precision_one():
    """θ is not what the model has in bfloat16, but what that and its residual stand for."""

    def update(update, state, param, step):
        return update, state

    tx = gx.master_weights(
        gx.chain(gx.sgd(1e-4), gx.lift(None, update, view=lambda state, param, step: 1000 * (param - 1)))
    )
    params = jnp.ones(1, jnp.bfloat16)
    updates, state = tx.update(jnp.ones(1, jnp.bfloat16), tx.init(params), params)
    params = gx.apply_updates(params, updates)
    np.testing.assert_array_equal(params, jnp.ones(1, jnp.bfloat16))
    np.testing.assert_allclose(gx.eval_params(tx, state, params).astype(jnp.float32), [-0.1], rtol=1e-2)


# What a view may read


def test_a_view_has_arguments_live_values_schedules_memory_and_the_number_of_steps():
    seen: dict[str, Any] = {}

    def view(state, param, step):
        seen.update(vars(step))
        return param * step.live * step.scheduled + step.total + step.number

    tx = gx.lift(
        None,
        lambda u, s, p, step: (u * step.value, s),
        view=view,
        gather=lambda measured, step: {"total": step.total + step.value},
        memory={"total": 0.0},
        extra=("value",),
        key=0,
        live=gx.positive(gx.live(2.0)),
        scheduled=gx.positive(lambda step: 3.0 + step),
        option="text",
    )
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    found = gx.eval_params(tx, state, params)
    total = float(LOSSES.sum()) + STEPS
    assert_near(found, jax.tree.map(lambda leaf: np.asarray(leaf) * 2 * (3.0 + STEPS) + total, params))
    assert seen["option"] == "text"
    assert "value" not in seen  # a loss belongs to a step


def test_a_view_that_asks_for_what_a_step_has_is_told_so():
    def view(state, param, step):
        return param * step.value

    tx = gx.lift(None, lambda u, s, p, step: (u, s), view=view, extra=("value",))
    with pytest.raises(AttributeError, match="step has no 'value'; it has number") as caught:
        gx.eval_params(tx, tx.init(PARAMS), PARAMS)
    own = [note for note in caught.value.__notes__ if not note.startswith("-")]  # the rest is JAX's
    assert own[0].startswith("in view of ")
    assert own[1:] == ["for params['bias']"]


def test_a_view_of_a_rule_with_a_branch_and_slots_by_shape():
    def view(state, param, step):
        return state["rows"][:, None] * jnp.ones_like(param) if "rows" in state else param

    def update(update, state, param, step):
        direction, inner = step.of(update, state["of"], param)
        rows = {"rows": state["rows"] + 1} if "rows" in state else {}
        return direction, {**rows, "of": inner}

    def init(param):
        return {"rows": jnp.zeros(param.shape[0])} if param.ndim == 2 else {}

    tx = gx.lift(init, update, view=view, slots=("rows",), of=gx.scale_by_momentum(0.5))
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    seen = gx.eval_params(tx, state, params)
    np.testing.assert_array_equal(seen["kernel"], jnp.full_like(params["kernel"], STEPS))
    assert_same(seen["bias"], params["bias"])


# What can't be composed


def test_nothing_follows_what_must_be_last():
    words = r"averaged\(0\.5\) must be the last stage, .* put .*scale.* before it"
    with pytest.raises(TypeError, match=words):
        gx.chain(averaged(), gx.scale(0.5))
    for wrap in (gx.skip_nonfinite, lambda tx: gx.accumulate(tx, 2), gx.observe, gx.quantize_state):
        with pytest.raises(TypeError, match="must be the last stage"):
            gx.chain(wrap(SGD), gx.scale(0.5))
    with pytest.raises(TypeError, match="must be the last stage"):
        gx.chain(gx.by_path({"kernel": SGD}, default=gx.sgd(0.1)), optax.scale(0.5))
    gx.chain(gx.clip_by_global_norm(1.0), gx.chain(gx.sgd(0.1), averaged()), gx.identity())


def test_two_views_in_one_chain_are_refused():
    def viewing() -> gx.Transformation:
        return gx.lift(None, lambda u, s, p, step: (u, s), view=lambda state, param, step: 2 * param)

    words = "both say which parameters to evaluate; use one of them"
    with pytest.raises(TypeError, match=words):
        gx.chain(viewing(), averaged())
    with pytest.raises(TypeError, match=words):
        gx.chain(gx.skip_nonfinite(viewing()), gx.sgd(0.1), viewing())
    with pytest.raises(TypeError, match=words):
        gx.chain(viewing(), gx.by_path({"kernel": SGD}, default=gx.sgd(0.1)))
    gx.by_path({"kernel": viewing()}, default=averaged())


@pytest.mark.parametrize(
    "tx",
    [gx.adamw(0.1), gx.accumulate(optax.adam(0.1), 2), optax.sgd(0.1), gx.chain(dog(), factored())],
    ids=["ours", "accumulated", "optax", "own"],
)
def test_without_a_view_it_is_the_parameters(tx):
    assert gx.eval_params(tx, tx.init(PARAMS), PARAMS) is PARAMS


def test_what_is_missing_or_wrong_is_told():
    state = SGD.init(PARAMS)
    with pytest.raises(TypeError, match="needs all three"):
        gx.eval_params(SGD, state)
    with pytest.raises(TypeError, match="params is an optimizer's state"):
        gx.eval_params(SGD, PARAMS, state)
    with pytest.raises(TypeError, match="tx of eval_params"):
        gx.eval_params("sgd", state, PARAMS)
    with pytest.raises(TypeError, match="state is"):
        gx.eval_params(SGD, gx.adam(0.1).init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="state is"):
        gx.eval_params(gx.skip_nonfinite(SGD), state, PARAMS)
    with pytest.raises(ValueError, match=r"\['bias'\] is missing"):
        gx.eval_params(SGD, SGD.init({"kernel": PARAMS["kernel"]}), PARAMS)
    with pytest.raises(ValueError, match=r"state\.average\['bias'\] is float32\[2\]"):
        gx.eval_params(SGD, SGD.init({**PARAMS, "bias": jnp.ones(2)}), PARAMS)


# What holds a transformation and its state


def test_a_train_state_goes_alone():
    train_state = pytest.importorskip("flax.training.train_state")
    holder = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=AROUND["three"](SGD))
    for number in range(STEPS):
        holder = holder.apply_gradients(grads=gradient(GRADIENTS, number))
    assert_near(gx.eval_params(holder), average_of(WALK))
    plain = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    assert_same(gx.eval_params(plain), PARAMS)


def test_an_nnx_optimizer_goes_with_its_model():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    x, walk = draw(0, 4, 3), []
    for _ in range(STEPS):
        grads = nnx.grad(lambda model: jnp.mean(jnp.square(model(x) - 1)))(model)
        optimizer.update(model, grads)
        walk.append(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    copy = nnx.clone(model)
    nnx.update(copy, gx.eval_params(optimizer, model))
    mean = average_of(walk)
    np.testing.assert_allclose(copy.kernel[...], mean["kernel"], rtol=1e-5)
    np.testing.assert_allclose(copy.bias[...], mean["bias"], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(model.kernel[...], walk[-1]["kernel"])
    with pytest.raises(TypeError, match="needs the model"):
        gx.eval_params(optimizer)


def test_the_schedule_free_optimizers_are_seen_like_a_rule_of_your_own():
    tx = gx.skip_nonfinite(gx.schedule_free_sgd(0.1))
    params, state = doors.compiled(tx, PARAMS, GRADIENTS)
    z = state.inner.z
    exact = jax.tree.map(
        lambda y, z: np.asarray(y, np.float64) + (1 / 0.9 - 1) * (np.asarray(y, np.float64) - z), params, z
    )
    assert_near(gx.eval_params(tx, state, params), exact)
