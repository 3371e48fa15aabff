"""How it is measured: equal results first, then interleaved rounds; from cold caches where caches count."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from cases import BUILD, COMPILE, COPIES, EQUATIONS, IMPORT, PEAK, STATE, STEP, TEMPORARIES, TRACE, UNJITTED, Case
from libraries import Contender, JaxRun, Run, TorchRun
from results import Result, Values
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workloads import Shapes, Tree, flattened, size, trees

Task: TypeAlias = Callable[[], Any]

Tick: TypeAlias = Callable[[str], None]
"""Called before each measurement with what it is, for the progress bar."""


SITTINGS = 7
"""Where arrays happen to lie in memory shows in times: they are made anew so often in the rounds of a step."""


def measure_all(cases: Sequence[Case], console: Console, peaks: Sequence[str] | None = None) -> list[Result]:
    """`measure` of one case after the other, behind a progress bar."""
    jax.config.update("jax_enable_compilation_cache", False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[Result] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(count_ticks, cases)))
        for case in cases:

            def tick(what: str, where: str = case.name) -> None:
                progress.update(task, advance=1, description=f"{where}: {what}")

            results += measure(case, tick, peaks)
    return results


def count_ticks(case: Case) -> int:
    """How often `measure` calls its `tick`."""
    contenders = len(case.contenders)
    counts = {
        STEP: case.rounds * (contenders + len(case.outsiders)),
        UNJITTED: case.repeats * contenders,
        BUILD: case.repeats * contenders,
        IMPORT: (case.repeats + 1) * contenders,
    }
    only_compiled = contenders if STEP in case.figures and BUILD not in case.figures else 0
    return sum(counts[figure] for figure in case.figures) + only_compiled


def measure(case: Case, tick: Tick, peaks: Sequence[str] | None = None) -> list[Result]:
    """Take the figures of a case, on a GPU the peaks of memory too if told with which arguments `run.py` has the case.

    Raises:
      AssertionError: if somebody does not come to the same parameters and moments as the others.
    """
    if IMPORT in case.figures:
        return [Result(case.name, IMPORT, case.contenders[0].name, imports(case, tick))]
    params, grads = trees(case.shapes)
    timed: dict[str, Values] = {}
    programs: dict[str, Program] = {}
    if STEP in case.figures or BUILD in case.figures:
        programs, starts = from_cold(case, params, grads, tick)
        if BUILD in case.figures:
            timed |= starts
    if STEP in case.figures:
        timed = {STEP: steps(case, programs, params, grads, tick), **timed}
    if UNJITTED in case.figures:
        timed[UNJITTED] = unjitted(case, params, grads, tick)
    base = case.contenders[0].name
    numbers = {name: exact_figures(program, case.shapes) for name, program in programs.items()}
    if peaks is not None and jax.default_backend() != "cpu":
        for name, program in programs.items():
            most = peak_in_fresh_process(case, program.contender, peaks)
            numbers[name] |= {} if most is None else {PEAK: most / size(case.shapes)}
    exact = {
        figure: {name: [values[figure]] for name, values in numbers.items()}
        for figure in (numbers[base] if numbers else ())
    }
    return [
        *(Result(case.name, figure, base, values) for figure, values in timed.items()),
        *(Result(case.name, figure, base, values, exact=True) for figure, values in exact.items()),
    ]


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced and compiled step, and what it is given."""

    contender: Contender
    arguments: Any
    traced: Any
    compiled: Any

    def start(self, params: Tree, grads: Any) -> JaxRun:
        """The step at work; `grads` as the contender stores them."""
        _, state, _ = self.arguments
        return JaxRun(self.contender, self.compiled, state, params, grads)


def from_cold(case: Case, params: Tree, grads: Tree, tick: Tick) -> tuple[dict[str, Program], dict[str, Values]]:
    """Trace and lower in every repeat, compile in the last ones; the last program of each contender is kept."""
    programs: dict[str, Program] = {}
    seconds: dict[str, Values] = {figure: {} for figure in (TRACE, COMPILE, BUILD)}
    repeats = case.repeats if BUILD in case.figures else 1
    for left in reversed(range(repeats)):
        for contender in shuffled(case.contenders):
            tick(f"trace, lower, compile: {contender.name}")
            program, times = cold_start(contender, params, grads, compiles=left < case.compiles)
            programs[contender.name] = program
            for figure, value in times.items():
                seconds[figure].setdefault(contender.name, []).append(value)
    return programs, seconds


def cold_start(
    contender: Contender, params: Tree, grads: Tree, compiles: bool = True
) -> tuple[Program, dict[str, float]]:
    """Forget everything, then take the step of a new optimizer to where it can run, and say how long that took."""
    contender.forget()
    step, arguments = prepared(contender, params, grads)
    jax.clear_caches()
    with quiet():
        times = [time.perf_counter()]
        traced = step.trace(*arguments)
        lowered = traced.lower()
        times.append(time.perf_counter())
        compiled = lowered.compile() if compiles else None
        times.append(time.perf_counter())
    trace, compile_ = np.diff(times).tolist()
    seconds = {TRACE: trace, **({COMPILE: compile_, BUILD: trace + compile_} if compiles else {})}
    return Program(contender, arguments, traced, compiled), seconds


def prepared(contender: Contender, params: Tree, grads: Tree) -> tuple[Any, Any]:
    """The step of a new optimizer, and shapes of what it takes."""
    tx = contender.make()
    trees = (contender.layout(params), contender.layout(grads))
    return contender.step(tx), jax.eval_shape(lambda params, grads: (params, tx.init(params), grads), *trees)


def built(contender: Contender, params: Tree, grads: Tree) -> Program:
    """The step, traced and compiled with whatever is in the caches."""
    step, arguments = prepared(contender, params, grads)
    traced = step.trace(*arguments)
    return Program(contender, arguments, traced, traced.lower().compile())


def steps(case: Case, programs: Mapping[str, Program], params: Tree, grads: Tree, tick: Tick) -> Values:
    """The compiled step of everybody, each on its own arrays."""
    seconds: Values = {}
    for sitting in range(min(SITTINGS, case.rounds)):
        shared = {flat: jax.tree.map(jnp.array, {"all": flattened(grads)} if flat else grads) for flat in flats(case)}
        runs: list[Run] = [programs[some.name].start(params, shared[some.flat]) for some in case.contenders]
        runs += [start(params, grads) for start in case.outsiders]
        if sitting == 0:
            check_equal(case, runs, params)
        rounds = case.rounds // SITTINGS + (sitting < case.rounds % SITTINGS)
        for name, values in interleaved({run.name: run for run in runs}, rounds, STEP, tick).items():
            seconds.setdefault(name, []).extend(values)
        del runs, shared
    return seconds


def flats(case: Case) -> set[bool]:
    """The layouts that are in use."""
    return {contender.flat for contender in case.contenders}


def unjitted(case: Case, params: Tree, grads: Tree, tick: Tick) -> Values:
    """`update` of the contenders without `jit` around it, on the same arrays."""
    arrays, gradients = jax.tree.map(jnp.array, (params, grads))
    tasks: dict[str, Task] = {}
    for contender in case.contenders:
        tx = contender.make()
        state = tx.init(arrays)
        tasks[contender.name] = lambda tx=tx, state=state: jax.block_until_ready(tx.update(gradients, state, arrays))
    return interleaved(tasks, case.repeats, UNJITTED, tick)


def imports(case: Case, tick: Tick) -> Values:
    """Seconds that a fresh process takes to import each library, once its files are in memory."""
    seconds: Values = {contender.name: [] for contender in case.contenders}
    with tempfile.TemporaryDirectory() as folder:
        # what users import is compiled to bytecode
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for turn in range(case.repeats + 1):
            for contender in shuffled(case.contenders):
                tick(f"import {contender.library}")
                clock = f"import time; start = time.perf_counter(); import {contender.library}; "
                command = [sys.executable, "-c", clock + "print(time.perf_counter() - start)"]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                if turn:
                    seconds[contender.name].append(float(done.stdout))
    return seconds


def interleaved(tasks: Mapping[str, Task], rounds: int, what: str, tick: Tick) -> Values:
    """Seconds of each task in every round; what is timed follows an untimed call of the same task."""
    seconds: Values = {name: [] for name in tasks}
    for _ in range(rounds):
        with quiet():
            for name in shuffled(tuple(tasks)):
                tick(f"{what}: {name}")
                task = tasks[name]
                calls = getattr(task, "calls", 1)
                task()
                start = time.perf_counter()
                for _ in range(calls):
                    task()
                seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def check_equal(case: Case, runs: Sequence[Run], start: Tree) -> None:
    """Let every run take a few steps and compare with the first: who computes something else cannot win.

    Parameters may differ by a part of the way they have gone. Moments may differ by 1e-5, for sums in another order,
    those of torch by 2e-2: its float32 norm of 64 M elements is off by 6e-3, and `nu` has the square.
    """
    for run in runs:
        for _ in range(case.checked):
            run()
    size_of = np.max if case.elementwise else np.mean
    expected = runs[0].result()
    for run in runs[1:]:
        found, torch = run.result(), isinstance(run, TorchRun)
        for leaf, right in expected["params"].items():
            off, way = (size_of(np.abs(some - right)) for some in (found["params"][leaf], start[leaf]))
            assert off <= (5e-3 if torch else case.params_within) * way, (
                f"{run.name}: params at {leaf} differ by {off / way:.1e} of the way"
            )
        if case.moments_within is None:
            continue
        within = 2e-2 if torch else case.moments_within
        for name in ("mu", "nu"):
            for leaf, value in found.get(name, {}).items():
                right = expected[name][leaf]
                equal = np.all(np.abs(value - right) <= within * np.abs(right))
                assert equal, f"{name} of {run.name} and of {runs[0].name} differ at {leaf}"


def exact_figures(program: Program, shapes: Shapes) -> dict[str, float]:
    """What does not depend on the machine's mood."""
    count, smallest = size(shapes), min(map(math.prod, shapes.values()))
    _, state, _ = program.arguments
    return {
        TEMPORARIES: program.compiled.memory_analysis().temp_size_in_bytes / count,
        COPIES: count_copies(program.compiled.as_text(), smallest),
        EQUATIONS: count_equations(program.traced.jaxpr, set()),
        STATE: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / count,
    }


def count_copies(text: str, smallest: int) -> int:
    """The `copy` instructions of arrays as large as a leaf."""
    shapes = re.findall(r"= \w+\[(\d[\d,]*)\]\S* copy\(", text)
    return sum(math.prod(map(int, shape.split(","))) >= smallest for shape in shapes)


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


def peak_in_fresh_process(case: Case, contender: Contender, arguments: Sequence[str]) -> int | None:
    """The device's peak of bytes in use over two steps: a process has one peak, so each contender gets its own."""
    command = [sys.executable, Path(__file__).with_name("run.py"), *arguments]
    done = subprocess.run([*command, "--peak", case.name, contender.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no peak of {contender.name} in {case.name}:\n{done.stderr}")
    return json.loads(done.stdout)


def peak(case: Case, contender: Contender) -> int | None:
    """The peak of this process after two steps, None where the device does not say."""
    params, grads = trees(case.shapes)
    run = built(contender, params, grads).start(params, jax.tree.map(jnp.array, contender.layout(grads)))
    run()
    run()
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


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
