"""How it is measured: equal results first, then interleaved rounds; from cold caches where caches count."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import figures
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from cases import (
    ABOVE,
    BUILD,
    COMPILATIONS,
    COMPILE,
    COPIES,
    EQUATIONS,
    EXACT,
    IMPORT,
    STATE,
    STEP,
    SWEEP,
    TEMPORARIES,
    TRACE,
    UNJITTED,
    Case,
)
from libraries import Contender, JaxRun, Run, TorchRun, free
from results import Found, Result, Values
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workloads import Tree, thinned, trees

Task: TypeAlias = Callable[[int], Any]
"""Does its work so many times, and waits for the last."""

Tick: TypeAlias = Callable[[str], None]
"""Called before each measurement with what it is, for the progress bar."""

LEAST_ROUNDS = 3
"""Even where the time is short."""


def measure_all(cases: Sequence[Case], console: Console, budget: float | None = None) -> Iterator[Found]:
    """`measure` one case after the other, behind a progress bar, and yield what each brings.

    With a budget, a case is begun while as many seconds are left as the longest so far took, and takes fewer rounds
    once it has used twice its even share of what was left.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    end, longest = time.monotonic() + (math.inf if budget is None else budget), 0.0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(count_ticks, cases)))
        done = 0
        for place, case in enumerate(cases):

            def tick(what: str, where: str = case.name) -> None:
                progress.update(task, advance=1, description=f"{where}: {what}")

            # modules need not be searched for garbage before every measurement
            gc.collect()
            gc.freeze()
            start = time.monotonic()
            if end - start < longest:
                yield Found(left_out=[case.name])
                continue
            try:
                found = measure(case, tick, deadline=start + 2 * (end - start) / (len(cases) - place))
            except Exception as error:  # out of memory, for example; the rows that follow need not suffer
                found = Found(faults=[f"{case.name}: {in_short(error)}"])
            free()
            took = time.monotonic() - start
            longest = max(longest, took)
            yield found + Found(seconds={case.name: round(took, 1)})
            done += count_ticks(case)
            progress.update(task, completed=done)


def results_of(found: Iterable[Found]) -> list[Result]:
    """All results; the end of the program where something went wrong."""
    every = sum(found, Found())
    if every.faults:
        raise SystemExit("\n".join(every.faults))
    return every.results


def in_short(error: Exception) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def count_ticks(case: Case) -> int:
    """How often `measure` calls its `tick`, at most."""
    contenders = len(case.contenders)
    counts = {
        STEP: case.rounds * (contenders + len(case.outsiders)),
        UNJITTED: case.repeats * contenders,
        SWEEP: case.repeats * contenders,
        BUILD: case.repeats * contenders,
        EXACT: 0,
        IMPORT: (case.repeats + 1) * contenders,
    }
    only_compiled = contenders if {STEP, EXACT} & {*case.figures} and BUILD not in case.figures else 0
    return sum(counts[figure] for figure in case.figures) + only_compiled


def measure(case: Case, tick: Tick, deadline: float = math.inf) -> Found:
    """Take the figures of a case; past the deadline, of `time.monotonic`, in no more rounds than there must be."""
    base = case.contenders[0].name
    if IMPORT in case.figures:
        return Found([Result(case.name, IMPORT, base, imports(case, tick))])
    params, grads = trees(case.shapes)
    timed: dict[str, Values] = {}
    exact: dict[str, Values] = {}
    faults: dict[str, str] = {}
    if {STEP, BUILD, EXACT} & {*case.figures}:
        programs, starts, faults = build(case, params, grads, tick)
        exact = exact_figures(case, programs)
        timed = starts if BUILD in case.figures else {}
        if STEP in case.figures and programs:
            times, wrong = steps(case, programs, params, grads, tick, deadline)
            timed, faults = {STEP: times, **timed}, faults | wrong
    if UNJITTED in case.figures:
        timed[UNJITTED] = unjitted(case, params, grads, tick)
    if SWEEP in case.figures:
        timed[SWEEP], exact[COMPILATIONS] = sweeps(case, params, grads, tick)

    def result(figure: str, values: Values, exact: bool) -> Result:
        there = [contender.name for contender in case.contenders if contender.name in values]
        return Result(case.name, figure, base if base in values else there[0], values, exact)

    return Found(
        [
            *(result(figure, values, False) for figure, values in timed.items() if values),
            *(result(figure, values, True) for figure, values in exact.items() if values),
        ],
        [f"{case.name}: {name}: {fault}" for name, fault in faults.items()],
    )


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


def build(
    case: Case, params: Tree, grads: Tree, tick: Tick
) -> tuple[dict[str, Program], dict[str, Values], dict[str, str]]:
    """Programs, seconds and faults. If a case has builds, from cold caches: trace and lower in every repeat, compile
    in the last ones.

    A contender that can't be built, such as one that this version does not know, is a fault, and the others go on.
    """
    programs: dict[str, Program] = {}
    faults: dict[str, str] = {}
    seconds: dict[str, Values] = {figure: {} for figure in (TRACE, COMPILE, BUILD)}
    cold = BUILD in case.figures
    for left in reversed(range(case.repeats if cold else 1)):
        for contender in shuffled(case.contenders):
            tick(f"trace, lower, compile: {contender.name}")
            if contender.name in faults:
                continue
            try:
                program, times = built(contender, params, grads, cold, compiles=left < case.compiles)
            except Exception as error:
                faults[contender.name] = in_short(error)
                continue
            programs[contender.name] = program
            for figure, value in times.items():
                seconds[figure].setdefault(contender.name, []).append(value)
    return {name: program for name, program in programs.items() if name not in faults}, seconds, faults


def built(
    contender: Contender, params: Tree, grads: Tree, cold: bool, compiles: bool
) -> tuple[Program, dict[str, float]]:
    """Take the step of a new optimizer to where it can run, and say how long that took."""
    if cold:
        contender.forget()
    step, arguments = contender.prepared(params, grads)
    if cold:
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


def exact_figures(case: Case, programs: Mapping[str, Program]) -> dict[str, Values]:
    """What does not depend on the machine's mood."""
    columns = {TEMPORARIES: "temporaries", COPIES: "copies", EQUATIONS: "equations", STATE: "state"}
    found = {
        contender.name: figures.of_program(program.traced, program.compiled, program.arguments, case.large)
        for contender in case.contenders
        if (program := programs.get(contender.name))
    }
    exact = {column: {name: [getattr(one, field)] for name, one in found.items()} for column, field in columns.items()}
    exact[ABOVE] = {
        contender.name: [found[contender.name].temporaries - max(found[part].temporaries for part in contender.parts)]
        for contender in case.contenders
        if contender.parts and {contender.name, *contender.parts} <= found.keys()
    }
    return exact


def steps(
    case: Case, programs: Mapping[str, Program], params: Tree, grads: Tree, tick: Tick, deadline: float
) -> tuple[Values, dict[str, str]]:
    """The compiled step of everybody, each on its own arrays; and who is wrong."""
    seconds: Values = {}
    wrong: dict[str, str] = {}
    sittings = min(case.sittings, case.rounds)
    taking_part = [programs[contender.name] for contender in case.contenders if contender.name in programs]
    for sitting in range(sittings):
        if sitting and time.monotonic() > deadline:
            break
        shared: dict[Any, Any] = {}
        for program in taking_part:
            contender = program.contender
            if contender.form not in shared:
                shared[contender.form] = jax.tree.map(jnp.array, contender.layout(grads))
        runs: list[Run] = [program.start(params, shared[program.contender.form]) for program in taking_part]
        runs += [start(params, grads) for start in case.outsiders]
        if sitting == 0 and case.checked:
            wrong = differences(case, runs, params)
        rounds = case.rounds // sittings + (sitting < case.rounds % sittings)
        tasks = {run.name: run for run in runs}
        for name, values in interleaved(tasks, rounds, STEP, tick, case.together, deadline).items():
            seconds.setdefault(name, []).extend(values)
        del runs, tasks, shared
        free()
    return seconds, wrong


def unjitted(case: Case, params: Tree, grads: Tree, tick: Tick) -> Values:
    """`update` of the contenders without `jit` around it, on the same arrays."""
    arrays, gradients = jax.tree.map(jnp.array, (params, grads))
    tasks: dict[str, Task] = {}
    for contender in case.contenders:
        tx = contender.make()
        state = tx.init(arrays)

        def update(times: int, tx: Any = tx, state: Any = state) -> None:
            for _ in range(times):
                jax.block_until_ready(tx.update(gradients, state, arrays))

        tasks[contender.name] = update
    return interleaved(tasks, case.repeats, UNJITTED, tick)


def sweeps(case: Case, params: Tree, grads: Tree, tick: Tick) -> tuple[Values, Values]:
    """Seconds that a contender takes for all it does without `jit`, from cold caches, and the programs it compiles."""
    arrays, gradients = jax.tree.map(jnp.array, (params, grads))
    seconds: Values = {contender.name: [] for contender in case.contenders}
    compilations: Values = {}
    for _ in range(case.repeats):
        for contender in shuffled(case.contenders):
            tick(f"{SWEEP}: {contender.name}")
            contender.forget()
            with quiet(), counted_compilations() as compiled:
                start = time.perf_counter()
                jax.block_until_ready(contender.advance(contender.make(), gradients, None, arrays))
                seconds[contender.name].append(time.perf_counter() - start)
            compilations[contender.name] = [float(len(compiled))]
    return seconds, compilations


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """A list that grows by an entry with every program that XLA compiles inside."""
    compiled: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


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


def interleaved(
    tasks: Mapping[str, Task], rounds: int, what: str, tick: Tick, together: int = 1, deadline: float = math.inf
) -> Values:
    """Seconds of each task in every round; what is timed follows an untimed call of the same task."""
    seconds: Values = {name: [] for name in tasks}
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        with quiet():
            for name in shuffled(tuple(tasks)):
                tick(f"{what}: {name}")
                task = tasks[name]
                calls = getattr(task, "calls", 1)
                task(1)
                start = time.perf_counter()
                for _ in range(calls):
                    task(together)
                seconds[name].append((time.perf_counter() - start) / (calls * together))
    return seconds


def differences(case: Case, runs: Sequence[Run], start: Tree) -> dict[str, str]:
    """Let every run take a few steps and say who does not come to where the first one comes.

    Parameters may differ by a part of the way they have gone. Moments may differ by 1e-5, for sums in another order,
    those of torch by 2e-2: `nu` has the square of its norm.
    """
    for run in runs:
        run(case.checked)
    first, *others = runs
    expected = first.result()
    begun = {leaf: thinned(value) for leaf, value in start.items()}
    found = {run.name: difference(case, run, expected, begun) for run in others}
    return {name: text for name, text in found.items() if text}


def difference(case: Case, run: Run, expected: Mapping[str, Tree], start: Tree) -> str:
    """What this run has otherwise than expected."""
    found = run.result()
    size_of = np.max if case.elementwise else np.mean
    within = case.params_within if run.within is None else run.within
    for leaf, right in expected["params"].items():
        off, way = (size_of(np.abs(array - right)) for array in (found["params"][leaf], start[leaf]))
        if not off <= within * way:
            return f"params at {leaf} are off by {off / way:.1e} of the way gone, more than {within:g}"
    within = 2e-2 if isinstance(run, TorchRun) else case.moments_within
    if within is None:
        return ""
    for name in ("mu", "nu"):
        for leaf, value in found.get(name, {}).items():
            right = expected[name][leaf]
            if not np.all(np.abs(value - right) <= within * np.abs(right)):
                return f"{name} at {leaf} is off by more than {within:g} of itself"
    return ""


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
