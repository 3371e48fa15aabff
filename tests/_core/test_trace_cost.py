"""What a step costs before it runs: calls of the library's functions while it is traced, and programs compiled."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx

pytestmark = pytest.mark.once

COUNTING = """
import os, sys
import jax, jax.numpy as jnp
import gradxform as gx

PACKAGE = os.path.dirname(gx.__file__)
PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}

def calls(function):
    count = [0]
    def seen(frame, event, arg):
        count[0] += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)
    sys.setprofile(seen)
    function()
    sys.setprofile(None)
    return count[0]

def built():
    return gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(1e-3))

def trace(tx):
    jax.jit(lambda grads, state, params: tx.update(grads, state, params)).lower(PARAMS, state, PARAMS)

tx = built()
state = tx.init(PARAMS)
cold = calls(lambda: jax.jit(tx.update).lower(PARAMS, state, PARAMS))
again = built()
print(cold, calls(lambda: jax.jit(again.update).lower(PARAMS, state, PARAMS)), calls(lambda: trace(again)))
"""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="later Pythons have no calls for comprehensions")
def test_calls_of_a_trace():
    done = subprocess.run([sys.executable, "-c", COUNTING], capture_output=True, text=True, check=True)
    cold, equal, elsewhere = map(int, done.stdout.split())
    assert cold <= 450
    assert equal <= 10  # an equal transformation is the same function to `jax.jit`
    assert elsewhere <= 150  # traced in another function, but planned already


def test_profiles_show_update_and_init():
    tx = gx.adamw(1e-3)
    params = jnp.ones(3)
    assert "jit_update" in jax.jit(tx.update).lower(params, tx.init(params), params).as_text()[:200]
    assert "jit_init" in jax.jit(tx.init).lower(params).as_text()[:200]


@pytest.fixture
def compilations():
    """How many programs were compiled since the last call."""
    seen: list[str] = []

    def listener(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    def count() -> int:
        number = len(seen)
        seen.clear()
        return number

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield count
    jax.monitoring.unregister_event_duration_listener(listener)


def test_a_sweep_outside_jit_compiles_once(compilations):
    params = {"a": jnp.full((2, 3), 0.5), "b": jnp.full(3, -0.5), "c": jnp.full((), 0.25)}
    gradients = [jax.tree.map(lambda leaf, scale=scale: scale * leaf, params) for scale in (0.3, -0.1)]

    def walked(rate: float, decay: float, eps: float) -> Any:
        tx = gx.chain(gx.clip_by_global_norm(1e3 * rate), gx.adamw(rate, weight_decay=decay, eps=eps))
        state, updates = tx.init(params), []
        for gradient in gradients:
            update, state = tx.update(gradient, state, params)
            updates.append(update)
        return updates

    walked(1e-3, 0.01, 1e-8)
    assert compilations() > 0
    for k in range(1, 20):
        rate, decay, eps = 1e-3 * (1 + k), 0.01 * (1 + k), 1e-8 * (1 + k)
        eager = walked(rate, decay, eps)
        assert compilations() == 0
        exact = exact_adamw(params, gradients, rate, decay, eps)
        for found, expected in zip(jax.tree.leaves(eager), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7 * rate)


def exact_adamw(params: Any, gradients: list[Any], rate: float, decay: float, eps: float) -> list[Any]:
    """The updates in float64, from the paper's formulas; parameters stay where they are."""

    def walked(theta: Any, *given: Any) -> list[Any]:
        m = v = np.zeros(np.shape(theta))
        theta, updates = np.asarray(theta, np.float64), []
        for t, g in enumerate((np.asarray(g, np.float64) for g in given), start=1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            updates.append(-rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + eps) + decay * theta))
        return updates

    by_leaf = jax.tree.map(walked, params, *gradients)
    return [
        jax.tree.map(lambda leaf, step=step: leaf[step], by_leaf, is_leaf=lambda x: isinstance(x, list))
        for step in (0, 1)
    ]


def test_numbers_of_branches_and_groups_keep_their_places():
    """Those that steps outside `jit` are given as arguments must reach the rules that have them."""
    params = {"a": jnp.full(3, 0.5), "b": jnp.full(3, 2.0)}
    inner = gx.chain(gx.scale(3.0), gx.scale_by_momentum(0.5), gx.scale(5.0))
    tx = gx.by_path(
        {"a": {"learning_rate": 7.0, "weight_decay": 11.0}},
        default=gx.chain(
            gx.normalize_by_rms(0.9, 2.0, of=inner, eps_root=13.0, initial_scale=17.0),
            gx.add_decoupled_weight_decay(19.0),
            gx.scale_by_learning_rate(23.0),
        ),
    )
    eager, _ = tx.update(params, tx.init(params), params)
    compiled, _ = jax.jit(tx.update)(params, tx.init(params), params)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
