"""A test file that runs itself as a script, in a process whose CPU poses as eight devices."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]


class Outcome(NamedTuple):
    """How a check went."""

    verdict: str
    """passed, skipped or failed"""
    text: str = ""
    """Why it was skipped, or the traceback."""


def on_eight_devices(*arguments: str) -> str:
    """What Python prints when it is run with these arguments, and warns of nothing."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # chex.set_n_cpu_devices comes too late in a file whose arrays are made as it is imported
        "JAX_NUM_CPU_DEVICES": "8",
        # programs run once: they are compiled in three quarters of the time
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=environment, capture_output=True, encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def outcomes_of(script: str) -> dict[str, Outcome]:
    """How each check of a script went that ends with `report`."""
    lines = map(json.loads, on_eight_devices(script).splitlines())
    return {name: Outcome(*outcome) for name, *outcome in lines}


def judge(outcome: Outcome) -> None:
    """Skip or fail as the check did."""
    if outcome.verdict == "skipped":
        pytest.skip(outcome.text)
    if outcome.verdict == "failed":
        pytest.fail(outcome.text, pytrace=False)


def report(checks: Mapping[str, Callable[[], Any]]) -> None:
    """Run all checks and print how each went."""
    assert jax.device_count() == 8
    for name, run in checks.items():
        outcome = Outcome("passed")
        try:
            run()
        except pytest.skip.Exception as reason:
            outcome = Outcome("skipped", str(reason))
        except Exception:
            outcome = Outcome("failed", traceback.format_exc())
        print(json.dumps([name, *outcome]))
