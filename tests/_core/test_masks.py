"""Which leaves a rule acts on: trees of booleans, prefixes, functions and patterns say it alike."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import equinox as eqx
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
        jax.tree.map(np.asarray, TREE),
        ".*kernel",
        re.compile(".*kernel"),
        re.compile(".*KERNEL", re.IGNORECASE),
        "(head|layers/[0-9]+)/kernel",
        lambda path, leaf: path.endswith("kernel"),
        lambda path, leaf: leaf.ndim == 2,
        lambda path, leaf: np.bool_(leaf.ndim == 2),
        lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params),
        lambda params: TREE,
        lambda params: jax.tree.map(jnp.asarray, TREE),
    ],
    ids=[
        "tree",
        "prefix",
        "tree of numpy",
        "tree of arrays",
        "tree of numpy arrays",
        "pattern",
        "compiled",
        "flags",
        "alternatives",
        "by path",
        "by leaf",
        "by numpy",
        "of all",
        "of all, constant",
        "of all, arrays",
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


# Functions are told apart by the arguments that they require


def of_leaf(path: str, leaf: Any) -> bool:
    return leaf.ndim == 2


def of_all(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


class Asked:
    """Both kinds as methods, and as an object that is called."""

    def of_leaf(self, path: str, leaf: Any) -> bool:
        return of_leaf(path, leaf)

    def of_all(self, params: Any) -> Any:
        return of_all(params)

    def __call__(self, path: str, leaf: Any) -> bool:
        return of_leaf(path, leaf)


def with_options(path, leaf, *rest, least=2, **more):
    return leaf.ndim == least


def with_two_more(least, path, leaf):
    return leaf.ndim == least


@pytest.mark.parametrize(
    "mask",
    [
        of_leaf,
        with_options,
        functools.partial(with_two_more, 2),
        jax.tree_util.Partial(with_two_more, 2),
        jax.tree_util.Partial(lambda flag, path, leaf: flag and leaf.ndim == 2, True),
        Asked(),
        Asked().of_leaf,
        of_all,
        functools.partial(lambda least, params: of_all(params), 2),
        functools.wraps(of_all)(lambda *args: of_all(*args)),
        Asked().of_all,
    ],
)
def test_functions_are_told_apart_by_what_they_require(mask):
    assert chosen(mask) == KERNELS


def test_a_function_of_all_is_asked_once_in_an_update():
    asked = []

    def mask(params: Any) -> Any:
        asked.append(params)
        return of_all(params)

    tx = gx.add_decoupled_weight_decay(0.1, mask=mask)
    state = tx.init(PARAMS)
    asked.clear()
    tx.update(PARAMS, state, PARAMS)
    assert asked == [PARAMS]


def one_option(params, verbose=False):
    return of_all(params)


AMBIGUOUS = {
    "one and an option": one_option,
    "one and a keyword": lambda params, *, verbose=False: True,
    "one and any number": lambda params, *rest: True,
    "one and any keywords": lambda params, **rest: True,
    "any number": lambda *args: True,
    "none": lambda: True,
    "three": lambda path, leaf, params: True,
    "a keyword is required": lambda path, *, leaf: True,
    "one of two is given by keyword": functools.partial(of_leaf, leaf=0),
    "no signature": np.maximum.reduce,
    "a type": bool,
    "an optimizer": gx.adamw,
}


@pytest.mark.parametrize("mask", AMBIGUOUS.values(), ids=AMBIGUOUS)
@pytest.mark.parametrize("build", [gx.freeze, lambda mask: gx.adamw(0.1, mask=mask)], ids=["freeze", "adamw"])
def test_a_function_that_does_not_say_how_to_ask_it_is_refused_at_once(build, mask):
    with pytest.raises(
        TypeError, match=r"does not say by its arguments .* \(path, leaf\) .* Wrap it: lambda params:"
    ) as found:
        build(mask)
    assert len(str(found.value)) < 600


def test_the_refused_function_is_shown_as_it_is_written():
    with pytest.raises(
        TypeError, match=r"mask one_option\(params, verbose=False\) .* lambda params: one_option\(params\)"
    ):
        gx.freeze(one_option)


def test_a_mask_must_have_a_hash():
    with pytest.raises(TypeError, match="mask is a Unhashable without a hash"):
        gx.freeze(dataclasses.make_dataclass("Unhashable", [], namespace={"__call__": lambda self, path, leaf: True})())


def test_a_tree_of_booleans_is_read_even_if_it_can_be_called():
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, params)
    assert callable(mask)
    expected = {"layers/0/weight", "layers/1/weight"}
    assert chosen(mask, params) == chosen(jax.tree.map(jnp.asarray, mask), params) == expected
    assert chosen(of_all, params) == expected


# Where a function of all stands in another transformation, it is asked for the same tree


def decayed(tx: Any, params: Any = PARAMS) -> set[str]:
    """The paths of the leaves that decay."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = by_path(tx.update(zeros, tx.init(params), params)[0])
    return {path for path, update in updates.items() if np.any(update)}


def test_a_function_of_all_sees_every_leaf_of_its_chain_in_groups_and_beside_frozen_ones():
    seen = []

    def mask(params: Any) -> Any:
        seen.append(jax.tree.structure(params))
        return of_all(params)

    decay = gx.add_decoupled_weight_decay(0.5, mask=mask)
    groups = gx.by_path({"head/.*": decay, "pair/.*": gx.freeze()}, default=gx.identity())
    assert decayed(groups) == {"head/kernel"}
    assert decayed(gx.chain(gx.freeze("head/.*"), decay)) == {"layers/0/kernel", "layers/1/kernel"}
    assert decayed(gx.freeze(lambda params: jax.tree.map(lambda leaf: True, params))) == set()
    assert set(seen) == {jax.tree.structure(PARAMS)}


def test_a_function_of_all_sees_holes_where_a_wrapper_leaves_leaves_out():
    outer = {**TREE, "layers": [True, False]}
    expected = {"head/kernel", "layers/0/kernel"}
    assert decayed(optax.masked(gx.add_decoupled_weight_decay(0.5, mask=of_all), outer)) == expected
    with pytest.raises(
        ValueError, match=r"mask\(params\)\['head'\].bias is False, params\['head'\].bias is a MaskedNode"
    ):
        decayed(optax.masked(gx.add_decoupled_weight_decay(0.5, mask=lambda params: {**TREE, "layers": 0}), outer))


# What they answer


LARGE = {f"layer_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in range(100)}
LARGE_MASK = jax.tree.map(lambda leaf: leaf.ndim == 2, LARGE)
WITHOUT = {**LARGE_MASK, "layer_7": {"kernel": True}}
WITH = {**LARGE_MASK, "layer_7": {"kernel": True, "bias": False, "scale": True}}
LISTS = {**LARGE_MASK, "layer_7": [True, False]}
NONE = {**LARGE_MASK, "layer_7": {"kernel": True, "bias": None}}
NUMBER = {**LARGE_MASK, "layer_7": {"kernel": True, "bias": 0}}
PREFIX = {**LARGE_MASK, "layer_7": True}
PLACE = r"\['layer_7'\]"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (WITHOUT, rf"{{}}{PLACE}\['bias'\] is missing, params{PLACE}\['bias'\] is there"),
        (WITH, rf"{{}}{PLACE}\['scale'\] has no counterpart in params"),
        (LISTS, rf"{{}}{PLACE} is a list, params{PLACE} is a dict"),
        (NONE, rf"{{}}{PLACE}\['bias'\] is None, params{PLACE}\['bias'\] is a leaf"),
        (NUMBER, rf"{{}}{PLACE}\['bias'\] must be True or False, got 0"),
    ],
    ids=["missing", "more", "other container", "None", "number"],
)
def test_the_first_place_where_a_mask_differs_is_named_in_a_few_words(answer, words):
    for mask, name in ((answer, "mask"), (lambda params: answer, r"mask\(params\)")):
        with pytest.raises((ValueError, TypeError), match=words.format(name)) as found:
            gx.adamw(0.1, mask=mask).init(LARGE)
        assert len(str(found.value)) < 300


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (True, r"mask\(params\) is True, params is a dict"),
        (PREFIX, rf"mask\(params\){PLACE} is True, params{PLACE} is a dict"),
        (None, r"mask\(params\) is None, params is a dict"),
    ],
    ids=["one boolean", "prefix", "None"],
)
def test_a_function_of_all_answers_for_every_leaf(answer, words):
    with pytest.raises(ValueError, match=words) as found:
        gx.adamw(0.1, mask=lambda params: answer).init(LARGE)
    assert "has one argument, so gradxform calls mask(params) once" in found.value.__notes__[0]


def test_what_a_function_raises_tells_how_it_was_asked():
    for mask, words in (
        (lambda path: path.endswith("kernel"), "one argument, so gradxform calls mask(params)"),
        (lambda params, leaf: params["head"], "two arguments, so gradxform calls mask(path, leaf)"),
    ):
        with pytest.raises((AttributeError, TypeError)) as found:
            gx.adamw(0.1, mask=mask).init(PARAMS)
        assert words in found.value.__notes__[0]


def test_a_large_mask_is_shown_in_a_few_words():
    assert "mask=<a tree of 200 booleans, 100 of them True>" in repr(gx.adamw(0.1, mask=LARGE_MASK))


@pytest.mark.parametrize("params", [jnp.ones(2), 1.0])
def test_a_bare_array_has_the_empty_path(params):
    assert chosen(lambda path, leaf: path == "", params) == {""}
    assert chosen(".*", params) == {""}


def test_a_pattern_on_no_leaves_is_no_error():
    tx = gx.adamw(0.1, mask="kernel")
    assert tx.update({}, tx.init({}), {})[0] == {}


MEANT = {
    "kernel": "'.*/kernel'",
    "head": "'head/.*'",
    "layers/1": "'layers/1/.*'",
    "0": "'.*/0'",
    "kernel|bias": "'.*/(?:kernel|bias)'",
    "Layers/.*": "'(?i:Layers/.*)'",
    "layers/*/bias": "gx.glob('layers/*/bias')",
    "params/head/kernel": "'head/kernel'",
    "['layers'][1]['bias']": "'layers/1/bias'",
    "kernal": "'.*/kernel'",
    "haed/kernel": "'head/kernel'",
    "d/k": "'.*d/k.*'",
    re.compile("head"): "'head/.*'",
    re.compile("zzz"): None,
}
PATTERNS = {
    "mask": lambda pattern: gx.adamw(0.1, mask=pattern),
    "freeze": gx.freeze,
    "by_path": lambda pattern: gx.by_path({pattern: gx.sgd(0.1)}, default=gx.sgd(0.1)),
    "muon": lambda pattern: gx.muon(0.1, pattern, gx.sgd(0.1)),
    "observe": lambda pattern: gx.observe(gx.sgd(0.1), by={"part": pattern}),
}


@pytest.mark.parametrize("build", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(("pattern", "meant"), MEANT.items(), ids=map(str, MEANT))
def test_a_pattern_that_matches_no_whole_path_is_an_error_that_says_which_would(build, pattern, meant):
    remedy = f": did you mean {meant}?" if meant else ""
    with pytest.raises(ValueError, match=r"matches none of the paths .*it must match a whole path") as found:
        build(pattern).init(PARAMS)
    assert str(found.value).endswith("whole path" + remedy)
    if meant:
        meant = eval(meant, {"gx": gx})  # what the message says to write
        assert any(re.fullmatch(meant, path) for path in PATHS)


def test_paths_in_messages_are_few():
    with pytest.raises(ValueError, match=r"paths layer_\{0…99\}/bias, layer_\{0…99\}/kernel; it must") as found:
        gx.freeze("nothing").init(LARGE)
    many = {letter * n: jnp.ones(1) for letter in "abcdefgh" for n in range(1, 30)}
    with pytest.raises(ValueError, match=r"paths a, aa, aaa, aaaa, aaaaa, aaaaaa, … \(232 paths\); it must") as found:
        gx.freeze("nothing").init(many)
    assert len(str(found.value)) < 200
    with pytest.raises(ValueError, match=r"no pattern matches 'b', of 'a', .*, 'aaaaaa', …; add one") as found:
        gx.by_path({name: gx.sgd(0.1) for name in many if "a" in name}).init(many)


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


@pytest.mark.parametrize("mask", [TREE, ".*kernel", of_leaf, of_all], ids=["tree", "pattern", "leaf", "all"])
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
    "build",
    [lambda: TREE, lambda: ".*kernel", lambda: re.compile(".*kernel"), lambda: of_leaf, lambda: of_all],
    ids=["tree", "pattern", "compiled", "leaf", "all"],
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


@pytest.mark.parametrize("mask", [of_leaf, of_all])
def test_a_mask_works_on_shapes_alone(mask):
    tx = gx.adamw(0.1, mask=mask)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert jax.tree.structure(jax.eval_shape(tx.init, shapes)) == jax.tree.structure(tx.init(PARAMS))
