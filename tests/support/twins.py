"""The twins of the catalog's rows, found by name in the modules of tests/twins, called as the rows are."""

from __future__ import annotations

import functools
import importlib
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import gradxform as gx
from gradxform.catalog import CATALOG, SYMBOLS

DATA = ("theta", "gradients", "updates")
"""What a twin may take first: θ₀ and g₁ … g_T for an optimizer, u₁ … u_T, and perhaps θ, for a transformation."""

# Those whose reference is no walk of one array are compared in files of their own.
ELSEWHERE = {
    "wrappers/test_parity_guards.py": {"clip_by_average_norm", "clip_by_param_norm", "clip_by_zscore", "skip_spikes"},
    "transforms/test_noise.py": {"add_noise", "noisy_sgd"},
    "wrappers/test_guards.py": {"skip_nonfinite"},
    "wrappers/test_observe.py": {"observe"},
    "optimizers/matrix/test_muon.py": {"orthogonalize"},
    "wrappers/quantization/test_quantization.py": {"quantize_state"},
    "wrappers/test_low_precision.py": {"compensated", "master_weights", "stochastic_rounding"},
}


def _found() -> dict[str, Callable[..., Any]]:
    folder = pathlib.Path(__file__).parents[1] / "twins"
    modules = [importlib.import_module(f"tests.twins.{file.stem}") for file in sorted(folder.glob("*.py"))]
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if name in CATALOG and inspect.isfunction(function) and function.__module__ == module.__name__
    }


TWINS = _found()


def data_of(twin: Callable[..., Any]) -> list[str]:
    """The names of the data that a twin takes."""
    return [name for name in inspect.signature(twin).parameters if name in DATA]


def twin_of(text: str, **names: Any) -> Callable[..., Any]:
    """What the twin of a call makes of its data: by position as twins call each other, or what it takes of these."""
    return eval(text, {**SYMBOLS, **names, **{name: functools.partial(_called, name) for name in TWINS}})


def _called(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    given, twin = inspect.signature(getattr(gx, name)).bind(*args, **kwargs).arguments, TWINS[name]
    # which leaves are matrices and what takes the others is no matter of one matrix
    arguments = {key: value for key, value in given.items() if key not in ("matrices", "other")}

    def on(*data: Any, **named: Any) -> Any:
        chosen = {key: value for key, value in named.items() if key in data_of(twin)}
        return twin(*data, **chosen, **arguments)

    return on
