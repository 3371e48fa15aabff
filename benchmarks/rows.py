"""The rows of the benchmark: each piece of work, who does it, and what this library wants to reach."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import optax
import optax.contrib
from cases import (
    ABOVE,
    BUILD,
    COMPILATIONS,
    COMPILE,
    COPIES,
    EXACT,
    IMPORT,
    STATE,
    STEP,
    SWEEP,
    TEMPORARIES,
    TRACE,
    UNJITTED,
    Case,
    Goal,
)
from libraries import (
    ADAMW,
    MAX_NORM,
    OPTAX_ADAMW,
    OPTAX_CLIPPED,
    OUR_ADAMW,
    OUR_CLIPPED,
    Contender,
    Optimizer,
    TorchSoapRun,
    each_once,
    has_soap,
    in_step,
    optax_clipped,
    optax_norm,
    our_clipped,
    outsiders,
    state_only,
    update_and_apply,
    update_only,
    with_value,
)
from presets import Preset
from workloads import Shapes, equal_leaves, gpt2_like, small_leaves

import gradxform as gx

TINY = 0.01
"""Bytes of temporaries per parameter that are none."""


def cases(preset: Preset) -> list[Case]:
    """The whole benchmark."""
    return [fitted(case, preset) for row in preset.rows for case in ROWS[row](preset)]


def fitted(case: Case, preset: Preset) -> Case:
    """The case in the preset's numbers of rounds, with the goals of its sort of machine."""

    def goal(goal: Goal) -> Goal:
        return goal if goal.base is None else dataclasses.replace(goal, at_most=max(goal.at_most, preset.loosest))

    repeats = min(case.repeats, preset.repeats)
    return dataclasses.replace(
        case,
        goals=tuple(map(goal, case.goals)),
        rounds=min(case.rounds, preset.rounds),
        sittings=min(case.sittings, preset.sittings),
        together=preset.together,
        repeats=repeats,
        compiles=min(case.compiles, repeats),
    )


def exact(who: str = "gradxform", temporaries: float = TINY, copies: bool = True) -> tuple[Goal, ...]:
    """No temporaries to speak of, and no copies."""
    goal = Goal(TEMPORARIES, temporaries, who, None)
    return (goal, Goal(COPIES, 0, who, None)) if copies else (goal,)


def large_leaf(preset: Preset) -> tuple[str, Shapes]:
    """The one large leaf, and what it is called."""
    return f"one leaf, {label(preset.leaf)}", {"leaf": (preset.leaf,)}


def transformer(preset: Preset) -> tuple[str, Shapes]:
    """What people train."""
    return "GPT-2-like tree", gpt2_like(*preset.transformer)


def adamw(preset: Preset) -> list[Case]:
    """AdamW, and with a clip before it."""
    found = []
    for where, shapes in (large_leaf(preset), transformer(preset)):
        plain = (Goal(STEP, 1.0), *exact())
        clipped = (Goal(STEP, 0.6), *exact(temporaries=0.1))
        found += [
            Case(f"AdamW, {where}", shapes, (OPTAX_ADAMW, OUR_ADAMW), plain, outsiders(), rounds=21),
            Case(f"clip + AdamW, {where}", shapes, (OPTAX_CLIPPED, OUR_CLIPPED), clipped, outsiders(clips=True)),
        ]
    return found


def guard(where: str, shapes: Shapes) -> Case:
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
        f"clip + AdamW behind a guard, {where}",
        shapes,
        tuple(contenders),
        (*goals, *exact("gradxform, skip_nonfinite", 0.1), *exact("gradxform, observe gradient", 0.1)),
    )


def accumulation(where: str, shapes: Shapes) -> Case:
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
    return Case(f"AdamW every 8 steps, {where}", shapes, contenders, goals, rounds=5, checked=8)


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


def low_precision(where: str, shapes: Shapes) -> Case:
    """Parameters in bfloat16, so that a step would be rounded away where nothing keeps what is missing."""
    wrappers: dict[str, tuple[Callable[[Optimizer], Optimizer], float]] = {
        "stochastic_rounding": (lambda tx: gx.stochastic_rounding(tx, 0), 8),
        "compensated": (lambda tx: gx.compensated(tx), 10),
        "master_weights": (lambda tx: gx.master_weights(tx), 12),
    }
    contenders = [OPTAX_ADAMW, dataclasses.replace(OPTAX_ADAMW, name="optax, bfloat16", dtype="bfloat16")]
    goals: list[Goal] = []
    for name, (wrap, state) in wrappers.items():
        who = f"gradxform, {name}"
        contenders.append(Contender(who, functools.partial(wrapped, wrap), in_step, dtype="bfloat16"))
        goals += [Goal(STEP, 1.2, who), Goal(STATE, state + 0.01, who, None), *exact(who)]
    return Case(
        f"AdamW, bfloat16 parameters, {where}",
        shapes,
        tuple(contenders),
        tuple(goals),
        params_within=0.1,  # half a unit in bfloat16's last place is a few hundredths of the first steps
        elementwise=False,
        moments_within=None,
    )


def wrapped(*wrappers: Callable[[Optimizer], Optimizer]) -> Optimizer:
    """AdamW inside wrappers, the last of which is the innermost."""
    return functools.reduce(lambda tx, wrap: wrap(tx), reversed(wrappers), gx.adamw(**ADAMW))


# looked up when they are called: a version that does not have one fails there alone
WRAPPERS: dict[str, Callable[[Optimizer], Optimizer]] = {
    "accumulate": lambda tx: gx.accumulate(tx, 4),
    "skip_nonfinite": lambda tx: gx.skip_nonfinite(tx),
    "observe": lambda tx: gx.observe(tx, of="gradient"),
    "quantize_state": lambda tx: gx.quantize_state(tx),
    "compensated": lambda tx: gx.compensated(tx),
    "master_weights": lambda tx: gx.master_weights(tx),
    "clip": lambda tx: gx.chain(gx.clip_by_global_norm(MAX_NORM), tx),
    "by_path": lambda tx: gx.by_path({"bias": gx.sgd(0.1)}, default=tx),
}

PAIRS = (
    ("accumulate", "skip_nonfinite"),
    ("skip_nonfinite", "accumulate"),
    ("clip", "accumulate"),
    ("clip", "quantize_state"),
    ("by_path", "quantize_state"),
    ("quantize_state", "accumulate"),
    ("quantize_state", "skip_nonfinite"),
    ("skip_nonfinite", "quantize_state"),
    ("observe", "skip_nonfinite"),
    ("observe", "master_weights"),
    ("skip_nonfinite", "compensated"),
    ("skip_nonfinite", "master_weights"),
)
"""The outer and the inner one."""


def pairs(side: int) -> Case:
    """What wrappers inside wrappers cost in memory: no more than the dearer of the two alone."""

    def contender(*names: str) -> Contender:
        low = {"compensated", "master_weights"} & set(names)
        return Contender(
            f"gradxform, {'('.join(names)}{')' * (len(names) - 1)}",
            functools.partial(wrapped, *(WRAPPERS[name] for name in names)),
            in_step,
            dtype="bfloat16" if low else None,
            parts=tuple(f"gradxform, {name}" for name in names) if len(names) > 1 else (),
        )

    both = [contender(*names) for names in PAIRS]
    return Case(
        f"pairs of wrappers around AdamW, one matrix {side}×{side}",
        {"matrix": (side, side), "bias": (8,)},
        (*(contender(name) for name in WRAPPERS), *both),
        tuple(Goal(ABOVE, 0.2, pair.name, None) for pair in both),
        figures=(EXACT,),
        large=side * side,
    )


def unjitted(shapes: Shapes) -> Case:
    """What Python takes for an update that nobody compiled."""
    name = f"un-jitted AdamW, {len(shapes)} leaves"
    return Case(name, shapes, (OPTAX_ADAMW, OUR_ADAMW), (Goal(UNJITTED, 0.2),), figures=(UNJITTED,))


def sweep(count: int) -> Case:
    """The first step of many AdamWs with other numbers, without `jit`, as one tries out hyperparameters."""
    numbers = [{**ADAMW, "learning_rate": 1e-3 * (k + 1), "weight_decay": 1e-2 * (k + 1)} for k in range(count)]
    contenders = (
        Contender("optax", lambda: [optax.adamw(**these) for these in numbers], each_once),
        Contender("gradxform", lambda: [gx.adamw(**these) for these in numbers], each_once),
    )
    name = f"{count} un-jitted AdamWs with other α and λ, 8 leaves"
    goals = (Goal(SWEEP, 1.0), Goal(COMPILATIONS, 1.0))
    return Case(name, small_leaves(8), contenders, goals, figures=(SWEEP,), repeats=3)


def builds(preset: Preset) -> list[Case]:
    """Clip + AdamW of many leaves, from nothing to a program."""
    one, three = (small_leaves(count * preset.thousand) for count in (1, 3))
    both, figures = (OPTAX_CLIPPED, OUR_CLIPPED), (STEP, BUILD)
    goals = (Goal(TRACE, 0.3), Goal(BUILD, 0.55))
    return [
        Case(f"build clip + AdamW, {len(one)} leaves", one, both, goals, figures=figures, repeats=4, compiles=2),
        Case(f"build clip + AdamW, {len(three)} leaves", three, both, (Goal(BUILD, 0.35),), figures=figures, repeats=1),
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


def dispatch(shapes: Shapes) -> Case:
    """Many tiny leaves, where each costs a fixed time; and what one flat array saves."""
    flat = Contender("gradxform, all flat", OUR_ADAMW.make, flat=True)
    goals = (Goal(STEP, 1.0), Goal(STEP, 0.12, flat.name))
    name = f"AdamW, {len(shapes)} leaves of 1 k"
    return Case(name, shapes, (OPTAX_ADAMW, OUR_ADAMW, flat), goals, outsiders(), rounds=21)


POLYNOMIAL = (3.4445, -4.775, 2.0315)
"""Of every step of Muon, five of them."""

MUON_FORMS = {
    "batched": {"batched": True},
    "one by one": {"batched": False},
    "bfloat16": {"dtype": "bfloat16"},
    "gram": {"method": "gram"},
}


def muon(count: int, rows: int, columns: int, forms: tuple[str, ...] = ()) -> Case:
    """Muon of hidden matrices alone; optax takes every matrix by itself.

    Products of float32 are asked for in full, as this library does by itself; where the device's default is less,
    optax takes part with that too.
    """
    shapes = equal_leaves(count, rows, columns)

    def ours(name: str, **options: object) -> Contender:
        def make() -> gx.Transformation:
            return gx.muon(0.02, ".*", coefficients=POLYNOMIAL, **options)

        return Contender(name, make, within=0.1 if "dtype" in options else None)

    def theirs(name: str, precision: str) -> Contender:
        def advance(*arguments: object) -> tuple[object, object]:
            with jax.default_matmul_precision(precision):
                return update_and_apply(*arguments)

        coarse = 0.1 if precision == "default" else None
        return Contender(name, lambda: optax.contrib.muon(0.02, ns_coeffs=POLYNOMIAL), advance, within=coarse)

    contenders = [theirs("optax", "highest"), ours("gradxform")]
    if jax.default_backend() != "cpu":
        contenders.insert(1, theirs("optax, default precision", "default"))
    goals = [Goal(STEP, 0.65 if rows * columns < 1 << 16 else 0.7), Goal(TEMPORARIES, 0.2), Goal(BUILD, 0.4)]
    for form in forms:
        if form != "gram" or columns >= 2 * rows:
            contenders.append(ours(f"gradxform, {form}", **MUON_FORMS[form]))
    gram = "gradxform, gram"
    goals += [Goal(STEP, 0.35, gram), Goal(TEMPORARIES, 0.3, gram), Goal(BUILD, 0.4, gram)]
    return Case(
        f"Muon, {count} matrices {rows}×{columns}",
        shapes,
        tuple(contenders),
        tuple(goals),
        figures=(STEP, BUILD),
        rounds=5,
        repeats=3,
        compiles=3,
        params_within=2e-2,
        moments_within=None,
    )


OPTIMIZERS: dict[str, tuple[Callable[[], Optimizer], Callable[[], Optimizer]]] = {
    "lion": (lambda: optax.lion(1e-3), lambda: gx.lion(1e-3)),
    "nadam": (lambda: optax.nadam(1e-3), lambda: gx.nadam(1e-3)),
    "adafactor": (lambda: optax.adafactor(1e-3), lambda: gx.adafactor(1e-3)),
    "noisy_sgd": (lambda: optax.noisy_sgd(1e-3, key=0), lambda: gx.noisy_sgd(1e-3)),
    "polyak_sgd": (optax.polyak_sgd, lambda: gx.polyak_sgd()),
    "prodigy": (optax.contrib.prodigy, lambda: gx.prodigy()),
    "schedule_free_sgd": (lambda: optax.contrib.schedule_free_sgd(0.1), lambda: gx.schedule_free_sgd(0.1)),
    "schedule_free_adamw": (lambda: optax.contrib.schedule_free_adamw(), lambda: gx.schedule_free_adamw()),
    "lbfgs": (lambda: optax.lbfgs(0.1, 5, linesearch=None), lambda: gx.lbfgs(0.1, 5)),
}
"""optax's and this library's, with the same numbers."""


def optimizers(preset: Preset) -> list[Case]:
    """One row for each further optimizer that optax has as well."""
    found = []
    for name, (theirs, ours) in OPTIMIZERS.items():
        where, shapes = transformer(preset)
        if name == "lbfgs":  # which keeps 12 numbers per parameter
            where, shapes = f"8 matrices {preset.matrix}×{preset.matrix}", equal_leaves(8, preset.matrix, preset.matrix)
        advance = with_value if name == "polyak_sgd" else update_and_apply
        contenders = (Contender("optax", theirs, advance), Contender("gradxform", ours, advance, parts=("optax",)))
        goals = [Goal(STEP, 1.05), Goal(ABOVE, TINY, "gradxform", None)]
        if name not in ("lbfgs", "noisy_sgd"):  # the last parameters are kept; the random numbers are written out
            goals.append(Goal(COPIES, 0, "gradxform", None))
        # each draws numbers of its own; and gradients that never change have no curvature, which each fills in its way
        checked = 0 if name in ("noisy_sgd", "lbfgs") else 3
        case = Case(f"{name}, {where}", shapes, contenders, tuple(goals), checked=checked, elementwise=False)
        found.append(dataclasses.replace(case, moments_within=None))
    return found


def soap(count: int, rows: int, columns: int) -> Case:
    """SOAP, which optax has not; every tenth step renews the bases."""
    numbers = {"lr": 1e-3, "betas": (0.9, 0.99), "precondition_frequency": 10}
    outsider = functools.partial(TorchSoapRun, numbers)

    def ours(**options: bool) -> gx.Transformation:
        return gx.soap(1e-3, 0.9, 0.99, weight_decay=0.0, **options)

    return Case(
        f"SOAP, {count} matrices {rows}×{columns}",
        equal_leaves(count, rows, columns),
        (
            Contender("gradxform", ours, calls=10),
            Contender("gradxform, kl", lambda: ours(kl=True), calls=10, within=math.inf),
        ),
        (),
        (outsider,) if has_soap() else (),
        rounds=5,
        checked=0,  # gradients that never change leave the bases open; the tests compare both on others
        params_within=2e-2,
        elementwise=False,
        moments_within=None,
    )


def imports() -> Case:
    """What ``import`` costs."""
    goals = (Goal(IMPORT, 1.1),)
    return Case("import in a fresh process", {}, (OPTAX_ADAMW, OUR_ADAMW), goals, figures=(IMPORT,), repeats=7)


ROWS: dict[str, Callable[[Preset], list[Case]]] = {
    "AdamW": adamw,
    "guard": lambda preset: [guard(*transformer(preset))],
    "accumulation": lambda preset: [accumulation(*transformer(preset))],
    "low-bit moments": lambda preset: [low_bit(*large_leaf(preset))],
    "bfloat16 parameters": lambda preset: [low_precision(*large_leaf(preset))],
    "pairs": lambda preset: [pairs(preset.matrix)],
    "un-jitted": lambda preset: [unjitted(small_leaves(preset.thousand))],
    "sweep": lambda preset: [sweep(preset.sweep)],
    "build": builds,
    "norm": lambda preset: norms(small_leaves(2 * preset.thousand)),
    "dispatch": lambda preset: [dispatch(equal_leaves(2 * preset.thousand, 1024))],
    "optimizers": optimizers,
    "SOAP": lambda preset: [soap(*preset.soap)],
    "Muon": lambda preset: [muon(*form, forms=preset.muon_forms) for form in preset.muon],
    "import": lambda preset: [imports()],
}


def label(size: int) -> str:
    """16 M of 1 << 24."""
    power, unit = next((p, u) for p, u in ((20, " M"), (10, " k"), (0, "")) if size >= 1 << p)
    return f"{size / (1 << power):g}{unit}"
