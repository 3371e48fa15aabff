"""Transformations beside a rule: cautious steps, grafts and steps now and then, around any transformation."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support import chex
from tests.support.trees import assert_same, signature

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32), "b": jnp.ones(3)}
GRADS = [
    {
        name: jnp.asarray(np.random.default_rng(seed).normal(size=leaf.shape), jnp.float32)
        for name, leaf in PARAMS.items()
    }
    for seed in (1, 2, 3, 4)
]


@pytest.fixture(autouse=True)
def promoting():
    """optax multiplies integer counts by floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def cautious(tx: Any) -> gx.Transformation:
    """Only where the update goes downhill (Liang et al. 2024, arXiv 2411.16085)."""

    def update(update, state, param, step):
        return jnp.where(update * step.inner < 0, step.inner, -0.0), state

    return gx.lift(None, update, beside={"inner": tx})


def graft(size: Any, direction: Any) -> gx.Transformation:
    """The length of one update for every leaf, the direction of another (Agarwal et al. 2020, arXiv 2002.11803)."""

    def update(update, state, param, step):
        return step.direction * gx.numerics.norm(step.size) / gx.numerics.norm(step.direction), state

    return gx.lift(None, update, beside={"size": size, "direction": direction}, whole=True)


def now_and_then(tx: Any, every: int) -> gx.Transformation:
    """A step of `tx` in every k-th step, none in the others."""

    def update(update, state, param, step):
        return step.inner, state

    return gx.lift(None, update, beside={"inner": tx}, when=lambda step: step.number % step.every == 0, every=every)


def walk(tx: Any, params: Any = PARAMS, grads: Any = GRADS) -> tuple[Any, Any]:
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = gx.apply_updates(params, updates)
    return params, state


INNER = {
    "ours": gx.adam(0.1),
    "optax": optax.adam(0.1),
    "chain with a norm": gx.chain(gx.clip_by_global_norm(0.5), gx.adam(gx.live(0.1))),
    "wrapper": gx.skip_nonfinite(gx.adamw(0.1)),
    "groups": gx.by_path({"b": gx.sgd(0.1)}, default=gx.adam(0.1)),
}
inner = pytest.mark.parametrize("tx", INNER.values(), ids=INNER)


@inner
def test_the_rule_sees_the_update_of_what_runs_beside_it(tx):
    params, state = PARAMS, tx.init(PARAMS)
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        masked = jax.tree.map(lambda u, g: np.where(g * u < 0, u, 0), updates, grads)
        params = gx.apply_updates(params, masked)
    # the same numbers, fused in another way: a few roundings of steps of 0.1
    chex.assert_trees_all_close(walk(cautious(tx))[0], params, atol=2e-7)


@inner
def test_its_state_is_a_field_and_goes_on_by_itself(tx):
    state = walk(cautious(tx))[1]
    expected = tx.init(PARAMS)
    params = PARAMS
    for grads in GRADS:
        updates, expected = tx.update(grads, expected, params)
        params = gx.apply_updates(params, jax.tree.map(lambda u, g: jnp.where(g * u < 0, u, -0.0), updates, grads))
    assert jax.tree.structure(state.inner) == jax.tree.structure(expected)
    chex.assert_trees_all_close(state.inner, expected, rtol=2e-6)


@inner
def test_loops_compiled_steps_and_steps_in_place_are_the_same(tx):
    tx = cautious(tx)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)

    def step(carry, grads):
        params, state = gx.step(tx, grads, carry[1], carry[0])
        return (params, state), None

    scanned, _ = jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), stacked))()
    expected = walk(tx)
    chex.assert_trees_all_close(scanned, expected, rtol=2e-6, atol=1e-6)
    assert signature(scanned[1]) == signature(tx.init(PARAMS))
    doubled = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), (PARAMS, GRADS[0]))
    member = jax.vmap(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(*doubled)
    alone = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0]
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], member), alone, rtol=2e-6, atol=1e-7)


def test_two_beside_one_rule():
    sgd, adam = gx.sgd(0.5), gx.adam(0.1)
    updates, _ = graft(sgd, adam).update(GRADS[0], graft(sgd, adam).init(PARAMS), PARAMS)
    long, way = (tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0] for tx in (sgd, adam))
    for name, update in updates.items():
        expected = way[name] * np.linalg.norm(long[name]) / np.linalg.norm(way[name])
        np.testing.assert_allclose(update, expected, rtol=1e-6)  # two norms in float32


@pytest.mark.parametrize("compiled", [False, True])
def test_when_it_is_not_due_its_state_stays_and_its_update_is_zero(compiled):
    tx = now_and_then(gx.adam(0.1), 2)
    update, state, inner = jax.jit(tx.update) if compiled else tx.update, tx.init(PARAMS), gx.adam(0.1)
    alone = inner.init(PARAMS)
    for number, grads in enumerate(GRADS, 1):
        updates, state = update(grads, state, PARAMS)
        if number % 2:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        else:
            expected, alone = inner.update(grads, alone, PARAMS)
            chex.assert_trees_all_close(updates, expected, rtol=2e-6)
        assert int(state.inner.count) == number // 2
        chex.assert_trees_all_close(state.inner.mu, alone.mu, rtol=2e-6)


def test_in_a_group_and_beside_frozen_leaves_it_sees_its_own_leaves():
    tx = gx.by_path({"w": cautious(gx.chain(gx.clip_by_global_norm(0.1), gx.sgd(1.0)))}, default=gx.sgd(0.1))
    alone = cautious(gx.chain(gx.clip_by_global_norm(0.1), gx.sgd(1.0)))
    expected, _ = alone.update({"w": GRADS[0]["w"]}, alone.init({"w": PARAMS["w"]}))
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    frozen = gx.chain(gx.freeze("b"), alone)
    updates, _ = frozen.update(GRADS[0], frozen.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    assert not np.any(updates["b"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: gx.skip_nonfinite(tx),
        lambda tx: gx.accumulate(tx, 1),
        lambda tx: gx.observe(tx),
        lambda tx: gx.chain(gx.identity(), tx),
    ],
)
def test_wrappers_around_it_change_nothing(wrap):
    tx = cautious(gx.adam(0.1))
    chex.assert_trees_all_close(walk(wrap(tx))[0], walk(tx)[0], rtol=2e-6, atol=1e-6)


def test_a_bad_step_leaves_it_as_it_was():
    tx = gx.skip_nonfinite(cautious(gx.adam(0.1)))
    params, state = walk(tx)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, GRADS[0])
    after, new = gx.step(tx, bad, state, params)
    assert_same(after, params)
    assert_same(new.inner, state.inner)


def test_its_moments_are_coded_and_its_metrics_shown():
    clipped = gx.chain(gx.clip_by_global_norm(0.1), gx.adam(0.1))
    tx = gx.observe(gx.quantize_state(cautious(clipped), "bfloat16", min_size=4))
    state = tx.init(PARAMS)
    assert state.inner.codes["inner/mu"]["w"].dtype == jnp.uint16
    _, state = gx.step(tx, GRADS[0], state, PARAMS)
    assert float(gx.metrics(state)["inner/clipped"]) == 1.0


@pytest.mark.parametrize("wrap", [gx.compensated, gx.master_weights, lambda tx: gx.stochastic_rounding(tx, 0)])
def test_low_precision_parameters_take_its_steps(wrap):
    params, grads = (jax.tree.map(jnp.bfloat16, tree) for tree in (PARAMS, GRADS[0]))
    tx = wrap(cautious(gx.sgd(0.125)))
    new, _ = gx.step(tx, grads, tx.init(params), params)
    # half a unit in the last place of bfloat16, or one where it is rounded at random
    chex.assert_trees_all_close(new, jax.tree.map(lambda p, g: p - 0.125 * g, params, grads), rtol=2**-7, atol=2**-7)


def test_what_reads_the_loss_or_the_parameters_asks_for_them():
    with pytest.raises(TypeError, match="scale_by_polyak reads 'value': call update"):
        cautious(gx.polyak_sgd()).update(GRADS[0], cautious(gx.polyak_sgd()).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        cautious(gx.adamw(0.1)).update(GRADS[0], cautious(gx.adamw(0.1)).init(PARAMS))
    assert gx.accumulate(cautious(gx.polyak_sgd()), 2).init(PARAMS).extra.keys() == {"value"}


def test_it_is_compared_pickled_printed_and_described():
    tx = now_and_then(gx.adam(0.1), 2)
    assert repr(tx).startswith("now_and_then(every=2, inner=chain(")
    assert gx.describe(tx, PARAMS, show=False).state_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(tx.init(PARAMS))
    )
    again = pickle.loads(pickle.dumps(tx.init(PARAMS)))
    assert_same(again, tx.init(PARAMS))


def test_what_can_not_be_is_told():
    with pytest.raises(TypeError, match="when goes with beside"):
        gx.lift(None, lambda u, s, p, step: (u, s), when=lambda step: True)
    with pytest.raises(TypeError, match=r"inner beside .* must be a transformation"):
        cautious(3)
    with pytest.raises(ValueError, match="'inner' is given twice"):
        gx.lift(None, lambda u, s, p, step: (u, s), beside={"inner": gx.sgd(0.1)}, inner=1.0)

    def asks_too_much(step):
        return step.nothing

    tx = gx.lift(None, lambda u, s, p, step: (u, s), beside={"inner": gx.sgd(0.1)}, when=asks_too_much)
    with pytest.raises(AttributeError, match="step has no 'nothing'") as raised:
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    assert any("in when of" in note for note in raised.value.__notes__)
