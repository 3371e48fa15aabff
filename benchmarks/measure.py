"""How it is measured: equal results first, then interleaved rounds; from cold caches where caches count."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from libraries import JAX_LIBRARIES, LEARNING_RATE, OPTAX, JaxLibrary, JaxRun, Run, TorchRun, torch_variants
from workloads import Tree, Workload

Tick: TypeAlias = Callable[[str], None]
"""Called before each measurement with what it is, for the progress bar."""

FIGURES = ("step", "update", "cold")
"""The compiled step; `update` and `init` as they are; tracing, lowering and compiling from cold caches."""

CHECKED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of one optimizer on one workload: by library, the repeats in seconds or one exact number."""

    workload: str
    optimizer: str
    figure: str
    values: Mapping[str, Sequence[float]]
    exact: bool = False
    reach: float | None = None

    def ratio(self, library: str) -> float | None:
        """The median over the rounds of the library's value divided by optax's."""
        pairs = zip(self.values[library], self.values[OPTAX.name], strict=True)
        ratios = [value / base for value, base in pairs if base]
        return float(np.median(ratios)) if ratios else None


def count_ticks(workload: Workload, figures: Sequence[str]) -> int:
    """How often `measure` calls its `tick`."""
    libraries = len(JAX_LIBRARIES)
    rounds = {
        "step": workload.runs * (libraries + len(torch_variants())),
        "update": 2 * workload.runs * libraries,
        "cold": workload.traces * libraries,
    }
    compiled_for_step = libraries if "step" in figures and "cold" not in figures else 0
    return sum(rounds[figure] for figure in figures) + compiled_for_step


def measure(workload: Workload, optimizer: str, clips: bool, figures: Sequence[str], tick: Tick) -> list[Row]:
    """Take the `figures` of one optimizer on one workload.

    Raises:
      AssertionError: if the libraries do not come to the same parameters and moments.
    """
    params, grads = workload.trees()
    rows: list[Row] = []

    def row(figure: str, values: Mapping[str, Sequence[float]], **more: Any) -> None:
        rows.append(Row(workload.name, optimizer, figure, values, **more))

    programs: dict[str, Program] = {}
    cold: dict[str, dict[str, list[float]]] = {figure: {} for figure in ("trace", "lower", "compile")}
    repeats = workload.traces if "cold" in figures else int("step" in figures)
    for left in reversed(range(repeats)):
        for library in shuffled(JAX_LIBRARIES):
            tick(f"trace, lower, compile: {library.name}")
            programs[library.name], seconds = cold_start(library, clips, params, grads, left < workload.compiles)
            for figure, value in seconds.items():
                cold[figure].setdefault(library.name, []).append(value)

    if "step" in figures:
        runs: list[Run] = [
            JaxRun(library, clips, programs[library.name].compiled, params, grads) for library in JAX_LIBRARIES
        ]
        runs += [TorchRun(name, options, clips, params, grads) for name, options in torch_variants().items()]
        check_equal(runs)
        tasks = {run.name: run for run in runs}
        row("compiled step", interleaved(tasks, workload.runs, "compiled step", tick), reach=1.0)
        del runs, tasks
    if "update" in figures:
        updates, inits = _eager(clips, params, grads)
        reach = 1 / 4 if len(workload.shapes) >= 1000 else None
        row("un-jitted update", interleaved(updates, workload.runs, "un-jitted update", tick), reach=reach)
        row("un-jitted init", interleaved(inits, workload.runs, "un-jitted init", tick))
    if "cold" in figures:
        reach = 1 / 3 if len(workload.shapes) == 1000 and not clips else None
        both = {name: list(map(sum, zip(cold["trace"][name], cold["lower"][name], strict=True))) for name in programs}
        row("trace", cold["trace"])
        row("lower", cold["lower"])
        row("trace + lower", both, reach=reach)
        row("compile", cold["compile"])
    if repeats:
        exact = {name: exact_figures(program, workload) for name, program in programs.items()}
        for figure in exact[OPTAX.name]:
            row(figure, {name: [values[figure]] for name, values in exact.items()}, exact=True)
    return rows


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced step, compiled or not yet."""

    traced: Any
    compiled: Any | None


def cold_start(
    library: JaxLibrary, clips: bool, params: Tree, grads: Tree, compiles: bool
) -> tuple[Program, dict[str, float]]:
    """Forget everything, then take the step of a new optimizer to where it can run, and say how long that took."""
    library.forget()
    tx = library.optimizer(clips)
    arguments = jax.eval_shape(lambda params, grads: (params, tx.init(params), grads), params, grads)
    step = library.step(tx)
    jax.clear_caches()
    with quiet():
        times = [time.perf_counter()]
        traced = step.trace(*arguments)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        compiled = lowered.compile() if compiles else None
        times.append(time.perf_counter())
    figures = ("trace", "lower", "compile") if compiles else ("trace", "lower")
    return Program(traced, compiled), {f: end - start for f, start, end in zip(figures, times, times[1:], strict=False)}


def interleaved(tasks: Mapping[str, Callable[[], Any]], rounds: int, what: str, tick: Tick) -> dict[str, list[float]]:
    """Seconds of each task in every round; each timed call follows an untimed one of the same task."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        with quiet():
            for name in shuffled(tuple(tasks)):
                tick(f"{what}: {name}")
                tasks[name]()
                start = time.perf_counter()
                tasks[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _eager(clips: bool, params: Tree, grads: Tree) -> tuple[dict[str, Callable[[], Any]], ...]:
    """`update` and `init` of each library without `jit` around them, on the same arrays."""
    updates: dict[str, Callable[[], Any]] = {}
    inits: dict[str, Callable[[], Any]] = {}
    arrays, gradients = jax.tree.map(jax.numpy.array, (params, grads))
    for library in JAX_LIBRARIES:
        tx = library.optimizer(clips)
        state = tx.init(arrays)
        updates[library.name] = lambda tx=tx, state=state: jax.block_until_ready(tx.update(gradients, state, arrays))
        inits[library.name] = lambda tx=tx: jax.block_until_ready(tx.init(arrays))
    return updates, inits


def check_equal(runs: Sequence[Run]) -> None:
    """Let every run take a few steps and compare with the first: who computes something else cannot win.

    Parameters may differ by a thousandth of the way they can have gone. Moments may differ by 1e-4: torch's clip
    adds 1e-6 to a norm of 0.1 in each of three steps, and the squares double that.
    """
    for run in runs:
        for _ in range(CHECKED_STEPS):
            run()
    expected = runs[0].result()
    for run in runs[1:]:
        for moment, tree in run.result().items():
            relative, absolute = (0, 1e-3 * CHECKED_STEPS * LEARNING_RATE) if moment == "params" else (1e-4, 0)
            for leaf, value in tree.items():
                message = f"{moment} of {run.name} and {runs[0].name} at {leaf}"
                np.testing.assert_allclose(value, expected[moment][leaf], relative, absolute, err_msg=message)


def exact_figures(program: Program, workload: Workload) -> dict[str, float]:
    """What does not depend on the machine's mood."""
    assert program.compiled is not None  # the last repeat compiles
    temporaries = program.compiled.memory_analysis().temp_size_in_bytes
    copies = re.findall(r"= \w+\[\d[\d,]*\]\S* copy\(", program.compiled.as_text())
    return {
        "temporary bytes per parameter": temporaries / workload.size,
        "copies of whole arrays": len(copies),
        "equations to trace": count_equations(program.traced.jaxpr, set()),
    }


def count_equations(jaxpr: Any, seen: set[int]) -> int:
    """The equations of a jaxpr and of each distinct one inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    if id(jaxpr) in seen:
        return 0
    seen.add(id(jaxpr))
    inner = (p for equation in jaxpr.eqns for p in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr))
    return len(jaxpr.eqns) + sum(count_equations(p, seen) for p in inner if _is_jaxpr(p))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def shuffled(items: Sequence[Any]) -> list[Any]:
    """The items in a new order every time, the same from run to run of the program."""
    return _ORDER.sample(list(items), len(items))


_ORDER = random.Random(0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
