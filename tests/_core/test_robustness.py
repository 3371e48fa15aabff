"""What training runs meet at their edges: extreme numbers, odd trees, shared arrays, calls that fail."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import pickle
import re
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.core import Tracer

import gradxform as gx
from gradxform import catalog
from gradxform._core.state import state_type
from tests.support import chex
from tests.support.tables import OPTIMIZERS, WITHOUT_EPS, entry_of, examples
from tests.support.trees import LOSS, STEPS, assert_same, walk

EVERY = OPTIMIZERS | WITHOUT_EPS
CLIPS = {
    "clip_by_value": gx.clip_by_value(1.0),
    "clip_by_leaf_norm": gx.clip_by_leaf_norm(1.0),
    "clip_by_global_norm": gx.clip_by_global_norm(1.0),
}
WITH_STATE = OPTIMIZERS | {"accumulate": gx.accumulate(gx.adam(0.1), every=2)}
every_optimizer = pytest.mark.parametrize("name", EVERY)


def noisy(name: str) -> bool:
    """Whether it adds noise: other numbers in every element, leaf and step."""
    return "key" in entry_of(name).arguments


def clips_leaves(name: str) -> bool:
    """Whether it bounds the size of each leaf itself, so that an element moves all others of its leaf."""
    return "clipping_threshold" in entry_of(name).arguments


eager_and_compiled = pytest.mark.parametrize("transform", [lambda call: call, jax.jit], ids=["eager", "compiled"])


def repeated(grads: Any, steps: int = STEPS) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), grads)


def zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def moments(state: Any) -> list[Any]:
    """All of a state but its counters and single numbers, such as a mean loss or the largest rate so far."""
    return [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.inexact)]


# Numbers


# Adafactor forgets by a power of the count, noise fades with one, and L-BFGS writes its pairs around a ring.
COUNTING = {"adafactor", "noisy_sgd", "lbfgs"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_last_count_is_as_good_as_any_late_one(name):
    tx, params = gx.chain(*CLIPS.values(), OPTIMIZERS[name]), jnp.zeros(2)
    last, late = (
        tx.update(jnp.ones(2), tx.init(params)._replace(count=jnp.asarray(count, jnp.int32)), params, value=LOSS)
        for count in (2**31 - 1, 2**30)
    )
    assert last[1].count == 2**31 - 1
    chex.assert_tree_all_finite(last)
    if entry_of(name).name not in COUNTING:
        assert_same((last[0], last[1][1:]), (late[0], late[1][1:]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_move_nothing_in_any_dtype(name):
    with jax.enable_x64(True):
        zero = {dtype: jnp.zeros(2, dtype) for dtype in ("float16", "bfloat16", "float32", "float64", "complex64")}
        tx = gx.chain(*CLIPS.values(), gx.accumulate(OPTIMIZERS[name], every=2))
        updates, state = walk(tx, zero, repeated(zero, steps=2), steps=2)
        if not noisy(name):
            assert_same(updates, [zero, zero])
        if entry_of(name).name != "adafactor":  # whose ε is among the squares
            assert_same(moments(state), moments(tx.init(zero)))


SIZES = [0.0, 1e-38, 1e-25, 1e-8, 0.19, 0.21, 300.0, 1e10, 1e20]


@every_optimizer
def test_a_clipped_gradient_of_any_size_acts_as_what_it_is_clipped_to(name):
    tx = gx.chain(gx.clip_by_global_norm(1.0), EVERY[name])
    for size in SIZES:
        grads = {"a": jnp.asarray([3.0, 0.0]) * size, "b": jnp.asarray([0.0, -4.0]) * size}
        factor = jnp.float32(1 / max(1.0, 5 * size))
        clipped = jax.tree.map(lambda leaf, factor=factor: leaf * factor, grads)
        ours, _ = walk(tx, zeros_like(grads), repeated(grads))
        expected, _ = walk(EVERY[name], zeros_like(grads), repeated(clipped))
        for update, leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            chex.assert_tree_all_finite(update)
            # the norm, the quotient and the product round thrice by 2⁻²⁴, NAdam and the square double that
            np.testing.assert_allclose(update, leaf, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_finite_shows_as_far_as_its_clip_reaches(name, value):
    grads = {"a": jnp.asarray([1.0, value, 1.0]), "b": jnp.ones(3)}
    params, shown = zeros_like(grads), {}
    for key, clip in CLIPS.items():
        updates, _ = gx.chain(clip, OPTIMIZERS[name]).update(grads, OPTIMIZERS[name].init(params), params, value=LOSS)
        shown[key] = "".join("?" if nan else "." for leaf in (updates["a"], updates["b"]) for nan in jnp.isnan(leaf))
    by_value = "???..." if clips_leaves(name) else ".?...."
    assert shown == {
        "clip_by_value": by_value if np.isnan(value) else "......",
        "clip_by_leaf_norm": "???...",
        "clip_by_global_norm": "??????",
    }


# Leaves


ELEMENTWISE = examples(entry for entry in (*catalog.OPTIMIZERS, *catalog.TRANSFORMATIONS) if entry.sees == "element")


def alone(name: str) -> bool:
    """Whether nothing else in a vector moves an element of it; Polyak's steps have the length of all gradients."""
    return not (noisy(name) or clips_leaves(name) or entry_of(name).name == "polyak_sgd")


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE | WITHOUT_EPS if alone(name)])
def test_an_element_gives_the_same_numbers_in_a_leaf_of_any_shape(name):
    tx = {**EVERY, **ELEMENTWISE}[name]
    random = np.random.default_rng(0)
    vector, gradients = (jnp.asarray(random.normal(size=size), jnp.float32) for size in (13, (STEPS, 13)))
    updates, state = walk(tx, vector, gradients)
    for shape in ((), (1,)):

        def last(array: Any, shape: tuple[int, ...] = shape) -> Any:
            return array[..., -1].reshape(*array.shape[:-1], *shape) if array.ndim else array

        assert_same(walk(tx, last(vector), last(gradients)), jax.tree.map(last, (updates, state)))


@pytest.mark.parametrize("params", [{}, {"frozen": jnp.ones(2)}], ids=["empty", "frozen"])
@pytest.mark.parametrize("clip", [gx.clip_by_global_norm(1.0), gx.clip_by_zscore()], ids=["norm", "zscore"])
def test_a_clip_alone_in_its_pass_may_find_no_leaf(clip, params):
    tx = gx.chain(gx.freeze(), clip, gx.observe(gx.sgd(0.1)))
    new_params, state = gx.step(tx, params, tx.init(params), params)
    assert_same(new_params, params)
    assert gx.metrics(state)["grad_norm"] == 0


@pytest.mark.parametrize("name", WITH_STATE)
def test_leaves_without_elements_take_part_and_change_nothing(name):
    tx = gx.chain(gx.clip_by_global_norm(1.0), WITH_STATE[name])
    empty = {"none": jnp.zeros((0,)), "rows": jnp.zeros((3, 0), jnp.bfloat16)}
    some = {"w": jnp.asarray([3.0, 4.0])}
    nothing, _ = tx.update(empty, tx.init(empty), empty, value=LOSS)
    both, state = tx.update(empty | some, tx.init(empty | some), empty | some, value=LOSS)
    without, _ = tx.update(some, tx.init(some), some, value=LOSS)
    if noisy(name):  # which noise a leaf gets depends on how many are before it
        without = {"w": both["w"]}
    assert_same((nothing, both), (empty, empty | without))
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("name", WITH_STATE)
def test_one_array_at_two_places_is_two_leaves(name):
    tx = WITH_STATE[name]
    shared, grad = jnp.asarray([1.0, -2.0]), jnp.asarray([0.3, 0.1])
    params, grads = {"a": shared, "b": [shared]}, {"a": grad, "b": [grad]}
    updates, state = walk(tx, params, repeated(grads))
    copies = jax.tree.map(jnp.array, (params, grads))
    assert_same((updates, state), walk(tx, copies[0], repeated(copies[1])))
    donated = jax.jit(tx.update, donate_argnums=1)  # which refuses a buffer that is there twice
    for start in (tx.init(params), jax.jit(tx.init)(params), state):
        update, _ = donated(grads, start, params, value=LOSS)
        if noisy(name):
            assert not jnp.any(update["a"] == update["b"][0])
        else:
            assert_same(update["a"], update["b"][0])


# Trees


@pytest.fixture
def deep_recursion():
    """JAX itself flattens no deeper than Python's own limit."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    yield
    sys.setrecursionlimit(before)


def nested(leaf: Any, node: Any, depth: int = 1000) -> Any:
    for _ in range(depth):
        leaf = node(leaf)
    return leaf


NODES = {"dicts": (lambda tree: {"a": tree}, "['a']", "a"), "lists": (lambda tree: [tree], "[0]", "0")}
every_node = pytest.mark.parametrize(("node", "name", "key"), NODES.values(), ids=NODES)


@eager_and_compiled
@every_node
def test_a_tree_may_be_a_thousand_nodes_deep(node, name, key, transform, deep_recursion):
    leaf = jnp.asarray([1.0, -2.0])
    tree = nested(leaf, node)
    tx = gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1, weight_decay=0.5))
    updates, _ = transform(tx.update)(tree, transform(tx.init)(tree), tree)
    expected, _ = transform(tx.update)(leaf, tx.init(leaf), leaf)
    assert_same(updates, nested(expected, node))
    assert_same(transform(gx.apply_updates)(tree, updates), nested(gx.apply_updates(leaf, expected), node))


@every_node
def test_a_mask_reaches_a_leaf_a_thousand_nodes_deep(node, name, key, deep_recursion):
    tree = node([nested(jnp.ones(2), node, 998), jnp.ones(2)])
    path = "/".join([key, "0", *[key] * 998])
    for mask in (path, node([nested(True, node, 998), False]), lambda where, leaf: where == path):
        updates, _ = walk(gx.add_decoupled_weight_decay(0.5, mask), tree, repeated(zeros_like(tree)), steps=1)
        assert_same(jax.tree.leaves(updates), [0.5 * jnp.ones(2), jnp.zeros(2)])


@every_node
def test_an_error_names_a_leaf_a_thousand_nodes_deep(node, name, key, deep_recursion):
    tree, tx = nested(jnp.ones(2), node), gx.adam(0.1)
    with pytest.raises(ValueError, match=re.escape(f"updates{name * 1000} has shape (3,), params{name * 1000} has")):
        tx.update(nested(jnp.ones(3), node), tx.init(tree), tree)
    with pytest.raises(ValueError, match=re.escape(f"updates{name * 1000} is missing")):
        tx.update(nested(jnp.ones(2), node, 999), tx.init(tree), tree)


@pytest.mark.parametrize(
    ("name", "transform"), [("adamw(α)", lambda call: call), ("sgd(α)", jax.jit)], ids=["eager", "compiled"]
)
def test_a_tree_may_have_three_thousand_leaves(name, transform):
    # of a larger optimizer than SGD this many small leaves keep XLA busy for minutes
    tx, vector = OPTIMIZERS[name], np.linspace(-1, 1, 3000, dtype=np.float32)
    tree = {f"layer {i}": x.reshape((1,) * (i % 3)) for i, x in enumerate(vector)}
    updates, _ = transform(tx.update)(tree, tx.init(tree), tree)
    expected, _ = tx.update(vector, tx.init(vector), vector)
    np.testing.assert_array_equal([updates[key].item() for key in tree], expected)


# Calls that fail


def fail(*arguments: Any) -> Any:
    raise ValueError("not today")


def crooked(update: Any, state: Any, param: Any, step: Any) -> Any:
    return update.sum(), state


PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
FAILING = {
    "schedule": gx.adam(lambda step: fail(step) if isinstance(step, Tracer) else 0.1),
    "rule": gx.chain(gx.momentum(0.1), gx.lift(None, crooked)),
    "foreign": gx.chain(gx.momentum(0.1), (lambda params: (), fail), gx.momentum(0.1)),
}
BAD = {
    "shape": PARAMS | {"b": jnp.ones(4)},
    "complex": PARAMS | {"b": jnp.ones(3, complex)},
    "whole numbers": PARAMS | {"b": jnp.ones(3, int)},
    "missing": {"w": PARAMS["w"]},
}


@pytest.fixture
def no_tracer_stays():
    """None is alive afterwards that was not before. What is older is frozen: to look through it takes seconds."""
    gc.freeze()
    yield
    gc.collect()
    left = [thing for thing in gc.get_objects() if issubclass(type(thing), Tracer)]
    gc.unfreeze()
    assert not left


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_failed_call_changes_nothing(name):
    tx = gx.chain(gx.clip_by_global_norm(1.0), WITH_STATE[name])
    _, state = walk(tx, PARAMS, repeated(PARAMS))
    before, expected = jax.tree.map(np.array, state), tx.update(PARAMS, state, PARAMS, value=LOSS)
    compiled = jax.jit(tx.update, donate_argnums=1)
    for bad in BAD.values():
        for update in (tx.update, compiled):
            with pytest.raises((TypeError, ValueError), match="'b'"):
                update(bad, state, PARAMS, value=LOSS)
    assert_same(jax.tree.map(jnp.asarray, before), state)
    assert_same(tx.update(PARAMS, state, PARAMS, value=LOSS), expected)
    assert compiled(PARAMS, state, PARAMS, value=LOSS)[1].count == 4


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_failed_compiled_call_leaks_no_tracer(name, no_tracer_stays):
    tx = gx.chain(gx.clip_by_global_norm(1.0), WITH_STATE[name])
    state = tx.init(PARAMS)
    with jax.checking_leaks():
        for bad in BAD.values():
            with pytest.raises((TypeError, ValueError), match="'b'"):
                jax.jit(tx.update)(bad, state, PARAMS, value=LOSS)
        jax.eval_shape(tx.update, PARAMS, state, PARAMS, value=LOSS)


@pytest.mark.parametrize("tx", FAILING.values(), ids=FAILING)
def test_code_of_the_user_that_fails_leaks_no_tracer(tx, no_tracer_stays):
    state = tx.init(PARAMS)
    with jax.checking_leaks(), pytest.raises(ValueError, match=r"not today|crooked turned"):
        jax.jit(tx.update)(PARAMS, state, PARAMS)


# What users do to pairs and states


@pytest.mark.parametrize(
    "build",
    [
        lambda rate: gx.sgd(gx.live(rate)),
        lambda rate: gx.skip_nonfinite(gx.sgd(rate)),
        lambda rate: gx.skip_nonfinite(gx.by_path({"a": gx.adam(optax.constant_schedule(0.1))}, default=gx.sgd(rate))),
    ],
    ids=["live", "guarded", "groups"],
)
def test_donating_a_state_deletes_nothing_of_the_users(build):
    rate, params = jnp.float32(0.1), {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = build(rate)
    step = jax.jit(lambda params, state, grads: gx.step(tx, grads, state, params), donate_argnums=(0, 1))
    grads = {"a": jnp.ones(3), "b": jnp.ones(2)}
    for _ in range(2):  # a second run starts from the same numbers
        params, state = {"a": jnp.ones(3), "b": jnp.ones(2)}, tx.init(params)
        params, state = step(params, state, grads)
        params, state = step(params, state, grads)
    assert rate == jnp.float32(0.1)


def test_one_schedule_in_two_groups_is_donated_once():
    rate = optax.constant_schedule(0.1)
    tx = gx.skip_nonfinite(gx.by_path({"a": gx.adam(rate)}, default=gx.sgd(rate)))
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    step = jax.jit(lambda params, state, grads: gx.step(tx, grads, state, params), donate_argnums=(0, 1))
    step(params, tx.init(params), {"a": jnp.ones(3), "b": jnp.ones(2)})


@pytest.mark.parametrize(
    "tx",
    [
        gx.accumulate(gx.sgd(0.1), every=1),
        gx.accumulate(gx.observe(gx.observe(gx.chain(gx.clip_by_global_norm(1.0), gx.sgd(0.1)))), every=1),
    ],
    ids=["accumulate", "observe"],
)
def test_a_state_that_was_made_outside_jit_is_donated_once(tx):
    params = {"a": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params), params)
    expected = tx.update(params, state, params)
    step = jax.jit(lambda state, params: tx.update(params, state, params), donate_argnums=0)
    assert_same(step(state, params), expected)


def test_a_value_that_was_set_is_still_the_users_after_a_donated_step():
    tx, rate, params = gx.sgd(gx.live(0.5)), jnp.float32(0.1), jnp.ones(3)
    state = gx.set_hyperparams(tx.init(params), learning_rate=rate)
    jax.jit(lambda state, grads: tx.update(grads, state), donate_argnums=0)(state, params)
    assert rate == jnp.float32(0.1)


@dataclasses.dataclass
class Unhashable:
    """Half of a pair of another library, which compares by value and so has no hash."""

    factor: float

    def __call__(self, updates: Any, state: Any = None, params: Any = None) -> Any:
        return () if state is None else (jax.tree.map(lambda u: self.factor * u, updates), state)


def test_a_pair_without_a_hash_goes_into_a_chain():
    tx, params = gx.chain(gx.scale(2.0), (Unhashable(3.0), Unhashable(3.0))), {"a": jnp.ones(2)}
    for given in (params, None):
        updates, _ = tx.update(params, tx.init(params), given)
        assert_same(updates, {"a": 6 * params["a"]})


def test_a_pair_with_another_init_or_update_is_what_it_was_made():
    def init(params):
        return gx.adam(0.1).init(params)._replace(count=jnp.asarray(7, jnp.int32))

    def update(updates, state, params=None, **extra_args):
        return jax.tree.map(jnp.zeros_like, updates), state

    params = jnp.ones(2)
    warm, still = gx.adam(0.1)._replace(init=init), gx.adam(0.1)._replace(update=update)
    assert gx.chain(gx.scale(1.0), warm).init(params).inner.count == 7
    assert_same(gx.step(still, params, still.init(params), params)[0], params)
    assert "update" in repr(still)


def test_names_that_are_numbered_meet_no_given_one():
    def init(param):
        return {"m": jnp.zeros_like(param), "m_2": jnp.zeros_like(param)}

    rule = gx.lift(init, lambda update, state, param, step: (update, state))
    assert gx.chain(rule, rule).init(jnp.ones(2))._fields == ("count", "m", "m_2", "m_2_2", "m_3")


def test_metrics_of_a_state_with_a_plain_number():
    tx = gx.sgd(gx.live(0.1))
    state = tx.init(jnp.ones(2))._replace(values={"learning_rate": 0.5})
    assert gx.metrics(state)["learning_rate"] == 0.5


def test_counters_stay_whole_where_the_state_is_narrow():
    def update(update, state, param, step):
        return update, {"m": step.keep("m", state["m"] + update), "n": step.keep("n", state["n"] + 1)}

    def init(param):
        return {"m": jnp.zeros_like(param), "n": jnp.zeros((), jnp.int32)}

    tx = gx.lift(init, update, state_dtype="bfloat16")
    state = tx.init(jnp.ones(2))
    _, new = tx.update(jnp.ones(2), state)
    assert (state.m.dtype, new.m.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (state.n.dtype, new.n.dtype, int(new.n)) == (jnp.int32, jnp.int32, 1)


def test_a_seed_that_was_restored_as_numpy_does_not_warn():
    params = jnp.linspace(-1, 1, 4096)
    quantized = gx.quantize_state(gx.adam(0.1))
    narrow = gx.stochastic_rounding(gx.adam(0.1), 0)
    for tx, theta in ((quantized, params), (narrow, params.astype(jnp.bfloat16))):
        state = tx.init(theta)._replace(seed=np.uint32(2**32 - 5))
        for _ in range(2):
            _, state = tx.update(params.astype(theta.dtype), state, theta)


@pytest.mark.parametrize(
    "other", [gx.skip_spikes(gx.sgd(0.1), window=8), gx.skip_spikes(gx.sgd(0.1)), gx.skip_nonfinite(gx.sgd(0.1))]
)
def test_the_state_of_another_guard_is_refused(other):
    tx, params = gx.skip_spikes(gx.sgd(0.1), window=16, watch="both"), jnp.ones(2)
    with pytest.raises(ValueError, match=r"state\.(norms|losses) .* init\(params\) again"):
        tx.update(params, other.init(params), params, value=1.0)


# What rules and other libraries give


def kept(update: Any, state: Any, param: Any, step: Any) -> Any:
    return update, state


def test_a_rule_whose_state_starts_as_the_parameter_may_be_donated():
    def init(param):
        zero = jnp.zeros_like(param)
        return {"first": param, "one": zero, "other": zero}

    tx, params = gx.lift(init, kept), {"a": jnp.ones(3)}
    step = jax.jit(lambda params, state, grads: gx.step(tx, grads, state, params), donate_argnums=(0, 1))
    _, state = step(params, tx.init(params), {"a": jnp.ones(3)})
    assert_same(state.first, {"a": jnp.ones(3)})


def test_a_rule_may_keep_what_x64_makes_wider():
    tx = gx.lift(lambda param: {"m": jnp.zeros(param.shape, float)}, kept)
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64), (False, jnp.float32)):
        with jax.enable_x64(x64):
            params = jnp.ones(3, jnp.float32)
            _, state = tx.update(params, tx.init(params), params)
            assert state.m.dtype == dtype


@pytest.mark.parametrize(
    "wrap",
    [
        gx.quantize_state,
        lambda tx: gx.quantize_state(gx.accumulate(tx, 2)),
        lambda tx: gx.compensated(gx.accumulate(tx, 2)),
    ],
    ids=["coded", "coded in a branch", "encoded in a branch"],
)
def test_encoded_arrays_and_a_rate_that_is_traced_leak_no_tracer(wrap, no_tracer_stays):
    def run(params, rate):
        tx = wrap(gx.adamw(gx.live(rate)))
        return tx.update(params, tx.init(params), params)

    with jax.checking_leaks():
        jax.jit(run)(jnp.ones(4096, jnp.bfloat16), 0.1)


def test_wrappers_that_have_run_are_pickled():
    tx, params = gx.quantize_state(gx.adamw(0.1)), jnp.ones(4096)
    state = tx.init(params)
    again = pickle.loads(pickle.dumps(tx))
    assert again == tx
    assert_same(again.update(params, state, params), tx.update(params, state, params))


def test_updates_of_another_library_may_be_wider_than_the_parameters():
    def update(updates, state, params=None):
        return jax.tree.map(lambda leaf: 0.1 * leaf.astype(jnp.float64), updates), state

    with jax.enable_x64(True):
        params = {"narrow": jnp.ones(4, jnp.bfloat16), "usual": jnp.ones(4, jnp.float32)}
        for tx in (gx.master_weights((lambda params: (), update)), gx.compensated((lambda params: (), update))):
            state = tx.init(params)
            updates, new = tx.update(params, state, params)
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
            assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaf: leaf.sum(), r"\(…\): new updates\['w'\] has shape \(\), updates\['w'\] has \(3,\)"),
        (lambda leaf: leaf.astype(complex), r"new updates\['w'\] is complex64, .* real updates must stay real"),
        (lambda leaf: {"x": leaf}, r"new updates\['w'\] is missing, updates\['w'\] is there; every stage must keep"),
    ],
    ids=["shape", "complex", "structure"],
)
def test_a_stage_of_another_library_that_breaks_its_updates_is_named(change, message):
    def update(updates, state, params=None):
        return jax.tree.map(change, updates), state

    tx, params = gx.chain(gx.sgd(0.1), (lambda params: (), update)), {"w": jnp.ones(3)}
    with pytest.raises((TypeError, ValueError), match=message):
        tx.update(params, tx.init(params), params)


def test_the_state_of_another_low_precision_wrapper_is_refused():
    params, wrappers = (
        jnp.ones(3, jnp.bfloat16),
        (gx.master_weights(gx.sgd(0.1)), gx.stochastic_rounding(gx.sgd(0.1), 0)),
    )
    for tx, other in (wrappers, wrappers[::-1]):
        with pytest.raises(ValueError, match="another wrapper's, or of other parameters; call init"):
            tx.update(params, other.init(params), params)


def test_threads_make_one_class_of_a_state():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(20):
            start = threading.Barrier(8)

            def make(number: int = number, start: Any = start) -> Any:
                start.wait()
                return state_type((f"moment_{number}",), ())

            with concurrent.futures.ThreadPoolExecutor(8) as threads:
                made = [one.result() for one in [threads.submit(make) for _ in range(8)]]
            assert len(set(made)) == 1
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("size", [3, 70_000])
def test_the_norm_of_complex_numbers_beyond_the_largest_float_counts_as_it(size):
    tx, z = gx.clip_by_global_norm(1.0), jnp.full(size, 3e38 + 3e38j, jnp.complex64)
    updates, _ = tx.update(z, tx.init(z))
    # one over the largest float would be flushed to zero: the smallest factor is the smallest normal number
    np.testing.assert_allclose(updates.real, 3e38 * np.finfo(np.float32).smallest_normal, rtol=1e-6)
