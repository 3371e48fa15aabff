"""Every example runs as a reader would run it, without a warning, and what it prints makes sense."""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

ROOT = pathlib.Path(__file__).parents[2]
PICTURES = {"compare", "compare_transformer", "landscape", "train_transformer"}
EXAMPLES = [
    pytest.param(path, marks=[pytest.mark.once] if path.stem in PICTURES else [], id=path.stem)
    for path in sorted((ROOT / "examples").glob("*.py"))
]


def skip_without_packages(example):
    """Skip if a package is not there that the example imports, or another example of which it takes a part."""
    for package in re.findall(r"^(?:import|from) (\w+)", example.read_text(), flags=re.MULTILINE):
        beside = example.with_name(f"{package}.py")
        if beside.exists():
            skip_without_packages(beside)
        else:
            pytest.importorskip(package)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example, tmp_path):
    skip_without_packages(example)
    draws = "--out" in example.read_text()
    command = [sys.executable, "-W", "error", str(example), "--quick", *(["--out", str(tmp_path)] if draws else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "MPLBACKEND": "agg"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\.\d", done.stdout), "it prints no result"
    if example.stem == "train_transformer":  # it writes text, in which NaN may be a word
        losses = [float(found) for found in re.findall(r"(\d\.\d+) nats", done.stdout)]
        assert len(losses) == 3, "a loss is missing or no number"
        assert losses[0] < losses[1], "it has not even learnt how frequent each character is"
    else:
        assert not re.search(r"\bnan\b", done.stdout, re.IGNORECASE), "it diverges"
        if example.stem.startswith(("train_", "own_")):
            accuracies = [float(found) for found in re.findall(r"test accuracy (\d\.\d+)", done.stdout)]
            assert accuracies, "it prints no accuracy"
            assert min(accuracies) > 0.85, "guessing gives 0.1 on the digits and 0.63 on the tumours"
    if draws:
        pictures = list(tmp_path.glob("*.png"))
        assert pictures, "it draws nothing"
        assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    # the example that sets its learning rate after every epoch says when it compiles
    assert done.stdout.count("compiling") == example.read_text().count('"compiling')


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        *("adamw", "lion", "nadam", "adafactor", "prodigy"),
        *("schedule_free_adamw", "soap", "muon", "noisy_sgd", "polyak_sgd"),
    ],
)
def test_the_transformer_trains_with_every_optimizer_that_it_offers(monkeypatch, name):
    example = ROOT / "examples" / "train_transformer.py"
    skip_without_packages(example)
    monkeypatch.syspath_prepend(str(example.parent))
    transformer, nnx = pytest.importorskip("train_transformer"), pytest.importorskip("flax.nnx")
    for constant, value in {"LAYERS": 1, "WIDTH": 16, "CONTEXT": 8}.items():
        monkeypatch.setattr(transformer, constant, value)
    assert len(transformer.OPTIMIZERS) == 10
    rate, _ = transformer.OPTIMIZERS[name]
    windows = jnp.asarray(np.tile(np.arange(9, dtype=np.int32) % 5, (20, 2, 1)))  # 20 steps on what is easy to learn
    with jax.numpy_rank_promotion("allow"):  # a user's settings
        model = transformer.Transformer(5, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, transformer.transformation(name, rate, 40), wrt=nnx.Param)
        log = transformer.train_steps(model, optimizer, windows)
        losses = [
            nnx.jit(transformer.loss_fn)(it, windows[0]) for it in (model, transformer.to_evaluate(model, optimizer))
        ]
    assert np.isfinite(log["loss"]).all()
    assert transformer.rates(log).shape == (20,)
    assert max(losses) < log["loss"][0]
    assert (losses[0] == losses[1]) == (name != "schedule_free_adamw"), "averages are evaluated, if there are any"


def test_the_optimizer_in_ten_lines_is_lion():
    pytest.importorskip("sklearn")  # which the example trains on
    scale_by_lion = runpy.run_path(str(ROOT / "examples" / "own_transformation.py"))["scale_by_lion"]
    assert repr(scale_by_lion()) == "scale_by_lion(0.9, b2=0.99)"
    assert scale_by_lion() == scale_by_lion()
    ours, theirs = scale_by_lion(0.9, 0.99), optax.scale_by_lion(0.9, 0.99)
    params = {"weight": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    our_state, their_state = ours.init(params), theirs.init(params)
    random = np.random.default_rng(0)
    for _ in range(20):
        grads = {name: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype) for name, leaf in params.items()}
        our_updates, our_state = ours.update(grads, our_state, params)
        their_updates, their_state = theirs.update(grads, their_state, params)
        for name in params:
            np.testing.assert_array_equal(our_updates[name], their_updates[name])  # signs
            # 20 roundings of numbers below 1, summed in another order
            np.testing.assert_allclose(our_state.mu[name], their_state.mu[name], rtol=0, atol=20 * 2**-24)


def test_the_optimizer_in_ten_lines_checks_its_numbers():
    pytest.importorskip("sklearn")  # which the example trains on
    scale_by_lion = runpy.run_path(str(ROOT / "examples" / "own_transformation.py"))["scale_by_lion"]
    with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\), got 1"):
        scale_by_lion(b1=1.0)
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got -1"):
        gx.chain(scale_by_lion(), gx.scale_by_learning_rate(-1.0))


def test_the_rule_with_totals_is_dog():
    pytest.importorskip("sklearn")  # which the example trains on
    dog = runpy.run_path(str(ROOT / "examples" / "own_transformation.py"))["dog"]
    tx, params = dog(first=0.01), {"weight": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    state, random = tx.init(params), np.random.default_rng(0)
    here = {name: np.ones(leaf.shape) for name, leaf in params.items()}
    distance, squares = 0.01, 0.0
    for _ in range(20):
        grads = {name: random.normal(size=leaf.shape) for name, leaf in params.items()}
        distance = max(distance, np.sqrt(sum(np.sum((leaf - 1) ** 2) for leaf in here.values())))
        squares += sum(np.sum(grad**2) for grad in grads.values())
        here = {name: leaf - distance / np.sqrt(squares + 1e-8) * grads[name] for name, leaf in here.items()}
        grads = {name: jnp.asarray(grad, jnp.float32) for name, grad in grads.items()}
        params, state = gx.step(tx, grads, state, params)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, here[name], rtol=1e-5)  # of numbers near 1; 20 steps in float32


def test_the_rule_with_slots_by_shape_is_soap_with_one_basis():
    pytest.importorskip("sklearn")  # which the example trains on
    left_soap = runpy.run_path(str(ROOT / "examples" / "own_transformation.py"))["scale_by_left_soap"]
    tx, params = left_soap(0.9, 0.99, every=3), {"weight": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    state, random = tx.init(params), np.random.default_rng(0)
    assert state.left["weight"].shape == (3, 3)
    assert not jax.tree.leaves(state.left["bias"])
    mu, nu, left = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 3))
    adam = gx.scale_by_adam(0.9, 0.99)
    adam_state = adam.init(params)
    for number in range(1, 11):
        grads = {name: jnp.asarray(random.normal(size=leaf.shape), jnp.float32) for name, leaf in params.items()}
        updates, state = tx.update(grads, state, params)
        plain, adam_state = adam.update(grads, adam_state, params)
        np.testing.assert_allclose(updates["bias"], plain["bias"], rtol=1e-5)
        grad = np.float64(grads["weight"])
        left = 0.99 * left + 0.01 * grad @ grad.T
        if (number - 1) % 3 == 0:
            basis = np.linalg.eigh(left)[1]
        mu, nu = 0.9 * mu + 0.1 * grad, 0.99 * nu + 0.01 * (basis.T @ grad) ** 2
        divisor = np.sqrt(nu / (1 - 0.99**number)) + 1e-8
        expected = basis @ (basis.T @ mu / (1 - 0.9**number) / divisor)
        np.testing.assert_allclose(updates["weight"], expected, rtol=0, atol=1e-4)
