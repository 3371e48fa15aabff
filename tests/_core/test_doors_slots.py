"""Slots by shape, random keys, options that stay what they are; and what authors of rules get wrong."""

from __future__ import annotations

import copy
import pathlib
import pickle
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support import doors
from tests.support.doors import GRADIENTS, PARAMS, STEPS, assert_near, dog, draw, factored, noisy, polyak, trained_dog
from tests.support.trees import assert_same, gradient, signature

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import figures

pytestmark = pytest.mark.once


def passed_on(update, state, param, step):
    return update, state


def keeping(init: Any, update: Any = passed_on, **options: Any) -> gx.Transformation:
    """A rule that is called `mine`."""

    def mine(u, s, p, step):
        return update(u, s, p, step)

    mine.__qualname__ = "mine"
    return gx.lift(init, mine, **options)


def message_of(call: Any, error: Any) -> tuple[str, list[str]]:
    """What an error says, and its notes, without JAX's own."""
    with pytest.raises(error) as caught:
        call()
    notes = getattr(caught.value, "__notes__", [])
    return str(caught.value), [note for note in notes if not note.startswith("-")]


def step(tx: Any, params: Any = PARAMS, **extra: Any) -> Any:
    return tx.update(params, tx.init(params), params, **extra)


# Slots


SQUARE = {"kernel": draw(0, 64, 64), "wide": draw(1, 32, 128), "bias": draw(2, 8)}
SQUARE_GRADIENTS = {"kernel": draw(3, STEPS, 64, 64), "wide": draw(4, STEPS, 32, 128), "bias": draw(5, STEPS, 8)}


def whitened(role: Any = None) -> gx.Transformation:
    """A rule with a factor of each matrix, as Shampoo has it, that is of the kernel's own shape where it is square."""

    def init(param):
        state = {"mu": jnp.zeros_like(param)}
        if param.ndim == 2:
            state["left"] = gx.Slot(jnp.eye(param.shape[0], dtype=param.dtype), axes=(0, None), role=role)
        return state

    def update(update, state, param, step):
        new = {"mu": step.keep("mu", 0.5 * state["mu"] + update)}
        if "left" in state:
            new["left"] = state["left"] + update @ update.T
        return new["mu"], new

    return gx.lift(init, update, slots=("mu", "left"))


@pytest.mark.parametrize("role", [None, "signed", "non_negative", "kept"])
def test_the_factor_of_a_square_kernel_is_no_moment(role):
    """A bug report: it was kept in codes, or refused as a field that nobody knows, only because it has the shape."""
    tx = gx.quantize_state(whitened(role))
    _, state = doors.donated(tx, SQUARE, SQUARE_GRADIENTS)
    assert state.codes["mu"]["kernel"].dtype == state.codes["mu"]["wide"].dtype == jnp.int8
    assert not jax.tree.leaves(state.codes.get("left", {}))
    _, exact = doors.donated(whitened(role), SQUARE, SQUARE_GRADIENTS)
    assert_same(state.inner.left, exact.left)


def test_a_slot_is_coded_by_its_role():
    def init(param):
        return {
            "first": gx.Slot(jnp.zeros_like(param), role="signed"),
            "second": gx.Slot(jnp.zeros_like(param), axes=(0, 1) if param.ndim == 2 else None, role="non_negative"),
            "third": gx.Slot(param, role="kept"),
        }

    tx = gx.quantize_state(gx.lift(init, passed_on))
    state = tx.init(SQUARE)
    assert sorted(state.codes) == ["first", "second"]
    assert isinstance(state.codes["second"]["bias"], optax.MaskedNode)
    assert_same(state.inner.third, SQUARE)
    told = gx.describe(tx, SQUARE, show=False)
    assert told.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_a_slot_whose_role_is_unknown_is_named():
    unknown = gx.lift(lambda param: {"past": jnp.zeros_like(param)}, passed_on)
    tx = gx.quantize_state(unknown)
    message, _ = message_of(lambda: tx.init(SQUARE), ValueError)
    assert "does not know what the state field 'past'" in message
    assert "say fields={'past': …}" in message
    told = gx.quantize_state(unknown, fields={"past": "signed"})
    assert told.init(SQUARE).codes["past"]["kernel"].dtype == jnp.int8


def test_coded_slots_by_shape_walk_like_exact_ones():
    params = {"vector": draw(0, 4096), "kernel": draw(1, 4, 3)}
    gradients = {"vector": draw(2, STEPS, 4096), "kernel": draw(3, STEPS, 4, 3)}
    tx = gx.chain(factored(), gx.scale_by_learning_rate(0.1))
    trained, state = doors.donated(gx.quantize_state(tx), params, gradients)
    assert state.codes["nu"]["vector"].dtype == jnp.uint8  # of a moment that is never negative
    assert_near(trained, doors.factored_twin(params, gradients), rtol=1e-2)


@pytest.mark.parametrize("codec", ["root8", "companded8", "dynamic8", "dynamic4", "bfloat16"])
def test_a_coded_leaf_is_seen_whole_by_rules_that_ask_for_its_shape(codec):
    """Where decoding looks numbers up, a step goes over runs of blocks, which have other shapes than the leaf."""
    params = {"vector": draw(0, 1 << 15)}

    def init(param):
        return {"nu" if param.ndim == 1 else "mu": jnp.zeros_like(param)}

    def update(update, state, param, step):
        assert update.ndim == 1
        nu = step.keep("nu", state["nu"] + update**2)
        return update / jnp.sqrt(nu), {"nu": nu}

    tx = gx.quantize_state(gx.lift(init, update, slots=("mu", "nu")), codec)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["vector"], np.sign(params["vector"]), rtol=1e-3)


@pytest.mark.parametrize("codec", ["root8", "dynamic8"])
def test_a_coded_leaf_draws_every_number_by_itself(codec):
    params = {"vector": jnp.zeros(1 << 18)}  # two runs

    def update(update, state, param, step):
        noise = jax.random.normal(step.key, update.shape, update.dtype)
        return noise, {"mu": step.keep("mu", update)}

    tx = gx.quantize_state(gx.lift(lambda param: {"mu": jnp.zeros_like(param)}, update, key=0), codec)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert len(np.unique(updates["vector"])) > 0.9 * params["vector"].size


def test_slots_by_shape_cost_no_array():
    if jaxlib.__version__ != "0.10.2":
        pytest.skip("the figures are those of one version of XLA")
    params = {
        "kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    tx = gx.chain(factored(), gx.scale_by_learning_rate(0.1))
    found = figures.of_step(tx, params, lambda tx, *arguments: gx.step(tx, *arguments), least=1 << 20)
    assert found.copies == 0
    assert found.temporaries < 4.01  # the squares, which two sums read (X3)
    assert found.state < 0.01


def test_names_that_depend_on_the_shape_must_be_named():
    tx = keeping(lambda param: {"rows": param[0]} if param.ndim == 2 else {"nu": param})
    message, notes = message_of(lambda: tx.init(PARAMS), ValueError)
    assert "init gives other names than nu for a leaf of shape (4, 3); name all: lift(slots=(…))" in message
    assert notes == ["for params['kernel']"]


def test_an_init_that_needs_an_axis_hears_of_slots():
    tx = keeping(lambda param: {"rows": jnp.zeros(param.shape[0])})
    _, notes = message_of(lambda: tx.init({"w": jnp.ones((2, 3))}), IndexError)
    assert notes[0] == "in init of mine"
    assert "it was asked for a 0-d array; if the names depend on the shape, say slots=(…)" in notes[1]
    assert len(notes) == 2


def test_a_name_that_slots_do_not_tell():
    tx = keeping(lambda param: {"nu": param, "mu": param}, slots=("nu",))
    message, notes = message_of(lambda: tx.init(PARAMS), ValueError)
    assert message == "init of mine gives 'mu', which is not one of slots=('nu',)"
    assert notes == ["in init of mine", "for params['bias']"]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((0,), "axes of 'nu' in mine must tell of 2 axes, got (0,)"),
        ((0, 2), "axes of 'nu' in mine must be None or axes of its parameter, from 0 to 1, got (0, 2)"),
        ((-2, -1), "axes of 'nu' in mine must be None or axes of its parameter, from 0 to 1, got (-2, -1)"),
    ],
)
def test_axes_are_those_of_the_parameter(axes, words):
    tx = keeping(lambda param: {"nu": gx.Slot(jnp.zeros_like(param), axes=axes)}, slots=("nu",))
    message, notes = message_of(lambda: tx.init({"w": jnp.ones((2, 3))}), ValueError)
    assert message == words
    assert notes == ["in init of mine", "for params['w']"]


def test_a_slot_has_a_dtype_of_its_own():
    def init(param):
        return {
            "mu": gx.Slot(jnp.zeros_like(param), dtype=jnp.bfloat16),
            "nu": gx.Slot(jnp.zeros_like(param), dtype="float32"),
            "past": jnp.zeros_like(param),
            "times": jnp.zeros(param.shape, jnp.int32),
        }

    def update(update, state, param, step):
        mu = step.keep("mu", 0.5 * state["mu"] + update)
        return mu, {"mu": mu, "nu": state["nu"] + update, "past": update, "times": state["times"] + 1}

    tx = gx.lift(init, update, state_dtype="float16", slots=("mu", "nu", "past", "times"))
    trained, state = doors.donated(tx, PARAMS, GRADIENTS)
    dtypes = {name: getattr(state, name)["kernel"].dtype for name in ("mu", "nu", "past", "times")}
    assert dtypes == {"mu": jnp.bfloat16, "nu": jnp.float32, "past": jnp.float16, "times": jnp.int32}
    assert signature(state) == signature(tx.init(PARAMS))
    assert (state.times["kernel"] == STEPS).all()
    eager, _ = doors.by_hand(tx, PARAMS, GRADIENTS)
    assert_near(eager, trained, rtol=1e-6)


def test_a_dtype_of_its_own_goes_with_slots():
    tx = keeping(lambda param: {"mu": gx.Slot(param, dtype=jnp.bfloat16)})
    message, _ = message_of(lambda: tx.init(PARAMS), ValueError)
    assert message == "init of mine gives 'mu' a dtype of its own: name all that it keeps, slots=(…)"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_narrow_slot_is_rounded_at_random(compiled):
    tx = gx.lift(
        lambda param: {"mu": gx.Slot(jnp.zeros_like(param), dtype=jnp.bfloat16)},
        lambda u, s, p, step: (u, {"mu": step.keep("mu", s["mu"] + u)}),
        slots=("mu",),
    )
    update = jax.jit(tx.update) if compiled else tx.update
    ones = {"w": jnp.ones(1000)}
    _, state = update({"w": jnp.full(1000, 256.0)}, tx.init(ones))
    for _ in range(3):
        _, state = update({"w": jnp.linspace(0.1, 1, 1000)}, state)
    # rounded at random, so right in the mean: to the nearest bfloat16, 256 would stay
    assert 256.5 < float(state.mu["w"].astype(jnp.float32).mean()) < 259


def test_nothing_twice_where_a_slot_is_the_parameter():
    tx = gx.lift(lambda param: {"a": param, "b": gx.Slot(param, role="kept")}, passed_on, slots=("a", "b"))
    params = {"w": draw(0, 3)}
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        given = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, params))}
        assert len(given) == len(jax.tree.leaves((state, params)))


def test_blocks_along_an_axis_are_traced_as_they_are_made():
    def init(param):
        return {"blocks": gx.Slot(jnp.zeros(param.shape[0] // 2), axes=(0,))}

    tx = gx.lift(init, passed_on, slots=("blocks",))
    params = {"w": jnp.ones((8, 3))}
    assert_same(jax.jit(tx.init)(params), tx.init(params))
    assert jax.eval_shape(tx.init, params).blocks["w"].shape == (4,)


def test_none_for_a_leaf_without_state():
    state = factored().init(PARAMS)
    assert isinstance(state.rows["bias"], optax.MaskedNode)
    assert isinstance(state.nu["kernel"], optax.MaskedNode)
    assert state.rows["kernel"].shape == (4,)
    with pytest.raises(ValueError, match=r"state\.rows\['bias'\] is float32\[3\], but this leaf has no such state"):
        factored().update(PARAMS, state._replace(rows=state.rows | {"bias": jnp.zeros(3)}), PARAMS)


def test_a_state_of_two_equal_rules_by_shape_has_numbered_fields():
    tx = gx.chain(factored(), factored())
    assert tx.init(PARAMS)._fields == ("count", "columns", "columns_2", "nu", "nu_2", "rows", "rows_2")
    step(tx)


def test_a_branch_may_have_slots_by_shape():
    tx = gx.normalize_by_rms(0.9, of=factored())
    state = tx.init(PARAMS)
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert isinstance(state.rows["bias"], optax.MaskedNode)
    alone, _ = step(factored())
    plain, _ = step(gx.normalize_by_rms(0.9))
    assert set(updates) == set(alone) == set(plain)
    np.testing.assert_allclose(updates["bias"] * PARAMS["bias"], plain["bias"] * alone["bias"], rtol=1e-5)


def test_leaves_may_go_through_slots_by_shape_stacked():
    tx = gx.lift(_scaled_start, _scaled, slots=("rows",), batched=True)
    params = {"a": draw(0, 4, 3), "b": draw(1, 4, 3), "c": draw(2, 3)}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert_near(updates, {n: leaf * (np.asarray(leaf).sum() if leaf.ndim == 2 else 1) for n, leaf in params.items()})
    assert state.rows["a"].shape == (4,)


def _scaled_start(param):
    return {"rows": jnp.zeros(param.shape[0])} if param.ndim == 2 else {}


def _scaled(update, state, param, step):
    if not state:
        return update, state
    rows = state["rows"] + jnp.sum(update, 1)
    return update * jnp.sum(rows), {"rows": rows}


# Random keys


def noise_of(tx: Any, params: Any, state: Any = None, compiled: bool = False) -> Any:
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params) if state is None else state
    return (jax.jit(tx.update) if compiled else tx.update)(zeros, state, params)


ONES = {name: jnp.ones(100) for name in "abc"}


def test_leaves_steps_and_stages_draw_other_numbers():
    first, state = noise_of(noisy(), ONES)
    second, _ = noise_of(noisy(), ONES, state)
    draws = [*first.values(), *second.values()]
    both, _ = noise_of(gx.chain(noisy(), gx.scale(0.0), noisy()), ONES)
    draws += both.values()
    drawn = np.stack(draws)
    assert len(np.unique(drawn)) == drawn.size
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.5


def test_two_stages_with_one_seed_in_passes_of_their_own_draw_other_numbers():
    norm = gx.clip_by_global_norm(1e9)
    one, _ = noise_of(gx.chain(noisy(), norm, gx.scale(0.0), noisy()), ONES)
    other, _ = noise_of(noisy(), ONES)
    assert len(np.intersect1d(one["a"], other["a"])) == 0
    state = gx.chain(noisy(), norm, noisy(), norm, noisy(key=3)).init(ONES)
    seeds = [np.asarray(getattr(state, name)).tolist() for name in ("seed", "seed_2", "seed_3")]
    assert len({tuple(seed) for seed in seeds}) == 3


def test_a_seed_tells_everything():
    one, state = noise_of(noisy(key=3), ONES)
    assert_same(noise_of(noisy(key=3), ONES)[0], one)
    assert_same(noise_of(noisy(key=3), ONES, compiled=True)[0], one)
    assert_same(noise_of(noisy(key=np.int64(3)), ONES)[0], one)
    assert len(np.intersect1d(noise_of(noisy(key=4), ONES)[0]["a"], one["a"])) == 0
    assert state.seed.dtype == jnp.uint32
    assert state.seed.shape == (2,)
    assert noisy(key=3) == noisy(key=3)
    assert noisy(key=3) != noisy(key=4)
    assert repr(noisy(key=3)) == "noisy(0.5, key=3)"


def test_a_key_of_jax_typed_or_raw_is_a_seed():
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    one, _ = noise_of(noisy(key=typed), ONES)
    assert_same(noise_of(noisy(key=raw), ONES)[0], one)
    assert_same(noise_of(noisy(key=3), ONES)[0], one)
    noise_of(noisy(key=jax.random.key(3, impl="rbg")), ONES)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
def test_a_transformation_that_holds_a_key_is_copied(key):
    tx = noisy(key=key)
    for duplicate in (copy.deepcopy(tx), pickle.loads(pickle.dumps(tx))):
        assert_same(noise_of(duplicate, ONES)[0], noise_of(tx, ONES)[0])
        assert_same(duplicate.init(ONES), tx.init(ONES))


def test_a_copy_is_not_equal_to_a_stranger_at_the_originals_address():
    copies = [pickle.loads(pickle.dumps(noisy(key=jax.random.key(0)))) for _ in range(30)]
    others = [noisy(key=jax.random.key(1)) for _ in range(300)]
    assert not set(copies) & set(others)


@pytest.mark.parametrize("key", [1.5, True, "0", jnp.ones(2), jax.random.split(jax.random.key(0))])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match="key must be a whole number or a key"):
        noisy(key=key)


def test_members_of_a_batch_may_have_seeds_of_their_own():
    state = noisy().init(ONES)
    states = jax.vmap(lambda key: noisy(key=key).init(ONES))(jax.random.split(jax.random.key(0), 2))
    assert states.seed.shape == (2, *state.seed.shape)
    zeros = jax.tree.map(jnp.zeros_like, ONES)
    noise, _ = jax.vmap(noisy().update, in_axes=(None, jax.tree.map(lambda _: 0, states)))(zeros, states)
    assert len(np.intersect1d(noise["a"][0], noise["a"][1])) == 0


def test_keys_of_mini_batches_and_of_groups():
    tx = gx.accumulate(noisy(), 2)
    _, state = noise_of(tx, ONES)
    noise, state = noise_of(tx, ONES, state)
    alone, _ = noise_of(noisy(), ONES)
    assert_same(noise, alone)
    groups = gx.by_path({"a": noisy(1.0)}, default=noisy(0.5))
    apart, state = noise_of(groups, ONES)
    assert len(np.intersect1d(apart["a"], apart["b"])) == 0
    assert 0.7 < float(apart["a"].std()) < 1.3
    assert_same(state.seed, noisy().init(ONES).seed)


def test_a_key_in_a_stacked_rule_is_the_leafs_own():
    tx = gx.lift(None, doors._noisy_step, key=0, deviation=0.5, batched=True)
    noise, _ = noise_of(tx, ONES)
    assert_same(noise, noise_of(gx.lift(None, doors._noisy_step, key=0, deviation=0.5), ONES)[0])


# Options


def test_plain_options_stay_what_they_are():
    seen: list[Any] = []

    def update(update, state, param, step):
        seen.append((step.axis, step.flag, step.sizes, step.function))
        return step.function(update), state

    tx = keeping(None, update, axis=0, flag=False, sizes=(1, (2, 0.5)), function=jnp.negative)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    assert_same(updates, jax.tree.map(jnp.negative, PARAMS))
    assert {repr(each) for each in seen} == {repr((0, False, (1, (2, 0.5)), jnp.negative))}
    assert "axis=0" in repr(tx)
    assert gx.get_hyperparams(tx.init(PARAMS)) == {}


def test_equal_options_of_other_types_are_others():
    seen: list[Any] = []

    def update(update, state, param, step):
        seen.append(step.axis)
        return update, state

    for axis in (False, 0, True, 1, (0, 1), (False, True), (0.0, 1.0)):
        for run in (lambda tx: tx.update, lambda tx: jax.jit(tx.update)):
            seen.clear()
            tx = gx.lift(None, update, axis=axis)
            run(tx)({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))
            assert {repr(each) for each in seen} <= {repr(axis)}
            assert repr(axis) in repr(tx) or axis is False
    assert gx.lift(None, update, axis=0) != gx.lift(None, update, axis=False)
    assert gx.lift(None, update, axis=(0, 1)) == gx.lift(None, update, axis=(0, 1))


def test_a_number_with_a_range_is_a_hyperparameter():
    tx = keeping(None, lambda u, s, p, step: (step.rate * u, s), rate=gx.positive(2), power=gx.live(1.0))
    assert set(gx.get_hyperparams(tx.init(PARAMS))) >= {"power"}
    assert_same(step(tx)[0], jax.tree.map(lambda leaf: 2 * leaf, PARAMS))


# Authors' mistakes


def mine(update: Any = passed_on, init: Any = lambda param: {"mu": jnp.zeros_like(param)}, **options: Any) -> Any:
    return lambda: step(keeping(init, update, **options), {"w": jnp.ones((2, 3))})


GATHERS = {"totals": lambda u, s, p, step: {"sum": jnp.sum(u)}, "gather": lambda total, step: {"all": total["sum"]}}
LEAF = "for updates['w']"
UPDATE = ["in update of mine", LEAF]
PREPARE, GATHER, TOTALS = (["in prepare of mine"], ["in gather of mine"], ["in totals of mine", LEAF])


def gathering(gather: Any, **options: Any) -> Any:
    return mine(totals=GATHERS["totals"], gather=gather, **options)


MISTAKES = {
    "no state": (mine(lambda u, s, p, step: u), TypeError, "update of mine must return the new update and", UPDATE),
    "a list as state": (mine(lambda u, s, p, step: (u, [s["mu"]])), TypeError, "and the new state, a dict", UPDATE),
    "three things": (mine(lambda u, s, p, step: (u, s, s)), TypeError, "update of mine must return", UPDATE),
    "nothing": (mine(lambda u, s, p, step: None), TypeError, "it returned None", UPDATE),
    "a number as update": (mine(lambda u, s, p, step: (0.0, s)), TypeError, "mine turned an update of shape", UPDATE),
    "what does not fit": (mine(lambda u, s, p, step: (u @ u, s)), TypeError, "", UPDATE),
    "an unknown name": (mine(lambda u, s, p, step: (u * step.rat, s), rate=0.1), AttributeError, "no 'rat'", UPDATE),
    "keeps another": (mine(lambda u, s, p, step: (step.keep("nu", u), s)), ValueError, "mine keeps 'nu'", UPDATE),
    "prepare gives an argument": (
        mine(rate=0.1, prepare=lambda step: {"rate": step.rate * 2}),
        ValueError,
        "'rate' is an argument of mine: prepare and gather must give other names",
        None,
    ),
    "prepare gives number": (
        mine(prepare=lambda step: {"number": step.number + 1}),
        ValueError,
        "'number' is in every step, also of mine: prepare and gather must give other names",
        None,
    ),
    "prepare gives keep": (mine(prepare=lambda step: {"keep": step.number}), ValueError, "'keep' is in every", None),
    "prepare fails": (mine(prepare=lambda step: {"x": step.nothing}), AttributeError, "has no 'nothing'", PREPARE),
    "prepare gives no dict": (mine(prepare=lambda step: step.number), TypeError, "", PREPARE),
    "gather gives an argument": (
        gathering(lambda total, step: {"rate": 0.5}, rate=0.1),
        ValueError,
        "'rate' is an argument of mine: prepare and gather must give other names",
        None,
    ),
    "gather gives number": (gathering(lambda total, step: {"number": 0.5}), ValueError, "'number' is in every", None),
    "gather fails": (gathering(lambda total, step: {"all": total["som"]}), KeyError, "som", GATHER),
    "gather forgets": (
        mine(**GATHERS, memory={"past": 0.0}),
        KeyError,
        "gather must return 'past', which the rule remembers or reports",
        GATHER,
    ),
    "gather reports nothing": (mine(**GATHERS, reports=("past",)), KeyError, "gather must return 'past'", GATHER),
    "gather changes a shape": (
        gathering(lambda total, step: {"past": jnp.ones(3)}, memory={"past": (0.0, 0.0)}),
        ValueError,
        "'past' has the shape (2,) in memory, now (3,)",
        GATHER,
    ),
    "memory fails": (
        gathering(lambda total, step: {"past": 0.0}, memory={"past": lambda params: params["w"]}),
        TypeError,
        "",
        ["in memory 'past' of mine"],
    ),
    "totals fail": (
        mine(totals=lambda u, s, p, step: {"sum": s["nu"]}, gather=GATHERS["gather"]),
        KeyError,
        "nu",
        TOTALS,
    ),
    "totals give no dict": (
        mine(totals=lambda u, s, p, step: jnp.sum(u), gather=GATHERS["gather"]),
        TypeError,
        "",
        TOTALS,
    ),
    "init gives no dict": (mine(init=lambda param: param), TypeError, "init of mine must give a dict of arrays", None),
    "init gives a number": (mine(init=lambda param: {"mu": 0.0}), TypeError, "init of mine gives float for 'mu'", None),
    "init fails for a shape": (
        mine(init=lambda param: {"mu": param.reshape(5)}, slots=("mu",)),
        TypeError,
        "",
        ["in init of mine", "for params['w']"],
    ),
    "memory alone": (mine(memory={"past": 0.0}), TypeError, "memory, reports and rescales go with gather", []),
    "totals alone": (mine(totals=GATHERS["totals"]), TypeError, "totals go with gather", []),
    "measure and totals": (mine(**GATHERS, measure=lambda u: {}), TypeError, "two ways to look at all leaves", []),
    "an argument called number": (mine(number=1.0), ValueError, "mine: every step has 'number' itself", []),
    "an argument called keep": (mine(keep=1.0), ValueError, "mine: every step has 'keep' itself", []),
    "memory called key": (mine(**GATHERS, memory={"key": 0.0}), ValueError, "mine: every step has 'key' itself", []),
    "an extra called number": (mine(extra=("number",)), ValueError, "mine: every step has 'number' itself", []),
    "a name twice": (
        mine(**GATHERS, memory={"value": 0.0}, extra=("value",)),
        ValueError,
        "mine: 'value' is given twice among arguments, memory and extra",
        [],
    ),
    "memory called count": (
        gathering(lambda total, step: {"count": total["sum"]}, memory={"count": 0.0}),
        ValueError,
        "every step has 'count' itself",
        [],
    ),
    "a branch with a key": (mine(of=noisy()), TypeError, "of of mine must be made of transformations that act", []),
    "a branch with totals": (mine(of=dog()), TypeError, "of of mine must be made of", []),
    "a branch that reads the loss": (mine(of=polyak()), TypeError, "of of mine must be made of", []),
}


@pytest.mark.parametrize(("call", "error", "words", "notes"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_the_rule_and_the_leaf(call, error, words, notes):
    message, found = message_of(call, error)
    assert words in message
    if notes is not None:
        assert found == notes


@pytest.mark.parametrize(
    "wrap",
    [gx.skip_nonfinite, lambda tx: gx.accumulate(tx, 2), gx.observe, gx.quantize_state, gx.master_weights],
    ids=["skip", "accumulate", "observe", "quantize", "master"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mistake_in_a_wrapper_is_noted_once(wrap, compiled):
    tx = wrap(keeping(lambda param: {"mu": jnp.zeros_like(param)}, lambda u, s, p, step: u))
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    _, notes = message_of(
        lambda: [update(params, state, params), update(params, update(params, state, params)[1], params)], TypeError
    )
    own = [note for note in notes if "mine" in note or "updates" in note]
    assert own == ["in update of mine", "for updates['w']"]


def test_totals_that_differ_by_leaf_are_refused():
    def totals(update, state, param, step):
        return {"sum": jnp.sum(update)} if update.ndim == 2 else {"size": jnp.sum(update)}

    tx = keeping(None, totals=totals, gather=lambda total, step: {"all": total["sum"]})
    message, _ = message_of(lambda: step(tx), ValueError)
    assert "totals must be the same for every leaf" in message


def test_axis_name_goes_with_what_looks_at_all_leaves():
    with pytest.raises(TypeError, match="axis_name goes with measure, totals or key"):
        gx.lift(None, passed_on, axis_name="x")
    assert repr(trained_dog().body.stages[0]) == "dog(0.5)"
    assert repr(dog(axis_name="x")) == "dog(0.5, axis_name='x')"


def test_slots_are_known_to_tree_map_params():
    tx = gx.quantize_state(gx.chain(factored(), gx.momentum(0.1)), min_size=256)
    params = {"kernel": jnp.ones((16, 16)), "vector": jnp.ones(256)}
    state = tx.init(params)
    grads = gradient(jax.tree.map(lambda leaf: leaf[None], params), 0)
    doubled = optax.tree_map_params(tx, lambda leaf: leaf, state)
    assert_same(doubled, state)
    tx.update(grads, doubled, params)
