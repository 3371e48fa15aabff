"""What the numbers of a run depend on: versions, the device, and when it was."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import subprocess
from pathlib import Path

import jax
from libraries import has_torch


def facts(outsiders: bool = True) -> dict[str, str]:
    """By name; `device` and `date` are worth showing without theirs."""
    names = ("jax", "jaxlib", "optax", "torch", "numpy")
    versions = {name: version(name) for name in names if name != "torch" or (outsiders and has_torch())}
    cpu = jax.default_backend() == "cpu"
    device = f"{os.cpu_count()} CPUs, {_processor()}" if cpu else jax.devices()[0].device_kind
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    python = platform.python_version()
    return {"gradxform": version("gradxform"), **versions, "Python": python, "device": device, "date": date}


def version(name: str) -> str:
    """The git commit of the folder that a library is imported from, else what the library says.

    Not what is installed: a checkout need not be, and another one may be in its place.
    """
    module = importlib.import_module(name)
    return _commit(Path(str(module.__file__))) or getattr(module, "__version__", "of unknown version")


def _commit(file: Path) -> str:
    """The commit that git has checked out there, ``+`` if it was changed since; nothing if git does not keep it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", file.parent, *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*") if git("ls-files", file.name) else ""


def _processor() -> str:
    """The model of the CPU where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
