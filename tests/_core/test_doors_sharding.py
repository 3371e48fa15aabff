"""On eight devices a rule of each door does what it does on one, and what it keeps is divided as its parameter is.

pytest runs this file once as a script, in a process whose CPU poses as eight devices; one test per check reads how
it went.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradxform as gx
from tests.support import doors
from tests.support.doors import LOSSES, STEPS, draw
from tests.support.eight_devices import judge, outcomes_of, report
from tests.support.trees import signature

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


SPECS = {"bias": P(), "columns": P(None, "x"), "rows": P("x", None)}
PARAMS = {"bias": draw(0, 24), "columns": draw(1, 24, 8), "rows": draw(2, 16, 24)}
GRADIENTS = {name: draw(seed, STEPS, *leaf.shape) for seed, (name, leaf) in enumerate(PARAMS.items(), 10)}
AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
RULES = {name: tx for name, (tx, _) in doors.RULES.items()}


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("x",), axis_types=(axis_type,))


def place(tree, axis_type=AxisType.Auto, lead=0):
    shardings = {name: NamedSharding(mesh(axis_type), P(*[None] * lead, *spec)) for name, spec in SPECS.items()}
    return {name: jax.device_put(leaf, shardings[name]) for name, leaf in tree.items()}


@functools.cache
def on_one_device(door):
    return doors.donated(RULES[door], PARAMS, GRADIENTS)


def assert_same_walk(actual, expected):
    """Equal but for sums over leaves, which eight devices add up in another order."""

    def same(one, other):
        assert one.dtype == other.dtype
        largest = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=0 if one.dtype == np.uint32 else 2e-6 * largest)

    jax.tree.map(same, actual, expected)


def assert_divided(array, spec):
    assert array.sharding.is_equivalent_to(NamedSharding(mesh(), spec), array.ndim), (array.shape, array.sharding)


def like_params(state):
    """The fields that are trees of arrays in the shapes of the parameters."""
    fields = [field for field in state if isinstance(field, dict) and field.keys() == SPECS.keys()]
    inner = [one for field in state if hasattr(field, "_fields") for one in like_params(field)]
    return [{n: x for n, x in field.items() if hasattr(x, "shape")} for field in fields] + inner


def assert_placed(state):
    for field in like_params(state):
        for name, leaf in field.items():
            if leaf.shape == PARAMS[name].shape:
                assert_divided(leaf, SPECS[name])
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 8, leaf.sharding


@check
def a_walk_on_eight_devices_is_that_of_one():
    for axis_type in AXIS_TYPES:
        params, gradients = place(PARAMS, axis_type), place(GRADIENTS, axis_type, lead=1)
        for door, tx in RULES.items():
            actual = doors.donated(tx, params, gradients)
            assert_same_walk(actual, on_one_device(door))
            assert_placed(actual[1])
            for name, leaf in actual[0].items():
                assert_divided(leaf, SPECS[name])
            assert signature(actual[1]) == signature(tx.init(params)), door


@check
def updates_outside_jit_are_those_of_one():
    params, gradients = place(PARAMS), place(GRADIENTS, lead=1)
    for door, tx in RULES.items():
        assert_same_walk(doors.by_hand(tx, params, gradients), on_one_device(door))


@check
def wrappers_around_a_rule_on_eight_devices():
    tx = gx.observe(gx.skip_nonfinite(gx.accumulate(RULES["totals"], 1)))
    for axis_type in AXIS_TYPES:
        params, gradients = place(PARAMS, axis_type), place(GRADIENTS, axis_type, lead=1)
        trained, state = doors.donated(tx, params, gradients)
        assert_same_walk(trained, on_one_device("totals")[0])
        assert_placed(state)


@check
def views_on_eight_devices():
    for door, tx in {"view": RULES["view"], "low": gx.master_weights(RULES["view"])}.items():
        dtype = jnp.bfloat16 if door == "low" else jnp.float32
        start = {name: leaf.astype(dtype) for name, leaf in PARAMS.items()}
        params, state = doors.donated(tx, start, GRADIENTS)
        expected = gx.eval_params(tx, state, params)
        for axis_type in AXIS_TYPES:
            there, state = doors.donated(tx, place(start, axis_type), place(GRADIENTS, axis_type, lead=1))
            for view in (gx.eval_params, jax.jit(gx.eval_params, static_argnums=0)):
                seen = view(tx, state, there)
                for name, leaf in seen.items():
                    assert_divided(leaf, SPECS[name])
                    np.testing.assert_allclose(
                        leaf.astype(jnp.float32),
                        expected[name].astype(jnp.float32),
                        rtol=2**-8 if door == "low" else 1e-5,
                    )


# What init makes


def with_axes(param):
    """Slots whose axes are some of the parameter's, with others beside them."""
    if param.ndim != 2:
        return {"mu": jnp.zeros_like(param)}
    first, second = param.shape
    return {
        "rows": gx.Slot(jnp.ones(first), axes=(0,)),
        "columns": gx.Slot(jnp.ones(second), axes=(1,)),
        "left": gx.Slot(jnp.eye(first), axes=(0, None)),
        "turned": gx.Slot(jnp.zeros((second, first)), axes=(1, 0)),
        "history": gx.Slot(jnp.zeros((5, first, second)), axes=(None, 0, 1)),
        "square": gx.Slot(jnp.zeros((first, first)), axes=(0, 0)),
        "nothing": gx.Slot(jnp.zeros(3), axes=(None,)),
        "mu": jnp.sort(param.reshape(-1, 3), axis=0).reshape(param.shape),  # which says nothing of how it is divided
    }


WITH_AXES = ("rows", "columns", "left", "turned", "history", "square", "nothing", "mu")
DIVIDED = {
    "rows": {"rows": P("x"), "columns": P()},
    "columns": {"rows": P(), "columns": P("x")},
    "left": {"rows": P("x", None), "columns": P()},
    "turned": {"rows": P(None, "x"), "columns": P("x", None)},
    "history": {"rows": P(None, "x", None), "columns": P(None, None, "x")},
    "square": {"rows": P("x", None), "columns": P()},
    "nothing": {"rows": P(), "columns": P()},
    "mu": SPECS,
}


def passed_on(update, state, param, step):
    return update, state


@check
def slots_are_divided_along_the_axes_of_their_parameter():
    tx = gx.lift(with_axes, passed_on, slots=WITH_AXES)
    alone = tx.init(PARAMS)
    for axis_type in AXIS_TYPES:
        params = place(PARAMS, axis_type)
        for named in (False, True):
            with jax.set_mesh(mesh(axis_type)) if named else jax.disable_jit(False):
                for init in (tx.init, jax.jit(tx.init)):
                    state = init(params)
                    for field, specs in DIVIDED.items():
                        for name, spec in specs.items():
                            array = getattr(state, field)[name]
                            np.testing.assert_array_equal(array, getattr(alone, field)[name])
                            if field in ("nothing",) or spec == P():
                                assert len(array.sharding.device_set) == 8, (field, name, array.sharding)
                            else:
                                assert_divided(array, spec)


@check
def slots_of_a_rule_whose_names_are_the_same_for_all_shapes():
    def init(param):
        axes = (None, *range(param.ndim))
        return {"past": gx.Slot(jnp.zeros((2, *param.shape), param.dtype), axes=axes), "mu": jnp.zeros_like(param)}

    tx = gx.lift(init, passed_on)
    for axis_type in AXIS_TYPES:
        params = place(PARAMS, axis_type)
        for init_of in (tx.init, jax.jit(tx.init)):
            state = init_of(params)
            for name, spec in SPECS.items():
                assert_divided(state.past[name], P(None, *spec))
                assert_divided(state.mu[name], spec)


class Heard(logging.Handler):
    """What is logged while it listens."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.messages = []

    def emit(self, record):
        self.messages.append((record.levelname, record.getMessage()))

    def __enter__(self):
        self.logger = logging.getLogger("gradxform")
        self.level = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_):
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level)


@check
def an_axis_that_does_not_divide_is_replicated_and_told():
    def init(param):
        return {"blocks": gx.Slot(jnp.zeros(param.shape[0] // 4), axes=(0,))}

    tx = gx.lift(init, passed_on, slots=("blocks",))
    for axis_type in AXIS_TYPES:
        params = {"rows": place(PARAMS, axis_type)["rows"]}
        for compiled in (False, True):
            with Heard() as heard:
                state = (jax.jit(tx.init) if compiled else tx.init)(params)
            assert state.blocks["rows"].shape == (4,)
            assert state.blocks["rows"].sharding.is_fully_replicated
            assert len(state.blocks["rows"].sharding.device_set) == 8
            if not compiled or axis_type == AxisType.Explicit:  # elsewhere the types of arrays do not tell
                [(level, text), *_] = heard.messages
                assert level == "INFO"
                assert "an array of shape (4,) of the state of params['rows'] is replicated" in text


@check
def blocks_that_divide_are_divided():
    def init(param):
        return {"blocks": gx.Slot(jnp.zeros(param.shape[0] // 2), axes=(0,))}

    tx = gx.lift(init, passed_on, slots=("blocks",))
    for axis_type in AXIS_TYPES:
        params = {"rows": place(PARAMS, axis_type)["rows"]}
        assert_divided(tx.init(params).blocks["rows"], P("x"))
        assert len(jax.jit(tx.init)(params).blocks["rows"].sharding.device_set) == 8


@check
def init_of_shapes_divides_slots_as_well():
    tx = gx.lift(with_axes, passed_on, slots=tuple(name for name in WITH_AXES))
    tx = doors.factored()
    params = place(PARAMS)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    state = tx.init(shapes)
    assert_divided(state.rows["rows"], P("x"))
    assert_divided(state.columns["columns"], P("x"))
    assert_divided(state.nu["bias"], P())


@check
def memory_from_the_parameters_is_on_all_devices():
    def flat(params):
        return sum((jnp.sum(jnp.sort(leaf.reshape(-1))) for leaf in params), start=jnp.zeros(()))

    tx = gx.lift(None, passed_on, gather=lambda measured, step: {"all": step.all}, memory={"all": flat})
    expected = tx.init(PARAMS).all
    for axis_type in AXIS_TYPES:
        for init in (tx.init, jax.jit(tx.init)):
            state = init(place(PARAMS, axis_type))
            np.testing.assert_allclose(state.all, expected, rtol=1e-5)
            assert len(state.all.sharding.device_set) == 8
            assert state.all.sharding.is_fully_replicated


@check
def totals_that_reshape_need_not_say_how_that_is_divided():
    def totals(update, state, param, step):
        return {
            "largest": gx.Norm(jnp.max(jnp.abs(update.reshape(-1, 4)))),
            "sum": jnp.sum(jnp.sort(param.reshape(-1))),
        }

    def update(update, state, param, step):
        return update / step.largest + step.sum, state

    tx = gx.lift(None, update, totals=totals, gather=lambda total, step: dict(total), needs_params=True)
    expected, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    for axis_type in AXIS_TYPES:
        params = place(PARAMS, axis_type)
        actual, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert_same_walk(actual, expected)


@check
def coded_slots_and_totals_on_eight_devices():
    params = {"rows": draw(0, 64, 256), "columns": draw(1, 64, 2048), "bias": draw(2, 24)}
    gradients = {name: draw(seed, STEPS, *leaf.shape) for seed, (name, leaf) in enumerate(params.items(), 5)}
    tx = gx.quantize_state(doors.trained_dog(), rounding="nearest")
    expected, alone = doors.donated(tx, params, gradients)
    for axis_type in AXIS_TYPES:
        actual, state = doors.donated(tx, place(params, axis_type), place(gradients, axis_type, lead=1))
        assert_divided(state.codes["mu"]["rows"], P("x", None))
        assert_divided(state.inner.start["columns"], P(None, "x"))
        np.testing.assert_allclose(state.inner.squares, alone.inner.squares, rtol=1e-5)
        for name in params:
            # where float32 rounds otherwise a few moments get the next code
            assert np.isclose(actual[name], expected[name], rtol=1e-5, atol=1e-5).mean() > 0.999, name


# Work that is divided by hand


def specs_of(state):
    """How a state is divided: what is shaped like a parameter as that is, all else replicated."""
    return type(state)(*[
        {n: SPECS[n] for n in field} if isinstance(field, dict) else jax.tree.map(lambda _: P(), field)
        for field in state
    ])  # fmt: skip


def in_shards(tx, params, gradients, check_vma=True):
    """The walk with a part of every array on each device, from a state that was made of whole arrays."""
    state = tx.init(params)
    divided = {name: P(None, *spec) for name, spec in SPECS.items()}

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh(), in_specs=(SPECS, specs_of(state), divided, P()),
        out_specs=(SPECS, specs_of(state)), check_vma=check_vma,
    )  # fmt: skip
    def run(params, state, gradients, losses):
        def step(carry, now):
            given, value = now
            updates, after = tx.update(given, carry[1], carry[0], value=value)
            return (gx.apply_updates(carry[0], updates), after), None

        return jax.lax.scan(step, (params, state), (gradients, losses))[0]

    return run(params, state, gradients, LOSSES)


@check
def totals_of_shards_are_those_of_whole_arrays():
    tx = gx.chain(doors.dog(axis_name="x"), gx.scale_by_learning_rate(4.0))
    assert_same_walk(in_shards(tx, PARAMS, GRADIENTS), on_one_device("totals"))


@check
def totals_of_shards_without_a_name_of_their_axis_are_refused():
    with pytest.raises(
        ValueError, match=r"updates\['columns'\] varies over the mesh axis x, and dog would see one shard"
    ):
        in_shards(doors.trained_dog(), PARAMS, GRADIENTS)


@check
def totals_of_each_shard_by_itself():
    def totals(update, state, param, step):
        return {"sum": jnp.sum(update)}

    tx = gx.lift(
        None,
        lambda u, s, p, step: (u * 0 + step.sum, s),
        totals=totals,
        gather=lambda total, step: {"sum": total["sum"]},
        axis_name=(),
    )
    update = jax.shard_map(
        lambda given: tx.update(given, tx.init(given))[0], mesh=mesh(), in_specs=P("x"), out_specs=P("x")
    )
    np.testing.assert_allclose(jax.jit(update)(jnp.arange(8.0)), jnp.arange(8.0))


@check
def views_and_gathers_of_shards():
    for door in ("gather alone", "view"):
        assert_same_walk(in_shards(RULES[door], PARAMS, GRADIENTS), on_one_device(door))


@check
def shards_draw_for_themselves_and_copies_alike():
    zeros = jax.tree.map(jnp.zeros_like, GRADIENTS)
    for tx in (doors.noisy(), doors.noisy(axis_name="x")):
        noise, _ = in_shards(tx, jax.tree.map(jnp.zeros_like, PARAMS), zeros)
        for name in ("rows", "columns"):
            assert len(np.unique(noise[name])) == noise[name].size
        copies = [np.asarray(shard.data) for shard in noise["bias"].addressable_shards]
        assert all(np.array_equal(copies[0], other) for other in copies)


@check
def a_loss_that_differs_by_shard_is_of_all_if_it_is_averaged():
    tx = gx.skip_nonfinite(gx.lift(
        None, lambda u, s, p, step: (u * step.value, s), gather=lambda measured, step: {}, extra=("value",)
    ))  # fmt: skip

    def step(given, loss):
        return tx.update(given, tx.init(given), given, value=jax.lax.pmean(loss[0], "x"))[0]

    run = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(P("x"), P("x")), out_specs=P("x")))
    np.testing.assert_allclose(run(jnp.ones(8), jnp.arange(8.0)), np.full(8, 3.5))
    np.testing.assert_array_equal(run(jnp.ones(8), jnp.arange(8.0).at[3].set(jnp.nan)), np.full(8, -0.0))


# pytest's side


@pytest.fixture(scope="session")
def outcomes() -> Any:
    """How each check went: None, or its traceback."""
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(name, outcomes):
    judge(outcomes[name])


if __name__ == "__main__":
    report(CHECKS)
