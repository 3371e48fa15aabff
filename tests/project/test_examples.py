"""Every example runs as a reader would run it, without a warning, and what it prints makes sense."""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

ROOT = pathlib.Path(__file__).parents[2]
PICTURES = {"compare", "landscape", "train_transformer"}
EXAMPLES = [
    pytest.param(path, marks=[pytest.mark.once] if path.stem in PICTURES else [], id=path.stem)
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example, tmp_path):
    for package in re.findall(r"^(?:import|from) (\w+)", example.read_text(), flags=re.MULTILINE):
        pytest.importorskip(package)
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
