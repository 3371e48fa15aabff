"""The packages that hold a transformation or its state are driven for real, and lose nothing on the way."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("equinox")
pytest.importorskip("flax")
pytest.importorskip("haiku")
pytest.importorskip("orbax.checkpoint")

import equinox as eqx
import flax.serialization
import haiku as hk
import orbax.checkpoint as ocp
from flax import linen, nnx
from flax.training.train_state import TrainState

import gradxform as gx
from gradxform import catalog
from tests.support import chex
from tests.support.chex import assert_trees_all_close as assert_close

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
PARAMS = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.array([0.5, -0.5, 2.0])}
MASK = {"kernel": True, "bias": False}


OPTIMIZERS = {
    entry.name: functools.partial(
        entry.function, **({"matrices": ".*kernel", "other": gx.adam(1e-3)} if entry.sees == "matrix" else {})
    )
    for entry in catalog.OPTIMIZERS
    if next(iter(entry.arguments)) == "learning_rate"
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def gradients(like, steps=4, seed=1):
    """Different gradients for each step."""
    random = np.random.default_rng(seed)
    return [jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), p.dtype), like) for _ in range(steps)]


def walk(tx, params, grads, state=None):
    """The parameters and the state after a step per gradient."""
    state = tx.init(params) if state is None else state
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_identical(actual, expected):
    """Same structure, dtypes and bits; bfloat16 is float32 to chex."""
    chex.assert_trees_all_equal(actual, expected)
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)


@contextlib.contextmanager
def lenient():
    """Foreign code promotes and broadcasts, as JAX lets it by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# What consumers ask of a transformation


@every_optimizer
def test_it_is_an_optax_transformation(optimizer):
    tx = optimizer(0.1)
    assert isinstance(tx, optax.GradientTransformation)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    updates, state = update(updates=PARAMS, state=init(params=PARAMS), params=PARAMS, unknown_to_it=jnp.ones(()))
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(init(PARAMS))


@every_optimizer
def test_an_equal_optimizer_as_a_static_argument_is_not_traced_again(optimizer):
    traced = []

    @functools.partial(jax.jit, static_argnames="tx")
    def step(tx, grads, state, params):
        traced.append(tx)
        return tx.update(grads, state, params)

    for rate in (0.1, 0.1, 0.2):
        tx = optimizer(rate)
        step(tx, PARAMS, tx.init(PARAMS), PARAMS)
    assert len(traced) == 2, "the second is equal to the first, the third is not"
    assert optimizer(0.1) == optimizer(0.1)
    assert hash(optimizer(0.1)) == hash(optimizer(0.1))
    assert optimizer(0.1) != optimizer(0.2)


@every_optimizer
def test_the_second_step_is_not_traced_again(optimizer):
    tx = optimizer(gx.live(0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return gx.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for grads in gradients(PARAMS):
        params, state = step(params, gx.set_hyperparams(state, learning_rate=0.05), grads)


@every_optimizer
def test_the_state_is_named_tuples_and_dicts_of_arrays(optimizer):
    state = optimizer(gx.live(0.1)).init(PARAMS)
    assert isinstance(state, tuple)
    assert hasattr(state, "_fields")
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert leaf.size > 0, "Orbax refuses arrays without elements"
        assert not leaf.weak_type


@every_optimizer
def test_optax_finds_the_fields_of_the_state_once(optimizer):
    tx = optax.chain(optax.clip(1.0), optimizer(gx.live(0.1)))
    state = tx.init(PARAMS)
    names = {name for part in state for name in getattr(part, "_fields", ())}
    for name in names | {"count", "learning_rate"}:
        assert len(optax.tree_utils.tree_get_all_with_path(state, name)) == 1, name
    state = optax.tree_utils.tree_set(state, count=jnp.int32(41))
    state = tx.update(PARAMS, state, PARAMS)[1]
    assert optax.tree_utils.tree_get(state, "count") == 42


def test_the_moments_have_the_names_consumers_look_for():
    _, state = walk(gx.adamw(0.1), PARAMS, gradients(PARAMS))
    grads = gradients(PARAMS)
    assert optax.tree_utils.tree_get(state, "count") == len(grads)
    with lenient():
        theirs = walk(optax.adamw(0.1), PARAMS, grads)[1]
    for name in ("mu", "nu"):
        # both round a handful of times per step, in another order
        assert_close(optax.tree_utils.tree_get(state, name), optax.tree_utils.tree_get(theirs, name), rtol=1e-5)


@every_optimizer
def test_trackers_read_the_learning_rate_at_the_top_of_the_state(optimizer):
    schedule = optax.linear_schedule(0.5, 0.0, 5)
    stages = [gx.clip_by_global_norm(1.0), optimizer(schedule), optax.identity()]
    if "schedule_free" in optimizer.func.__name__:  # which must be the last
        stages = [*stages[::2], stages[1]]
    for tx in (optimizer(schedule), gx.chain(*stages)):
        state = tx.init(PARAMS)
        assert state.hyperparams["learning_rate"] == 0.5
        for expected in (0.5, 0.4):
            _, state = tx.update(PARAMS, state, PARAMS)
            np.testing.assert_allclose(state.hyperparams["learning_rate"], expected, rtol=1e-6)  # a float32
    accumulated = gx.accumulate(optimizer(gx.live(0.25)), every=2).init(PARAMS)
    assert accumulated.hyperparams["learning_rate"] == 0.25


@every_optimizer
def test_transformation_and_state_pickle(optimizer):
    tx, grads = optimizer(0.1), gradients(PARAMS)
    params, state = walk(tx, PARAMS, grads)
    tx_again, state_again = pickle.loads(pickle.dumps((tx, state)))
    assert tx_again == tx
    assert_identical(walk(tx_again, params, grads, state_again), walk(tx, params, grads, state))


def test_a_pickled_live_value_stays_live():
    tx = gx.accumulate(gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(gx.live(0.1))), every=2)
    tx, state = pickle.loads(pickle.dumps((tx, tx.init(PARAMS))))
    state = gx.set_hyperparams(state, learning_rate=0.5)
    _, state = walk(tx, PARAMS, gradients(PARAMS), state)
    assert state.hyperparams["learning_rate"] == 0.5
    with pytest.raises(ValueError, match="must be in"):
        gx.set_hyperparams(state, learning_rate=-1.0)


# What leaves `init` and `update` take


@every_optimizer
def test_init_takes_shapes_in_place_of_arrays(optimizer):
    tx = optimizer(0.1)
    shapes = jax.eval_shape(lambda: PARAMS)
    state, expected = tx.init(shapes), tx.init(PARAMS)
    for field in {"start", "z"} & set(state._fields):  # which start as the parameters: of shapes they are shapes
        assert getattr(state, field) == shapes
        state, expected = (each._replace(**{field: None}) for each in (state, expected))
    assert_identical(state, expected)
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tx.init(PARAMS))
    assert jax.eval_shape(tx.init, shapes) == expected


@every_optimizer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_leaves(optimizer, dtype):
    tx = optimizer(0.1)
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), PARAMS)
    on_device = jax.tree.map(jnp.asarray, arrays)
    assert_identical(tx.init(arrays), tx.init(on_device))
    assert_identical(tx.update(arrays, tx.init(arrays), arrays), tx.update(on_device, tx.init(on_device), on_device))


@every_optimizer
def test_none_leaves_stay_none(optimizer):
    tx = gx.chain(gx.clip_by_global_norm(1.0), optimizer(0.1))
    with_none = {"model": PARAMS, "activation": None}
    updates, state = tx.update(with_none, tx.init(with_none), with_none)
    expected, expected_state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert updates["activation"] is None
    assert_identical(updates["model"], expected)
    assert_identical(jax.tree.leaves(state), jax.tree.leaves(expected_state))


@every_optimizer
@pytest.mark.parametrize("nothing", [(), {}, [None]], ids=str)
def test_trees_without_leaves(optimizer, nothing):
    optimizer = optimizer(gx.live(0.1))
    for tx in (optimizer, gx.chain(gx.clip_by_global_norm(1.0), optimizer), gx.accumulate(optimizer, 2)):
        updates, state = tx.update(nothing, tx.init(nothing), nothing)
        assert updates == nothing
        assert state.hyperparams["learning_rate"] == jnp.float32(0.1)


# Flax Linen


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.tanh(linen.Dense(8)(x)))


@jax.jit
def linen_step(train_state):
    def loss(params):
        return jnp.mean(train_state.apply_fn({"params": params}, X) ** 2)

    return train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))


LINEN_APPLY = LinenModel().apply


def linen_start(tx, seed=0):
    return TrainState.create(apply_fn=LINEN_APPLY, params=LinenModel().init(jax.random.key(seed), X)["params"], tx=tx)


@pytest.mark.parametrize(
    "tx",
    [
        gx.adamw(gx.live(1e-2)),
        gx.accumulate(gx.chain(gx.clip_by_global_norm(1.0), gx.adam(optax.linear_schedule(1e-2, 0.0, 9))), every=2),
        gx.chain(optax.trace(0.9), gx.rmsprop(gx.live(1e-2), centered=True, momentum=0.9)),
    ],
    ids=["live", "accumulated", "with optax"],
)
def test_linen_train_state_continues_from_bytes(tx):
    with lenient():
        train_state = linen_step(linen_step(linen_step(linen_start(tx))))
        saved = flax.serialization.to_bytes(train_state)
        restored = flax.serialization.from_bytes(linen_start(tx, seed=1), saved)
        restored = jax.tree.map(jnp.asarray, restored)
        assert_identical(restored, train_state)
        assert_identical(linen_step(linen_step(restored)), linen_step(linen_step(train_state)))
    assert restored.opt_state.hyperparams["learning_rate"] == train_state.opt_state.hyperparams["learning_rate"]


def test_linen_serialises_the_state_under_its_field_names():
    saved = flax.serialization.to_state_dict(gx.adamw(gx.live(0.1), b1=lambda step: 0.9).init(PARAMS))
    assert set(saved) == {"count", "values", "mu", "nu"}
    assert set(saved["values"]) == {"learning_rate", "scheduled/b1"}
    assert set(saved["mu"]) == set(PARAMS)


def test_linen_train_states_with_equal_optimizers_are_traced_once():
    traced = []

    @jax.jit
    def step(train_state):
        traced.append(train_state.tx)
        return train_state.apply_gradients(grads=train_state.params)

    for rate in (0.1, 0.1, 0.2):
        step(linen_start(gx.adamw(rate)))
    assert traced == [gx.adamw(0.1), gx.adamw(0.2)]


def test_linen_paths_are_those_of_its_params():
    with lenient():
        train_state = linen_start(gx.chain(gx.add_decoupled_weight_decay(1.0, mask=r"Dense_\d/kernel"), gx.scale(-1.0)))
        stepped = train_state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, train_state.params))
    for name, layer in stepped.params.items():
        np.testing.assert_array_equal(layer["kernel"], 0)
        np.testing.assert_array_equal(layer["bias"], train_state.params[name]["bias"])


# Flax NNX


class NnxModel(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(4, 8, rngs=nnx.Rngs(0), bias_init=nnx.initializers.ones_init())
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))  # its statistics are no parameters

    def __call__(self, x):
        return self.norm(self.hidden(x)).sum(axis=1)


@nnx.jit
@nnx.grad
def nnx_gradient(model):
    return jnp.mean(jnp.square(model(X) - 1))


def nnx_arrays(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_nnx_optimizer_walks_as_the_pair_does():
    model, tx = NnxModel(), gx.chain(optax.clip(0.5), gx.adamw(1e-2))
    params, grads = nnx_arrays(model), []
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with lenient():
        for _ in range(3):
            gradient = nnx_gradient(model)
            grads.append(nnx.to_pure_dict(gradient))
            optimizer.update(model, gradient)
        expected, state = walk(tx, params, grads)
    assert_identical(nnx_arrays(model), expected)
    assert_identical(jax.tree.leaves(optimizer.opt_state), jax.tree.leaves(state))


def test_nnx_optimizer_passes_extra_arguments_on():
    model = NnxModel()
    tx = gx.chain(gx.sgd(1e-2), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with lenient():
        for _ in range(2):  # the second value is no better than the first
            optimizer.update(model, nnx_gradient(model), value=jnp.float32(1.0))
    assert jax.tree.leaves(optimizer.opt_state.inner.scale) == [0.5]


def test_nnx_live_value_is_set_without_tracing_again():
    model, traced = NnxModel(), []
    optimizer = nnx.Optimizer(model, gx.sgd(gx.live(0.5)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        traced.append(model)
        optimizer.update(model, nnx_gradient(model))

    with lenient():
        step(model, optimizer)
        before = nnx_arrays(model)
        optimizer.opt_state.hyperparams["learning_rate"][...] = jnp.float32(0.0)
        step(model, optimizer)
        assert_identical(nnx_arrays(model), before)
        optimizer.opt_state = gx.set_hyperparams(optimizer.opt_state, learning_rate=0.5)
        step(model, optimizer)
        assert (nnx_arrays(model)["hidden"]["kernel"] != before["hidden"]["kernel"]).any()
    assert len(traced) == 1


@pytest.mark.parametrize("mask", ["hidden/kernel", lambda path, leaf: path == "hidden/kernel"], ids=["pattern", "call"])
def test_nnx_paths_are_those_of_its_attributes(mask):
    model = NnxModel()
    tx = gx.chain(gx.add_decoupled_weight_decay(1.0, mask=mask), gx.scale(-1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(model.hidden.kernel[...], 0)
    np.testing.assert_array_equal(model.hidden.bias[...], 1)


# Haiku


def test_haiku_trains_the_part_that_is_not_frozen():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 1])(x)))
    tx = gx.chain(gx.add_decoupled_weight_decay(1.0, mask=r"mlp/~/linear_1/w"), gx.scale(-1.0))
    with lenient():
        params = model.init(jax.random.key(0), X)
    frozen, trained = hk.data_structures.partition(lambda module, name, value: module.endswith("linear_0"), params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trained), tx.init(trained), trained)
    stepped = hk.data_structures.merge(frozen, gx.apply_updates(trained, updates))
    assert jax.tree.structure(stepped) == jax.tree.structure(params)
    np.testing.assert_array_equal(stepped["mlp/~/linear_1"]["w"], 0)
    assert_identical(stepped["mlp/~/linear_0"], params["mlp/~/linear_0"])


# Equinox


class EquinoxModel(eqx.Module):
    layers: list[eqx.nn.Linear]
    activation: Any = jnp.tanh
    steps: int = 3

    def __call__(self, x):
        return self.layers[1](self.activation(self.layers[0](x)))


@eqx.filter_jit
def equinox_step(model, state, tx):
    grads = eqx.filter_grad(lambda model: jnp.mean(jnp.square(jax.vmap(model)(X))))(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state


def equinox_start(tx, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    model = EquinoxModel([eqx.nn.Linear(4, 8, key=keys[0]), eqx.nn.Linear(8, 1, key=keys[1])])
    return model, tx.init(eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.parametrize(
    "tx",
    [gx.adamw(gx.live(1e-2), mask="layers/./weight"), gx.accumulate(gx.momentum(1e-2), every=2)],
    ids=["adamw", "accumulated"],
)
def test_equinox_continues_from_its_file(tx, tmp_path):
    with lenient():
        model, state = equinox_start(tx)
        for _ in range(3):
            model, state = equinox_step(model, state, tx)
        eqx.tree_serialise_leaves(tmp_path / "training.eqx", (model, state))
        restored = eqx.tree_deserialise_leaves(tmp_path / "training.eqx", equinox_start(tx, seed=1))
        continued = [equinox_step(*start, tx) for start in ((model, state), restored)]
    assert eqx.tree_equal(*continued)


# Orbax


def test_orbax_restores_what_it_saved(tmp_path):
    tx, grads = gx.chain(optax.trace(0.9), gx.adamw(gx.live(0.1))), gradients(PARAMS)
    params, state = walk(tx, PARAMS, grads)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    assert_identical(restored, state)
    restored, state = (gx.set_hyperparams(some, learning_rate=0.05) for some in (restored, state))
    assert_identical(walk(tx, params, grads, restored), walk(tx, params, grads, state))


# optax's wrappers around ours


WRAPPERS = {
    "chain": optax.chain,
    "named_chain": lambda tx: optax.named_chain(("only", tx)),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=1),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "flatten": optax.flatten,
    "with_extra_args_support": optax.with_extra_args_support,
    "gx.chain": lambda tx: gx.chain(optax.identity(), tx, optax.identity()),
    "gx.accumulate": lambda tx: gx.accumulate(tx, every=1),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapper_that_changes_nothing_changes_no_bit(wrap):
    tx, grads = gx.adamw(optax.linear_schedule(0.5, 0.0, 5)), gradients(PARAMS)
    with lenient():
        params, state = walk(wrap(tx), PARAMS, grads)
    expected, expected_state = walk(tx, PARAMS, grads)
    assert_identical(params, expected)
    assert gx.get_hyperparams(state) == gx.get_hyperparams(expected_state)


@every_optimizer
def test_masked_leaves_have_no_state_and_pass_through(optimizer):
    tx, grads = optax.masked(optimizer(0.1), MASK), gradients(PARAMS, steps=1)[0]
    state = tx.init(PARAMS)
    updates, state = tx.update(grads, state, PARAMS)
    for moment in state.inner_state[1:]:
        assert not isinstance(moment, dict) or moment["bias"] == optax.MaskedNode()
    assert_identical(updates["bias"], grads["bias"])
    kernel = {"kernel": PARAMS["kernel"]}
    expected, _ = optimizer(0.1).update({"kernel": grads["kernel"]}, optimizer(0.1).init(kernel), kernel)
    assert_identical(updates["kernel"], expected["kernel"])


def test_partition_gives_each_group_its_own():
    labels = {"kernel": "fast", "bias": "slow"}
    tx = optax.partition({"fast": gx.sgd(gx.live(0.5)), "slow": gx.momentum(gx.live(0.1))}, labels)
    grads = gradients(PARAMS)
    params, state = walk(tx, PARAMS, grads)
    for label, alone in (("fast", gx.sgd(0.5)), ("slow", gx.momentum(0.1))):
        name = {label: name for name, label in labels.items()}[label]
        expected, _ = walk(alone, PARAMS[name], [grad[name] for grad in grads])
        assert_identical(params[name], expected)
    rates = gx.get_hyperparams(state)
    assert sorted(np.asarray(rate).item() for rate in rates.values()) == [np.float32(0.1), 0.5]


def test_multi_steps_agrees_with_accumulate():
    grads = gradients(PARAMS, steps=6)
    with lenient():
        params, _ = walk(optax.MultiSteps(gx.adamw(0.1), every_k_schedule=3).gradient_transformation(), PARAMS, grads)
    expected, _ = walk(gx.accumulate(gx.adamw(0.1), every=3), PARAMS, grads)
    # a mean of three is rounded in another order; Adam turns that into a relative error of its steps of 0.1
    assert_close(params, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.adamw, gx.adamw], ids=["optax", "gx"])
def test_tree_map_params_tells_moments_from_the_rest(optimizer):
    tx = gx.chain(optax.trace(0.9), optimizer(0.1))
    state = optax.tree_map_params(
        tx, lambda moment, param: (moment.shape, param.shape), tx.init(PARAMS), PARAMS,
        transform_non_params=lambda leaf: "other",
    )  # fmt: skip
    twice = {name: (leaf.shape, leaf.shape) for name, leaf in PARAMS.items()}
    assert optax.tree_utils.tree_get(state, "mu") == twice
    assert optax.tree_utils.tree_get(state, "nu") == twice
    assert optax.tree_utils.tree_get(state, "trace") == twice
    assert state.count == "other"


@every_optimizer
def test_tree_map_params_changes_every_moment_and_nothing_else(optimizer):
    tx = gx.accumulate(optimizer(gx.live(0.1)), every=2)
    state = tx.init(PARAMS)
    marked = optax.tree_map_params(tx, lambda moment: "moment", state, transform_non_params=lambda leaf: "other")
    assert marked.pending == "other"
    assert marked.mean == jax.tree.map(lambda leaf: "moment", PARAMS)
    assert marked.inner.count == "other"
    assert marked.inner.hyperparams["learning_rate"] == "other"
    assert set(marked.inner.hyperparams.values()) == {"other"}
    for kept, mark in zip(state.inner[2:], marked.inner[2:], strict=True):
        # a seed, a distance and inner products are no moments of a leaf
        assert set(jax.tree.leaves(mark)) <= {"moment" if isinstance(kept, dict) else "other"}
    assert jax.tree.structure(marked.inner[2:]) == jax.tree.structure(state.inner[2:])


@every_optimizer
def test_apply_updates_is_optax_s(optimizer):
    tx = optimizer(0.1)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_identical(gx.apply_updates(PARAMS, updates), optax.apply_updates(PARAMS, updates))


# optax.inject_hyperparams, which makes arrays of all numbers and schedules of all callables


# Sizes, and counts of products, pairs and steps, which compile anew; and what noise starts from.
WHOLE_NUMBERS = {"steps", "max_size", "every", "min_dim_size_to_factor", "decay_offset", "memory_size", "key"}


@every_optimizer
def test_injected_numbers_may_change_while_compiled(optimizer):
    static = WHOLE_NUMBERS & inspect.signature(optimizer).parameters.keys()
    tx = optax.inject_hyperparams(optimizer, static_args=static)(learning_rate=0.1)
    grads = gradients(PARAMS)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return gx.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for grad, rate in zip(grads, (0.1, 0.2, 0.3, 0.4), strict=True):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        params, state = step(params, state, grad)
    live = optimizer(gx.live(0.1))
    expected, live_state = PARAMS, live.init(PARAMS)
    for grad, rate in zip(grads, (0.1, 0.2, 0.3, 0.4), strict=True):
        live_state = gx.set_hyperparams(live_state, learning_rate=rate)
        expected, live_state = walk(live, expected, [grad], live_state)
    # injected betas and eps are float32 arrays, ours are Python floats: 1 - 0.999 differs by 2e-5 of itself
    assert_close(params, expected, rtol=0, atol=2e-5)


def test_injected_schedule_shows_and_acts():
    schedule = optax.linear_schedule(0.5, 0.0, 5)
    tx, grads = optax.inject_hyperparams(gx.sgd)(learning_rate=schedule), gradients(PARAMS)
    params, state = walk(tx, PARAMS, grads)
    expected, expected_state = walk(gx.sgd(schedule), PARAMS, grads)
    # the schedule is evaluated in float32 by both, once inside jit
    assert_close(params, expected, rtol=0, atol=1e-6)
    assert_close(state.hyperparams["learning_rate"], expected_state.hyperparams["learning_rate"], rtol=1e-6)


def test_injected_bfloat16_betas_are_refused():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(TypeError, match=r"b1 arrives as bfloat16, which rounds 0\.999 to 1.*hyperparam_dtype"):
        optax.inject_hyperparams(gx.adamw)(learning_rate=0.1).init(params)
    injected = optax.inject_hyperparams(gx.adamw, hyperparam_dtype=jnp.float32)(learning_rate=0.1)
    grads = gradients(params)
    actual, expected = walk(injected, params, grads)[0], walk(gx.adamw(0.1), params, grads)[0]
    # an ulp of bfloat16 each step, where the float32 betas tip the rounding
    assert_close(*(jax.tree.map(jnp.float32, tree) for tree in (actual, expected)), rtol=len(grads) * 2**-8)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda path, leaf: leaf.ndim > 1, "missing 1 required positional argument: 'leaf'"),
        (lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params), "mask"),
    ],
    ids=["gradxform's", "optax's"],
)
def test_an_injected_callable_mask_does_not_change_what_decays_in_silence(mask, message):
    """`inject_hyperparams` calls it with the step count, as if it were a schedule; optax's kind then says False."""
    with pytest.raises((TypeError, ValueError), match=message):
        optax.inject_hyperparams(gx.adamw)(learning_rate=0.1, mask=mask).init(PARAMS)


@pytest.mark.parametrize("mask", ["kernel", MASK, lambda path, leaf: leaf.ndim > 1], ids=["pattern", "tree", "call"])
def test_an_injected_mask_is_right_where_optax_leaves_it_alone(mask):
    tx = optax.inject_hyperparams(gx.adamw, static_args="mask")(learning_rate=1.0, weight_decay=1.0, mask=mask)
    params, _ = walk(tx, PARAMS, [jax.tree.map(jnp.zeros_like, PARAMS)])
    np.testing.assert_array_equal(params["kernel"], 0)
    np.testing.assert_array_equal(params["bias"], PARAMS["bias"])


# Foreign transformations in ours, and extra arguments through ours


BETAS = {"b1": 0.5, "b2": 0.75}  # exact in float32, so that 1 - b2**t is not what the two libraries differ by
STAGES = (
    (gx.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)),
    (gx.scale_by_adam(**BETAS), optax.scale_by_adam(**BETAS)),
    (gx.add_decoupled_weight_decay(0.1), optax.add_decayed_weights(0.1)),
    (gx.scale_by_learning_rate(0.1), optax.scale_by_learning_rate(0.1)),
)


@pytest.mark.parametrize("chain", [gx.chain, optax.chain], ids=["gx", "optax"])
@pytest.mark.parametrize("whose", list(itertools.product(["gx", "optax"], repeat=4)), ids=" ".join)
def test_stages_of_both_libraries_mix(whose, chain):
    tx = chain(*(ours if which == "gx" else theirs for which, (ours, theirs) in zip(whose, STAGES, strict=True)))
    grads = gradients(PARAMS)
    with lenient():
        params, _ = walk(tx, PARAMS, grads)
        expected, _ = walk(optax.chain(*(theirs for _, theirs in STAGES)), PARAMS, grads)
    # four steps, each rounded a dozen times at 2**-24 of numbers below 8
    assert_close(params, expected, rtol=0, atol=5e-6)


PLATEAU = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)


@pytest.mark.parametrize(
    "tx",
    [
        gx.chain(gx.sgd(0.1), PLATEAU),
        gx.chain(gx.chain(gx.identity(), PLATEAU), gx.sgd(0.1)),
        optax.chain(gx.chain(PLATEAU), gx.sgd(0.1)),
        optax.masked(gx.chain(PLATEAU, gx.sgd(0.1)), {"kernel": True, "bias": True}),
        gx.accumulate(gx.chain(PLATEAU, gx.sgd(0.1)), every=1),
        gx.accumulate(optax.chain(gx.sgd(0.1), PLATEAU), every=1),
    ],
    ids=["last", "nested", "optax.chain", "optax.masked", "accumulate", "accumulate of optax.chain"],
)
def test_value_reaches_a_foreign_stage(tx):
    state = tx.init(PARAMS)
    with lenient():
        for _ in range(2):  # the second value is no better than the first
            updates, state = tx.update(PARAMS, state, PARAMS, value=jnp.float32(1.0))
    assert optax.tree_utils.tree_get(state, "scale") == 0.5
    assert_close(updates, jax.tree.map(lambda leaf: -0.05 * leaf, PARAMS), rtol=1e-6)  # two float32 products
    with pytest.raises(TypeError, match="value"):
        tx.update(PARAMS, state, PARAMS)


def test_line_search_finds_the_step_it_finds_in_optax():
    def loss(params):
        return jnp.sum(params["kernel"] ** 4) + jnp.sum(params["bias"] ** 2)

    def descend(tx):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(4):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
            params = optax.apply_updates(params, updates)
        return params

    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
    with lenient():
        actual, expected = descend(gx.chain(gx.sgd(1.0), search)), descend(optax.chain(optax.sgd(1.0), search))
    assert loss(actual) < loss(PARAMS) / 5
    assert_close(actual, expected, rtol=1e-6)  # the same products, in another order


class CountState(NamedTuple):
    count: jax.Array


def test_a_plain_pair_of_functions_is_a_stage():
    def init(params):
        return CountState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        return jax.tree.map(lambda leaf: 2 * leaf, updates), CountState(state.count + 1)

    tx = gx.chain(gx.scale(0.5), (init, update), gx.scale_by_learning_rate(1.0))
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.ones(()))
    assert_identical(updates, jax.tree.map(jnp.negative, PARAMS))
    assert state.inner.count == 1


# What elsewhere trains wrongly in silence


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(3, bool), np.arange(3)], ids=["int", "bool", "numpy int"])
@every_optimizer
def test_whole_numbers_are_not_trained(optimizer, leaf):
    params = {"kernel": jnp.ones((2, 1)), "table": leaf}
    with pytest.raises(TypeError, match=r"params\['table'\] is (int|bool).*only floating-point or complex"):
        optimizer(0.1).init(params)
    floats = jax.tree.map(jnp.float32, params)
    with pytest.raises(TypeError, match=r"updates\['table'\] is (int|bool).*only floating-point or complex"):
        optimizer(0.1).update(params, optimizer(0.1).init(floats), floats)
    with pytest.raises(TypeError, match=r"\['table'\] is (int|bool)"):
        gx.apply_updates(params, floats)


@every_optimizer
def test_an_update_does_not_change_the_shape_of_its_parameter(optimizer):
    params, grads = {"kernel": jnp.ones((1, 3))}, {"kernel": jnp.ones((2, 3))}
    tx = optimizer(0.1)
    with pytest.raises(ValueError, match=r"updates\['kernel'\] has shape \(2, 3\), params\['kernel'\] has \(1, 3\)"):
        tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"updates\['kernel'\] has shape \(2, 3\), params\['kernel'\] has \(1, 3\)"):
        gx.apply_updates(params, grads)


def global_norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))


def test_the_norm_of_two_thousand_bfloat16_leaves():
    random = np.random.default_rng(0)
    grads = list(jnp.asarray(random.normal(size=(2000, 3)) * 0.37, jnp.bfloat16))
    assert 28 < global_norm(grads) < 29  # added up in bfloat16, the squares get stuck at a norm of 20.1
    tx = gx.clip_by_global_norm(1.0)
    clipped, _ = tx.update(grads, tx.init(grads))
    # every clipped element is rounded to bfloat16 once, up or down by 2**-9 at most
    np.testing.assert_allclose(global_norm(clipped), 1, rtol=2**-9)


def test_a_float16_norm_does_not_overflow():
    grads = {"kernel": jnp.full((40, 25), 1000.0, jnp.float16)}  # norm 31623; one square is beyond float16
    tx = gx.clip_by_global_norm(1.0)
    clipped, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(global_norm(clipped), 1, rtol=2**-11)  # one rounding to float16


@every_optimizer
def test_a_float16_gradient_of_300_moves_as_a_float32_one_does(optimizer):
    known = {"d0": 1.0} if "d0" in inspect.signature(optimizer).parameters else {}  # else a first step of 10⁻⁶·α
    tx = optimizer(2.0**-10, **known)
    params = {"kernel": jnp.ones((2, 3), jnp.float16)}
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 300.0), params)  # its square is beyond float16
    wide_params, wide_grads = (jax.tree.map(jnp.float32, tree) for tree in (params, grads))
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = tx.update(wide_grads, tx.init(wide_params), wide_params)
    assert (updates["kernel"] < 0).all()
    # one rounding to float16, below its normal range to a fixed 2**-25
    assert_close(jax.tree.map(jnp.float32, updates), expected, rtol=2**-11, atol=2**-25)


def test_a_bfloat16_parameter_has_a_second_moment_that_keeps_moving():
    tx = gx.adam(0.0)
    params = {"kernel": jnp.zeros(3, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    state, _ = jax.lax.scan(lambda state, _: (tx.update(grads, state, params)[1], None), tx.init(params), length=3000)
    # v = 1 - 0.999**t; in bfloat16 it would stick at 0.5. 3000 float32 roundings of a number below 1
    np.testing.assert_allclose(state.nu["kernel"], 1 - 0.999**3000, rtol=0, atol=3000 * 2**-24)
