"""Leaves that are not trained: frozen ones of any dtype, functions of whole models, and those without a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support.trees import assert_same

ADAMW = gx.adamw(0.1)
FREEZING = gx.chain(gx.freeze("base"), gx.clip_by_global_norm(1.0), ADAMW)
AROUND = {
    "chain": FREEZING,
    "by_path": gx.by_path({"base": gx.freeze()}, default=gx.chain(gx.clip_by_global_norm(1.0), ADAMW)),
    "skip_nonfinite": gx.skip_nonfinite(FREEZING),
    "skip_spikes": gx.skip_spikes(FREEZING),
    "accumulate": gx.accumulate(FREEZING, 1),
    "observe": gx.observe(FREEZING),
    "quantize_state": gx.quantize_state(FREEZING, min_size=256),
    "optax": gx.chain(gx.freeze("base"), optax.clip_by_global_norm(1.0), ADAMW),
}
BASES = {
    "int8": jnp.full((4, 3), 7, jnp.int8),
    "uint4": jnp.full((4, 3), 7, jnp.uint4),
    "bool": jnp.ones(3, bool),
    "bfloat16": jnp.full((4, 3), 0.5, jnp.bfloat16),
}
LORA = {"a": jnp.full((16, 16), 0.5), "b": jnp.full(3, -0.5)}
GRADIENT = jax.tree.map(lambda leaf: 0.1 * leaf, LORA)


def gradients_of(base: Any) -> dict[str, Any]:
    return {
        "float0": np.zeros(base.shape, jax.dtypes.float0),
        "None": None,
        "own dtype": base,
        "NaN": jnp.full(base.shape, jnp.nan),
    }


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize(
    ("dtype", "given"),
    [*(("int8", given) for given in ("float0", "None", "own dtype", "NaN")), *((dtype, "None") for dtype in BASES)],
)
def test_a_frozen_base_of_any_dtype_stays_while_the_rest_trains(name, dtype, given):
    base = BASES[dtype]
    tx, params = AROUND[name], {"base": base, "lora": LORA}
    gradient = {"base": gradients_of(base)[given], "lora": GRADIENT}
    state = tx.init(params)
    updates, new_state = tx.update(gradient, state, params)
    assert (updates["base"].dtype, updates["base"].shape) == (base.dtype, base.shape)
    assert not updates["base"].any()
    for apply in (gx.apply_updates, optax.apply_updates):
        applied = apply(params, updates)
        assert_same(applied["base"], base)
        assert (applied["lora"]["a"] < LORA["a"]).all()
    stepped, _ = gx.step(tx, gradient, state, params)
    assert_same(stepped["base"], base)
    np.testing.assert_allclose(stepped["lora"]["a"], applied["lora"]["a"], rtol=1e-6)
    alone = gx.chain(gx.clip_by_global_norm(1.0), ADAMW)
    expected, _ = alone.update(GRADIENT, alone.init(LORA), LORA)
    if name != "quantize_state":  # whose moments are rounded
        np.testing.assert_allclose(updates["lora"]["b"], expected["b"], rtol=1e-6)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.parametrize("wrap", [gx.compensated, gx.master_weights, lambda tx: gx.stochastic_rounding(tx, 0)])
def test_a_base_of_integers_below_low_precision(wrap):
    params = {"base": BASES["int8"], "lora": jnp.ones((4, 4), jnp.bfloat16)}
    tx = wrap(gx.chain(gx.freeze("base"), gx.sgd(0.1)))
    updates, _ = tx.update({"base": None, "lora": jnp.ones((4, 4), jnp.bfloat16)}, tx.init(params), params)
    new = gx.apply_updates(params, updates)
    assert_same(new["base"], params["base"])
    assert (new["lora"] < 1).all()


def test_under_jit_with_donation_too():
    params = {"base": BASES["int8"], "lora": LORA}

    @jax.jit
    def loss(lora: Any, base: Any) -> Any:
        return jnp.sum((base.astype(jnp.float32).sum() * lora["b"]) ** 2)

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        gradient = {"base": None, "lora": jax.grad(loss)(params["lora"], params["base"])}
        return gx.step(FREEZING, gradient, state, params)

    state = FREEZING.init(params)
    for _ in range(3):
        params, state = train(params, state)
    assert_same(params["base"], BASES["int8"])
    assert (jnp.abs(params["lora"]["b"]) < 0.5).all()


@pytest.mark.parametrize("leaf", [jnp.ones(3, int), jax.random.key(0)], ids=["int", "key"])
def test_what_is_not_frozen_must_be_trainable(leaf):
    with pytest.raises(TypeError, match=r"freeze\('base'\)"):
        ADAMW.init({"base": leaf, "lora": LORA})


def test_integers_are_added_exactly_or_not_at_all():
    params = {"base": BASES["int8"]}
    with pytest.raises(TypeError, match=r"params\['base'\] is int8"):
        gx.apply_updates(params, {"base": jnp.ones((4, 3))})


# Without a gradient


@pytest.mark.parametrize("tx", [ADAMW, gx.chain(gx.clip_by_global_norm(1.0), ADAMW), gx.skip_nonfinite(ADAMW)])
@pytest.mark.parametrize("part", ["encoder", "bias"])
def test_none_for_a_leaf_or_a_whole_subtree_leaves_it_and_its_moments(tx, part):
    params = {"encoder": {"w": jnp.ones(3), "b": jnp.ones(2)}, "bias": jnp.ones(2), "head": jnp.ones(3)}
    gradient = {**params, part: None}
    state = tx.init(params)
    for _ in range(2):
        updates, new_state = jax.jit(tx.update)(gradient, state, params)
        assert_same(gx.apply_updates(params, updates)[part], params[part])
        assert (updates["head"] < 0).all()
        inner = getattr(new_state, "inner", new_state)
        assert not any(leaf.any() for leaf in jax.tree.leaves(inner.mu[part]))
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        state = new_state


def test_no_gradient_at_all_is_an_error():
    with pytest.raises(ValueError, match="updates has no leaf"):
        ADAMW.update(None, ADAMW.init(LORA), LORA)


def test_an_accumulated_mean_waits_where_there_is_no_gradient():
    tx = gx.accumulate(gx.sgd(1.0), 2)
    state = tx.init(LORA)
    for gradient in ({"a": None, "b": jnp.ones(3)}, {"a": None, "b": jnp.full(3, 3.0)}):
        updates, state = tx.update(gradient, state, LORA)
    assert not updates["a"].any()
    np.testing.assert_array_equal(updates["b"], [-2, -2, -2])


def test_a_mean_that_starts_without_a_gradient_forgets_the_one_before():
    tx = gx.accumulate(gx.sgd(1.0), 2)
    state = tx.init(LORA)
    for value in (8.0, 8.0, None, 3.0):
        gradient = {"a": None if value is None else jnp.full_like(LORA["a"], value), "b": jnp.ones(3)}
        updates, state = jax.jit(tx.update)(gradient, state, LORA)
    np.testing.assert_array_equal(updates["a"], jnp.full_like(LORA["a"], -1.5))


# Whole models


def test_whole_equinox_models_in_init_and_update():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    x = jnp.ones(2)
    filtered = eqx.filter(model, eqx.is_inexact_array)
    grads = eqx.filter_grad(lambda model: jnp.sum(model(x) ** 2))(model)
    for tx in (ADAMW, gx.skip_nonfinite(gx.chain(gx.clip_by_global_norm(1.0), ADAMW))):
        state = tx.init(model)
        assert_same(jax.tree.leaves(state), jax.tree.leaves(tx.init(filtered)))
        updates, _ = tx.update(grads, state, model)
        expected, _ = tx.update(grads, tx.init(filtered), filtered)
        assert_same(jax.tree.leaves(updates), jax.tree.leaves(expected))
        assert eqx.apply_updates(model, updates)(x).shape == (1,)
        stepped, _ = gx.step(tx, grads, state, model)
        assert stepped(x).shape == (1,)
