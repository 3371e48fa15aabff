"""A guessed name is answered with what it is called here, and the answers stay true as names arrive."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import gradxform as gx
from gradxform._core.other_names import OTHER_NAMES

pytestmark = pytest.mark.once

PUBLIC = set(gx.__all__)


def answer(name: str) -> str:
    with pytest.raises(AttributeError) as found:
        getattr(gx, name)
    return str(found.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("multi_transform", ": here it is gx.by_path({pattern: transformation, …}, default=…)"),
        ("MultiSteps", ": here it is gx.accumulate(tx, every=k)"),
        (
            "inject_hyperparams",
            ": here any number may change: a schedule is taken as it is, and gx.live(number) is set in",
        ),
        ("SGD", ": here it is gx.sgd"),
        ("AdamW", ": here it is gx.adamw"),
        ("RMSprop", ": here it is gx.rmsprop"),
        ("ScaleByAdam", ": here it is gx.scale_by_adam"),
        ("NAdam", ": here it is gx.nadam"),
        ("Lion", ": here it is gx.lion"),
        ("lamb", ": optax.lamb works in gx.chain as it is"),
        ("Lamb", ": optax.lamb works in gx.chain as it is"),
        ("dadapt_adamw", ": optax.contrib.dadapt_adamw works in gx.chain as it is"),
        ("cosine_decay_schedule", ": optax.cosine_decay_schedule makes a schedule, which goes in place of a number"),
        ("softmax_cross_entropy", ": use optax.softmax_cross_entropy as it is"),
        ("ScaleByAdamState", ": it is optax's, optax.ScaleByAdamState"),
        ("contrib", ": it is optax's, optax.contrib"),
        ("adamv", ": did you mean gx.adam"),
        ("clip_by_globalnorm", ": did you mean gx.clip_by_global_norm"),
    ],
)
def test_a_guessed_name(name, said):
    assert answer(name).startswith(f"gradxform has no {name!r}{said}")


@pytest.mark.parametrize("name", ["nothing_like_it", "_private", "__wrapped__", "__path_hooks__"])
def test_a_name_that_tells_nothing(name):
    assert answer(name) == f"gradxform has no {name!r}"


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_the_table_names_exists_and_what_it_answers_does_not(name):
    assert name not in PUBLIC
    assert answer(name) == f"gradxform has no {name!r}: {OTHER_NAMES[name]}"
    assert set(re.findall(r"\bgx\.(\w+)", OTHER_NAMES[name])) <= PUBLIC
    for theirs in re.findall(r"\boptax\.(\w+)", OTHER_NAMES[name]):
        assert hasattr(optax, theirs)
    assert not OTHER_NAMES[name].startswith("here it is") or re.search(r"gx\.|mask=", OTHER_NAMES[name])


def transformations(module: types.ModuleType) -> list[str]:
    """Names of functions that return a transformation, by their signatures."""
    functions = {name: value for name, value in vars(module).items() if name[0] != "_" and inspect.isfunction(value)}
    made = {name: str(inspect.signature(function).return_annotation) for name, function in functions.items()}
    return [name for name, said in made.items() if "GradientTransformation" in said]


THEIRS = {*transformations(optax), "scale_by_factored_rms", *transformations(optax.contrib)}


def test_the_list_of_optax_is_long():
    assert {"adam", "lion", "chain", "masked", "prodigy", "flatten"} <= THEIRS
    assert len(THEIRS) > 110


@pytest.mark.parametrize("name", sorted(THEIRS - PUBLIC))
def test_every_transformation_of_optax_is_answered(name):
    module = "optax" if name in vars(optax) else "optax.contrib"
    assert answer(name).partition(": ")[2] in (OTHER_NAMES.get(name), f"{module}.{name} works in gx.chain as it is")


@pytest.mark.parametrize("name", ["lamb", "signum", "scale_by_trust_ratio", "centralize", "adan"])
def test_what_is_said_to_work_in_chain_does(name):
    function = getattr(optax, name)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    with jax.numpy_dtype_promotion("standard"):
        tx = gx.chain(function(*[0.1 for _ in needed]))
        params = {"w": jnp.ones((2, 3))}
        updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].shape == (2, 3)


# What is said to be the same is the same


def walk(tx):
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    state, out = tx.init(params), []
    for scale in (1.0, -0.5, 3.0):
        updates, state = tx.update(jax.tree.map(lambda p, s=scale: s * p, params), state, params)
        out.append(updates)
    return out


decay, max_value, weight_decay, mask, max_ratio, learning_rate = 0.9, 0.5, 0.1, {"w": True, "b": False}, 0.01, 0.1
SAME = {
    "trace": optax.trace(decay),
    "ema": optax.ema(decay),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_stddev": optax.scale_by_stddev(),
    "scale_by_rss": optax.scale_by_rss(),
    "clip": optax.clip(max_value),
    "add_decayed_weights": optax.add_decayed_weights(weight_decay, mask),
    "scale_by_factored_rms": optax.scale_by_factored_rms(),
    "scale_by_lion": optax.scale_by_lion(),
    "scale_by_param_block_rms": optax.scale_by_param_block_rms(),
    "nadamw": optax.nadamw(learning_rate),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_said_to_be_the_same_is(name):
    code = re.search(r"gx\.\w+\(.*\)", OTHER_NAMES[name]).group()
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (jax.tree.leaves(walk(tx)) for tx in (eval(code), SAME[name]))
    flat = (np.concatenate(list(map(np.ravel, leaves))) for leaves in (ours, theirs))
    np.testing.assert_allclose(*flat, rtol=2e-5)  # optax subtracts a float32 power from 1


# It costs nothing where no name is guessed


def test_submodules_are_imported_without_asking_for_other_names():
    program = (
        "import sys; from gradxform import wrappers, rules; import gradxform.transforms.scaling; "
        "print(hasattr(sys.modules['gradxform'], 'wrappers'), 'gradxform._core.other_names' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_an_import_of_a_name_that_does_not_exist_fails_as_it_should():
    with pytest.raises(ImportError, match="cannot import name 'MultiSteps' from 'gradxform'"):
        exec("from gradxform import MultiSteps")
