"""What is to reach: each piece of work, who does it, and the figures that this library wants of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import optax
import optax.contrib
from libraries import (
    ADAMW,
    MAX_NORM,
    OPTAX_ADAMW,
    OPTAX_CLIPPED,
    OUR_ADAMW,
    OUR_CLIPPED,
    Contender,
    Outsider,
    optax_clipped,
    optax_norm,
    our_clipped,
    outsiders,
    state_only,
    update_only,
)
from workloads import Shapes, equal_leaves, gpt2_like, small_leaves

import gradxform as gx

STEP, UNJITTED, TRACE, COMPILE, BUILD, IMPORT = (
    "compiled step",
    "un-jitted update",
    "trace + lower",
    "compile",
    "build",
    "import",
)
TEMPORARIES, COPIES, EQUATIONS, STATE, PEAK = (
    "temporaries, B/param",
    "full-size copies",
    "equations",
    "state, B/param",
    "peak memory, B/param",
)
TINY = 0.01
"""Bytes of temporaries per parameter that are none."""

MUON = (3.4445, -4.775, 2.0315)
"""The polynomial of every step of Muon, five of them."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """At most so much of a figure: of the base's in the same run, or in itself where there is no base."""

    figure: str
    at_most: float
    who: str = "gradxform"
    base: str | None = "optax"


@dataclasses.dataclass(frozen=True)
class Case:
    """A piece of work on a tree, done by everybody; the first contender is the base of all ratios shown."""

    name: str
    shapes: Shapes
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...]
    outsiders: tuple[Outsider, ...] = ()
    figures: tuple[str, ...] = (STEP,)
    """Of STEP, UNJITTED, BUILD (trace, lower, compile, and its parts), IMPORT; STEP and BUILD bring exact figures."""
    rounds: int = 11
    """The compiled step."""
    repeats: int = 5
    """What runs in Python: un-jitted calls, tracing and lowering, imports."""
    compiles: int = 1
    """In so many of the repeats the step is compiled as well."""
    checked: int = 3
    """Steps after which everybody must have come to the same."""
    params_within: float = 1e-3
    """Of the way gone."""
    elementwise: bool = True
    """The furthest element off against the one that went furthest; False for the means of both, for noisy moments."""
    moments_within: float | None = 1e-5
    """Relative; None not to look."""


def exact(who: str = "gradxform", temporaries: float = TINY, copies: bool = True) -> tuple[Goal, ...]:
    """No temporaries to speak of, and no copies."""
    goal = Goal(TEMPORARIES, temporaries, who, None)
    return (goal, Goal(COPIES, 0, who, None)) if copies else (goal,)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    leaf: int = 1 << 26
    transformer: tuple[int, int, int, int] = (12, 512, 16384, 1024)
    thousand: int = 1000
    muon: tuple[tuple[int, int, int], ...] = ((100, 64, 64), (48, 512, 512), (12, 512, 2048))


QUICK = Sizes(leaf=1 << 14, transformer=(1, 32, 128, 32), thousand=4, muon=((3, 8, 8), (2, 16, 16), (2, 16, 64)))


def cases(sizes: Sizes) -> list[Case]:
    """The whole benchmark."""
    leaf = {"leaf": (sizes.leaf,)}
    transformer = gpt2_like(*sizes.transformer)
    found = []
    for where, shapes in {f"one leaf, {label(sizes.leaf)}": leaf, "GPT-2-like tree": transformer}.items():
        found += [
            Case(
                f"AdamW, {where}",
                shapes,
                (OPTAX_ADAMW, OUR_ADAMW),
                (Goal(STEP, 1.0), *exact()),
                outsiders(),
                rounds=21,
            ),
            Case(
                f"clip + AdamW, {where}",
                shapes,
                (OPTAX_CLIPPED, OUR_CLIPPED),
                (Goal(STEP, 0.6), *exact(temporaries=0.1)),
                outsiders(clips=True),
            ),
        ]
    small = {count: small_leaves(count * sizes.thousand) for count in (1, 2, 3)}
    kilo = equal_leaves(2 * sizes.thousand, 1024)
    return [
        *found,
        guard(transformer),
        accumulation(transformer),
        low_bit(f"one leaf, {label(sizes.leaf)}", leaf),
        Case(
            f"un-jitted AdamW, {len(small[1])} leaves",
            small[1],
            (OPTAX_ADAMW, OUR_ADAMW),
            (Goal(UNJITTED, 0.2),),
            figures=(UNJITTED,),
        ),
        Case(
            f"build clip + AdamW, {len(small[1])} leaves",
            small[1],
            (OPTAX_CLIPPED, OUR_CLIPPED),
            (Goal(TRACE, 0.3), Goal(BUILD, 0.55)),
            figures=(STEP, BUILD),
            repeats=4,
            compiles=2,
        ),
        Case(
            f"build clip + AdamW, {len(small[3])} leaves",
            small[3],
            (OPTAX_CLIPPED, OUR_CLIPPED),
            (Goal(BUILD, 0.35),),
            figures=(STEP, BUILD),
            repeats=1,
        ),
        *norms(small[2]),
        dispatch(kilo),
        *(muon(*form, last=form == sizes.muon[-1]) for form in sizes.muon),
        Case(
            "import in a fresh process",
            {},
            (OPTAX_ADAMW, OUR_ADAMW),
            (Goal(IMPORT, 1.1),),
            figures=(IMPORT,),
            repeats=7,
        ),
    ]


def norms(shapes: Shapes) -> list[Case]:
    """The global norm of small leaves, with the clip by it and alone."""
    clips = (
        Contender("optax", lambda: optax.clip_by_global_norm(MAX_NORM), update_only),
        Contender("gradxform", lambda: gx.clip_by_global_norm(MAX_NORM), update_only),
    )
    alone = (
        Contender("optax", optax_norm, state_only),
        Contender("gradxform", lambda: gx.observe(gx.identity(), of="gradient"), state_only),
    )
    step = Goal(STEP, 1.0)
    forms = {"global norm and clip": (clips, (step,)), "global norm": (alone, (Goal(COMPILE, 0.15), step))}
    return [
        Case(f"{work}, {len(shapes)} leaves", shapes, contenders, goals, figures=(STEP, BUILD), repeats=1)
        for work, (contenders, goals) in forms.items()
    ]


def guard(shapes: Shapes) -> Case:
    """Skip steps that are not finite, and look at the others."""
    contenders = [
        Contender("optax, apply_if_finite", lambda: optax.apply_if_finite(optax_clipped(), 10)),
        Contender("gradxform, unguarded", our_clipped),
        Contender("gradxform, skip_nonfinite", lambda: gx.skip_nonfinite(our_clipped())),
        Contender("gradxform, observe gradient", lambda: gx.observe(gx.skip_nonfinite(our_clipped()), of="gradient")),
        Contender("gradxform, observe all", lambda: gx.observe(gx.skip_nonfinite(our_clipped()))),
    ]
    limits = {"gradxform, unguarded": 1.2, "optax, apply_if_finite": 0.5}
    guarded = [contender.name for contender in contenders[2:]]
    goals = [Goal(STEP, limit, who, base) for base, limit in limits.items() for who in guarded]
    return Case(
        "clip + AdamW behind a guard, GPT-2-like tree",
        shapes,
        tuple(contenders),
        (*goals, *exact("gradxform, skip_nonfinite", 0.1), *exact("gradxform, observe gradient", 0.1)),
    )


def accumulation(shapes: Shapes) -> Case:
    """A step of AdamW from eight mini-batches."""

    def ours() -> gx.Transformation:
        return gx.accumulate(gx.adamw(**ADAMW), 8)

    contenders = (
        Contender("optax, MultiSteps", lambda: optax.MultiSteps(optax.adamw(**ADAMW), 8), calls=8),
        Contender("gradxform, update and apply", ours, calls=8),
        Contender("gradxform, gx.step", ours, in_step, calls=8),
    )
    goals = (
        Goal(STEP, 0.4, "gradxform, update and apply", "optax, MultiSteps"),
        Goal(STEP, 0.2, "gradxform, gx.step", "optax, MultiSteps"),
        *exact("gradxform, gx.step"),
    )
    return Case("AdamW every 8 steps, GPT-2-like tree", shapes, contenders, goals, rounds=5, checked=8)


ROOT8 = "gradxform, root8, gx.step"


def low_bit(where: str, shapes: Shapes) -> Case:
    """Moments in fewer bits than the parameters."""
    contenders = (
        OPTAX_ADAMW,
        Contender("optax, mu bfloat16", lambda: optax.adamw(**ADAMW, mu_dtype="bfloat16")),
        Contender("gradxform, bfloat16", lambda: gx.adamw(**ADAMW, state_dtype="bfloat16")),
        Contender(ROOT8, lambda: gx.quantize_state(gx.adamw(**ADAMW)), in_step),
    )
    goals = (
        Goal(STEP, 1.0, "gradxform, bfloat16"),
        Goal(STATE, 4.01, "gradxform, bfloat16", None),
        *exact("gradxform, bfloat16"),
        Goal(STEP, 1.2, ROOT8),
        Goal(STATE, 2.1, ROOT8, None),
        *exact(ROOT8, 0.1, copies=False),
    )
    name = f"AdamW, low-bit moments, {where}"
    return Case(name, shapes, contenders, goals, params_within=0.02, elementwise=False, moments_within=None)


def dispatch(shapes: Shapes) -> Case:
    """Many tiny leaves, where each costs a fixed time; and what one flat array saves."""
    flat = Contender("gradxform, all flat", OUR_ADAMW.make, flat=True)
    goals = (Goal(STEP, 1.0), Goal(STEP, 0.12, flat.name))
    name = f"AdamW, {len(shapes)} leaves of 1 k"
    return Case(name, shapes, (OPTAX_ADAMW, OUR_ADAMW, flat), goals, outsiders(), rounds=21)


def muon(count: int, rows: int, columns: int, last: bool) -> Case:
    """Muon of hidden matrices alone; optax takes every matrix by itself."""
    shapes = equal_leaves(count, rows, columns)

    def ours(method: str) -> gx.Transformation:
        return gx.muon(0.02, ".*", method=method, coefficients=MUON)

    contenders = [Contender("gradxform", lambda: ours("newton_schulz"))]
    if last:
        contenders.append(Contender("gradxform, gram", lambda: ours("gram")))
    goals = [Goal(STEP, 0.65 if rows * columns < 1 << 16 else 0.7), Goal(TEMPORARIES, 0.2), Goal(BUILD, 0.4)]
    if last:
        gram = "gradxform, gram"
        goals += [Goal(STEP, 0.35, gram), Goal(TEMPORARIES, 0.3, gram), Goal(BUILD, 0.4, gram)]
    return Case(
        f"Muon, {count} matrices {rows}×{columns}",
        shapes,
        (Contender("optax", lambda: optax.contrib.muon(0.02, ns_coeffs=MUON)), *contenders),
        tuple(goals),
        figures=(STEP, BUILD),
        rounds=5,
        repeats=3,
        compiles=3,
        params_within=2e-2,
        moments_within=None,
    )


def in_step(tx: gx.Transformation, grads: object, state: object, params: object) -> tuple[object, object]:
    """Update and apply in one."""
    return gx.step(tx, grads, state, params)


def label(size: int) -> str:
    """16 M of 1 << 24."""
    power, unit = next((p, u) for p, u in ((20, " M"), (10, " k"), (0, "")) if size >= 1 << p)
    return f"{size / (1 << power):g}{unit}"


def with_rounds(found: Sequence[Case], rounds: int | None, repeats: int | None) -> list[Case]:
    """The cases with other numbers of rounds."""

    def changed(case: Case) -> Case:
        least = min(case.repeats, repeats or case.repeats)
        return dataclasses.replace(
            case, rounds=rounds or case.rounds, repeats=least, compiles=min(case.compiles, least)
        )

    return [changed(case) for case in found]
