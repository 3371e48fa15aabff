"""The figures that no machine changes: no copies, no temporaries to speak of, few equations. Programs, no times."""

from __future__ import annotations

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import figures
from libraries import ADAMW, MAX_NORM, OUR_ADAMW, OUR_CLIPPED, Contender, in_step, update_only
from rows import accumulation, guard, low_bit
from workloads import Shapes, equal_leaves, small_leaves, trees

import gradxform as gx

MATRICES: Shapes = {**equal_leaves(4, 256, 256), "bias": (512,), "scale": (512,)}
CLIP = Contender("gradxform", lambda: gx.clip_by_global_norm(MAX_NORM), update_only)


def named(name: str) -> Contender:
    """A contender of one of the cases that has several of ours."""
    cases = (guard("", MATRICES), accumulation("", MATRICES), low_bit("", MATRICES))
    return next(contender for case in cases for contender in case.contenders if contender.name == name)


def of(contender: Contender, least: int | None = None) -> figures.Figures:
    params, _ = trees(MATRICES)
    return figures.of_step(contender.make(), params, contender.advance, least)


@pytest.mark.parametrize(
    ("contender", "state", "equations"),
    [
        (OUR_ADAMW, 8, 150),
        (OUR_CLIPPED, 8, 250),
        (named("gradxform, skip_nonfinite"), 8, 300),
        (named("gradxform, gx.step"), 12, 300),
        (named("gradxform, bfloat16"), 4, 280),
        (named("gradxform, root8, gx.step"), 2.0545, 400),  # small leaves are kept
        (Contender("", lambda: gx.quantize_state(gx.adamw(**ADAMW), "bfloat16"), in_step), 4.0156, 310),
    ],
    ids=["AdamW", "clip", "guard", "accumulate in gx.step", "bfloat16", "8 bits in gx.step", "bfloat16 in gx.step"],
)
def test_a_step_copies_nothing_and_needs_no_second_tree(contender, state, equations):
    found = of(contender)
    assert found.copies == 0
    # a small leaf or two, or numbers per block of 8-bit codes; a matrix would be 1 byte
    assert found.temporaries < (0.1 if "8, gx" in contender.name else 0.02)
    assert found.state == pytest.approx(state, abs=1e-3)
    assert found.equations <= equations


def test_copies_and_temporaries_are_seen_where_they_are():
    def swapped(tx, grads, state, params):
        params, state = gx.step(tx, grads, state, params)
        return params, (state[:-2], state.nu, state.mu)

    contender = Contender("gradxform", lambda: gx.adamw(**ADAMW), swapped)
    found = of(contender)
    assert found.copies >= 4
    assert found.temporaries > 1
    assert of(contender, least=256 * 256 + 1).copies == 0


@pytest.mark.parametrize(
    ("instruction", "copies"),
    [
        ("%copy.1 = f32[512,256]{1,0} copy(%p.1)", 1),
        ("ROOT %copy.2 = f32[131072]{0:T(256)} copy(%p.1)", 1),
        ("%c = (f32[512,256]{1,0}, f32[512,256]{1,0}, u32[]) copy-start(%p.1)", 1),
        ("%small = f32[512]{0} copy(%p.1)", 0),
        ("%count = s32[] copy(%p.1)", 0),
        ("%sum = f32[512,256]{1,0} add(%copy.1, %p.1)", 0),
    ],
)
def test_only_copies_of_large_arrays_count(instruction, copies):
    text = f"%p.0 = f32[512,256] parameter(0)\n  {instruction}\n  %end = f32[] constant(0)"
    assert figures.count_copies(text, 512 * 256) == copies


def test_shapes_are_enough():
    params = {"matrix": jnp.zeros((64, 32)), "bias": jnp.zeros(8)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    found = figures.of_step(gx.momentum(0.1), shapes, gx.step)
    assert found == figures.of_step(gx.momentum(0.1), params, gx.step)
    assert found.state == pytest.approx(4, abs=0.01)


def test_two_hundred_leaves_of_eight_shapes_cost_two_equations_each_and_few_reductions():
    def lowered(contender: Contender) -> tuple[int, str]:
        step, arguments = contender.prepared(*trees(small_leaves(200)))
        traced = step.trace(*arguments)
        return figures.count_equations(traced.jaxpr), traced.lower().as_text()

    equations, _ = lowered(OUR_ADAMW)
    assert equations <= 4 * 200
    equations, text = lowered(CLIP)
    assert equations <= 6 * 200
    assert 0 < text.count("stablehlo.reduce") <= 3 * 8  # one for each 16 leaves of a shape
