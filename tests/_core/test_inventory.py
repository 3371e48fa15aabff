"""The inventory names every array of every state, by its path, and says which leaf it is for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform._core.body import body_of
from tests.support.tables import EVERYTHING, draw_for

PARAMS = {"kernel": jnp.ones((16, 16)), "learning_rate": jnp.ones(3), "nested": [{"count": jnp.ones(())}]}
ADAMW = gx.adamw(gx.live(1e-3))
NARROW = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
WRAPPED = {
    "by_path": gx.by_path({"kernel": gx.sgd(0.1, momentum=0.9), "nested/.*": gx.freeze()}, default=ADAMW),
    "optax": gx.chain(gx.clip_by_zscore(), optax.adam(0.1)),
    "masked": gx.by_path({"kernel": gx.skip_nonfinite(ADAMW)}, default=gx.accumulate(gx.momentum(0.1), 2)),
    "skip_spikes": gx.skip_spikes(gx.observe(ADAMW)),
    "quantized": gx.quantize_state(gx.accumulate(ADAMW, 2), min_size=256),
    "quantized optax": gx.quantize_state(optax.adam(0.1), min_size=256),
    "factored": gx.normuon(0.1, "kernel", other=gx.sgd(0.1, momentum=0.9)),
}
LOW = {
    "compensated": gx.compensated(ADAMW),
    "master weights": gx.accumulate(gx.master_weights(ADAMW), 2),
    "coded": gx.compensated(gx.quantize_state(ADAMW, min_size=256)),
}
EVERY = {name: (tx, PARAMS) for name, tx in WRAPPED.items()} | {name: (tx, NARROW) for name, tx in LOW.items()}


def found(tx, params):
    return body_of("tx", tx).inventory(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params))


def check(tx, params):
    state, _ = jax.tree_util.tree_flatten_with_path(tx.init(params))
    inventory = found(tx, params)
    assert {array.path: array.aval for array in inventory} == {path: (a.shape, a.dtype) for path, a in state}
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for array in inventory:
        if array.leaf is not None:
            assert array.path[-len(paths[array.leaf]) :] == paths[array.leaf]


@pytest.mark.parametrize("name", EVERY)
def test_the_paths_are_those_of_the_state(name):
    check(*EVERY[name])


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_paths_are_those_of_every_optimizers_state(name):
    check(EVERYTHING[name], draw_for(name, 0))


def test_a_name_that_a_parameter_shares_with_a_counter_is_no_moment():
    arrays = found(ADAMW, PARAMS)
    shared = {array.field for array in arrays if array.leaf is None}
    assert shared == {"count", "values"}
    assert {array.leaf for array in arrays if array.field == "mu"} == {0, 1, 2}


def test_roles_go_by_fields_not_by_shapes():
    def keep(param):
        return {"mu": jnp.zeros_like(param), "left": jnp.eye(param.shape[0]) if param.ndim == 2 else jnp.zeros(())}

    factors = gx.lift(keep, lambda update, state, param, step: (update, state))
    square = {"kernel": jnp.ones((16, 16))}
    roles = {array.field: array.role for array in found(factors, square) if array.leaf is not None}
    assert roles == {"mu": "signed", "left": None}
    with pytest.raises(ValueError, match=r"'left'.*fields=\{'left'"):
        gx.quantize_state(factors, min_size=256).init(square)
    state = gx.quantize_state(factors, min_size=256, fields={"left": "kept"}).init(square)
    np.testing.assert_array_equal(state.inner.left["kernel"], np.eye(16))
    assert list(state.codes) == ["mu"]
