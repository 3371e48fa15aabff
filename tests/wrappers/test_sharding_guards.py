"""On a mesh of eight devices norms are of whole leaves, and all shards skip together.

pytest runs this file once as a script, in a process whose CPU poses as eight devices; one test per check reads how
it went.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradxform as gx
from tests.support import chex
from tests.support.eight_devices import judge, outcomes_of, report

pytestmark = pytest.mark.once
AXES = ("x", "y")
SPECS = {"rows": P("x"), "both": P("x", "y"), "same": P()}
SHAPES = {"rows": (8, 6), "both": (4, 2), "same": (5,)}
# Where JAX does not track what is replicated, every leaf counts as sharded over all axes; so let it be.
WHOLLY = {"both": P("x", "y"), "flat": P(("x", "y"))}

CHECKS = {}


def check(name):
    def add(function):
        assert name not in CHECKS
        CHECKS[name] = function
        return function

    return add


def clipped_sgd(**axis):
    return gx.chain(gx.clip_by_global_norm(1.0, **axis), gx.sgd(0.1, momentum=0.9))


# What takes a norm of all leaves must be told the axes,
NORMS = {
    "clip_by_global_norm": lambda **axis: gx.clip_by_global_norm(1.0, **axis),
    "clip_by_zscore": lambda **axis: gx.clip_by_zscore(warmup=1, max_norm=None, **axis),
    "clip_by_average_norm": lambda **axis: gx.clip_by_average_norm(warmup=3, **axis),
    "skip_spikes": lambda **axis: gx.skip_spikes(clipped_sgd(**axis), window=2, **axis),
    "observe": lambda **axis: gx.observe(clipped_sgd(**axis), by="leaf", **axis),
}
# what only asks whether they are finite knows them by itself, if JAX does,
GUARDS = {
    "skip_nonfinite": lambda **axis: gx.skip_nonfinite(clipped_sgd(**axis), **axis),
    "accumulate": lambda **axis: gx.accumulate(clipped_sgd(**axis), every=2, **axis),
}
# and what takes the norm of one leaf in its rule needs it whole.
WHOLE = {
    "clip_by_leaf_norm": gx.clip_by_leaf_norm(1.0),
    "clip_by_param_norm": gx.clip_by_param_norm(0.1),
    "normalize_by_rms": gx.normalize_by_rms(0.9, of=gx.clip_by_leaf_norm(1.0)),
}
# Fewer where JAX does not track what varies, and yet fewer with pmap: each takes seconds to compile.
UNTRACKED = ("clip_by_global_norm", "skip_nonfinite", "accumulate")
PMAPPED = ("clip_by_zscore", "observe")


@functools.cache
def mesh():
    return Mesh(np.reshape(jax.devices(), (4, 2)), AXES)


def tree(seed, specs=SPECS):
    random = np.random.default_rng(seed)
    shapes = SHAPES | {"flat": (16,)}
    return {name: jnp.asarray(random.normal(size=shapes[name]), jnp.float32) for name in specs}


def specs_of(state, specs):
    """Of a state: arrays under a leaf's name are sharded like the leaf, scalars are replicated."""

    def one(path, leaf):
        names = [key.key for key in path if getattr(key, "key", None) in specs]
        return specs[names[0]] if names and leaf.ndim else P()

    return jax.tree_util.tree_map_with_path(one, state)


def sharded(tx, specs, check_vma, update_specs=None):
    """`tx.update` on the shards of each leaf."""
    state = specs_of(jax.eval_shape(tx.init, tree(0, specs)), specs)
    in_specs, out_specs = (specs, state, specs), (update_specs or specs, state)
    on_shards = jax.shard_map(
        lambda *arguments: tx.update(*arguments),
        mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma,
    )  # fmt: skip
    # given, so that what comes from the host is not compiled for apart
    return jax.jit(on_shards, in_shardings=jax.tree.map(lambda spec: NamedSharding(mesh(), spec), in_specs))


def walk(update, state, params, gradients):
    updates = []
    for gradient in gradients:
        update_, state = update(gradient, state, params)
        updates.append(update_)
    return updates, state


def gradients_of(specs):
    """Four steps; the last is a spike."""
    gradient = tree(1, specs)
    return [jax.tree.map(lambda leaf, scale=scale: leaf * scale, gradient) for scale in (1.0, 1.5, 1.1, 100.0)]


def assert_close(actual, expected):
    # both are float32; a norm over shards is added up in another order: some 2⁻²⁴ each for a few sums and a root
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-7)


def together(names, **axis):
    """Several transformations, each on the same gradients: one program to compile."""
    members = {name: (NORMS | GUARDS)[name](**axis) for name in names}

    def update(gradient, states, params):
        results = {name: tx.update(gradient, states[name], params) for name, tx in members.items()}
        return {name: new for name, (new, _) in results.items()}, {name: state for name, (_, state) in results.items()}

    return optax.GradientTransformation(lambda params: {name: tx.init(params) for name, tx in members.items()}, update)


@functools.cache
def programs(check_vma):
    """The transformations on shards and on whole leaves: their `update`, compiled, a state, and parameters."""
    specs, names = (SPECS, (*NORMS, *GUARDS)) if check_vma else (WHOLLY, UNTRACKED)
    params = tree(0, specs)
    apart, whole = together(names, axis_name=AXES), together(names)
    update = sharded(apart, specs, check_vma, dict.fromkeys(names, specs))
    return (update, apart.init(params), params), (jax.jit(whole.update), whole.init(params), params)


@functools.cache
def walked(check_vma):
    """What becomes of the same gradients on shards, and on whole leaves."""
    return [walk(*program, gradients_of(program[-1])) for program in programs(check_vma)]


def stepped_with_nan(check_vma):
    """Parameters, a gradient, and the updates and states after that one and one that is NaN in one shard."""
    update, state, params = programs(check_vma)[0]
    gradient = tree(1, params)
    bad = gradient | {"both": gradient["both"].at[3, 1].set(jnp.nan)}
    _, before = update(gradient, state, params)
    return params, gradient, before, *update(bad, before, params)


def agrees_with_unsharded(name, check_vma):
    (updates, states), (expected, expected_states) = walked(check_vma)
    assert_close([update[name] for update in updates], [update[name] for update in expected])
    assert_close(states[name], expected_states[name])


def refuses(build, *patterns, kind=ValueError, **axis):
    """What `update` of a transformation raises on shards."""
    tx = build(**axis)
    with pytest.raises(kind) as error:
        sharded(tx, SPECS, True)(tree(1), tx.init(tree(0)), tree(0))
    for pattern in patterns:
        assert error.match(pattern)


for _name, _build in (NORMS | GUARDS).items():
    check(f"{_name} of sharded and replicated leaves is that of the whole leaves")(
        functools.partial(agrees_with_unsharded, _name, True)
    )
    check(f"{_name} refuses an axis the mesh does not have")(
        functools.partial(refuses, _build, "unbound axis name: z", kind=NameError, axis_name=("x", "y", "z"))
    )
for _name in UNTRACKED:
    check(f"{_name} of shards is that of the whole where JAX does not track what varies")(
        functools.partial(agrees_with_unsharded, _name, False)
    )
for _name, _build in NORMS.items():
    check(f"{_name} without axis_name names the leaf and the axis")(
        functools.partial(refuses, _build, _name, r"updates\['both'\]", "axis x", r"axis_name=\['x', 'y'\]")
    )
    check(f"{_name} with one of two axes names the leaf and the other axis")(
        functools.partial(refuses, _build, _name, r"updates\['both'\]", "axis y", axis_name="x")
    )
for _name, _tx in WHOLE.items():
    check(f"{_name} of a shard names the leaf and the axis")(
        functools.partial(refuses, lambda tx=_tx: tx, r"updates\['both'\].*axis x, y.*needs whole arrays")
    )


@check("replicated leaves alone need no axis_name")
def _():
    specs = {"same": P()}
    params, gradients = tree(0, specs), gradients_of(specs)
    tx = gx.accumulate(clipped_sgd(), every=2)
    actual = walk(sharded(tx, specs, True), tx.init(params), params, gradients)
    assert_close(actual, walk(jax.jit(tx.update), tx.init(params), params, gradients))
    for tx in WHOLE.values():
        jax.eval_shape(sharded(tx, specs, True), gradients[0], tx.init(params), params)


@check("where JAX does not track what varies, a replicated leaf counts once per device")
def _():
    tx, gradient = gx.clip_by_global_norm(1.0, axis_name=AXES), tree(1, {"same": P()})
    (update,), _ = walk(sharded(tx, {"same": P()}, False), tx.init(gradient), gradient, [gradient])
    size = float(jnp.linalg.norm(gradient["same"])) * 8**0.5
    assert_close(update["same"], gradient["same"] / size)


@check("axis_name=() takes each shard by itself")
def _():
    specs = {"both": P("x", "y")}
    gradient = tree(1, specs)
    tx = gx.clip_by_global_norm(0.01, axis_name=())
    for check_vma in (True, False):
        (update,), _ = walk(sharded(tx, specs, check_vma), tx.init(gradient), gradient, [gradient])
        assert_close(update["both"], 0.01 * jnp.sign(gradient["both"]))  # a shard is one element


@check("a norm does not overflow over shards")
def _():
    for size in (1e-30, 1e37):
        gradient = {"both": jnp.full((4, 2), size)}
        tx = gx.clip_by_global_norm(size, axis_name=AXES)
        (update,), _ = walk(sharded(tx, {"both": P("x", "y")}, True), tx.init(gradient), gradient, [gradient])
        np.testing.assert_allclose(update["both"], gradient["both"] / 8**0.5, rtol=1e-6)


@check("one shard with NaN makes all shards skip, and nothing changes")
def _():
    for check_vma in (True, False):
        params, _, before, updates, after = stepped_with_nan(check_vma)
        chex.assert_trees_all_equal(gx.apply_updates(params, updates["skip_nonfinite"]), params)
        chex.assert_trees_all_equal(after["skip_nonfinite"].inner, before["skip_nonfinite"].inner)
        assert [shard.data for shard in after["skip_nonfinite"].skipped.addressable_shards] == [1] * 8


@check("one shard with NaN makes all shards drop the gradient")
def _():
    for check_vma in (True, False):
        _, gradient, _, updates, after = stepped_with_nan(check_vma)
        # its norm is more than 1, to which it is clipped
        assert_close(updates["accumulate"], optax.tree.scale(-0.1 / optax.tree.norm(gradient), gradient))
        assert [shard.data for shard in after["accumulate"].dropped.addressable_shards] == [1] * 8


@check("guards need no axis_name where JAX tracks what varies")
def _():
    params, gradient = tree(0), tree(1)
    bad = gradient | {"both": gradient["both"].at[3, 1].set(jnp.nan)}
    tx = gx.skip_nonfinite(gx.accumulate(gx.sgd(1.0), every=2))
    (_, nothing, update), state = walk(sharded(tx, SPECS, True), tx.init(params), params, [gradient, bad, gradient])
    chex.assert_trees_all_equal(gx.apply_updates(params, nothing), params)
    chex.assert_trees_all_equal(update, jax.tree.map(jnp.negative, gradient))
    assert (state.skipped, state.inner.dropped) == (1, 0)


@check("a failure that does not end is logged once under jit over a mesh")
def _():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("gradxform").addHandler(handler)
    params = {name: jax.device_put(leaf, NamedSharding(mesh(), SPECS[name])) for name, leaf in tree(0).items()}
    tx = gx.skip_nonfinite(gx.sgd(0.1), max_consecutive=1)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    walk(jax.jit(tx.update), tx.init(params), params, [bad, bad])
    jax.effects_barrier()
    logging.getLogger("gradxform").removeHandler(handler)
    assert len(records) == 1, records


def on_devices(tx, params, gradients):
    """The walk with one row of each leaf on each device, and the state of every device."""
    rows = jax.vmap(tx.init)(params)
    return walk(jax.pmap(tx.update, axis_name="devices"), rows, params, gradients)


@check("pmap with axis_name gives what the whole leaves give")
def _():
    params, gradients = tree(0, {"rows": P()}), gradients_of({"rows": P()})
    on_rows, whole = together(PMAPPED, axis_name="devices"), together(PMAPPED)
    updates, states = on_devices(on_rows, params, gradients)
    expected, expected_states = walk(jax.jit(whole.update), whole.init(params), params, gradients)
    assert_close(updates, expected)
    for name, state in states.items():
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_states[name]), strict=True):
            # a row on each device, or the same scalar
            assert_close(a, b if a.shape == b.shape else jnp.broadcast_to(b, a.shape))


@check("pmap without axis_name takes each device by itself")
def _():
    params, gradients = tree(0, {"rows": P()}), gradients_of({"rows": P()})
    for axis in ({}, {"axis_name": ()}):
        updates, _ = on_devices(gx.clip_by_global_norm(0.1, **axis), params, gradients)
        norms = jnp.linalg.norm(updates[0]["rows"], axis=1)
        np.testing.assert_allclose(norms, 0.1, rtol=1e-6)  # as in assert_close


# pytest's side


@pytest.fixture(scope="session")
def outcomes():
    """How each check went: None, or its traceback."""
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_mesh(name, outcomes):
    judge(outcomes[name])


if __name__ == "__main__":
    report(CHECKS)
