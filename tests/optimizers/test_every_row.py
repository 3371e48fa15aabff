"""What holds for every row of the catalog, be it an optimizer, a transformation or a wrapper."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest

import gradxform as gx
from gradxform.catalog import SYMBOLS
from tests.support import chex
from tests.support.tables import EVERYTHING, built, draw_for, entry_of
from tests.support.trees import LOSS, assert_same, signature

pytestmark = pytest.mark.quick

every_row = pytest.mark.parametrize("text", EVERYTHING)


def every_row_but(reason: str, *names: str) -> Any:
    """All rows; those of these names are known to fail, and say so when they no longer do."""
    fails = pytest.mark.xfail(reason=reason, strict=True)
    return pytest.mark.parametrize(
        "text", [pytest.param(text, marks=[fails] if entry_of(text).name in names else []) for text in EVERYTHING]
    )


def step(tx: Any, grads: Any, params: Any) -> Any:
    """A second step: what the first has remembered counts."""
    params, state = gx.step(tx, params, tx.init(params), params, value=LOSS)
    return gx.step(tx, grads, state, params, value=LOSS)


@every_row
def test_compiled_and_batched_steps_are_those_of_a_loop(text):
    tx, both = EVERYTHING[text], [draw_for(text, seed, (2,)) for seed in (1, 2)]
    together = jax.jit(jax.vmap(functools.partial(step, tx)))(*both)
    for member in range(2):
        alone = step(tx, *(jax.tree.map(lambda leaf, member=member: leaf[member], tree) for tree in both))
        batched = jax.tree.map(lambda leaf, member=member: leaf[member], together)
        # some dozen float32 roundings, of which Muon's products enlarge those of small singular values, and SOAP's
        # eigenvectors those of eigenvalues near one another; or, where parameters are narrow, one number more or less
        # of what they may be, and of its residual
        low_precision = batched[0]["kernel"].dtype == jnp.bfloat16
        enlarged = entry_of(text).sees == "matrix" or "renewal" in entry_of(text).arguments
        tolerance = 2**-7 if low_precision else 1e-4 if enlarged else 2e-6
        chex.assert_trees_all_close(batched, alone, rtol=tolerance, atol=tolerance)


@every_row
def test_parameters_and_state_keep_their_signatures_in_both_precisions(text):
    tx = EVERYTHING[text]
    for params in (draw_for(text, 1), jax.tree.map(jnp.bfloat16, draw_for(text, 1))):
        state = tx.init(params)
        assert signature(jax.eval_shape(tx.init, params)) == signature(state)
        new_params, new_state = gx.step(tx, params, state, params, value=LOSS)
        assert (signature(new_params), signature(new_state)) == (signature(params), signature(state))


@every_row
def test_what_is_built_anew_or_pickled_is_equal_and_does_the_same(text):
    tx, params, grads = EVERYTHING[text], draw_for(text, 1), draw_for(text, 2)
    pickled = pickle.loads(pickle.dumps(tx))
    assert tx == built(text) == pickled
    assert hash(tx) == hash(built(text))
    state = tx.init(params)
    assert_same(pickle.loads(pickle.dumps(state)), state)
    assert_same(step(pickled, grads, params), step(tx, grads, params))


@every_row
def test_it_prints_as_it_is_built(text):
    if entry_of(text).sees == "matrix" and "other" in entry_of(text).arguments:
        assert repr(EVERYTHING[text]).startswith("by_path({'.*kernel': chain("), "the groups that it makes"
    else:
        assert eval(repr(EVERYTHING[text]), {**vars(gx), "falling": SYMBOLS["s"]}) == EVERYTHING[text]


@every_row
def test_a_gradient_of_any_size_gives_finite_parameters_and_state(text):
    params, signs = draw_for(text, 1), jax.tree.map(jnp.sign, draw_for(text, 2))
    for size in (0.0, 1e-38, 1e-20, 1e20, 1e30):
        grads = jax.tree.map(lambda sign, size=size: (size * sign).astype(sign.dtype), signs)
        chex.assert_tree_all_finite(step(EVERYTHING[text], grads, params))


@every_row
def test_the_bytes_that_describe_tells_are_those_of_the_state(text):
    tx, params = EVERYTHING[text], draw_for(text, 1)
    assert gx.describe(tx, params, show=False).state_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(tx.init(params))
    )


@every_row
def test_a_new_state_can_be_donated_and_binds_no_device(text):
    tx, params = EVERYTHING[text], draw_for(text, 1)
    train = jax.jit(functools.partial(step_in_place, tx), donate_argnums=(0, 1))
    result = train(jax.tree.map(jnp.array, params), tx.init(params), params)
    assert not any(leaf.committed for leaf in jax.tree.leaves(result))


def step_in_place(tx: Any, params: Any, state: Any, grads: Any) -> Any:
    return gx.step(tx, grads, state, params, value=LOSS)


@pytest.mark.once
@every_row_but(
    "they log through a callback, which JAX lowers only where the device is", "skip_nonfinite", "skip_spikes"
)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_step_lowers_for_a_platform_that_is_not_here(text, platform):
    tx, params = EVERYTHING[text], draw_for(text, 1)
    train = jax.jit(functools.partial(step_in_place, tx))
    lowered = jax.export.export(train, platforms=[platform])(params, tx.init(params), params)
    assert lowered.platforms == (platform,)
