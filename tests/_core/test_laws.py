"""Laws that hold for every tree, every chain and every gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("hypothesis")

from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradxform as gx
from tests.support import chex
from tests.support.strategies import (
    ORDINARY,
    POSITIVE,
    STAGES,
    WHOLE_TREE,
    arrays_like,
    chains,
    magnitudes,
    problems,
    signed,
    structures,
)
from tests.support.tables import OPTIMIZERS, WITHOUT_EPS, entry_of, of_degree
from tests.support.trees import LOSS, STEPS, assert_close, assert_same, gradient, signature, walk

# XLA rounds a·b + c once or twice, depending on what is compiled together, so two ways to compile one step may
# differ in the last bits. On numbers of one sign nothing cancels, and each of the few dozen operations of three
# steps adds at most one rounding error.
FUSION = 32 * float(jnp.finfo(jnp.float32).eps)
ONE_SIGN = magnitudes(np.float32(1e-3), np.float32(1e3))

stages = st.sampled_from(STAGES)


# chain is associative, and identity is its unit


@given(stages, stages, stages, problems())
def test_chain_is_associative(a, b, c, problem):
    flat = walk(gx.chain(a, b, c), *problem)
    assert_same(walk(gx.chain(gx.chain(a, b), c), *problem), flat)
    assert_same(walk(gx.chain(a, gx.chain(b, c)), *problem), flat)


@given(stages, problems())
def test_identity_is_the_unit_of_chain(stage, problem):
    alone = walk(gx.chain(stage), *problem)
    assert_same(walk(gx.chain(gx.identity(), stage), *problem), alone)
    assert_same(walk(gx.chain(stage, gx.identity()), *problem), alone)


@given(problems())
def test_identity_gives_back_what_it_gets(problem):
    params, gradients = problem
    updates, state = walk(gx.identity(), params, gradients)
    assert_same(updates, [gradient(gradients, step) for step in range(STEPS)])
    assert state._fields == ("count",)


@given(stages, problems())
def test_a_chain_of_one_does_what_the_one_does(stage, problem):
    assert_same(walk(gx.chain(stage), *problem)[0], walk(stage, *problem)[0])


# The way of running a step does not matter


@given(chains(POSITIVE), problems(ONE_SIGN))
def test_compiled_is_eager(tx, problem):
    compiled = optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update))
    assert_close(walk(compiled, *problem), walk(tx, *problem), FUSION)


@given(st.sampled_from(POSITIVE), problems(ONE_SIGN))
def test_scan_is_a_loop(tx, problem):
    params, gradients = problem

    def step(state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return state, updates

    state, stacked = jax.lax.scan(step, tx.init(params), gradients)
    assert_close(([gradient(stacked, i) for i in range(STEPS)], state), walk(tx, params, gradients), FUSION)


@given(st.sampled_from(POSITIVE), st.data())
def test_vmap_is_a_loop(tx, data):
    structure = data.draw(structures())
    params, grads = (data.draw(arrays_like(structure, ONE_SIGN, (2,))) for _ in range(2))
    together = jax.jit(jax.vmap(lambda grads, params: tx.update(grads, tx.init(params), params)))(grads, params)
    for i in range(2):
        alone = tx.update(gradient(grads, i), tx.init(gradient(params, i)), gradient(params, i))
        assert_close(gradient(together, i), alone, FUSION)


@given(st.sampled_from(POSITIVE), st.sampled_from(POSITIVE), problems(ONE_SIGN))
def test_optax_chains_them_too(a, b, problem):
    assert_close(walk(optax.chain(a, b), *problem)[0], walk(gx.chain(a, b), *problem)[0], FUSION)


@given(stages, problems())
def test_update_changes_none_of_its_arguments(stage, problem):
    params, gradients = problem
    state = stage.init(params)
    before = jax.tree.map(np.array, (params, gradients, state))
    first, second = (walk(stage, params, gradients, state=state) for _ in range(2))
    assert_same(first, second)
    assert_same(jax.tree.map(jnp.asarray, before), (params, gradients, state))


# Structure, shapes and dtypes stay


@given(chains(), problems())
def test_updates_look_like_params_and_the_state_keeps_its_signature(tx, problem):
    params, gradients = problem
    state = tx.init(params)
    fixed = signature(state)
    assert signature(jax.eval_shape(tx.init, params)) == fixed
    for step in range(STEPS):
        updates, state = tx.update(gradient(gradients, step), state, params, value=LOSS)
        assert signature(updates) == signature(params)
        assert signature(state) == fixed


DTYPES = st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])


@given(st.sampled_from(sorted(OPTIMIZERS)), st.lists(st.tuples(DTYPES, DTYPES), min_size=1, max_size=3))
def test_updates_come_in_the_dtypes_of_the_params(name, dtypes):
    assume(all(ours == jnp.complex64 or theirs != jnp.complex64 for ours, theirs in dtypes))
    params, grads = ([jnp.ones(2, pair[i]) for pair in dtypes] for i in range(2))
    tx = OPTIMIZERS[name]
    assert signature(tx.update(grads, tx.init(params), params, value=LOSS)[0]) == signature(params)


# Finite in, finite out: magnitudes up to 1e37, because the heavy ball adds up to ten gradients


def everything(dtype: Any) -> st.SearchStrategy[float]:
    return signed(float(jnp.finfo(dtype).smallest_normal), min(float(jnp.finfo(dtype).max), np.float32(1e37)))


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(problem=problems(everything(jnp.float32)))
def test_finite_gradients_give_finite_updates(name, problem):
    chex.assert_tree_all_finite(walk(OPTIMIZERS[name], *problem))


@pytest.mark.parametrize("name", WITHOUT_EPS)
@given(problem=problems(everything(jnp.float32)))
def test_finite_gradients_give_finite_updates_without_eps(name, problem):
    chex.assert_tree_all_finite(walk(WITHOUT_EPS[name], *problem))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("optimizers", [OPTIMIZERS, WITHOUT_EPS], ids=["default eps", "eps=0"])
@given(data=st.data())
def test_finite_gradients_of_low_precision_give_finite_updates(dtype, optimizers, data):
    tx = optimizers[data.draw(st.sampled_from(sorted(optimizers)))]
    leaf = jax.ShapeDtypeStruct((3,), dtype)
    params = data.draw(arrays_like(leaf, everything(dtype)))
    chex.assert_tree_all_finite(walk(tx, params, data.draw(arrays_like(leaf, everything(dtype), (STEPS,)))))


# A tree only names its leaves


@given(chains(), problems())
def test_nesting_does_not_matter(tx, problem):
    as_list = walk(tx, *(jax.tree.leaves(tree) for tree in problem))
    as_tree = walk(tx, *problem)
    assert_same(jax.tree.leaves(as_list), jax.tree.leaves(as_tree))


@given(chains(), problems(), st.randoms(use_true_random=False))
def test_the_order_of_leaves_does_not_matter(tx, problem, random):
    order = list(range(len(jax.tree.leaves(problem[0]))))
    random.shuffle(order)

    def shuffled(tree: Any) -> list[Any]:
        leaves = jax.tree.leaves(tree)
        return [leaves[i] for i in order]

    for update, other in zip(walk(tx, *map(shuffled, problem))[0], walk(tx, *problem)[0], strict=True):
        for a, b in zip(update, shuffled(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=FUSION)  # a global norm adds the leaves up in another order


@given(st.sampled_from([stage for stage in STAGES if stage not in WHOLE_TREE]), problems())
def test_leaves_do_not_see_each_other(stage, problem):
    together = [jax.tree.leaves(update) for update in walk(stage, *problem)[0]]
    for index, leaf in enumerate(zip(*map(jax.tree.leaves, problem), strict=True)):
        assert_same(walk(stage, *leaf)[0], [update[index] for update in together])


# What single transformations obey

POWERS_OF_TWO = st.integers(-20, 20).map(lambda k: 2.0**k)
MODERATE = signed(np.float32(1e-6), np.float32(1e6))  # squares, times 2^±40, neither overflow nor underflow


def times(factor: float, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: factor * leaf, tree)


@pytest.mark.parametrize("name", of_degree(0, WITHOUT_EPS))
@given(problem=problems(MODERATE), c=POWERS_OF_TWO)
def test_normalised_steps_ignore_the_scale_of_the_gradient(name, problem, c):
    params, gradients = problem
    tx = WITHOUT_EPS[name]
    assert_same(walk(tx, params, times(c, gradients))[0], walk(tx, params, gradients)[0])


@pytest.mark.parametrize("name", of_degree(1, OPTIMIZERS))
@given(problem=problems(MODERATE), c=POWERS_OF_TWO)
def test_linear_steps_grow_with_the_gradient(name, problem, c):
    params, gradients = problem
    tx = OPTIMIZERS[name]
    assert_same(walk(tx, params, times(c, gradients))[0], times(c, walk(tx, params, gradients)[0]))


# Noise turns with nothing.
WITHOUT_NOISE = {name: tx for name, tx in OPTIMIZERS.items() if "key" not in entry_of(name).arguments}


@pytest.mark.parametrize("name", WITHOUT_NOISE)
@given(problem=problems())
def test_steps_turn_with_the_signs_of_parameters_and_gradients(name, problem):
    tx = OPTIMIZERS[name]
    assert_same(walk(tx, *times(-1.0, problem))[0], times(-1.0, walk(tx, *problem)[0]))


@pytest.mark.parametrize(
    "clip", [gx.clip_by_value(4.0), gx.clip_by_leaf_norm(4.0), gx.clip_by_global_norm(4.0)], ids=repr
)
@given(problem=problems())
def test_clipping_twice_is_clipping_once(clip, problem):
    once, twice = walk(clip, *problem)[0], walk(gx.chain(clip, clip), *problem)[0]
    assert_close(twice, once, FUSION)  # the clipped norm is itself rounded, so the second clip may move a last bit


@pytest.mark.parametrize("clip", [gx.clip_by_leaf_norm, gx.clip_by_global_norm])
@given(grads=arrays_like(jax.ShapeDtypeStruct((4,), np.float32)), limit=st.sampled_from([0.5, 4.0]))
def test_clipping_by_norm_keeps_the_direction(clip, grads, limit):
    size = float(jnp.linalg.norm(grads))
    clipped, _ = clip(limit).update(grads, clip(limit).init(grads))
    np.testing.assert_allclose(clipped, grads * min(1.0, limit / max(size, 1e-30)), rtol=FUSION)


@given(stages, problems())
def test_accumulating_one_gradient_changes_nothing(stage, problem):
    assert_same(walk(gx.accumulate(stage, every=1), *problem)[0], walk(stage, *problem)[0])


@given(problems())
def test_apply_updates_adds(problem):
    params, gradients = problem
    updates = gradient(gradients, 0)
    assert_same(gx.apply_updates(params, updates), jax.tree.map(jnp.add, params, updates))


# Updates of complex leaves turn with their phases


EQUIVARIANT = WITHOUT_NOISE | {
    "clip_by_value": gx.clip_by_value(1.0),
    "clip_by_leaf_norm": gx.clip_by_leaf_norm(1.0),
    "clip_by_global_norm": gx.clip_by_global_norm(1.0),
    "accumulate": gx.accumulate(gx.momentum(0.1), every=2),
    "masked chain": gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1, weight_decay=0.5, mask="z")),
}


def mixed(lead=()):
    """A real and a complex leaf in double precision."""
    return st.tuples(*[hnp.arrays(np.float64, (*lead, 3), elements=ORDINARY)] * 3).map(
        lambda drawn: {"w": drawn[0], "z": drawn[1] + 1j * drawn[2]}
    )


@pytest.mark.once
@pytest.mark.parametrize("name", EQUIVARIANT)
@given(params=mixed(), gradients=mixed((STEPS,)), angles=hnp.arrays(np.float64, 3, elements=st.floats(-4.0, 4.0)))
def test_updates_turn_with_the_phases_of_params_and_gradients(name, params, gradients, angles):
    def turned(tree):
        return {"w": tree["w"], "z": tree["z"] * np.exp(1j * angles)}

    def updates(params, gradients):
        return jax.tree.map(lambda *some: np.stack(some), *walk(EQUIVARIANT[name], params, gradients)[0])

    with jax.enable_x64(True):
        straight, crooked = updates(params, gradients), updates(turned(params), turned(gradients))
    for key, expected in turned(straight).items():
        largest = np.abs(gradients[key]).max(axis=0) + np.abs(expected).max(axis=0)
        # a few dozen roundings of 2⁻⁵³ of the gradients, which may cancel where they are averaged
        assert (np.abs(crooked[key] - expected) <= 1e-14 * largest).all()


# Groups are chains on their leaves

GROUPED = {"embed": (2, 2), "head/bias": (2,), "layers/bias": (2,), "scale": (2,)}
few = st.lists(st.sampled_from(POSITIVE), max_size=2).map(lambda stages: gx.chain(*stages))


@pytest.mark.once
@given(st.tuples(few, few, few), st.data())
def test_groups_with_norms_of_their_own_are_chains_on_their_leaves(parts, data):
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in GROUPED.items()}
    params, gradients = (data.draw(arrays_like(shapes, ONE_SIGN, lead)) for lead in ((), (STEPS,)))
    a, b, default = parts
    together, _ = walk(gx.by_path({"embed": a, ".*bias": b}, default, joint_norm=False), params, gradients)
    for own, paths in ((a, ["embed"]), (b, ["head/bias", "layers/bias"]), (default, ["scale"])):
        alone, _ = walk(own, *({path: tree[path] for path in paths} for tree in (params, gradients)))
        assert_close([{path: update[path] for path in paths} for update in together], alone, FUSION)
