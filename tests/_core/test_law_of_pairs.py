"""A pair of wrappers costs no more memory than the dearer of the two: exact figures of compiled steps."""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import pytest

import gradxform as gx

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import figures

pytestmark = pytest.mark.once

WRAPPERS = {
    "accumulate": lambda tx: gx.accumulate(tx, 4),
    "skip_nonfinite": gx.skip_nonfinite,
    "skip_spikes": gx.skip_spikes,
    "observe": lambda tx: gx.observe(tx, of="gradient"),
    "quantize_state": gx.quantize_state,
    "compensated": gx.compensated,
    "master_weights": gx.master_weights,
    "stochastic_rounding": lambda tx: gx.stochastic_rounding(tx, 0),
    "clip": lambda tx: gx.chain(gx.clip_by_global_norm(1.0), tx),
    "chain": gx.chain,
    "by_path": lambda tx: gx.by_path({"bias": gx.sgd(0.1)}, default=tx),
}
LOW_PRECISION = {"compensated", "master_weights", "stochastic_rounding"}
PAIRS = [
    (outer, inner)
    for outer, inner in itertools.permutations(WRAPPERS, 2)
    if not (outer in LOW_PRECISION and inner in LOW_PRECISION)
]
SHAPES = {"kernel": (1024, 1024), "bias": (8,)}

ALONE = dict.fromkeys(WRAPPERS, (0.0, 0)) | {
    "quantize_state": (0.08, 0),  # the largest of each block
    # parameter and residual are each made of the old values of both, and a kernel of XLA's has one result on a CPU: the
    # new value lies in memory between the two
    "compensated": (4.0, 0),
}
"""Temporaries in bytes per parameter, and full-size copies, of each wrapper around AdamW in `step`."""

BY_UPDATE = {
    # What is added to parameters in codes or in low precision is an array of its own between update and apply_updates,
    # and one more where a second wrapper puts it behind a branch or makes it of codes.
    ("accumulate", "quantize_state"),
    ("quantize_state", "accumulate"),
    *((outer, inner) for outer in ("accumulate", "quantize_state") for inner in LOW_PRECISION),
    *((outer, inner) for outer in LOW_PRECISION for inner in ("accumulate", "quantize_state")),
}
"""The pairs that cost more than the dearer of the two as `update` and `apply_updates`."""


def by_step(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return gx.step(tx, grads, state, params)


def by_update(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return gx.apply_updates(params, updates), state


@functools.cache
def cost(advance: Any, *names: str) -> tuple[float, int]:
    """Temporaries in bytes per parameter and full-size copies, of wrappers around AdamW, the outermost first."""
    dtype = jnp.bfloat16 if LOW_PRECISION & set(names) else jnp.float32
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}
    tx = functools.reduce(lambda tx, name: WRAPPERS[name](tx), reversed(names), gx.adamw(1e-3))
    found = figures.of_step(tx, params, advance, least=1 << 20)
    return round(found.temporaries, 2), found.copies


def within(found: tuple[float, int], allowed: tuple[float, int]) -> bool:
    return found[0] <= allowed[0] + 0.2 and found[1] <= allowed[1]


exact = pytest.mark.skipif(
    jaxlib.__version__ != "0.10.2",
    reason="the figures are those of one version of XLA; others are printed by the pairs",
)


@exact
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_a_wrapper_costs_alone(name):
    assert cost(by_step, name) == pytest.approx(ALONE[name], abs=0.02)


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_a_pair_costs_no_more_than_the_dearer_of_the_two(outer, inner):
    found, alone = cost(by_step, outer, inner), [cost(by_step, name) for name in (outer, inner)]
    allowed = max(cost for cost, _ in alone), max(copies for _, copies in alone)
    if jaxlib.__version__ != "0.10.2":
        print(f"{outer}({inner}): {found}, allowed {allowed}")
        return
    assert within(found, allowed)


@exact
def test_which_pairs_cost_more_as_update_and_apply():
    dearer = set()
    for outer, inner in PAIRS:
        alone = [cost(by_update, name) for name in (outer, inner)]
        allowed = max(cost for cost, _ in alone), max(copies for _, copies in alone)
        if not within(cost(by_update, outer, inner), allowed):
            dearer.add((outer, inner))
    assert dearer <= BY_UPDATE
