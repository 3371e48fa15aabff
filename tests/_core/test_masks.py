"""Which leaves a rule acts on: trees of booleans, prefixes, callables and patterns say it alike."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support.trees import assert_close, assert_same

pytestmark = pytest.mark.once


class Head(NamedTuple):
    """A node whose paths are field names."""

    kernel: Any
    bias: Any


PARAMS = {
    "layers": [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}],
    "head": Head(jnp.ones((2, 2)), jnp.ones(2)),
    "absent": None,
    "pair": (jnp.ones(2), jnp.ones(0)),
}
PATHS = [
    "head/kernel",
    "head/bias",
    "layers/0/bias",
    "layers/0/kernel",
    "layers/1/bias",
    "layers/1/kernel",
    "pair/0",
    "pair/1",
]
KERNELS = {"head/kernel", "layers/0/kernel", "layers/1/kernel"}


def by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def chosen(mask: Any, params: Any = PARAMS) -> set[str]:
    """The paths of the leaves a masked rule acts on: it counts its calls in the state of each."""

    def count(update, state, param, step):
        return update + 1, {"calls": state["calls"] + 1}

    tx = gx.lift(lambda param: {"calls": jnp.zeros((), jnp.int32)}, count, mask=mask)
    updates, state = tx.update(params, tx.init(params), params)
    acted = {path for path, calls in by_path(state.calls).items() if calls}
    before, after = by_path(params), by_path(updates)
    for path in before:
        np.testing.assert_array_equal(after[path], before[path] + float(path in acted))
    return acted


TREE = {
    "layers": [{"kernel": True, "bias": False}, {"kernel": True, "bias": False}],
    "head": Head(True, False),
    "absent": None,
    "pair": (False, False),
}


@pytest.mark.parametrize(
    "mask",
    [
        TREE,
        {**TREE, "pair": False},
        jax.tree.map(np.bool_, TREE),
        jax.tree.map(jnp.asarray, TREE),
        ".*kernel",
        re.compile(".*kernel"),
        re.compile(".*KERNEL", re.IGNORECASE),
        "(head|layers/[0-9]+)/kernel",
        lambda path, leaf: path.endswith("kernel"),
        lambda path, leaf: leaf.ndim == 2,
        lambda path, leaf: np.bool_(leaf.ndim == 2),
    ],
    ids=[
        "tree",
        "prefix",
        "tree of numpy",
        "tree of arrays",
        "pattern",
        "compiled",
        "flags",
        "alternatives",
        "by path",
        "by leaf",
        "by numpy",
    ],
)
def test_every_way_to_say_the_kernels(mask):
    assert chosen(mask) == KERNELS


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, set(PATHS)),
        ({"layers": True, "head": False, "absent": None, "pair": False}, {path for path in PATHS if "layers" in path}),
        (
            {
                "layers": [True, {"kernel": False, "bias": True}],
                "head": Head(False, True),
                "absent": None,
                "pair": False,
            },
            {"layers/0/kernel", "layers/0/bias", "layers/1/bias", "head/bias"},
        ),
        ("layers/0/.*", {"layers/0/kernel", "layers/0/bias"}),
        ("pair/.", {"pair/0", "pair/1"}),
        (lambda path, leaf: False, set()),
        (lambda path, leaf: leaf.size == 0, {"pair/1"}),
    ],
    ids=["none", "prefix", "mixed prefix", "pattern", "tuple", "never", "empty leaf"],
)
def test_masks_choose(mask, expected):
    assert chosen(mask) == expected


def test_a_callable_is_asked_once_per_leaf_by_path():
    asked = []

    def mask(path: str, leaf: Any) -> bool:
        asked.append((path, leaf.shape))
        return True

    tx = gx.add_decoupled_weight_decay(0.1, mask=mask)
    state = tx.init(PARAMS)
    asked.clear()
    tx.update(PARAMS, state, PARAMS)
    assert [path for path, _ in asked] == PATHS
    assert [shape for _, shape in asked] == [leaf.shape for leaf in jax.tree.leaves(PARAMS)]


@pytest.mark.parametrize("params", [jnp.ones(2), 1.0])
def test_a_bare_array_has_the_empty_path(params):
    assert chosen(lambda path, leaf: path == "", params) == {""}
    assert chosen(".*", params) == {""}


def test_a_pattern_on_no_leaves_is_no_error():
    tx = gx.adamw(0.1, mask="kernel")
    assert tx.update({}, tx.init({}), {})[0] == {}


@pytest.mark.parametrize("mask", ["kernel", "Layers/.*", re.compile("head")])
def test_a_pattern_that_matches_no_whole_path_is_an_error(mask):
    tx = gx.add_decoupled_weight_decay(0.1, mask=mask)
    with pytest.raises(ValueError, match="matches none of the paths head/kernel, head/bias, layers/0/bias"):
        tx.init(PARAMS)


# Masked leaves are left alone


def test_adamw_is_adam_where_nothing_decays():
    masked, adam = gx.adamw(0.1, weight_decay=0.5, mask=".*kernel"), gx.adam(0.1)
    ours, _ = masked.update(PARAMS, masked.init(PARAMS), PARAMS)
    theirs, _ = adam.update(PARAMS, adam.init(PARAMS), PARAMS)
    assert_close(ours["head"].bias, theirs["head"].bias, rtol=1e-6)  # fused with one rule less
    np.testing.assert_allclose(ours["head"].kernel - theirs["head"].kernel, np.full((2, 2), -0.05), rtol=1e-5)


def test_masks_in_one_chain_do_not_mix():
    tx = gx.chain(
        gx.add_l2_regularization(1.0, mask=".*kernel"),
        gx.add_decoupled_weight_decay(2.0, mask=".*bias"),
        gx.add_decoupled_weight_decay(4.0, mask="head/.*"),
    )
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    added = {"head/kernel": 5, "head/bias": 6, "layers/0/kernel": 1, "layers/1/bias": 2, "pair/0": 0}
    for path, amount in added.items():
        assert (by_path(updates)[path] == 1.0 + amount).all()


def test_a_mask_in_a_branch():
    numerator = gx.add_decoupled_weight_decay(1.0, mask=".*kernel")  # doubles the numerator of the kernels
    tx = gx.normalize_by_rms(0.0, eps=0.0, of=numerator)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["head"].kernel, np.full((2, 2), 2.0))
    np.testing.assert_array_equal(updates["head"].bias, np.ones(2))


# With what others mask


def test_a_mask_inside_optax_masked():
    outer = {**TREE, "layers": [True, False]}  # leaves MaskedNode at layers/1, the biases and the pair
    tx = optax.masked(gx.add_decoupled_weight_decay(1.0, mask=".*kernel"), outer)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layers"][0]["kernel"], np.full((2, 2), 2.0))
    np.testing.assert_array_equal(updates["layers"][0]["bias"], np.ones(2))
    np.testing.assert_array_equal(updates["layers"][1]["kernel"], np.ones((2, 2)))
    np.testing.assert_array_equal(updates["head"].kernel, np.full((2, 2), 2.0))


def test_masked_nodes_hold_no_state():
    tx = optax.masked(gx.adam(0.1), TREE)
    mu = tx.init(PARAMS).inner_state.mu
    assert isinstance(mu["head"].bias, optax.MaskedNode)
    assert mu["head"].kernel.shape == (2, 2)


def test_params_masked_by_hand():
    params = {"on": {"kernel": jnp.ones(2)}, "off": optax.MaskedNode(), "none": None}
    assert chosen(".*", params) == {"on/kernel"}
    assert chosen({"on": True, "off": optax.MaskedNode(), "none": None}, params) == {"on/kernel"}


# Compiled


@pytest.mark.parametrize("mask", [TREE, ".*kernel", lambda path, leaf: leaf.ndim == 2], ids=["tree", "pattern", "leaf"])
def test_masks_under_jit_are_one_trace(mask):
    traces = []
    tx = gx.adamw(0.1, mask=mask)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(params)
        updates, state = tx.update(params, state, params)
        return gx.apply_updates(params, updates), state

    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    assert_same(state, tx.init(PARAMS))
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "build", [lambda: TREE, lambda: ".*kernel", lambda: re.compile(".*kernel")], ids=["tree", "pattern", "compiled"]
)
def test_equal_masks_are_equal_static_arguments(build):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def init(tx: Any, params: Any) -> Any:
        traces.append(tx)
        return tx.init(params)

    for _ in range(2):
        init(gx.adamw(0.1, mask=build()), PARAMS)
    assert len(traces) == 1


def test_a_mask_works_on_shapes_alone():
    tx = gx.adamw(0.1, mask=lambda path, leaf: leaf.ndim == 2)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert jax.tree.structure(jax.eval_shape(tx.init, shapes)) == jax.tree.structure(tx.init(PARAMS))
