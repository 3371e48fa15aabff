"""A test file that runs itself as a script, in a process whose CPU poses as eight devices."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[2]


def outcomes_of(script: str) -> dict[str, str | None]:
    """How each check of a script went that ends with `report`: None, or its traceback."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # whose programs run once: they are compiled in three quarters of the time
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=environment, capture_output=True, encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def report(checks: Mapping[str, Callable[[], Any]]) -> None:
    """Run all checks and print how each went."""
    assert jax.device_count() == 8
    for name, run in checks.items():
        outcome = None
        try:
            run()
        except Exception:
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]))
