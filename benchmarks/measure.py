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
import jax.numpy as jnp
import numpy as np
from libraries import JAX_LIBRARIES, LEARNING_RATE, OPTAX, JaxLibrary, JaxRun, Run, TorchRun, torch_variants
from workloads import Tree, Workload

Task: TypeAlias = Callable[[], Any]
Values: TypeAlias = dict[str, list[float]]
"""By library the repeats in seconds, or one exact number."""

Tick: TypeAlias = Callable[[str], None]
"""Called before each measurement with what it is, for the progress bar."""

FIGURES = ("step", "update", "cold")
"""The compiled step; `update` and `init` as they are; tracing, lowering and compiling from cold caches."""

CHECKED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of one optimizer on one workload."""

    workload: str
    optimizer: str
    figure: str
    values: Values
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
        "step": workload.steps * (libraries + len(torch_variants())),
        "update": 2 * workload.repeats * libraries,
        "cold": workload.repeats * libraries,
    }
    compiled_for_step = libraries if "step" in figures and "cold" not in figures else 0
    return sum(rounds[figure] for figure in figures) + compiled_for_step


def measure(workload: Workload, optimizer: str, clips: bool, figures: Sequence[str], tick: Tick) -> list[Row]:
    """Take the `figures` of one optimizer on one workload.

    Raises:
      AssertionError: if the libraries do not come to the same parameters and moments.
    """
    params, grads = workload.trees()
    timed: dict[str, Values] = {}
    programs: dict[str, Program] = {}
    if "step" in figures or "cold" in figures:
        repeats = workload.repeats if "cold" in figures else 1
        programs, starts = from_cold(repeats, workload.compiles, clips, params, grads, tick)
    if "step" in figures:
        timed["compiled step"] = steps(programs, workload.steps, clips, params, grads, tick)
    if "update" in figures:
        timed |= eager(workload.repeats, clips, params, grads, tick)
    if "cold" in figures:
        timed |= starts
    rows = [
        Row(workload.name, optimizer, figure, values, reach=reach(figure, len(workload.shapes), clips))
        for figure, values in timed.items()
    ]
    exact = {name: exact_figures(program, workload) for name, program in programs.items()}
    for figure in exact[OPTAX.name] if exact else ():
        values = {name: [numbers[figure]] for name, numbers in exact.items()}
        rows.append(Row(workload.name, optimizer, figure, values, exact=True))
    return rows


def reach(figure: str, leaves: int, clips: bool) -> float | None:
    """The ratio to optax that gradxform is to reach."""
    if figure == "compiled step":
        return 1.0
    if figure == "un-jitted update" and leaves >= 1000:
        return 1 / 4
    if figure == "trace + lower" and leaves == 1000 and not clips:
        return 1 / 3
    return None


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced step, compiled or not yet."""

    traced: Any
    compiled: Any | None


def from_cold(
    repeats: int, compiles: int, clips: bool, params: Tree, grads: Tree, tick: Tick
) -> tuple[dict[str, Program], dict[str, Values]]:
    """Trace and lower `repeats` times, compile in the last of them; the last program of each library is kept."""
    programs: dict[str, Program] = {}
    seconds: dict[str, Values] = {figure: {} for figure in ("trace", "lower", "trace + lower", "compile")}
    for left in reversed(range(repeats)):
        for library in shuffled(JAX_LIBRARIES):
            tick(f"trace, lower, compile: {library.name}")
            programs[library.name], times = cold_start(library, clips, params, grads, left < compiles)
            for figure, value in times.items():
                seconds[figure].setdefault(library.name, []).append(value)
    return programs, seconds


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
    trace, lower, compile_ = np.diff(times).tolist()
    seconds = {"trace": trace, "lower": lower, "trace + lower": trace + lower}
    return Program(traced, compiled), {**seconds, "compile": compile_} if compiles else seconds


def steps(programs: Mapping[str, Program], rounds: int, clips: bool, params: Tree, grads: Tree, tick: Tick) -> Values:
    """The compiled step of everybody, each on its own arrays."""
    runs: list[Run] = [JaxRun(some, clips, programs[some.name].compiled, params, grads) for some in JAX_LIBRARIES]
    runs += [TorchRun(name, options, clips, params, grads) for name, options in torch_variants().items()]
    check_equal(runs)
    return interleaved({run.name: run for run in runs}, rounds, "compiled step", tick)


def eager(rounds: int, clips: bool, params: Tree, grads: Tree, tick: Tick) -> dict[str, Values]:
    """`update` and `init` of the JAX libraries without `jit` around them, on the same arrays."""
    updates: dict[str, Task] = {}
    inits: dict[str, Task] = {}
    arrays, gradients = jax.tree.map(jnp.array, (params, grads))
    for library in JAX_LIBRARIES:
        tx = library.optimizer(clips)
        state = tx.init(arrays)
        updates[library.name] = lambda tx=tx, state=state: jax.block_until_ready(tx.update(gradients, state, arrays))
        inits[library.name] = lambda tx=tx: jax.block_until_ready(tx.init(arrays))
    return {
        "un-jitted update": interleaved(updates, rounds, "un-jitted update", tick),
        "un-jitted init": interleaved(inits, rounds, "un-jitted init", tick),
    }


def interleaved(tasks: Mapping[str, Task], rounds: int, what: str, tick: Tick) -> Values:
    """Seconds of each task in every round; each timed call follows an untimed one of the same task."""
    seconds: Values = {name: [] for name in tasks}
    for _ in range(rounds):
        with quiet():
            for name in shuffled(tuple(tasks)):
                tick(f"{what}: {name}")
                tasks[name]()
                start = time.perf_counter()
                tasks[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def check_equal(runs: Sequence[Run]) -> None:
    """Let every run take a few steps and compare with the first: who computes something else cannot win.

    Parameters may differ by a thousandth of the way they can have gone. Moments may differ by 1e-5, for sums in
    another order, those of torch by 2e-3: its float32 norm of 16 M elements is off by 8e-4, and `nu` has the square.
    """
    for run in runs:
        for _ in range(CHECKED_STEPS):
            run()
    expected = runs[0].result()
    for run in runs[1:]:
        moments = 2e-3 if isinstance(run, TorchRun) else 1e-5
        for name, tree in run.result().items():
            relative, absolute = (0, 1e-3 * CHECKED_STEPS * LEARNING_RATE) if name == "params" else (moments, 0)
            for leaf, value in tree.items():
                right = expected[name][leaf]
                equal = np.all(np.abs(value - right) <= absolute + relative * np.abs(right))
                assert equal, f"{name} of {run.name} and of {runs[0].name} differ at {leaf}"


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
