"""The figures that no machine changes: no copies, no temporaries to speak of, few equations. Programs, no times."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import measure
from cases import COPIES, EQUATIONS, STATE, TEMPORARIES, accumulation, guard, in_step, low_bit
from libraries import ADAMW, MAX_NORM, OUR_ADAMW, OUR_CLIPPED, Contender, update_only
from workloads import Shapes, equal_leaves, small_leaves, trees

import gradxform as gx

MATRICES: Shapes = {**equal_leaves(4, 256, 256), "bias": (512,), "scale": (512,)}
CLIP = Contender("gradxform", lambda: gx.clip_by_global_norm(MAX_NORM), update_only)


def named(name: str) -> Contender:
    """A contender of one of the cases that has several of ours."""
    every = [
        some for case in (guard(MATRICES), accumulation(MATRICES), low_bit("", MATRICES)) for some in case.contenders
    ]
    return next(contender for contender in every if contender.name == name)


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
    found = measure.exact_figures(measure.built(contender, *trees(MATRICES)), MATRICES)
    assert found[COPIES] == 0
    # a small leaf or two, or numbers per block of 8-bit codes; a matrix would be 1 byte
    assert found[TEMPORARIES] < (0.1 if "8, gx" in contender.name else 0.02)
    assert found[STATE] == pytest.approx(state, abs=1e-3)
    assert found[EQUATIONS] <= equations


def test_copies_and_temporaries_are_seen_where_they_are():
    def swapped(tx, grads, state, params):
        params, state = gx.step(tx, grads, state, params)
        return params, (state[:-2], state.nu, state.mu)

    contender = Contender("gradxform", lambda: gx.adamw(**ADAMW), swapped)
    found = measure.exact_figures(measure.built(contender, *trees(MATRICES)), MATRICES)
    assert found[COPIES] >= 4
    assert found[TEMPORARIES] > 1


def test_two_hundred_leaves_of_eight_shapes_cost_two_equations_each_and_few_reductions():
    def lowered(contender: Contender) -> tuple[int, str]:
        step, arguments = measure.prepared(contender, *trees(small_leaves(200)))
        traced = step.trace(*arguments)
        return measure.count_equations(traced.jaxpr, set()), traced.lower().as_text()

    equations, _ = lowered(OUR_ADAMW)
    assert equations <= 4 * 200
    equations, text = lowered(CLIP)
    assert equations <= 6 * 200
    assert 0 < text.count("stablehlo.reduce") <= 3 * 8  # one for each 16 leaves of a shape
