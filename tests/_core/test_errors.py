"""Bad input raises at once, names what the user wrote, and leaves the optimizer and its state as they were."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform import catalog
from tests.support.trees import assert_same

pytestmark = pytest.mark.once

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
TX = gx.adamw(gx.live(0.1), b1=optax.constant_schedule(0.9))
STATE = TX.init(PARAMS)
SNAPSHOT = jax.tree.map(np.array, STATE)
EXPECTED = TX.update(PARAMS, STATE, PARAMS)


class Row(NamedTuple):
    """A call, and the error it must raise: its type, and words of its message."""

    call: Callable[[], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    words: str


def check(row: Row) -> None:
    with pytest.raises(row.error) as caught:
        row.call()
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    for word in row.words.split(" & "):
        assert word in message
    assert_same(jax.tree.map(jnp.asarray, SNAPSHOT), STATE)
    assert_same(TX.update(PARAMS, STATE, PARAMS), EXPECTED)


def table(**rows: tuple[Callable[[], Any], type[Exception], str]) -> Any:
    return pytest.mark.parametrize("row", [Row(*row) for row in rows.values()], ids=rows)


def with_b(leaf: Any) -> Any:
    return {**PARAMS, "b": leaf}


def step(tx: Any, updates: Any = PARAMS, params: Any = PARAMS) -> Any:
    return tx.update(updates, tx.init(PARAMS), params)


# Trees


@table(
    missing=(lambda: TX.update({"w": PARAMS["w"]}, STATE, PARAMS), ValueError, "updates['b'] is missing & params['b']"),
    extra=(lambda: TX.update({**PARAMS, "c": 1.0}, STATE, PARAMS), ValueError, "updates['c'] & params"),
    none_in_params=(lambda: TX.update(PARAMS, STATE, with_b(None)), ValueError, "updates['b'] & params"),
    list_for_tuple=(
        lambda: gx.sgd(0.1).update([1.0], gx.sgd(0.1).init((1.0,)), (1.0,)),
        ValueError,
        "updates is a list & params is a tuple",
    ),
    no_updates=(lambda: TX.update(None, STATE, PARAMS), ValueError, "updates has no leaf & gradients of these params"),
    column=(lambda: TX.update(with_b(jnp.ones((3, 1))), STATE, PARAMS), ValueError, "updates['b'] & (3, 1) & (3,)"),
    scalar=(lambda: TX.update(with_b(1.0), STATE, PARAMS), ValueError, "updates['b'] & () & params['b'] & (3,)"),
    complex=(
        lambda: TX.update(with_b(jnp.ones(3, complex)), STATE, PARAMS),
        TypeError,
        "updates['b'] & complex64 & params['b'] & float32 & real part",
    ),
    complex_without_params=(
        lambda: gx.momentum(0.1).update(jnp.ones(2, complex), gx.momentum(0.1).init(jnp.ones(2))),
        (TypeError, ValueError),
        "complex64",
    ),
    apply_missing=(lambda: gx.apply_updates(PARAMS, {"w": PARAMS["w"]}), ValueError, "updates['b'] is missing"),
    apply_extra=(lambda: gx.apply_updates(PARAMS, {**PARAMS, "c": 1.0}), ValueError, "updates['c']"),
    apply_column=(lambda: gx.apply_updates(PARAMS, with_b(jnp.ones((3, 1)))), ValueError, "updates['b'] & (3, 1)"),
    apply_scalar=(lambda: gx.apply_updates(PARAMS, with_b(1.0)), ValueError, "updates['b'] & ()"),
    accumulate_missing=(lambda: step(gx.accumulate(TX, 2), {"w": 1.0}), ValueError, "updates['b'] is missing"),
    without_params=(lambda: TX.update(PARAMS, STATE), ValueError, "add_decoupled_weight_decay & params"),
    l2_without_params=(lambda: step(gx.adam_l2(0.1), params=None), ValueError, "add_l2_regularization & params"),
    swapped=(lambda: TX.update(STATE, PARAMS, PARAMS), TypeError, "updates is an optimizer's state & swapped?"),
)
def test_trees(row):
    check(row)


LEAVES = {
    "int": (jnp.ones(3, int), "int32[3]"),
    "bool": (jnp.ones(3, bool), "bool[3]"),
    "numpy int": (np.ones(3, np.int32), "int32[3]"),
    "numpy object": (np.array([None] * 3), "object[3]"),
    "python int": (3, "int32[]"),
    "python bool": (True, "bool True"),
    "string": ("adam", "str 'adam' & eqx.filter"),
    "key": (jax.random.key(0), "key<fry>[]"),
    "old key": (jax.random.PRNGKey(0), "uint32[2]"),
    "float0": (np.zeros(3, jax.dtypes.float0), "float0 & integer input"),
    "object": (object(), "object"),
}


@pytest.mark.parametrize(("leaf", "words"), LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("params", lambda leaf: TX.init(with_b(leaf))),
        ("params", lambda leaf: TX.update(PARAMS, STATE, with_b(leaf))),
        ("params", lambda leaf: gx.accumulate(gx.sgd(0.1), 2).init(with_b(leaf))),
        ("params", lambda leaf: gx.apply_updates(with_b(leaf), PARAMS)),
        ("updates", lambda leaf: TX.update(with_b(leaf), STATE, PARAMS)),
        ("updates", lambda leaf: gx.apply_updates(PARAMS, with_b(leaf))),
    ],
    ids=["init", "update params", "accumulate", "apply params", "update", "apply"],
)
def test_leaves_that_cannot_be_trained(argument, call, leaf, words):
    check(Row(lambda: call(leaf), TypeError, f"{argument}['b'] & {words}"))


# States


def state_of(tx: Any, params: Any = PARAMS) -> Any:
    return tx.init(params)


SGD = gx.sgd(0.1)
ACCUMULATE = gx.accumulate(gx.sgd(0.1), every=2)


@table(
    none=(lambda: TX.update(PARAMS, None, PARAMS), TypeError, "state is NoneType & count"),
    of_sgd=(
        lambda: TX.update(PARAMS, SGD.init(PARAMS), PARAMS),
        TypeError,
        "state is State('count',) & State('count', 'values', 'mu', 'nu')",
    ),
    of_optax=(lambda: TX.update(PARAMS, optax.adam(0.1).init(PARAMS), PARAMS), TypeError, "state is tuple"),
    less=(lambda: TX.update(PARAMS, TX.init({"w": PARAMS["w"]}), PARAMS), ValueError, "['b'] is missing"),
    more=(lambda: TX.update(PARAMS, TX.init({**PARAMS, "c": 1.0}), PARAMS), ValueError, "['c'] & different parameters"),
    stale=(lambda: TX.update(PARAMS, TX.init(with_b(jnp.ones(4))), PARAMS), ValueError, "['b'] & [4] & [3]"),
    moment_none=(lambda: TX.update(PARAMS, STATE._replace(mu=None), PARAMS), ValueError, "state.mu['b'] is missing"),
    moment_dtype=(
        lambda: TX.update(PARAMS, STATE._replace(mu=with_b(jnp.ones(3, jnp.bfloat16))), PARAMS),
        ValueError,
        "state.mu['b'] & bfloat16 & float32",
    ),
    no_hyperparams=(lambda: TX.update(PARAMS, STATE._replace(values={}), PARAMS), ValueError, "learning_rate"),
    other_hyperparams=(
        lambda: TX.update(PARAMS, STATE._replace(values={"lr": 0.1, "scheduled/b1": 0.9}), PARAMS),
        ValueError,
        "'lr' & 'learning_rate'",
    ),
    stacked_hyperparams=(
        lambda: TX.update(PARAMS, STATE._replace(values={"learning_rate": jnp.ones(2), "scheduled/b1": 0.9}), PARAMS),
        ValueError,
        "learning_rate & [2]",
    ),
    stacked_count=(
        lambda: SGD.update(1.0, SGD.init(1.0)._replace(count=jnp.zeros(2, int))),
        ValueError,
        "count & [2]",
    ),
    float_count=(
        lambda: SGD.update(1.0, SGD.init(1.0)._replace(count=jnp.zeros(()))),
        (TypeError, ValueError),
        "count",
    ),
    accumulate_of_sgd=(lambda: ACCUMULATE.update(PARAMS, SGD.init(PARAMS), PARAMS), TypeError, "accumulate & State"),
    accumulate_none=(lambda: ACCUMULATE.update(PARAMS, None, PARAMS), TypeError, "accumulate & NoneType"),
    accumulate_stale=(
        lambda: ACCUMULATE.update(PARAMS, ACCUMULATE.init({"w": PARAMS["w"]}), PARAMS),
        ValueError,
        "state.mean['b'] is missing",
    ),
)
def test_states(row):
    check(row)


# Hyperparameters, by the names under which they were given

FUNCTIONS = [entry.function for entry in (*catalog.OPTIMIZERS, *catalog.TRANSFORMATIONS)]
FLAGS = {
    "nesterov",
    "debias",
    "centered",
    "eps_in_sqrt",
    "bias_correction",
    "batched",
    "factored",
    "safeguard_warmup",
    "scale_init_precond",
    "multiply_by_parameter_scale",
    "kl",
}
DTYPES = {"state_dtype", "mu_dtype", "accumulator_dtype", "dtype", "dtype_momentum"}
COUNTS = {"memory_size", "min_dim_size_to_factor", "every", "max_size", "warmup_steps"}
CHOICES = {"axes", "variant", "renewal"}
TRANSFORMATIONS = {"of", "tx", "linesearch", "then"}
OTHERS = {"mask", "weight_decay_mask", "axis_name", "axis", "warmup", "schedule", "key"} | TRANSFORMATIONS
OFFSETS = {"step_offset", "decay_offset"}
OF_MATRICES = {"matrices", "other", "layout", "method", "steps", "coefficients", "scale"}  # see test_muon.py
MAY_BE_NONE = {
    (function, name)
    for function in FUNCTIONS
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.default is None
} | {(gx.adafactor, "clipping_threshold"), (gx.clip_by_zscore, "max_norm")}
MAY_BE_INFINITE = {"max_value", "max_norm", "max_ratio", "max_rms", "max_learning_rate", "clipping_threshold"}
FIXED = {"initial_scale", "initial_accumulator_value"}

BELOW_ZERO, TOO_LARGE = [-1.0, -1e-30], [1.0, 1.5]
OUT_OF_RANGE = {
    "learning_rate": BELOW_ZERO,
    "momentum": BELOW_ZERO + TOO_LARGE,
    "dampening": [*BELOW_ZERO, 1.5],
    "decay": BELOW_ZERO + TOO_LARGE,
    "beta": BELOW_ZERO + TOO_LARGE,
    "beta2": BELOW_ZERO + TOO_LARGE,
    "b1": BELOW_ZERO + TOO_LARGE,
    "b2": BELOW_ZERO + TOO_LARGE,
    "eps": BELOW_ZERO,
    "eps_root": BELOW_ZERO,
    "initial_scale": BELOW_ZERO,
    "initial_accumulator_value": BELOW_ZERO,
    "weight_decay": BELOW_ZERO,
    "max_value": [*BELOW_ZERO, 0.0],
    "max_norm": [*BELOW_ZERO, 0.0],
    "max_ratio": [*BELOW_ZERO, 0.0],
    "threshold": [*BELOW_ZERO, 0.0],
    "factor": [],
    "blend": BELOW_ZERO + TOO_LARGE,
    "momentum_decay": [*BELOW_ZERO, 0.0],
    "decay_rate": [*BELOW_ZERO, 0.0],
    "min_scale": [*BELOW_ZERO, 0.0],
    "max_rms": [*BELOW_ZERO, 0.0],
    "clipping_threshold": [*BELOW_ZERO, 0.0],
    "weight_decay_rate": BELOW_ZERO,
    "f_min": [],
    "max_learning_rate": [*BELOW_ZERO, 0.0],
    "scaling": BELOW_ZERO,
    "b3": BELOW_ZERO + TOO_LARGE,
    "d0": [*BELOW_ZERO, 0.0],
    "d_coef": [*BELOW_ZERO, 0.0],
    "eta": BELOW_ZERO,
    "gamma": BELOW_ZERO,
    "shampoo_beta": BELOW_ZERO + TOO_LARGE,
    "weight_lr_power": BELOW_ZERO,
}
ONE_IS_IN_RANGE = {
    (function, "b1")
    for function in (gx.average_schedule_free, gx.schedule_free, gx.schedule_free_sgd, gx.schedule_free_adamw)
}
WRONG_TYPE = {
    "bool": True,
    "numpy bool": np.True_,
    "array of bool": jnp.asarray(True),
    "str": "0.1",
    "complex": 0.1j,
    "None": None,
    "list": [0.1],
    "bfloat16": jnp.asarray(0.1, jnp.bfloat16),
    "transformation": gx.scale(0.1),
}
WRONG_VALUE = {
    "nan": np.nan,
    "inf": np.inf,
    "array of nan": jnp.asarray(np.nan),
    "vector": jnp.ones(2),
    "numpy vector": np.ones(2),
}


def build(function: Callable[..., Any], name: str, value: Any) -> Any:
    required = {key: 0.1 for key, p in inspect.signature(function).parameters.items() if p.default is p.empty}
    required |= {"matrices": {"w": "in out"}, "other": gx.sgd(0.1)} if "matrices" in required else {}
    required |= {"tx": gx.sgd(0.1)} if "tx" in required else {}
    required |= {"schedule": optax.constant_schedule(0.1)} if "schedule" in required else {}
    needed: dict[str, Any] = {}
    if name in ("dampening", "nesterov", "accumulator_dtype") and function is gx.sgd:
        needed = {"momentum": 0.9}
    elif name == "momentum_decay" and function is not gx.nadam:
        needed = {"nesterov": True, "debias": True} if function is gx.scale_by_momentum else {"nesterov": True}
    elif name == "dtype_momentum":
        needed = {"momentum": 0.9}
    return function(**{**required, **needed, name: value})


def arguments(names: Callable[[str], bool]) -> Any:
    pairs = [(f, name) for f in FUNCTIONS for name in inspect.signature(f).parameters if names(name)]
    return pytest.mark.parametrize(("function", "name"), pairs, ids=[f"{f.__name__}-{name}" for f, name in pairs])


def test_every_argument_of_every_function_is_known_to_these_tables():
    named = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    assert named == OUT_OF_RANGE.keys() | FLAGS | DTYPES | COUNTS | CHOICES | OTHERS | OFFSETS | OF_MATRICES
    public = [value for name, value in vars(gx).items() if inspect.isfunction(value) and not name.startswith("_")]
    taking_numbers = {f for f in public if OUT_OF_RANGE.keys() & inspect.signature(f).parameters.keys()}
    of_wrappers = {gx.times, gx.skip_spikes, gx.stochastic_rounding, gx.accumulate}  # in test_errors_of_wrappers.py
    assert taking_numbers - of_wrappers <= set(FUNCTIONS)


@pytest.mark.parametrize("value", WRONG_TYPE.values(), ids=WRONG_TYPE)
@arguments(OUT_OF_RANGE.__contains__)
def test_hyperparameters_of_the_wrong_type(function, name, value):
    if value is None and (function, name) in MAY_BE_NONE:
        build(function, name, value)
    else:
        with pytest.raises(TypeError, match=rf"^{name}\b"):
            build(function, name, value)


@pytest.mark.parametrize("value", WRONG_VALUE.values(), ids=WRONG_VALUE)
@arguments(OUT_OF_RANGE.__contains__)
def test_hyperparameters_that_are_no_finite_number(function, name, value):
    if value is np.inf and name in MAY_BE_INFINITE:
        build(function, name, value)
        return
    with pytest.raises(ValueError, match=rf"^{name} must be\b"):
        build(function, name, value)


@arguments(OUT_OF_RANGE.__contains__)
def test_hyperparameters_out_of_range(function, name):
    for value in OUT_OF_RANGE[name]:
        if value == 1.0 and (function, name) in ONE_IS_IN_RANGE:
            continue
        for form in (float, np.float32, jnp.float32):
            with pytest.raises(ValueError, match=rf"^{name} must be in .*, got"):
                build(function, name, form(value))


@pytest.mark.parametrize("value", ["x", 1e-8])
@arguments(FLAGS.__contains__)
def test_flags_are_true_or_false(function, name, value):
    with pytest.raises(TypeError, match=rf"^{name}\b"):
        build(function, name, value)


@pytest.mark.parametrize("value", [0, 1.5, True, "3"])
@arguments((COUNTS | OFFSETS).__contains__)
def test_counts_are_whole_numbers(function, name, value):
    if name in OFFSETS and value == 0:
        build(function, name, value)
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be\b"):
        build(function, name, value)


@arguments(CHOICES.__contains__)
def test_choices_are_named(function, name):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*'.*', got 'other'"):
        build(function, name, "other")


@pytest.mark.parametrize("value", ["key", 0.5, True, jnp.zeros(3), jnp.zeros((2, 2), jnp.uint32)], ids=str)
@arguments({"key"}.__contains__)
def test_keys_are_whole_numbers_or_keys(function, name, value):
    with pytest.raises(TypeError, match=r"^key must be a whole number or a key"):
        build(function, name, value)


@pytest.mark.parametrize("value", ["float31", int, bool, complex])
@arguments(DTYPES.__contains__)
def test_state_dtypes_are_floating_point(function, name, value):
    with pytest.raises(TypeError, match=rf"^{name}\b"):
        build(function, name, value)


@arguments((OUT_OF_RANGE.keys() - FIXED).__contains__)
def test_tracers_are_not_checked(function, name):
    jax.eval_shape(lambda value: build(function, name, value).init(PARAMS), -1.0)


def test_a_tracer_must_be_a_scalar():
    with pytest.raises(ValueError, match="learning_rate must be a scalar, got shape"):
        jax.eval_shape(lambda rate: gx.sgd(rate).init(PARAMS), jnp.ones(2))


@table(
    live_bool=(lambda: gx.live(True), TypeError, "live & bool"),
    live_vector=(lambda: gx.live(jnp.ones(2)), ValueError, "live & (2,)"),
    live_schedule=(lambda: gx.live(optax.constant_schedule(0.1)), TypeError, "live & number"),
    live_live=(lambda: gx.live(gx.live(0.1)), TypeError, "live"),
    live_out_of_range=(lambda: gx.adam(gx.live(-0.1)), ValueError, "learning_rate & [0, inf) & -0.1"),
    live_beta=(lambda: gx.adam(0.1, b2=gx.live(1.5)), ValueError, "b2 & [0, 1) & 1.5"),
    eps_inside=(lambda: gx.adagrad(0.1, eps=-1.0, eps_in_sqrt=True), ValueError, "eps must be in [0, inf)"),
    eps_outside=(lambda: gx.rmsprop(0.1, eps=-1.0, eps_in_sqrt=False), ValueError, "eps must be in [0, inf)"),
    nesterov_alone=(lambda: gx.sgd(0.1, nesterov=True), ValueError, "nesterov & momentum"),
    dampening_alone=(lambda: gx.sgd(0.1, dampening=0.5), ValueError, "dampening & momentum"),
    dtype_alone=(lambda: gx.sgd(0.1, accumulator_dtype="float32"), ValueError, "accumulator_dtype & momentum"),
    nesterov_of_rmsprop=(lambda: gx.rmsprop(0.1, nesterov=True), ValueError, "nesterov & momentum"),
    heavy_debias=(lambda: gx.scale_by_momentum(0.9, dampening=0.0, debias=True), ValueError, "debias & dampening"),
    complex_state=(
        lambda: gx.momentum(0.1, state_dtype="bfloat16").init(jnp.ones(2, complex)),
        TypeError,
        "state_dtype & bfloat16 & complex64",
    ),
    no_schedule=(lambda: gx.scale_by_schedule(0.1), TypeError, "schedule & function & scale"),
    schedule_none=(lambda: step(gx.sgd(lambda count: None)), TypeError, "schedule for learning_rate & NoneType"),
    schedule_vector=(lambda: step(gx.sgd(lambda count: jnp.ones(2))), ValueError, "schedule for learning_rate & (2,)"),
    schedule_nan=(lambda: gx.sgd(lambda count: np.nan).init(PARAMS), ValueError, "schedule for learning_rate & nan"),
    schedule_inf=(lambda: step(gx.sgd(lambda count: jnp.inf)), ValueError, "schedule for learning_rate & inf"),
    schedule_str=(lambda: step(gx.sgd(lambda count: "x")), TypeError, "schedule for learning_rate & 'x'"),
    schedule_bool=(lambda: step(gx.sgd(lambda count: True)), TypeError, "schedule for learning_rate & bool"),
    schedule_complex=(lambda: step(gx.sgd(lambda count: 1j)), TypeError, "schedule for learning_rate & complex"),
    schedule_low=(
        lambda: step(gx.adam(0.1, b1=lambda count: jnp.asarray(0.9, jnp.bfloat16))),
        TypeError,
        "schedule for b1 & bfloat16",
    ),
    schedule_no_argument=(lambda: step(gx.sgd(lambda: 0.1)), TypeError, "learning_rate"),
    schedule_two_arguments=(lambda: step(gx.sgd(lambda count, epoch: 0.1)), TypeError, "learning_rate"),
)
def test_options_and_schedules(row):
    check(row)


# Composition


def foreign(function: Callable[[Any], Any]) -> Any:
    return optax.stateless(lambda updates, params: function(updates))


OVER_LEAVES = gx.clip_by_global_norm(1.0)


@table(
    chain_str=(lambda: gx.chain(gx.sgd(0.1), "adam"), TypeError, "argument 2 of chain & 'adam'"),
    chain_none=(lambda: gx.chain(None), TypeError, "argument 1 of chain & None"),
    chain_uncalled=(lambda: gx.chain(gx.adam), TypeError, "argument 1 of chain & adam"),
    chain_list=(lambda: gx.chain([gx.sgd(0.1)]), TypeError, "argument 1 of chain & [scale_by_learning_rate(0.1)]"),
    chain_pair=(lambda: gx.chain((1, 2)), TypeError, "argument 1 of chain & (1, 2)"),
    every_zero=(lambda: gx.accumulate(SGD, every=0), ValueError, "every & at least 1 & 0"),
    every_negative=(lambda: gx.accumulate(SGD, every=-1), ValueError, "every & -1"),
    every_half=(lambda: gx.accumulate(SGD, every=1.5), TypeError, "every & whole number & 1.5"),
    every_true=(lambda: gx.accumulate(SGD, every=True), TypeError, "every & True"),
    every_str=(lambda: gx.accumulate(SGD, every="2"), TypeError, "every & '2'"),
    accumulate_str=(lambda: gx.accumulate("sgd", every=2), TypeError, "accumulate & 'sgd'"),
    of_global=(
        lambda: gx.normalize_by_rms(of=OVER_LEAVES),
        TypeError,
        "of & normalize_by_rms & clip_by_global_norm(1.0)",
    ),
    of_inner_global=(
        lambda: gx.normalize_by_rss(of=gx.chain(gx.scale(2.0), OVER_LEAVES)),
        TypeError,
        "of & normalize_by_rss & clip_by_global_norm(1.0)",
    ),
    of_optax=(lambda: gx.normalize_by_rms(of=optax.clip(1.0)), TypeError, "of & normalize_by_rms & optax.clip"),
    of_accumulate=(lambda: gx.normalize_by_rms(of=ACCUMULATE), TypeError, "of & accumulate"),
    of_str=(lambda: gx.normalize_by_rms(of="momentum"), TypeError, "of & 'momentum'"),
    of_number=(lambda: gx.normalize_by_rms(of=0.9), TypeError, "of & 0.9"),
    of_uncalled=(lambda: gx.normalize_by_rms(of=gx.scale_by_momentum), TypeError, "of & scale_by_momentum"),
    foreign_drops=(
        lambda: step(gx.chain(foreign(lambda u: {"w": u["w"]}), SGD)),
        ValueError,
        "updates['b'] is missing",
    ),
    foreign_none=(lambda: step(gx.chain(foreign(lambda u: None))), ValueError, "updates['b'] is missing"),
    foreign_shape=(
        lambda: step(gx.chain(foreign(lambda u: jax.tree.map(jnp.sum, u)), SGD)),
        ValueError,
        "updates['b'] & () & (3,)",
    ),
    foreign_int=(
        lambda: step(gx.chain(foreign(lambda u: jax.tree.map(lambda x: x.astype(int), u)), SGD)),
        TypeError,
        "updates['b'] & int32[3]",
    ),
    foreign_complex=(
        lambda: step(gx.chain(SGD, foreign(lambda u: jax.tree.map(lambda x: x.astype(complex), u)))),
        TypeError,
        "updates['b'] & complex64",
    ),
)
def test_composition(row):
    check(row)


# Rules


def rule(
    update: Callable[..., Any] = lambda update, state, param, step: (update, state),
    init: Callable[..., Any] = lambda param: {"mu": jnp.zeros_like(param)},
    **arguments: Any,
) -> Callable[[], Any]:
    """One step of a transformation that is called `mine`."""

    def mine(update, state, param, step):
        return rule_update(update, state, param, step)

    rule_update = update
    mine.__qualname__ = "mine"
    return lambda: step(gx.lift(init, mine, **arguments))


@table(
    wider=(rule(lambda u, s, p, step: (u[None], s)), ValueError, "mine & (3,) & (1, 3)"),
    narrower=(rule(lambda u, s, p, step: (u.sum(), s)), ValueError, "mine & (3,) & ()"),
    complex_update=(rule(lambda u, s, p, step: (u * 1j, s)), TypeError, "mine & complex64"),
    slot_gone=(rule(lambda u, s, p, step: (u, {})), ValueError, "mine & 'mu'"),
    slot_renamed=(rule(lambda u, s, p, step: (u, {"nu": s["mu"]})), ValueError, "mine & 'nu' & 'mu'"),
    slot_shape=(rule(lambda u, s, p, step: (u, {"mu": s["mu"].sum()})), ValueError, "mine & mu & (3,) & ()"),
    slot_complex=(rule(lambda u, s, p, step: (u, {"mu": s["mu"] * 1j})), TypeError, "mine & mu & complex64"),
    unknown_attribute=(rule(lambda u, s, p, step: (step.lr * u, s), rate=0.1), AttributeError, "lr & number, rate"),
    bad_argument=(rule(rate=object()), TypeError, "rate & object"),
    vector_argument=(rule(rate=jnp.ones(2)), ValueError, "rate & (2,)"),
    fraction=(rule(rate=gx.fraction(1.0)), ValueError, "rate & [0, 1) & 1.0"),
    non_negative=(rule(rate=gx.non_negative(-1.0)), ValueError, "rate & [0, inf) & -1.0"),
    positive=(rule(rate=gx.positive(0.0)), ValueError, "rate & (0, inf) & 0.0"),
    other_name=(rule(rate=gx.fraction(2.0, "b1")), ValueError, "b1 & [0, 1) & 2.0"),
    memory_alone=(rule(measure=lambda u: {}, memory={"x": 0.0}), TypeError, "memory & gather"),
    reports_alone=(rule(reports=["x"]), TypeError, "reports & gather"),
    axis_alone=(rule(axis_name="x"), TypeError, "axis_name & measure"),
    axis_of_a_function=(rule(measure=lambda u: {}, axis_name="x"), TypeError, "axis_name & Measure & across"),
    axis_number=(lambda: gx.clip_by_global_norm(1.0, axis_name=0), TypeError, "axis_name & mesh axis & 0"),
    axis_unbound=(
        lambda: step(gx.clip_by_global_norm(1.0, axis_name="model")),
        NameError,
        "unbound axis name: model",
    ),
    axis_half=(lambda: gx.clip_by_param_norm(axis=0.5), TypeError, "axis & 0.5"),
    axis_too_large=(lambda: step(gx.clip_by_param_norm(axis=2)), ValueError, "axis (2,) & clip_by_param_norm & (2, 3)"),
    axis_of_all=(lambda: step(gx.clip_by_param_norm(axis=(-2, 1))), ValueError, "axis (-2, 1) & (2, 3) & mask="),
    axis_bool=(lambda: gx.clip_by_param_norm(axis=(0, True)), TypeError, "axis & True"),
    warmup_zero=(lambda: gx.clip_by_zscore(warmup=0), ValueError, "warmup & at least 1 & 0"),
    warmup_half=(lambda: gx.clip_by_average_norm(warmup=1.5), TypeError, "warmup & whole number & 1.5"),
    small_squares=(lambda: gx.adam(0.1, state_dtype="float16"), ValueError, "state_dtype & float16 & bfloat16"),
    byte_state=(lambda: gx.momentum(0.1, state_dtype=jnp.float8_e4m3fn), TypeError, "state_dtype & 16 bits"),
    at_most_unknown=(rule(at_most="limit", floor=1.0), TypeError, "at_most & 'limit' & floor"),
    totals_alone=(rule(totals=lambda u, s, p, step: {}), TypeError, "totals & gather"),
    totals_and_measure=(
        rule(totals=lambda u, s, p, step: {}, measure=lambda u: {}, gather=lambda t, step: {}),
        TypeError,
        "measure & totals",
    ),
    needs_params=(
        lambda: step(gx.lift(None, lambda u, s, p, step: (u + p, s), needs_params=True), params=None),
        ValueError,
        "needs the parameters",
    ),
    reserved_slot=(rule(lambda u, s, p, step: (u, s), lambda param: {"count": param}), ValueError, "count"),
    integer_state_dtype=(rule(state_dtype=int), TypeError, "state_dtype & int"),
)
def test_rules(row):
    check(row)


# Live values


def setting(**values: Any) -> Callable[[], Any]:
    return lambda: gx.set_hyperparams(STATE, **values)


@table(
    unknown=(setting(lr=1.0), KeyError, "'lr' & learning_rate & b1"),
    one_unknown=(setting(learning_rate=1.0, lr=1.0), KeyError, "'lr' & learning_rate"),
    constant=(setting(b2=0.5), KeyError, "'b2' & learning_rate"),
    constant_rate=(lambda: gx.set_hyperparams(SGD.init(1.0), learning_rate=1.0), KeyError, "learning_rate & live"),
    schedule=(setting(b1=0.5), ValueError, "b1 & b1=gx.live"),
    nothing_there=(lambda: gx.set_hyperparams((), learning_rate=1.0), KeyError, "learning_rate & none"),
    vector=(setting(learning_rate=jnp.ones(2)), ValueError, "learning_rate & () & (2,)"),
    negative=(setting(learning_rate=-1.0), ValueError, "learning_rate & [0, inf) & -1.0"),
    nan=(setting(learning_rate=np.nan), ValueError, "learning_rate & nan"),
    inf=(setting(learning_rate=np.inf), ValueError, "learning_rate & inf"),
    array_out_of_range=(setting(learning_rate=jnp.asarray(-1.0)), ValueError, "learning_rate & -1.0"),
    string=(setting(learning_rate="x"), TypeError, "learning_rate & 'x'"),
    none=(setting(learning_rate=None), TypeError, "learning_rate & None"),
    bool=(setting(learning_rate=True), TypeError, "learning_rate & True"),
    complex=(setting(learning_rate=1j), TypeError, "learning_rate & 1j"),
    function=(setting(learning_rate=lambda count: 0.1), TypeError, "learning_rate"),
    bfloat16=(setting(learning_rate=jnp.asarray(0.999, jnp.bfloat16)), TypeError, "learning_rate & bfloat16"),
)
def test_live_values(row):
    check(row)


# Masks


def pass_on(update, state, param, step):
    return update, state


def masked(mask: Any) -> Callable[[], Any]:
    return lambda: step(gx.add_decoupled_weight_decay(0.1, mask=mask))


@table(
    no_match=(masked("kernel"), ValueError, "'kernel' & b, w & whole path"),
    part_of_a_path=(masked(re.compile("")), ValueError, "matches none & b, w"),
    broken_pattern=(masked("("), ValueError, "mask & '('"),
    less=(masked({"w": True}), ValueError, "mask & 'b'"),
    more=(masked({"w": True, "b": True, "c": False}), ValueError, "mask & 'c'"),
    list_for_dict=(masked([True, False]), ValueError, "mask is a list & params is a dict"),
    none_for_leaf=(masked({"w": True, "b": None}), ValueError, "mask['b'] is None"),
    numbers=(masked({"w": 1, "b": 0}), TypeError, "mask['b'] & 0"),
    number=(masked(3), TypeError, "mask & 3"),
    vector=(masked({"w": True, "b": jnp.ones(3, bool)}), TypeError, "mask & True"),
    one_argument=(masked(lambda path: True), ValueError, "mask(params) is True & one argument & (path, leaf)"),
    by_traced_values_of_all=(
        lambda: jax.eval_shape(
            lambda p: gx.adamw(0.1, mask=lambda params: jax.tree.map(lambda leaf: leaf.sum() > 0, params)).init(p),
            PARAMS,
        ),
        TypeError,
        "mask(params)['b'] must be True or False",
    ),
    returns_none=(masked(lambda path, leaf: None), TypeError, "mask('b', leaf) & None"),
    returns_number=(masked(lambda path, leaf: 1), TypeError, "mask('b', leaf) & 1"),
    by_value_in_jit=(lambda: jax.jit(masked(lambda path, leaf: leaf.sum() > 0))(), TypeError, "mask('b', leaf)"),
    by_traced_value=(
        lambda: jax.eval_shape(lambda p: gx.adamw(0.1, mask=lambda path, leaf: leaf.sum() > 0).init(p), PARAMS),
        TypeError,
        "mask('b', leaf)",
    ),
    without_params=(lambda: step(gx.lift(None, pass_on, mask="w"), params=None), ValueError, "pass_on & params"),
)
def test_masks(row):
    check(row)
