"""Bad input to what goes around transformations: the same errors as without, by the same names, and nothing changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests._core.test_errors import Row, check, table
from tests.support import tables
from tests.support.trees import assert_same

pytestmark = pytest.mark.once

PARAMS = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
ADAMW = gx.adamw(gx.live(0.1))
WRAPPERS = {
    **tables.WRAPPERS,
    "by_path": lambda tx: gx.by_path({"w": {"weight_decay": 0.0}, "b": tx}, default=None if tx is None else tx),
    "clip_by_zscore": lambda tx: gx.chain(gx.clip_by_zscore(), tx),
    "clip_by_average_norm": lambda tx: gx.chain(gx.clip_by_average_norm(), tx),
    "clip_by_param_norm": lambda tx: gx.chain(gx.clip_by_param_norm(), tx),
}


def with_b(leaf: Any) -> Any:
    return {**PARAMS, "b": leaf}


def update(tx: Any, updates: Any = PARAMS, state: Any = None, params: Any = PARAMS) -> Any:
    return tx.update(updates, tx.init(PARAMS) if state is None else state, params)


INPUTS = {
    "missing leaf": (lambda tx: update(tx, {"w": PARAMS["w"]}), ValueError, "updates['b'] is missing"),
    "extra leaf": (lambda tx: update(tx, {**PARAMS, "c": 1.0}), ValueError, "updates['c']"),
    "other shape": (lambda tx: update(tx, with_b(jnp.ones((3, 1)))), ValueError, "updates['b'] & (3, 1) & (3,)"),
    "scalar": (lambda tx: update(tx, with_b(1.0)), ValueError, "updates['b'] & () & (3,)"),
    "complex": (lambda tx: update(tx, with_b(jnp.ones(3, complex))), TypeError, "updates['b'] & complex64 & real part"),
    "int": (lambda tx: update(tx, with_b(jnp.ones(3, int))), TypeError, "updates['b'] & int32[3]"),
    "string": (lambda tx: update(tx, with_b("adam")), TypeError, "updates['b'] & str 'adam'"),
    "key": (lambda tx: update(tx, with_b(jax.random.key(0))), TypeError, "updates['b'] & key<fry>[]"),
    "float0": (lambda tx: update(tx, with_b(np.zeros(3, jax.dtypes.float0))), TypeError, "updates['b'] & float0"),
    "string in params": (lambda tx: tx.init(with_b("adam")), TypeError, "params['b'] & str 'adam'"),
    "int in params": (lambda tx: tx.init(with_b(jnp.ones(3, int))), TypeError, "params['b'] & int32[3]"),
    "without params": (lambda tx: tx.update(PARAMS, tx.init(PARAMS)), ValueError, "params"),
    "state of sgd": (lambda tx: update(tx, state=gx.sgd(0.1).init(PARAMS)), TypeError, "state is State"),
    "state of optax": (lambda tx: update(tx, state=optax.adam(0.1).init(PARAMS)), TypeError, "state is tuple"),
    "stale state": (
        lambda tx: update(tx, state=tx.init({**PARAMS, "b": jnp.ones(4)})),
        ValueError,
        "['b'] & [4] & [3]",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_bad_input_is_named_through_every_wrapper(wrap, call, error, words):
    tx = wrap(ADAMW)
    state = tx.init(PARAMS)
    before = jax.tree.map(np.array, state)
    expected = tx.update(PARAMS, state, PARAMS)
    with pytest.raises(error) as caught:
        call(tx)
    for word in words.split(" & "):
        assert word in str(caught.value)
    assert_same(jax.tree.map(jnp.asarray, before), state)
    assert_same(tx.update(PARAMS, state, PARAMS), expected)


@pytest.mark.parametrize(
    "inner", ["adam", None, gx.adam, (1, 2), 0.1], ids=["str", "None", "function", "pair", "float"]
)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_wrapped_must_be_a_transformation(wrap, inner):
    with pytest.raises((TypeError, ValueError), match=r"must be a transformation|give default="):
        wrap(inner)


FLOATS = {"w": jnp.ones(3), "b": jnp.ones(3)}
LOSS = gx.skip_spikes(gx.sgd(0.1), watch="loss")


def spikes(**extra: Any) -> Any:
    return lambda: LOSS.update(FLOATS, LOSS.init(FLOATS), FLOATS, **extra)


def by_path(groups: Any, default: Any = ADAMW, **options: Any) -> Any:
    return lambda: gx.by_path(groups, default, **options)


@table(
    every_zero=(lambda: gx.accumulate(ADAMW, 0), ValueError, "every & at least 1 & 0"),
    consecutive_zero=(lambda: gx.skip_nonfinite(ADAMW, 0), ValueError, "max_consecutive & at least 1 & 0"),
    consecutive_half=(lambda: gx.skip_nonfinite(ADAMW, 1.5), TypeError, "max_consecutive & whole number & 1.5"),
    consecutive_of_spikes=(lambda: gx.skip_spikes(ADAMW, max_consecutive=0), ValueError, "max_consecutive & 0"),
    threshold_zero=(lambda: gx.skip_spikes(ADAMW, 0.0), ValueError, "threshold & (0, inf) & 0.0"),
    threshold_nan=(lambda: gx.skip_spikes(ADAMW, np.nan), ValueError, "threshold & nan"),
    threshold_str=(lambda: gx.skip_spikes(ADAMW, "6"), TypeError, "threshold & '6'"),
    threshold_live=(lambda: gx.skip_spikes(ADAMW, gx.live(6.0)), TypeError, "threshold & live"),
    window_one=(lambda: gx.skip_spikes(ADAMW, window=1), ValueError, "window & at least 2 & 1"),
    window_half=(lambda: gx.skip_spikes(ADAMW, window=4.5), TypeError, "window & 4.5"),
    watch_unknown=(lambda: gx.skip_spikes(ADAMW, watch="grad"), ValueError, "watch & 'loss' & 'grad'"),
    watch_number=(lambda: gx.skip_spikes(ADAMW, watch=1), ValueError, "watch & 1"),
    value_missing=(spikes(), TypeError, "skip_spikes & value=… & no extra argument"),
    value_misspelt=(spikes(vaule=1.0, step=3), TypeError, "value=… & vaule, step"),
    value_none=(spikes(value=None), TypeError, "value & None"),
    value_bool=(spikes(value=True), TypeError, "value & True"),
    value_vector=(spikes(value=jnp.ones(2)), ValueError, "value & scalar & (2,)"),
    axis_number=(lambda: gx.skip_nonfinite(ADAMW, axis_name=1), TypeError, "axis_name & 1"),
    axis_of_numbers=(lambda: gx.observe(ADAMW, axis_name=[1]), TypeError, "axis_name & [1]"),
    by_unknown=(lambda: gx.observe(ADAMW, "leaves"), TypeError, "by & 'leaf' & 'leaves'"),
    by_number=(lambda: gx.observe(ADAMW, 3), TypeError, "by & 3"),
    by_list=(lambda: gx.observe(ADAMW, ["w"]), TypeError, "by & ['w']"),
    by_broken=(lambda: gx.observe(ADAMW, {"x": "("}), ValueError, "'(' & regular expression"),
    by_nothing=(lambda: gx.observe(ADAMW, {"x": "kernel"}).init(FLOATS), ValueError, "kernel & b, w & whole path"),
    by_pattern_number=(lambda: gx.observe(ADAMW, {"x": 1}), TypeError, "pattern & 1"),
    key_str=(lambda: gx.stochastic_rounding(ADAMW, "0"), TypeError, "key & '0'"),
    key_float=(lambda: gx.stochastic_rounding(ADAMW, 0.5), TypeError, "key & 0.5"),
    key_bool=(lambda: gx.stochastic_rounding(ADAMW, True), TypeError, "key & True"),
    key_none=(lambda: gx.stochastic_rounding(ADAMW, None), TypeError, "key & None"),
    key_traced=(
        lambda: jax.eval_shape(lambda key: gx.stochastic_rounding(ADAMW, key).init(PARAMS), jax.random.key(0)),
        TypeError,
        "key & concrete",
    ),
    residual_unknown=(lambda: gx.compensated(ADAMW, "int4"), ValueError, "residual & 'int8' & 'int4'"),
    residual_number=(lambda: gx.compensated(ADAMW, 8), ValueError, "residual & 8"),
    nothing_low=(
        lambda: gx.master_weights(ADAMW).init(FLOATS),
        ValueError,
        "master_weights & bfloat16 & apply_updates",
    ),
    nothing_low_to_round=(lambda: gx.stochastic_rounding(ADAMW, 0).init(FLOATS), ValueError, "stochastic_rounding"),
    promoted=(
        lambda: update(gx.compensated(ADAMW), params=jax.tree.map(jnp.float32, PARAMS)),
        ValueError,
        "compensated & equinox.apply_updates",
    ),
    partly_promoted=(
        lambda: gx.compensated(ADAMW).update(
            {**PARAMS, "c": PARAMS["w"]},
            gx.compensated(ADAMW).init({**PARAMS, "c": PARAMS["w"]}),
            {**PARAMS, "c": PARAMS["w"].astype(jnp.float32)},
        ),
        ValueError,
        "params['c'] & float32[2, 3] & apply_updates",
    ),
    something_after=(
        lambda: gx.chain(gx.master_weights(ADAMW), gx.scale(0.5)),
        TypeError,
        "master_weights & last stage & scale(0.5)",
    ),
    something_after_group=(
        lambda: gx.chain(gx.by_path({"w": gx.compensated(ADAMW)}, default=ADAMW), gx.scale(0.5)),
        TypeError,
        "last stage & scale(0.5)",
    ),
    times_negative=(lambda: gx.times(-1.0), ValueError, "factor & [0, inf) & -1.0"),
    times_str=(lambda: gx.times("2"), TypeError, "factor & '2'"),
    times_nan=(lambda: gx.times(np.nan), ValueError, "factor & nan"),
    times_array=(lambda: gx.times(jnp.asarray(2.0)), TypeError, "factor & number & live"),
    times_alone=(lambda: gx.adamw(gx.times(2.0)), TypeError, "learning_rate & times(2.0)"),
    glob_number=(lambda: gx.glob(3), TypeError, "pattern & 3"),
    no_groups=(by_path({}), TypeError, "groups & {}"),
    list_of_groups=(by_path([("w", ADAMW)]), TypeError, "groups & dict"),
    group_of_str=(by_path({"w": "adam"}), TypeError, "'w' & 'adam'"),
    group_none=(by_path({"w": None}), TypeError, "'w' & None"),
    pattern_number=(by_path({1: ADAMW}), TypeError, "pattern & 1"),
    pattern_broken=(by_path({"*/w": ADAMW}), ValueError, "'*/w' & regular expression & gx.glob"),
    default_str=(by_path({"w": ADAMW}, "adam"), TypeError, "default & 'adam'"),
    unknown_override=(by_path({"w": {"lr": 0.1}}), ValueError, "'w' & 'lr' & 'learning_rate'"),
    override_without_default=(by_path({"w": {"weight_decay": 0.0}}, None), ValueError, "'w' & default="),
    override_in_wrapper=(
        by_path({"w": {"weight_decay": 0.0}}, gx.accumulate(ADAMW, 2)),
        ValueError,
        "'weight_decay' & accumulate & put by_path into it",
    ),
    override_out_of_range=(by_path({"w": {"weight_decay": -1.0}}), ValueError, "weight_decay & [0, inf) & -1.0"),
    override_of_type=(by_path({"w": {"b1": "0.9"}}), TypeError, "b1 & '0.9'"),
    override_scaled_too_far=(by_path({"w": {"b2": gx.times(2.0)}}), ValueError, "b2 & [0, 1) & 1.998"),
    no_predicate=(by_path({print: ADAMW}), TypeError, "print & path, leaf"),
    joint_norm_number=(by_path({"w": ADAMW}, joint_norm=1), TypeError, "joint_norm & 1"),
    two_bounds=(
        by_path({"w": gx.clip_by_global_norm(1.0), "b": gx.clip_by_global_norm(2.0)}, None),
        ValueError,
        "clip_by_global_norm(1.0) & clip_by_global_norm(2.0) & joint_norm=False",
    ),
    no_match=(lambda: gx.by_path({"w": ADAMW}).init(FLOATS), ValueError, "no pattern matches 'b' & 'w' & default="),
    two_matches=(
        lambda: gx.by_path({"w": ADAMW, "w|b": ADAMW}).init(FLOATS),
        ValueError,
        "'w' and 'w|b' both match 'w'",
    ),
    idle_pattern=(lambda: gx.by_path({"k": ADAMW}, ADAMW).init(FLOATS), ValueError, "'k' & b, w & whole path"),
    mask_of_freeze=(lambda: gx.freeze(3), TypeError, "mask & 3"),
    freeze_in_branch=(lambda: gx.normalize_by_rms(of=gx.freeze()), TypeError, "of & freeze()"),
    describe_str=(lambda: gx.describe("adam", FLOATS), TypeError, "tx of describe & 'adam'"),
    describe_bad_leaf=(lambda: gx.describe(ADAMW, {"w": "x"}), TypeError, "params['w'] & str 'x'"),
)
def test_options(row):
    check(Row(*row))
