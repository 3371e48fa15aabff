"""On eight devices a step is the step of one device, and every array stays where its parameter is.

pytest runs this file once as a script, in a process whose CPU poses as eight devices; one test per check reads how
it went.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradxform as gx
from tests.support import chex
from tests.support.eight_devices import judge, outcomes_of, report
from tests.support.tables import ANY_LEAF, built, entry_of
from tests.support.trees import LOSS

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# A small network, its batch, and where they lie


SPECS = {"rows": P("x", None), "columns": P(None, "x"), "bias": P()}
EVERYWHERE = jax.tree.map(lambda _: P(), SPECS)
OPTIMIZERS = {text: built(text, α=0.01) for entry in ANY_LEAF for text in entry.examples}
# shards draw numbers of their own
ELEMENTWISE = [tx for text, tx in OPTIMIZERS.items() if entry_of(text).sees == "element" and "noisy" not in text]
# this eps keeps Adam from making a whole step of the rounding errors of a gradient near zero
CLIPPED_ADAMW = gx.chain(gx.clip_by_global_norm(0.1), gx.adamw(0.01, eps=1e-4))
STEPS = 4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def start():
    return {"rows": draw(0, 16, 24) / 4, "columns": draw(1, 24, 8) / 5, "bias": jnp.zeros((1, 24))}


BATCH = (draw(2, 32, 16), draw(3, 32, 8))


def loss(params, batch):
    hidden = jnp.tanh(batch[0] @ params["rows"] + params["bias"])
    return jnp.mean(jnp.square(hidden @ params["columns"] - batch[1]))


def step_of(tx):
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params, value=LOSS)
        return gx.apply_updates(params, updates), state

    return step


def train(step, params, state, batch=BATCH, steps=STEPS):
    for _ in range(steps):
        params, state = step(params, state, batch)
    return params, state


@functools.cache
def on_one_device(tx):
    return train(jax.jit(step_of(tx)), start(), tx.init(start()))


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("x",), axis_types=(axis_type,))


def place(tree, specs, axis_type=AxisType.Auto):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh(axis_type), spec), specs))


def moments(state):
    """The fields of a state that are trees like the parameters."""
    fields = [field for field in state if isinstance(field, dict) and field.keys() == SPECS.keys()]
    return fields + [one for field in state if hasattr(field, "_fields") for one in moments(field)]


def assert_same_walk(actual, expected):
    """Equal but for sums over the batch and over the leaves, which eight devices add up in another order."""

    def same(one, other):
        # a few float32 roundings of sums of some 300 numbers, then of squares, in units of the array's largest number
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())

    jax.tree.map(same, actual, expected)


def assert_placed(tree, specs):
    for name, leaf in tree.items():
        expected = NamedSharding(mesh(), specs[name])
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, leaf.sharding)


# Arrays that are sharded, and a compiler that divides the work


@check
def a_jitted_step_is_that_of_one_device():
    params = place(start(), SPECS)
    batch = place(BATCH, (P("x"), P("x")))
    trained = train(jax.jit(step_of(CLIPPED_ADAMW)), params, CLIPPED_ADAMW.init(params), batch)
    assert_same_walk(trained, on_one_device(CLIPPED_ADAMW))
    assert_placed(trained[0], SPECS)


def sorted_in_rows_of_three(update, state, param, step):
    """A user's own rule, which does not say how its reshape is divided."""
    return jnp.sort(update.reshape(-1, 3), axis=0).reshape(update.shape), state


def largest(groups, dtype):
    """Of groups of leaves, which does not say how its reshape is divided either."""
    found = [jnp.max(jnp.stack([jnp.abs(leaf.reshape(-1)) for leaf in group])) for group in groups]
    return {"largest": jnp.stack(found).astype(dtype)}


LARGEST = gx.Measure(of=lambda leaf: {"largest": largest([[leaf]], leaf.dtype)["largest"][0]}, joint=largest)


TYPED = {"rows": P("x", None), "columns": P(None, "x"), "whole": P()}
ON_TYPED_MESHES = {
    "guarded and observed": gx.observe(gx.skip_nonfinite(gx.skip_spikes(CLIPPED_ADAMW)), of="all"),
    "accumulated": gx.accumulate(gx.adamw(0.01), every=1),
    "matrices": gx.normuon(0.01, ".*", steps=1),
    "matrices together": gx.muon(0.01, ".*", batched=True, method="gram", steps=1),
    "in blocks": gx.quantize_state(gx.adamw(0.01), "companded8", min_size=256, rounding="nearest"),
    "another library's in groups": gx.quantize_state(optax.sgd(0.01, momentum=0.9), "companded8", min_size=256),
    "compensated": gx.compensated(gx.sgd(0.01), "int8"),
    "each leaf by its norm, then sorted": gx.chain(
        gx.clip_by_leaf_norm(0.1), gx.clip_by_param_norm(0.1), gx.lift(None, sorted_in_rows_of_three)
    ),
    "by the largest of all": gx.lift(
        None,
        lambda update, state, param, step: (update / step.all, state),
        constructor=largest,
        measure=LARGEST,
        gather=lambda measured, step: {"all": jnp.max(measured["largest"])},
    ),
}


@check
def a_step_on_a_mesh_that_types_show_is_that_of_one_device():
    values = {name: draw(seed, 16, 48) for seed, name in enumerate(TYPED)}
    for name, tx in ON_TYPED_MESHES.items():
        dtype = jnp.bfloat16 if name == "compensated" else jnp.float32
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), values)
        grads = jax.tree.map(jnp.cos, params)
        expected = jax.jit(functools.partial(gx.step, tx))(grads, tx.init(params), params)[0]
        there = [place(tree, TYPED, AxisType.Explicit) for tree in (grads, params)]
        state = tx.init(there[1])
        updates, _ = jax.eval_shape(tx.update, there[0], state, there[1])
        new, after = jax.jit(functools.partial(gx.step, tx))(there[0], state, there[1])
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state), name
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, there[1]), name
        for key, leaf in updates.items():
            assert leaf.sharding.spec == jax.typeof(there[1][key]).sharding.spec, (name, key)
        for key, leaf in new.items():
            # where float32 rounds otherwise a few numbers get the next code or the next number of bfloat16
            same = np.isclose(leaf.astype(np.float32), expected[key].astype(np.float32), rtol=1e-6, atol=2e-6)
            assert same.mean() > 0.999, (name, key)


@check
def an_update_on_an_explicit_mesh_is_that_of_one_device():
    tx, params = CLIPPED_ADAMW, start()
    grads = jax.grad(loss)(params, BATCH)
    expected = tx.update(grads, tx.init(params), params)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params, grads = (place(tree, SPECS, AxisType.Explicit) for tree in (params, grads))
        actual = jax.jit(tx.update)(grads, tx.init(params), params)
    for tree in (actual[0], *moments(actual[1])):
        assert_placed(tree, SPECS)
    assert_same_walk(actual, expected)


@check
def init_compiled_on_a_mesh_puts_moments_where_parameters_are():
    for axis_type, named in itertools.product((AxisType.Explicit, AxisType.Auto), (False, True)):
        params = place(start(), SPECS, axis_type)
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        with jax.set_mesh(mesh(axis_type)) if named else contextlib.nullcontext():
            for tx, given in (
                (CLIPPED_ADAMW, params),
                (gx.accumulate(CLIPPED_ADAMW, every=2), params),
                (gx.compensated(CLIPPED_ADAMW), narrow),
            ):
                found = moments(jax.jit(tx.init)(given))
                assert found
                for moment in found:
                    assert_placed(moment, SPECS)


@check
def init_puts_every_moment_where_its_parameter_is():
    params = place(start(), SPECS)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    for name, optimizer in OPTIMIZERS.items():
        tx = gx.accumulate(gx.chain(gx.clip_by_global_norm(1.0), optimizer), every=2)
        for given in (params, shapes):
            found = moments(tx.init(given))
            assert len(found) == 1 + len(moments(optimizer.init(start()))), name
            for moment in found:
                whole = {
                    name: leaf for name, leaf in moment.items() if getattr(leaf, "shape", None) == params[name].shape
                }
                assert_placed(whole, SPECS)
                for leaf in jax.tree.leaves(moment):  # what goes along some axes of its parameter only
                    assert len(leaf.sharding.device_set) == 8, name


@check
def a_donated_step_leaves_everything_where_it_is():
    params, batch = place(start(), SPECS), place(BATCH, (P("x"), P("x")))
    given = params, CLIPPED_ADAMW.init(params)
    kept = jax.jit(step_of(CLIPPED_ADAMW))(*given, batch)
    params, state = jax.jit(step_of(CLIPPED_ADAMW), donate_argnums=(0, 1))(*given, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given[0], moments(given[1]))))
    for tree in (params, *moments(state)):
        assert_placed(tree, SPECS)
    chex.assert_trees_all_equal((params, state), kept)


@check
def steps_outside_jit_leave_everything_where_it_is():
    params = place(start() | {"columns": start()["columns"].astype(jnp.bfloat16)}, SPECS)
    tx = gx.accumulate(CLIPPED_ADAMW, every=2)
    for update in (jax.jit(tx.update), tx.update):
        state = tx.init(params)
        for _ in range(2):
            updates, state = update(params, state, params)
        for tree in (updates, *moments(state)):
            assert_placed(tree, SPECS)


@check
def moments_may_be_divided_where_parameters_are_not():
    params, batch = place(start(), EVERYWHERE), place(BATCH, (P("x"), P("x")))
    divided = {name: NamedSharding(mesh(), spec) for name, spec in SPECS.items()}
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=divided[name]) for name, leaf in params.items()
    }
    state = CLIPPED_ADAMW.init(shapes)
    everywhere = NamedSharding(mesh(), P())
    wanted = optax.tree_map_params(
        CLIPPED_ADAMW, lambda _, sharding: sharding, state, divided, transform_non_params=lambda _: everywhere
    )
    step = jax.jit(step_of(CLIPPED_ADAMW), out_shardings=(everywhere, wanted))
    params, state = train(step, params, state, batch)
    for moment in moments(state):
        assert_placed(moment, SPECS)
    assert_same_walk((params, state), on_one_device(CLIPPED_ADAMW))


@check
def training_continues_from_a_checkpoint_of_divided_arrays():
    ocp = pytest.importorskip("orbax.checkpoint")
    params, batch = place(start(), SPECS), place(BATCH, (P("x"), P("x")))
    step = jax.jit(step_of(CLIPPED_ADAMW))
    saved = train(step, params, CLIPPED_ADAMW.init(params), batch, steps=STEPS // 2)
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), saved)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "state", saved)
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(pathlib.Path(folder) / "state", template)
    for tree in (params, *moments(state)):
        assert_placed(tree, SPECS)
    ended = train(step, params, state, batch, steps=STEPS // 2)
    chex.assert_trees_all_equal(ended, train(step, *saved, batch, steps=STEPS // 2))


@check
def the_second_step_is_not_traced_again():
    params, batch = place(start(), SPECS), place(BATCH, (P("x"), P("x")))
    tx = gx.chain(gx.clip_by_global_norm(0.1), gx.adamw(gx.live(0.01)))

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, batch):
        return step_of(tx)(params, state, batch)

    params, state = train(step, params, tx.init(params), batch)
    train(step, params, gx.set_hyperparams(state, learning_rate=0.02), batch)


@check
def a_checkpoint_is_restored_onto_what_init_gives():
    ocp = pytest.importorskip("orbax.checkpoint")
    params = place(start(), SPECS)
    state = CLIPPED_ADAMW.init(params)
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(pathlib.Path(folder) / "state", template)
    jax.jit(CLIPPED_ADAMW.update)(params, restored, params)


@check
def matrices_on_a_mesh_are_orthogonalised_whole():
    params = start() | {"experts": draw(4, 8, 6, 9) / 3}
    specs = SPECS | {"experts": P("x", None, None)}
    grads = jax.tree.map(jnp.cos, params)
    layouts = {"rows|columns": "in out", "experts": "each in 3*out"}
    for method in ("newton_schulz", "gram"):
        tx = gx.normuon(0.01, layouts, gx.adamw(0.01), method=method)
        expected = tx.update(grads, tx.init(params), params)
        placed, placed_grads = place(params, specs), place(grads, specs)
        actual = jax.jit(tx.update)(placed_grads, tx.init(placed), placed)
        # five steps of sums of some 20 products, whose roundings each step may triple
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), actual[0], expected[0])
        for name, spec in specs.items():
            moment = actual[1].mu_2[name] if name == "bias" else actual[1].mu[name]
            assert moment.sharding.is_equivalent_to(NamedSharding(mesh(), spec), moment.ndim), name


@check
def codes_and_scales_are_divided_like_their_moments():
    specs = {"rows": P("x", None), "columns": P(None, "x"), "half_blocks": P(None, "x"), "flat": P("x", None)}
    # of half_blocks a device has half a block of each row, and flat has blocks that are in two rows
    shapes = {"rows": (16, 512), "columns": (8, 2048), "half_blocks": (8, 1024), "flat": (16, 128)}
    params = {name: draw(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    grads = {name: draw(seed, *shape) for seed, (name, shape) in enumerate(shapes.items(), 3)}

    def stepped(tx, names, place):
        params_of, grads_of = (place({name: tree[name] for name in names}) for tree in (params, grads))
        first = tx.init(params_of)
        return first, *jax.jit(functools.partial(gx.step, tx))(grads_of, first, params_of)

    for codec, names in {"root8": list(shapes), "dynamic8": ["rows"]}.items():
        tx, own = gx.quantize_state(gx.adamw(0.01), codec, min_size=1024), {name: specs[name] for name in names}
        first, actual, state = stepped(tx, names, lambda tree, own=own: place(tree, own))
        _, expected, alone = stepped(tx, names, lambda tree: tree)
        assert_placed(actual, own)
        for moment in ("mu", "nu"):
            assert_placed(
                first.scales[moment], {name: P() if name in ("half_blocks", "flat") else own[name] for name in own}
            )
            for codes in (first.codes[moment], state.codes[moment]):
                assert_placed(codes, own)
            for name in names:
                # where float32 rounds otherwise a few moments get the next code
                assert np.mean(np.asarray(state.codes[moment][name]) == alone.codes[moment][name]) > 0.999
        for name in names:
            assert np.isclose(actual[name], expected[name], rtol=1e-6, atol=1e-6).mean() > 0.999


@check
def a_shard_of_a_matrix_is_refused_by_its_name():
    params = {name: start()[name] for name in ("rows", "columns")}
    tx = gx.muon(0.01, ".*")
    step = jax.shard_map(
        lambda params: tx.update(params, tx.init(params), params)[0],
        mesh=mesh(), in_specs=P("x", None), out_specs=P("x", None),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"updates\['columns'\] varies over the mesh axis x, and orthogonalize needs"):
        jax.jit(step)(params)


# Work that is divided by hand


@check
def a_shard_map_over_the_batch_is_one_device():
    tx = CLIPPED_ADAMW

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh(), in_specs=(P(), P(), P("x")), out_specs=P())
    def step(params, state, batch):
        grads = jax.grad(loss)(jax.lax.pcast(params, "x", to="varying"), batch)
        updates, state = tx.update(jax.lax.pmean(grads, "x"), state, params)
        return gx.apply_updates(params, updates), state

    assert_same_walk(train(step, start(), tx.init(start())), on_one_device(tx))


def in_shards(tx, grads, params):
    """The parameters after steps with these gradients, each device with its own part of every array."""

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh(), in_specs=(SPECS, SPECS), out_specs=SPECS)
    def run(params, grads):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params, value=LOSS)
            return (gx.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[0][0]

    return run(params, grads)


def in_one(tx, grads, params):
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(grads, state, params, value=LOSS)
        params = gx.apply_updates(params, updates)
    return params


@check
def a_scan_in_a_shard_map_over_the_parameters_is_one_device():
    params = start()
    grads = jax.grad(loss)(params, BATCH)
    for tx in (*ELEMENTWISE, gx.accumulate(gx.adamw(0.01), every=2)):
        actual, expected = (run(tx, grads, params) for run in (in_shards, in_one))
        for name in params:
            # the same arithmetic on every element: a few float32 roundings where it is fused otherwise
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, atol=1e-7)


# pytest's side


@pytest.fixture(scope="session")
def outcomes():
    """How each check went: None, or its traceback."""
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(name, outcomes):
    judge(outcomes[name])


if __name__ == "__main__":
    report(CHECKS)
