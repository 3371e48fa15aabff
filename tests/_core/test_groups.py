"""Groups by path: a leaf gets what its pattern says, a frozen one is out of everything, and clipping sees one norm."""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support.tables import OPTIMIZERS
from tests.support.trees import LOSS, Layer, assert_close, assert_same, signature

pytestmark = pytest.mark.once

# XLA rounds a·b + c once or twice, depending on what is compiled together; a few steps have a few dozen operations
FUSION = 32 * float(jnp.finfo(jnp.float32).eps)

SHAPES = {
    "embed": (2, 2),
    "layers": [{"kernel": (2, 2), "bias": (2,)}, {"kernel": (2, 2), "bias": (2,)}],
    "head": {"kernel": (2, 2), "bias": (2,)},
    "scale": (2,),
}
PATHS = [
    "embed",
    "head/bias",
    "head/kernel",
    "layers/0/bias",
    "layers/0/kernel",
    "layers/1/bias",
    "layers/1/kernel",
    "scale",
]


def numbers(seed: int) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(random.normal(size=s), jnp.float32), SHAPES, is_leaf=is_shape)


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


PARAMS = numbers(0)
GRADS = [numbers(seed) for seed in (1, 2, 3)]


def leaves(tree: Any) -> dict[str, Any]:
    """What stands at each path of a tree like `PARAMS`, holes included."""
    return dict(zip(PATHS, jax.tree.structure(PARAMS).flatten_up_to(tree), strict=True))


def tree_of(by_path: dict[str, Any]) -> Any:
    return jax.tree.structure(PARAMS).unflatten([by_path[path] for path in PATHS])


def train(tx: Any, params: Any, grads: list[Any], state: Any = None) -> tuple[Any, Any]:
    state = tx.init(params) if state is None else state
    tx = optax.with_extra_args_support(tx)
    for grad in grads:
        updates, state = tx.update(grad, state, params, value=LOSS)
        params = gx.apply_updates(params, updates)
    return params, state


def assert_each_alone(tx: Any, alone: dict[str, Any]) -> None:
    """Every leaf is trained, bit for bit, as by the optimizer that `alone` names for it, on this leaf and no other."""
    trained, _ = train(tx, PARAMS, GRADS)
    for path, own in alone.items():
        expected, _ = train(own, leaves(PARAMS)[path], [leaves(grads)[path] for grads in GRADS])
        np.testing.assert_array_equal(leaves(trained)[path], expected, err_msg=path)


def shown(state: Any) -> dict[str, float]:
    return {name: float(value) for name, value in gx.get_hyperparams(state).items()}


@contextlib.contextmanager
def lenient():
    """Foreign code promotes and broadcasts, as JAX lets it by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# The same patterns, whatever the parameters are made of


def dict_params() -> Any:
    return {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}


def list_params() -> Any:
    return [[jnp.ones((2, 2)), jnp.ones(2), jnp.ones(2)]]


class Block(NamedTuple):
    dense: Any
    scale: Any


def named_tuple_params() -> Any:
    return Block(Layer(jnp.ones((2, 2)), jnp.ones(2)), jnp.ones(2))


def linen_params() -> Any:
    linen = pytest.importorskip("flax.linen")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.LayerNorm(use_bias=False)(linen.Dense(2)(x))

    return jax.eval_shape(Model().init, jax.random.key(0), jnp.ones(2))["params"]


def nnx_model() -> Any:
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.norm = nnx.LayerNorm(2, use_bias=False, rngs=nnx.Rngs(0))

    return Model()


def nnx_params() -> Any:
    nnx = pytest.importorskip("flax.nnx")
    return nnx.state(nnx.eval_shape(nnx_model), nnx.Param)


def haiku_params() -> Any:
    hk = pytest.importorskip("haiku")
    model = hk.transform(lambda x: hk.LayerNorm(-1, create_scale=True, create_offset=False)(hk.Linear(2)(x)))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.ones(2))


def equinox_params() -> Any:
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        dense: eqx.nn.Linear
        scale: jax.Array
        activation: Any = jnp.tanh

    model = Model(eqx.nn.Linear(2, 2, key=jax.random.key(0)), jnp.ones(2))
    return eqx.filter(model, eqx.is_inexact_array)


# how to reach the kernel, the bias and the scale of each
TREES = {
    "dict": (dict_params, lambda t: (t["dense"]["kernel"], t["dense"]["bias"], t["norm"]["scale"])),
    "list": (list_params, lambda t: t[0]),
    "named tuple": (named_tuple_params, lambda t: (t.dense.kernel, t.dense.bias, t.scale)),
    "Flax Linen": (linen_params, lambda t: (t["Dense_0"]["kernel"], t["Dense_0"]["bias"], t["LayerNorm_0"]["scale"])),
    "Flax NNX": (nnx_params, lambda t: (t["dense"]["kernel"][...], t["dense"]["bias"][...], t["norm"]["scale"][...])),
    "Haiku": (haiku_params, lambda t: (t["linear"]["w"], t["linear"]["b"], t["layer_norm"]["scale"])),
    "Equinox": (equinox_params, lambda t: (t.dense.weight, t.dense.bias, t.scale)),
}

KERNEL, BIAS = ".*(kernel|weight|/w|/0)", ".*(bias|/b|/1)"
SAME_FOR_ALL = gx.by_path(
    {KERNEL: gx.chain(gx.scale_by_momentum(0.0), gx.scale(2.0)), BIAS: gx.freeze()}, default=gx.scale(3.0)
)


@pytest.mark.parametrize(("build", "parts"), TREES.values(), ids=TREES)
def test_one_by_path_for_every_kind_of_parameters(build, parts):
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), build())
    updates, state = SAME_FOR_ALL.update(params, SAME_FOR_ALL.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    kernel, bias, scale = parts(updates)
    np.testing.assert_array_equal(kernel, np.full((2, 2), 2.0))
    np.testing.assert_array_equal(bias, np.zeros(2))
    np.testing.assert_array_equal(scale, np.full(2, 3.0))
    assert [moment.shape for moment in jax.tree.leaves(state.mu)] == [(2, 2)]


def test_nnx_optimizer_trains_groups():
    nnx = pytest.importorskip("flax.nnx")
    model, tx = nnx_model(), gx.by_path({"dense/kernel": gx.freeze(), "dense/bias": gx.sgd(0.5)}, default=gx.adam(0.1))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with lenient():
        for _ in range(2):
            optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_same(after["dense"]["kernel"], before["dense"]["kernel"])
    np.testing.assert_array_equal(after["dense"]["bias"], np.full(2, -1.0))
    np.testing.assert_allclose(after["norm"]["scale"], 0.8, rtol=1e-6)  # two Adam steps of 0.1 along one gradient


# Overrides: the default with other numbers


SCHEDULE = optax.linear_schedule(0.1, 0.0, 5)
RATE = gx.live(0.2)


@pytest.mark.parametrize(
    ("base", "changes", "instead"),
    [
        ({}, {}, {}),
        ({}, {"weight_decay": 0.0}, {"weight_decay": 0.0}),
        ({}, {"weight_decay": gx.times(4)}, {"weight_decay": 4 * 0.01}),
        ({}, {"learning_rate": gx.times(0.5)}, {"learning_rate": 0.5 * 0.1}),
        ({}, {"learning_rate": RATE}, {"learning_rate": RATE}),
        ({}, {"learning_rate": SCHEDULE}, {"learning_rate": SCHEDULE}),
        ({"learning_rate": SCHEDULE}, {"learning_rate": 0.1}, {"learning_rate": 0.1}),
        (
            {"learning_rate": SCHEDULE},
            {"learning_rate": gx.times(0.5)},
            {"learning_rate": lambda t: 0.5 * SCHEDULE(t)},
        ),
        ({"learning_rate": gx.live(0.1)}, {"learning_rate": gx.times(0.5)}, {"learning_rate": gx.live(0.05)}),
        ({"learning_rate": jnp.float32(0.1)}, {"learning_rate": gx.times(0.5)}, {"learning_rate": jnp.float32(0.05)}),
        ({}, {"b1": 0.5, "b2": 0.9, "eps": 1e-3}, {"b1": 0.5, "b2": 0.9, "eps": 1e-3}),
        ({}, {"b1": gx.times(0.5), "b2": SCHEDULE}, {"b1": 0.45, "b2": SCHEDULE}),
    ],
    ids=[
        "nothing",
        "no decay",
        "times a decay",
        "times a constant",
        "live",
        "schedule",
        "constant for a schedule",
        "times a schedule",
        "times a live value",
        "times an array",
        "moments",
        "moving moments",
    ],
)
def test_an_override_is_the_optimizer_built_with_that_number(base, changes, instead):
    base = {"learning_rate": 0.1, "weight_decay": 0.01, **base}
    default, other = gx.adamw(**base), gx.adamw(**{**base, **instead})
    alone = {
        path: other if path.endswith("bias") else default for path in ("head/bias", "head/kernel", "layers/1/bias")
    }
    assert_each_alone(gx.by_path({".*bias": changes}, default=default), alone)


def test_an_override_reaches_every_rule_that_has_the_name():
    clip = functools.partial(gx.chain, gx.scale_by_momentum(0.9), gx.bias_correction(0.9))
    other = gx.chain(gx.scale_by_momentum(0.5), gx.bias_correction(0.5))
    tx = gx.by_path({".*bias": {"decay": 0.5}}, default=clip())
    assert_each_alone(tx, {"head/bias": other, "head/kernel": clip()})


def test_a_norm_of_its_own_with_another_bound():
    tx = gx.by_path(
        {".*bias": {"max_norm": 0.5}}, default=gx.chain(gx.clip_by_global_norm(2.0), gx.sgd(1.0)), joint_norm=False
    )
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    biases = {path: leaf for path, leaf in leaves(updates).items() if path.endswith("bias")}
    others = {path: leaf for path, leaf in leaves(updates).items() if not path.endswith("bias")}
    np.testing.assert_allclose([norm(biases), norm(others)], [0.5, 2.0], rtol=1e-6)  # the factor and each product


def test_the_state_shows_the_hyperparameters_of_each_group():
    tx = gx.by_path(
        {
            "embed": {"learning_rate": gx.times(0.5), "b1": gx.live(0.5)},
            "head/.*": {"weight_decay": 0.0},
            "scale": gx.sgd(gx.live(0.25)),
        },
        default=gx.adamw(SCHEDULE),
    )
    _, state = train(tx, PARAMS, GRADS[:2])
    expected = {"learning_rate": 0.08, "embed/learning_rate": 0.04, "embed/b1": 0.5, "scale/learning_rate": 0.25}
    assert shown(state) == pytest.approx(expected, rel=1e-6)  # float32 of a schedule at step 1


def test_what_the_state_shows_does_not_depend_on_the_numbers():
    def state(rate: float, factor: float) -> Any:
        groups = {
            "embed": gx.sgd(rate),
            "head/.*": {"learning_rate": rate},
            "scale": {"learning_rate": gx.times(factor)},
        }
        return gx.by_path(groups, default=gx.sgd(0.5)).init(PARAMS)

    # a checkpoint must fit after a number was changed to one that another group has
    assert signature(state(0.5, 1.0)) == signature(state(0.25, 0.125))
    same = {"embed": {"learning_rate": gx.times(0.5)}, "scale": {"learning_rate": gx.times(0.5)}}
    assert shown(gx.by_path(same, default=gx.sgd(SCHEDULE)).init(PARAMS)) == pytest.approx(
        {"learning_rate": 0.1, "embed/learning_rate": 0.05, "scale/learning_rate": 0.05}, rel=1e-6
    )


def test_live_values_of_groups_are_set_under_jit_without_tracing_again():
    tx = gx.by_path(
        {"embed": {"learning_rate": gx.times(0.5)}, "head/bias": {"learning_rate": gx.live(0.5)}},
        default=gx.sgd(gx.live(1.0)),
    )
    traces = []

    @jax.jit
    def step(state: Any) -> Any:
        traces.append(state)
        return tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)

    def moved(state: Any) -> tuple[list[float], dict[str, float]]:
        updates, state = step(state)
        return [float(jnp.max(-leaves(updates)[path])) for path in ("scale", "embed", "head/bias")], shown(state)

    state = tx.init(PARAMS)
    assert moved(state)[0] == [1.0, 0.5, 0.5]
    steps, values = moved(gx.set_hyperparams(state, learning_rate=4.0))
    assert steps == [4.0, 2.0, 0.5]
    assert values == {"learning_rate": 4.0, "embed/learning_rate": 2.0, "head/bias/learning_rate": 0.5}
    assert moved(gx.set_hyperparams(state, {"head/bias/learning_rate": 8.0}))[0] == [1.0, 0.5, 8.0]
    assert len(traces) == 1
    with pytest.raises(ValueError, match=r"embed/learning_rate follows .*learning_rate=gx\.live"):
        gx.set_hyperparams(state, {"embed/learning_rate": 1.0})
    with pytest.raises(ValueError, match=r"head/bias/learning_rate must be in \[0, inf\)"):
        gx.set_hyperparams(state, {"head/bias/learning_rate": -1.0})
    with pytest.raises(KeyError, match=r"which shows .*embed/learning_rate"):
        gx.set_hyperparams(state, {"embed/rate": 1.0})


def test_a_schedule_is_asked_once_per_step_whatever_is_a_multiple_of_it():
    asked = []

    def schedule(step: Any) -> float:
        asked.append(step)
        return 0.5

    tx = gx.by_path({p: {"learning_rate": gx.times(0.5)} for p in ("embed", "scale")}, default=gx.sgd(schedule))
    state = tx.init(PARAMS)
    asked.clear()
    tx.update(PARAMS, state, PARAMS)
    assert len(asked) == 1


def test_a_live_value_per_group_is_vmapped():
    tx = gx.by_path({"embed": {"learning_rate": gx.times(0.5)}}, default=gx.sgd(gx.live(1.0)))
    ones = jax.tree.map(jnp.ones_like, PARAMS)

    def step(rate: jax.Array) -> Any:
        return tx.update(ones, gx.set_hyperparams(tx.init(PARAMS), learning_rate=rate), PARAMS)[0]

    updates = jax.vmap(step)(jnp.asarray([1.0, 2.0]))
    np.testing.assert_array_equal(updates["embed"][:, 0, 0], [-0.5, -1.0])
    np.testing.assert_array_equal(updates["scale"][:, 0], [-1.0, -2.0])


# What groups are for


def test_layer_wise_decay_of_the_learning_rate():
    # timm's table for two layers and a decay of 0.65: 0.65**3, 0.65**2, 0.65 and 1
    factors = {"embed": 0.274625, "layers/0/.*": 0.4225, "layers/1/.*": 0.65, "head/.*|scale": 1.0}
    tx = gx.by_path({path: {"learning_rate": gx.times(factor)} for path, factor in factors.items()}, gx.adamw(0.1))
    alone = {path: factor for path in PATHS for pattern, factor in factors.items() if re.fullmatch(pattern, path)}
    assert_each_alone(tx, {path: gx.adamw(0.1 * factor) for path, factor in alone.items()})
    expected = {f"{path}/learning_rate": 0.1 * factor for path, factor in factors.items()}
    found = gx.get_hyperparams(tx.init(PARAMS), tx)
    rates = {name: float(value) for name, value in found.items() if name.endswith("learning_rate")}
    assert rates == pytest.approx({"learning_rate": 0.1, **expected}, rel=1e-6)  # float32


def test_widths_by_the_maximal_update_parametrization():
    # Adam at four times the width: matrix-like leaves step a quarter as far and decay four times as much per step
    wide = {"learning_rate": gx.times(1 / 4), "weight_decay": gx.times(4)}
    tx = gx.by_path({"layers/./kernel": wide}, default=gx.adamw(0.1, weight_decay=0.01))
    matrix, vector = gx.adamw(0.1 / 4, weight_decay=0.04), gx.adamw(0.1, weight_decay=0.01)
    assert_each_alone(tx, {path: matrix if re.fullmatch("layers/./kernel", path) else vector for path in PATHS})


def test_the_optimizers_of_the_groups_do_not_meet():
    tx = gx.by_path(
        {".*bias": gx.sgd(0.1, momentum=0.9), "embed": optax.sgd(0.5), "scale": gx.rmsprop(0.1)}, default=gx.adam(0.1)
    )
    own = {"head/bias": gx.sgd(0.1, momentum=0.9), "embed": gx.sgd(0.5), "scale": gx.rmsprop(0.1)}
    assert_each_alone(tx, {**own, "head/kernel": gx.adam(0.1)})


# Frozen leaves

FROZEN = "embed|.*bias"
FROZEN_PATHS = {path for path in PATHS if re.fullmatch(FROZEN, path)}
FROZEN_TREE = tree_of({path: path in FROZEN_PATHS for path in PATHS})
FREEZE = gx.freeze(FROZEN)
MASKS = {
    "tree": FROZEN_TREE,
    "prefix": {**FROZEN_TREE, "embed": True, "scale": False},
    "by path": lambda path, leaf: path in FROZEN_PATHS,
    "by leaf": lambda path, leaf: path == "embed" or (leaf.ndim == 1 and path != "scale"),
    "pattern": FROZEN,
    "compiled": re.compile(FROZEN.upper(), re.IGNORECASE),
}


def same_bits(one: Any, other: Any) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_way_to_say_what_is_frozen(mask):
    tx = gx.chain(gx.momentum(0.1), gx.freeze(mask))
    state = tx.init(PARAMS)
    updates, state = tx.update(GRADS[0], state, PARAMS)
    for path in PATHS:
        frozen = path in FROZEN_PATHS
        assert isinstance(leaves(state.mu)[path], optax.MaskedNode) == frozen, path
        assert (np.signbit(leaves(updates)[path]) & (leaves(updates)[path] == 0)).all() == frozen, path


def test_a_glob_says_what_is_frozen():
    assert gx.freeze(gx.glob("**/bias")).init(PARAMS) == gx.freeze().init(PARAMS)
    updates, _ = gx.freeze(gx.glob("**/bias")).update(GRADS[0], gx.freeze().init(PARAMS), PARAMS)
    assert {path for path, leaf in leaves(updates).items() if (leaf == 0).all()} == {p for p in PATHS if "bias" in p}


CLIP = gx.clip_by_global_norm(1.0)
FREEZING = {
    "group": gx.by_path({FROZEN: gx.freeze()}, default=gx.adamw(0.1)),
    "within a group": gx.by_path({"embed|.*bias|head.*": gx.chain(gx.adam(0.1), FREEZE)}, default=gx.adamw(0.1)),
    "two groups": gx.by_path({"embed": gx.freeze(), ".*bias": gx.freeze()}, default=gx.rmsprop(0.1, centered=True)),
    "before": gx.chain(FREEZE, CLIP, gx.adamw(0.1)),
    "after": gx.chain(CLIP, gx.adamw(0.1), FREEZE),
    "between": gx.chain(CLIP, FREEZE, gx.adamw(0.1)),
    "twice": gx.chain(gx.freeze("embed"), gx.adam(0.1), gx.freeze(".*bias")),
    "before optax": gx.chain(FREEZE, optax.adam(0.1)),
    "after optax": gx.chain(optax.adam(0.1), FREEZE),
    "accumulate": gx.accumulate(gx.chain(FREEZE, CLIP, gx.adam(0.1)), every=2),
    "skip": gx.skip_nonfinite(gx.by_path({FROZEN: gx.freeze()}, default=gx.chain(CLIP, gx.adam(0.1)))),
    "wrapped": gx.chain(gx.scale_by_momentum(0.9), gx.skip_nonfinite(gx.chain(FREEZE, gx.sgd(0.1)))),
}


@pytest.mark.parametrize("tx", FREEZING.values(), ids=FREEZING)
def test_frozen_leaves_stay_to_the_bit_and_have_no_state(tx):
    special = jnp.asarray([-0.0, jnp.inf])
    params = tree_of(
        {p: jnp.broadcast_to(special, x.shape) if p in FROZEN_PATHS else x for p, x in leaves(PARAMS).items()}
    )
    with lenient():
        trained, state = train(tx, params, GRADS)
    for path in PATHS:
        assert same_bits(leaves(trained)[path], leaves(params)[path]) == (path in FROZEN_PATHS), path
    assert {leaf.path for leaf in gx.describe(tx, params, show=False).leaves if leaf.frozen} == FROZEN_PATHS
    moments = jax.tree.leaves(state, is_leaf=lambda node: jax.tree.structure(node) == HOLED)
    holed = [moment for moment in moments if jax.tree.structure(moment) == HOLED]
    arrays = [one for one in moments if jax.tree.structure(one) != HOLED]
    assert holed
    assert all(array.shape == () for array in arrays)


HOLED = jax.tree.structure(tree_of({p: optax.MaskedNode() if p in FROZEN_PATHS else 0 for p in PATHS}))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_frozen_leaves_of_other_dtypes(dtype):
    params = {"embed": jnp.asarray([-0.0, 1.0], dtype), "w": jnp.ones(2)}
    tx = gx.by_path({"embed": gx.freeze()}, default=gx.adam(0.1))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert updates["embed"].dtype == dtype
    assert same_bits(gx.apply_updates(params, updates)["embed"], params["embed"])
    assert same_bits(optax.apply_updates(params, updates)["embed"], params["embed"])
    assert isinstance(state.nu["embed"], optax.MaskedNode)


def test_freeze_alone():
    updates, state = gx.freeze().update(GRADS[0], gx.freeze().init(PARAMS))
    assert all(same_bits(leaf, -jnp.zeros_like(leaf)) for leaf in jax.tree.leaves(updates))
    assert jax.tree.leaves(state) == [1]
    tx = gx.by_path({".*": gx.freeze()})
    assert_same(tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0], updates)


# What a guard or a clipping would notice, before and behind what freezes
WATCHING = {
    "clip before": gx.chain(CLIP, FREEZE, gx.sgd(0.1)),
    "clip after": gx.chain(FREEZE, CLIP, gx.sgd(0.1)),
    "clip and by_path": gx.chain(CLIP, gx.by_path({FROZEN: gx.freeze()}, default=gx.sgd(0.1))),
    "clip in the default": gx.by_path({FROZEN: gx.freeze()}, default=gx.chain(CLIP, gx.sgd(0.1))),
    "clip before a wrapped freeze": gx.chain(CLIP, gx.skip_nonfinite(gx.chain(FREEZE, gx.sgd(0.1)))),
    "optax before": gx.chain(optax.clip_by_global_norm(1.0), FREEZE, gx.sgd(0.1)),
    "optax after": gx.chain(FREEZE, optax.clip_by_global_norm(1.0), gx.sgd(0.1)),
    "optax beside a wrapped freeze": gx.chain(
        optax.clip_by_global_norm(1.0), gx.accumulate(gx.chain(FREEZE, gx.sgd(0.1)), every=1)
    ),
    "zscore": gx.chain(gx.clip_by_zscore(), FREEZE, gx.sgd(0.1)),
    "skip_nonfinite": gx.skip_nonfinite(gx.chain(FREEZE, gx.sgd(0.1))),
    "skip_spikes": gx.skip_spikes(gx.by_path({FROZEN: gx.freeze()}, default=gx.sgd(0.1)), window=2),
    "accumulate": gx.accumulate(gx.chain(gx.sgd(0.1), FREEZE), every=2),
    "observe": gx.observe(gx.chain(CLIP, FREEZE, gx.sgd(0.1)), by="leaf"),
}


@pytest.mark.parametrize("tx", WATCHING.values(), ids=WATCHING)
def test_the_gradient_of_a_frozen_leaf_does_not_matter(tx):
    def frozen_as(value: float) -> list[Any]:
        return [
            tree_of({p: jnp.full_like(g, value) if p in FROZEN_PATHS else 4 * g for p, g in leaves(grads).items()})
            for grads in GRADS
        ]

    with lenient():
        expected = train(tx, PARAMS, frozen_as(0.0))
        for value in (jnp.nan, -jnp.inf, 1e30):
            assert_same(train(tx, PARAMS, frozen_as(value)), expected)
    assert not same_bits(expected[0]["scale"], PARAMS["scale"])


def test_frozen_leaves_do_not_count_in_the_norm():
    tx = gx.observe(gx.chain(CLIP, FREEZE))
    updates, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    trained = {path: leaf for path, leaf in leaves(GRADS[0]).items() if path not in FROZEN_PATHS}
    np.testing.assert_allclose(gx.metrics(state)["grad_norm"], norm(trained), rtol=1e-6)  # a sum of a few squares
    np.testing.assert_allclose(norm(leaves(updates)), 1.0, rtol=1e-6)


def test_low_precision_wrappers_keep_nothing_for_frozen_leaves():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    grads = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), some) for some in GRADS]
    for wrap in (gx.master_weights, gx.compensated, functools.partial(gx.stochastic_rounding, key=0)):
        for tx in (wrap(gx.chain(FREEZE, gx.adam(0.1))), gx.by_path({FROZEN: gx.freeze()}, default=wrap(gx.adam(0.1)))):
            trained, state = train(tx, params, grads)
            (residual,) = optax.tree_utils.tree_get_all_with_path(state, "residual")
            for path in PATHS:
                frozen = path in FROZEN_PATHS
                assert same_bits(leaves(trained)[path], leaves(params)[path]) == frozen
                assert isinstance(leaves(residual[1])[path], optax.MaskedNode) == (frozen or "rounding" in repr(tx))


# One norm


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))


KERNELS = {path for path in PATHS if path.endswith("kernel")}


def clipped(scale: float, max_norm: float = 1.0) -> gx.Transformation:
    return gx.chain(gx.clip_by_global_norm(max_norm), gx.scale(scale))


def test_groups_that_clip_share_one_norm_where_those_of_optax_do_not():
    size = norm(GRADS[0])
    assert size > 1
    for tx in (
        gx.by_path({".*kernel": clipped(1.0)}, default=clipped(-1.0)),
        gx.by_path({".*kernel": {"factor": -1.0}}, default=clipped(1.0)),
        gx.by_path({".*kernel": gx.chain(gx.clip_by_value(100.0), clipped(1.0)), "(?!.*kernel).*": clipped(2.0)}),
        gx.by_path({".*kernel": {"factor": -1.0}}, default=gx.chain(optax.clip_by_global_norm(1.0), gx.scale(2.0))),
    ):
        updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
        for path in KERNELS:  # the norm, the factor and the product are rounded
            np.testing.assert_allclose(np.abs(leaves(updates)[path]), np.abs(leaves(GRADS[0])[path]) / size, rtol=1e-6)

    labels = tree_of({path: "kernel" if path in KERNELS else "other" for path in PATHS})
    theirs = optax.partition(dict.fromkeys(("kernel", "other"), optax.clip_by_global_norm(1.0)), labels)
    updates, _ = theirs.update(GRADS[0], theirs.init(PARAMS), PARAMS)
    np.testing.assert_allclose(norm(updates), np.sqrt(2), rtol=1e-6)  # one norm of 1 per group: clipped less than asked
    ours = gx.by_path({".*kernel": CLIP}, default=CLIP)
    updates, _ = ours.update(GRADS[0], ours.init(PARAMS), PARAMS)
    np.testing.assert_allclose(norm(updates), 1.0, rtol=1e-6)


def test_a_joint_norm_leaves_out_what_is_frozen_and_what_no_group_clips():
    tx = gx.by_path({".*kernel": clipped(1.0), "layers/./bias": clipped(1.0), "embed": gx.freeze()}, gx.identity())
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    joint = {path: leaf for path, leaf in leaves(updates).items() if path in KERNELS or path.startswith("layers")}
    np.testing.assert_allclose(norm(joint), 1.0, rtol=1e-6)
    assert_same((updates["scale"], updates["head"]["bias"]), (GRADS[0]["scale"], GRADS[0]["head"]["bias"]))


def test_every_clipping_of_the_groups_is_brought_in_line():
    twice = gx.chain(gx.clip_by_global_norm(2.0), gx.scale(3.0), gx.clip_by_global_norm(1.0))
    tx = gx.by_path({".*kernel": gx.chain(gx.scale(1.0), twice)}, default=twice)
    expected, _ = twice.update(GRADS[0], twice.init(PARAMS), PARAMS)
    assert_close(tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0], expected, FUSION)


@pytest.mark.parametrize(
    ("changed", "bound"),
    [({"factor": 1.0}, 1.0), (clipped(1.0), 1.0), (clipped(1.0, 1.5), 1.5)],
    ids=["override", "own", "other"],
)
def test_a_norm_per_group_on_request(changed, bound):
    tx = gx.by_path({".*kernel": changed}, default=clipped(1.0), joint_norm=False)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    kernels = {path: leaf for path, leaf in leaves(updates).items() if path in KERNELS}
    others = {path: leaf for path, leaf in leaves(updates).items() if path not in KERNELS}
    np.testing.assert_allclose([norm(kernels), norm(others)], [bound, 1.0], rtol=1e-6)


def test_wrapped_norms_are_joint_or_said_not_to_be():
    gx.by_path({".*kernel": gx.skip_nonfinite(clipped(1.0))}, default=gx.scale(1.0))  # one group with a norm is joint
    gx.by_path({".*kernel": gx.freeze()}, default=gx.skip_nonfinite(clipped(1.0)))
    tx = gx.by_path({".*kernel": gx.skip_nonfinite(clipped(2.0))}, gx.skip_nonfinite(clipped(1.0)), joint_norm=False)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    others = {path: leaf for path, leaf in leaves(updates).items() if path not in KERNELS}
    np.testing.assert_allclose(norm(others), 1.0, rtol=1e-6)  # the norm, the factor and the product are rounded


# Errors


def adamw() -> gx.Transformation:
    return gx.adamw(0.1)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: gx.by_path({}), TypeError, "groups must be a dict from patterns .*, got {}"),
        (lambda: gx.by_path([("a", gx.sgd(1.0))]), TypeError, "groups must be a dict"),
        (lambda: gx.by_path({3: gx.sgd(1.0)}), TypeError, "by_path.* string or .*compiled.*, got 3"),
        (lambda: gx.by_path({"*/bias": gx.sgd(1.0)}), ValueError, r"'\*/bias' is no regular expression: .*use gx.glob"),
        (lambda: gx.by_path({"a": None}), TypeError, "the group 'a' must be a transformation, .* got None"),
        (lambda: gx.by_path({"a": gx.sgd}), TypeError, "the group 'a' must be a transformation"),
        (lambda: gx.by_path({"a": gx.sgd(1.0)}, default="sgd"), TypeError, "default must be a transformation"),
        (lambda: gx.by_path({"a": gx.sgd(1.0)}, joint_norm=1), TypeError, "joint_norm must be True or False"),
        (lambda: gx.by_path({"a": {"b1": 0.5}}), ValueError, "group 'a' overrides .* of the default: give default="),
        (
            lambda: gx.by_path({"a": {"lr": 0.5}}, adamw()),
            ValueError,
            "group 'a' overrides 'lr'; the default has .*'b1', 'weight_decay', 'learning_rate'$",
        ),
        (lambda: gx.by_path({"a": {"b1": 0.5}}, gx.freeze()), ValueError, "overrides 'b1'; the default has none$"),
        (
            lambda: gx.by_path({"a": {"b1": 0.5}}, gx.accumulate(adamw(), every=2)),
            ValueError,
            r"overrides do not reach into accumulate\(.*: put by_path into it",
        ),
        (lambda: gx.by_path({"a": {"b1": 0.5}}, optax.adam(0.1)), ValueError, r"do not reach into optax.chain\(…\)"),
        (lambda: gx.by_path({"a": {"b1": 1.5}}, adamw()), ValueError, r"b1 must be in \[0, 1\), got 1.5"),
        (lambda: gx.by_path({"a": {"b1": gx.times(2)}}, adamw()), ValueError, r"b1 must be in \[0, 1\), got 1.8"),
        (lambda: gx.by_path({"a": {"b1": gx.live(2)}}, adamw()), ValueError, r"b1 must be in \[0, 1\), got 2"),
        (lambda: gx.by_path({"a": {"b1": "0.5"}}, adamw()), TypeError, "b1 must be a real number"),
        (lambda: gx.by_path({"a": {"b1": gx.freeze()}}, adamw()), TypeError, "b1 must be a real number"),
        (lambda: gx.by_path({lambda params: True: adamw()}), TypeError, "must be a function .path, leaf. -> bool"),
        (lambda: gx.by_path({3: adamw()}), TypeError, "a pattern must be a string"),
        (lambda: gx.times(-1), ValueError, r"factor must be in \[0, inf\), got -1"),
        (lambda: gx.times("half"), TypeError, "factor must be a real number"),
        (lambda: gx.times(jnp.float32(1)), TypeError, "factor must be a number; for one that changes, give the group"),
        (lambda: gx.adam(gx.times(0.5)), TypeError, r"learning_rate must be a real number, .*times\(0.5\)"),
        (lambda: gx.glob(re.compile("a")), TypeError, "pattern must be a string"),
        (lambda: gx.freeze(True), TypeError, "mask is the single value True"),
        (
            lambda: gx.by_path({"a": clipped(1.0, 2.0)}, clipped(1.0)),
            ValueError,
            r"clip_by_global_norm\(1.0\) in 'default' and clip_by_global_norm\(2.0\) in 'a' look at all leaves together"
            "; give both the same numbers, or with joint_norm=False each its own leaves",
        ),
        (lambda: gx.by_path({"a": {"max_norm": 2.0}}, clipped(1.0)), ValueError, "look at all leaves together"),
        (
            lambda: gx.by_path({"a": gx.accumulate(clipped(2.0), every=2)}, gx.skip_nonfinite(clipped(1.0))),
            ValueError,
            r"skip_nonfinite\(.*\) in 'default' sees the norm of its own leaves only, and other groups take norms as "
            "well; put by_path inside it, or say joint_norm=False",
        ),
        (
            lambda: gx.by_path({"a": clipped(1.0), "b": gx.clip_by_zscore()}),
            ValueError,
            r"clip_by_global_norm\(1.0\) in 'a' and clip_by_zscore.* in 'b' look at all leaves",
        ),
    ],
)  # fmt: skip
def test_what_is_no_group_is_refused_when_it_is_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            gx.by_path({"embed": gx.sgd(1.0), ".*kernel": gx.sgd(1.0)}),
            "no pattern matches 'head/bias', of 'embed', '.*kernel'; add one or give default=",
        ),
        (
            gx.by_path({"head/.*": gx.sgd(1.0), ".*bias": gx.sgd(1.0)}, default=gx.sgd(1.0)),
            "'head/.*' and '.*bias' both match 'head/bias'; make the patterns exclude one another",
        ),
        (
            gx.by_path({"head": gx.sgd(1.0)}, default=gx.sgd(1.0)),
            "pattern 'head' matches none of the paths embed, head/bias, head/kernel, layers/{0,1}/bias, "
            "layers/{0,1}/kernel, scale; it must match a whole path: did you mean 'head/.*'?",
        ),
        (
            gx.by_path({re.compile("LAYERS/.*"): gx.sgd(1.0)}, default=gx.sgd(1.0)),
            "pattern 'LAYERS/.*' matches none of the paths embed",
        ),
        (gx.chain(gx.sgd(1.0), gx.freeze("bias")), "mask 'bias' matches none of the paths embed, head/bias"),
    ],
    ids=["no match", "two matches", "nothing matched", "case", "freeze"],
)
def test_leaves_and_patterns_that_do_not_fit_are_named(tx, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match=re.escape(message)):
        gx.describe(tx, PARAMS)


def test_the_state_of_other_groups_is_refused():
    one = gx.by_path({"embed": gx.freeze()}, default=gx.momentum(SCHEDULE))
    other = gx.by_path({"embed": gx.momentum(SCHEDULE)}, default=gx.momentum(SCHEDULE))
    with pytest.raises(ValueError, match=r"state\.values has .*'scheduled/embed/learning_rate'"):
        one.update(GRADS[0], other.init(PARAMS), PARAMS)
    one = gx.by_path({"embed": gx.freeze()}, default=gx.momentum(0.1))
    other = gx.by_path({"scale": gx.freeze()}, default=gx.momentum(0.1))
    with pytest.raises(ValueError, match=r"state.mu\['embed'\] is float32\[2, 2\], but this leaf has no such state"):
        one.update(GRADS[0], other.init(PARAMS), PARAMS)


def test_groups_need_the_parameters_for_their_paths():
    tx = gx.by_path({"embed": gx.freeze()}, default=gx.sgd(1.0))
    with pytest.raises(ValueError, match=r"needs the parameters: call update\(updates, state, params\)"):
        tx.update(GRADS[0], tx.init(PARAMS))


# Laws

MIXED = gx.by_path(
    {
        "embed": gx.freeze(),
        ".*bias": {"weight_decay": 0.0, "learning_rate": gx.times(0.5)},
        "scale": gx.chain(gx.clip_by_global_norm(1.0), gx.sgd(0.1, momentum=0.9)),
    },
    default=gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(gx.live(0.1), weight_decay=0.01)),
)


def test_chains_with_groups_are_associative_and_have_a_unit():
    a, b, c = gx.scale(2.0), gx.by_path({"embed": gx.freeze(), ".*bias": gx.scale(3.0)}, gx.scale_by_momentum()), CLIP
    expected = train(gx.chain(a, b, c), PARAMS, GRADS)
    assert gx.chain(gx.chain(a, b), c) == gx.chain(a, gx.chain(b, c)) == gx.chain(a, b, c)
    assert_same(train(gx.chain(a, gx.chain(b, c)), PARAMS, GRADS), expected)
    assert gx.chain(b, gx.identity()) == gx.chain(gx.identity(), b) == b
    two = gx.chain(b, gx.by_path({"(head|embed).*": gx.scale(0.5)}, default=gx.identity()))
    updates, _ = two.update(GRADS[0], two.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["head"]["bias"], 1.5 * GRADS[0]["head"]["bias"])
    np.testing.assert_array_equal(updates["embed"], np.zeros((2, 2)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_group_of_all_is_the_optimizer(name):
    tx = OPTIMIZERS[name]
    params, grads = {"w": PARAMS["embed"]}, [{"w": some["embed"]} for some in GRADS]
    expected, state = train(tx, params, grads)
    for grouped in (gx.by_path({".*": tx}), gx.by_path({".*": {}}, default=tx)):
        trained, own = train(grouped, params, grads)
        assert_same(trained, expected)
        assert_same(own, state)


def test_compiled_and_scanned_steps_are_eager_ones():
    expected = train(MIXED, PARAMS, GRADS)
    compiled = optax.GradientTransformation(jax.jit(MIXED.init), jax.jit(MIXED.update))
    assert_close(train(compiled, PARAMS, GRADS), expected, FUSION)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        return train(MIXED, params, [grads], state), None

    stacked = jax.tree.map(lambda *some: jnp.stack(some), *GRADS)
    scanned, _ = jax.lax.scan(step, (PARAMS, MIXED.init(PARAMS)), stacked)
    assert_close(scanned, expected, FUSION)


def test_a_donated_state_with_holes_is_carried_on_without_tracing_again():
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        traces.append(params)
        return train(MIXED, params, [grads], state)

    params, state = jax.tree.map(jnp.copy, (PARAMS, MIXED.init(PARAMS)))
    for grads in GRADS:
        params, state = step(params, state, grads)
    assert len(traces) == 1
    assert_close((params, state), train(MIXED, PARAMS, GRADS), FUSION)


def build() -> gx.Transformation:
    return gx.by_path(
        {
            gx.glob("layers/*/kernel"): {"learning_rate": gx.times(0.5), "eps": 0.5},
            re.compile("HEAD/.*", re.IGNORECASE): gx.sgd(0.25, momentum=0.5),
            "embed": gx.freeze(),
            "scale": gx.chain(gx.freeze("scale"), gx.sgd(0.1)),
        },
        default=gx.adamw(0.1, mask=".*bias"),
        joint_norm=False,
    )


def test_equal_groups_are_equal_static_arguments():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def init(tx: Any, params: Any) -> Any:
        traces.append(tx)
        return tx.init(params)

    for _ in range(2):
        init(build(), PARAMS)
    assert len(traces) == 1
    assert hash(build()) == hash(build())
    assert gx.by_path({"a": gx.sgd(1.0)}) != gx.by_path({"b": gx.sgd(1.0)})
    assert gx.by_path({"a": gx.sgd(1.0)}) != gx.by_path({"a": gx.sgd(1.0)}, default=gx.sgd(1.0))
    assert gx.by_path({"a": {"b1": 0.5}}, adamw()) != gx.by_path({"a": {"b1": 0.25}}, adamw())
    assert gx.by_path({"a": CLIP}, CLIP) != gx.by_path({"a": CLIP}, CLIP, joint_norm=False)
    assert gx.by_path({"a": gx.freeze()}, gx.sgd(1.0)) != gx.by_path({"a": gx.scale(0.0)}, gx.sgd(1.0))


def test_groups_print_as_the_call_that_makes_them():
    assert eval(repr(build()), {**vars(gx), "re": re}) == build()
    assert repr(gx.by_path({"a": {"learning_rate": gx.times(0.5)}, "b": gx.freeze()}, gx.sgd(1.0))) == (
        "by_path({'a': {'learning_rate': times(0.5)}, 'b': freeze()}, default=scale_by_learning_rate(1.0))"
    )
    assert repr(gx.by_path({"a": gx.freeze("a/b")})) == "by_path({'a': freeze(mask='a/b')})"


def test_groups_and_their_state_pickle():
    expected, state = train(MIXED, PARAMS, GRADS[:1])
    tx, again = pickle.loads(pickle.dumps((MIXED, state)))
    assert pickle.loads(pickle.dumps(build())) == build()
    state, again = (gx.set_hyperparams(some, learning_rate=0.5) for some in (state, again))
    assert_same(train(tx, expected, GRADS[1:], again), train(MIXED, expected, GRADS[1:], state))


# States with holes in other hands


def test_tree_map_params_finds_what_is_like_the_parameters():
    state = MIXED.init(PARAMS)
    marked = optax.tree_map_params(
        MIXED,
        lambda moment, path: "hole" if isinstance(moment, optax.MaskedNode) else path,
        state,
        tree_of({path: path for path in PATHS}),
        transform_non_params=lambda leaf: "other",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    adam = {path for path in PATHS if path not in ("embed", "scale")}
    assert leaves(marked.nu) == {path: path if path in adam else "hole" for path in PATHS}
    sgd, first_moment = sorted([marked.mu, marked.mu_2], key=lambda mu: mu["scale"] != "scale")
    assert leaves(first_moment) == leaves(marked.nu)
    assert leaves(sgd) == {path: path if path == "scale" else "hole" for path in PATHS}
    assert marked.count == "other"


def test_tree_map_params_takes_masks_that_are_trees():
    for tx in (gx.chain(gx.freeze(FROZEN_TREE), gx.adam(0.1)), gx.adamw(0.1, mask=FROZEN_TREE)):
        state = tx.init(PARAMS)
        assert_same(optax.tree_map_params(tx, lambda moment: moment, state), state)


def test_flax_and_orbax_continue_with_holes_in_the_state(tmp_path):
    flax, ocp = pytest.importorskip("flax.serialization"), pytest.importorskip("orbax.checkpoint")
    tx = gx.accumulate(MIXED, every=2)
    params, state = train(tx, PARAMS, GRADS)
    expected = train(tx, params, GRADS, state)
    restored = flax.from_bytes(tx.init(PARAMS), flax.to_bytes(state))
    assert_same(train(tx, params, GRADS, jax.tree.map(jnp.asarray, restored)), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    assert_same(train(tx, params, GRADS, restored), expected)


def test_foreign_transformations_as_groups_and_as_default():
    tx = gx.by_path({"embed": optax.sgd(0.1, momentum=0.9), ".*bias": gx.freeze()}, default=optax.adam(0.1))
    with lenient():
        trained, state = train(tx, PARAMS, GRADS)
        for path, own in {"embed": optax.sgd(0.1, momentum=0.9), "head/kernel": optax.adam(0.1)}.items():
            expected, _ = train(own, leaves(PARAMS)[path], [leaves(grads)[path] for grads in GRADS])
            # optax compiles some of its arithmetic for all leaves together
            np.testing.assert_allclose(leaves(trained)[path], expected, rtol=FUSION)
    assert_same(trained["head"]["bias"], PARAMS["head"]["bias"])
    for moment in ("mu", "nu", "trace"):
        held = {
            path
            for path, leaf in leaves(optax.tree_utils.tree_get(state, moment)).items()
            if leaf != optax.MaskedNode()
        }
        assert held == ({"embed"} if moment == "trace" else {p for p in PATHS if p != "embed" and "bias" not in p})


def test_groups_inside_wrappers_of_optax_and_ours():
    tx = gx.by_path({"embed": gx.freeze()}, default=gx.adam(0.1))
    expected, _ = train(tx, PARAMS, GRADS)
    for wrapped in (
        optax.chain(tx),
        optax.with_extra_args_support(tx),
        optax.masked(tx, lambda params: jax.tree.map(lambda leaf: True, params)),
        gx.accumulate(tx, every=1),
        gx.skip_nonfinite(tx),
        gx.observe(tx, by="group"),
    ):
        assert_same(train(wrapped, PARAMS, GRADS)[0], expected)
    injected = optax.inject_hyperparams(lambda rate: gx.by_path({"embed": gx.freeze()}, default=gx.adam(rate)))(0.1)
    # the rate is an array there, and in the compiled rule no constant
    assert_close(train(injected, PARAMS, GRADS)[0], expected, FUSION)


def test_trees_without_leaves():
    for nothing in ({}, [], {"a": None}):
        tx = gx.by_path({"embed": gx.freeze()}, default=gx.adam(0.1))
        updates, _ = tx.update(nothing, tx.init(nothing), nothing)
        assert updates == nothing


# Functions as keys, and groups of groups


def is_matrix(path: str, leaf: Any) -> bool:
    return leaf.ndim == 2


def test_a_function_of_path_and_leaf_is_a_key():
    one, other = gx.adamw(0.1), gx.sgd(0.2, momentum=0.9)
    tx = gx.by_path({is_matrix: one}, default=other)
    assert_each_alone(tx, {path: one if leaf.ndim == 2 else other for path, leaf in leaves(PARAMS).items()})
    assert tx == gx.by_path({is_matrix: one}, default=other)
    assert repr(tx).startswith("by_path({test_groups.is_matrix: ") or "is_matrix: " in repr(tx)
    live = gx.by_path({is_matrix: {"learning_rate": gx.live(0.5)}}, default=gx.sgd(0.1))
    assert shown(live.init(PARAMS)) == {"is_matrix/learning_rate": 0.5}


def test_a_function_that_takes_no_leaf_or_what_another_key_takes_is_named():
    with pytest.raises(ValueError, match=r"by_path: pattern .*is_matrix takes none of the leaves"):
        gx.by_path({is_matrix: gx.sgd(0.1)}, default=gx.sgd(0.1)).init({"bias": jnp.zeros(2)})
    with pytest.raises(ValueError, match="both match 'embed'"):
        gx.by_path({is_matrix: gx.sgd(0.1), "embed": gx.sgd(0.2)}, default=gx.sgd(0.1)).init(PARAMS)


def test_the_function_sees_the_leaf_of_each_step():
    tx = gx.by_path({is_matrix: gx.sgd(1.0)}, default=gx.sgd(2.0))
    for params in ({"w": jnp.ones((2, 2)), "v": jnp.ones(2)}, {"w": jnp.ones(2), "v": jnp.ones((2, 2))}):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert {name: float(-leaf.ravel()[0]) for name, leaf in updates.items()} == {
            name: 1.0 if leaf.ndim == 2 else 2.0 for name, leaf in params.items()
        }


def test_groups_of_groups_train_each_leaf_as_alone():
    kernels, rest, other, embed = gx.adamw(0.1), gx.sgd(0.3), gx.momentum(0.2), gx.adam(0.05)
    inner = gx.by_path({".*kernel": kernels}, default=rest)
    tx = gx.by_path({"layers/.*": inner, "embed": embed}, default=other)
    expected = dict.fromkeys(PATHS, other) | {"embed": embed}
    expected |= {path: kernels if "kernel" in path else rest for path in PATHS if path.startswith("layers")}
    assert_each_alone(tx, expected)
    assert_same(train(pickle.loads(pickle.dumps(tx)), PARAMS, GRADS), train(tx, PARAMS, GRADS))


def test_groups_of_groups_may_be_three_deep_and_the_default():
    deep = gx.by_path({".*bias": gx.sgd(0.3)}, default=gx.by_path({"layers/0/.*": gx.sgd(0.2)}, default=gx.sgd(0.1)))
    tx = gx.by_path({"embed": gx.sgd(0.5)}, default=deep)
    rates = dict.fromkeys(PATHS, 0.1) | {"embed": 0.5, "layers/0/kernel": 0.2}
    rates |= {path: 0.3 for path in PATHS if path.endswith("bias")}
    assert_each_alone(tx, {path: gx.sgd(rate) for path, rate in rates.items()})


def test_an_inner_pattern_is_asked_of_its_own_group_only():
    inner = gx.by_path({"embed": gx.sgd(0.1)}, default=gx.sgd(0.2))
    with pytest.raises(ValueError, match="by_path: pattern 'embed' matches none of the paths layers/"):
        gx.by_path({"layers/.*": inner}, default=gx.sgd(0.3)).init(PARAMS)


def test_all_groups_of_groups_share_one_norm():
    clip, rates = gx.clip_by_global_norm(0.5), {"layers/0/kernel": 0.1, "layers/1/kernel": 0.1}
    inner = gx.by_path({".*kernel": gx.chain(clip, gx.sgd(0.1))}, default=gx.chain(clip, gx.sgd(0.2)))
    tx = gx.by_path({"layers/.*": inner}, default=gx.chain(clip, gx.sgd(0.3)))
    rates |= {path: 0.3 for path in PATHS if not path.startswith("layers")}
    clipped, _ = clip.update(GRADS[0], clip.init(PARAMS), PARAMS)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    for path, update in leaves(updates).items():
        np.testing.assert_allclose(update, -rates.get(path, 0.2) * leaves(clipped)[path], rtol=1e-6)


def test_hyperparameters_in_groups_of_groups_show_both_names_and_can_be_set():
    inner = gx.by_path({".*kernel": gx.sgd(gx.live(0.1))}, default=gx.sgd(0.2))
    tx = gx.by_path({"layers/.*": inner}, default=gx.sgd(gx.live(0.3)))
    state = tx.init(PARAMS)
    assert shown(state) == pytest.approx({"learning_rate": 0.3, "layers/.*/.*kernel/learning_rate": 0.1})
    state = gx.set_hyperparams(state, {"layers/.*/.*kernel/learning_rate": 1.0})
    updates, _ = tx.update(GRADS[0], state, PARAMS)
    np.testing.assert_allclose(leaves(updates)["layers/0/kernel"], -leaves(GRADS[0])["layers/0/kernel"])
    with pytest.raises(ValueError, match=r"overrides do not reach into by_path\(.*: put by_path into it"):
        gx.by_path({"head/.*": {"learning_rate": 0.0}}, default=gx.by_path({"embed": gx.sgd(0.1)}, gx.sgd(0.2)))


def test_describe_names_the_group_and_the_group_in_it():
    inner = gx.by_path({".*kernel": gx.sgd(0.1)}, default=gx.sgd(0.2))
    description = gx.describe(gx.by_path({"layers/.*": inner}, default=gx.sgd(0.3)), PARAMS, show=False)
    assert {leaf.path: leaf.group for leaf in description.leaves if leaf.path.startswith("layers/0")} == {
        "layers/0/bias": "layers/.*/default",
        "layers/0/kernel": "layers/.*/.*kernel",
    }


# Globs


@pytest.mark.parametrize(
    ("pattern", "matched", "missed"),
    [
        ("kernel", ["kernel"], ["a/kernel", "kernels", "kerne"]),
        ("*", ["a", "layer_0", ""], ["a/b"]),
        ("*/kernel", ["a/kernel", "layer_0/kernel"], ["kernel", "a/b/kernel"]),
        ("encoder/*/kernel", ["encoder/0/kernel"], ["encoder/0/1/kernel", "encoder/kernel"]),
        ("layer_*", ["layer_0", "layer_12", "layer_"], ["layer_0/kernel", "my_layer_0"]),
        ("*norm*/scale", ["layer_norm_1/scale", "norm/scale"], ["norm/a/scale", "norm"]),
        ("**", ["a", "a/b/c", ""], []),
        ("encoder/**", ["encoder/a", "encoder/a/b"], ["encoder", "decoder/encoder/a"]),
        ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"], ["a/mykernel", "mykernel", "kernel/a"]),
        ("a/**/b", ["a/b", "a/c/b", "a/c/d/b"], ["ab", "a/cb", "a"]),
        ("**bias", ["bias", "a/bias", "a/mybias"], ["bias/a"]),
        ("a**b", ["ab", "a/b", "a/x/b"], ["ba"]),
        ("layer_?", ["layer_0", "layer_x"], ["layer_", "layer_10", "layer_/"]),
        ("?/?", ["0/1"], ["0", "00/1"]),
        ("a.b", ["a.b"], ["aXb"]),
        ("mlp/~/linear_0/w", ["mlp/~/linear_0/w"], ["mlp/x/linear_0/w"]),
        ("w[0]", ["w[0]"], ["w0"]),
        ("a+b(c)|d^$\\", ["a+b(c)|d^$\\"], ["aab(c)", "d"]),
        ("", [""], ["a"]),
    ],
)
def test_a_glob_matches(pattern, matched, missed):
    expression = gx.glob(pattern)
    assert [path for path in (*matched, *missed) if expression.fullmatch(path)] == matched


def test_globs_are_keys_and_masks():
    tx = gx.by_path({gx.glob("layers/*/kernel"): gx.scale(2.0)}, default=gx.scale(1.0))
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    doubled = {path for path in PATHS if (leaves(updates)[path] == 2 * leaves(GRADS[0])[path]).all()}
    assert doubled == {"layers/0/kernel", "layers/1/kernel"}
    assert gx.glob("*/bias") == gx.glob("*/bias")
    assert gx.adamw(0.1, mask=gx.glob("**/kernel")) == gx.adamw(0.1, mask=gx.glob("**/kernel"))
