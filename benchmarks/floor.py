"""The floor: AdamW as a loop in C that moves every byte once, compiled when the benchmark runs."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from workloads import Tree, flattened, thinned, unflattened

# sqrtf is one instruction only where it need not set errno
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def compiled() -> Any | None:
    """The C function, None where there is no compiler that takes it."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        source = Path(__file__).with_suffix(".c")
        done = subprocess.run([compiler, *FLAGS, source, "-o", library, "-lm"], capture_output=True)
        if done.returncode:
            return None
        function = ctypes.CDLL(str(library)).adamw
    pointer = np.ctypeslib.ndpointer(np.float32, flags="C")
    decays = [ctypes.c_double] * 2
    function.argtypes = [
        ctypes.c_long,
        *[pointer] * 4,
        ctypes.c_float,
        *decays,
        *[ctypes.c_float] * 4,
        ctypes.c_int,
    ]
    function.restype = None
    return function


class FloorRun:
    """The loop at work on all leaves as one array."""

    name = f"C floor, {THREADS} threads"
    calls = 1
    within = None

    def __init__(self, numbers: dict[str, float], params: Tree, grads: Tree) -> None:
        self._function, self._numbers, self._like, self._step = compiled(), numbers, params, 0
        self._params, self._grads = flattened(params).copy(), flattened(grads)
        self._mu, self._nu = np.zeros_like(self._params), np.zeros_like(self._params)

    def __call__(self, steps: int = 1) -> None:
        """Take so many steps."""
        numbers = self._numbers
        arrays = (self._params, self._mu, self._nu, self._grads)
        scalars = [numbers[name] for name in ("learning_rate", "b1", "b2", "eps", "weight_decay")]
        assert self._function is not None  # asked for by `libraries.outsiders`
        for _ in range(steps):
            self._step += 1
            unbias = (1 / -math.expm1(self._step * math.log(numbers[beta])) for beta in ("b1", "b2"))
            self._function(self._params.size, *arrays, *scalars, *unbias, THREADS)

    def result(self) -> dict[str, Tree]:
        """Where `params`, `mu` and `nu` are now."""
        arrays = {"params": self._params, "mu": self._mu, "nu": self._nu}
        trees = {name: unflattened(array, self._like) for name, array in arrays.items()}
        return {name: {key: thinned(leaf) for key, leaf in tree.items()} for name, tree in trees.items()}
