"""Hostile settings for every test: nothing promotes, broadcasts or warns in silence."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest

from tests.support import chex

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

try:
    import hypothesis
except ModuleNotFoundError:
    pass  # what draws examples is skipped
else:
    # Each example compiles: CI draws 15 on the oldest Python, and 6 where it checks the newest Python and JAX.
    EXAMPLES = 15 if sys.version_info < (3, 12) else 6
    hypothesis.settings.register_profile("short", max_examples=EXAMPLES, deadline=None, derandomize=True)
    hypothesis.settings.register_profile("long", max_examples=500, deadline=None)
    hypothesis.settings.load_profile("long" if os.environ.get("GRADXFORM_LONG") else "short")


@pytest.fixture(autouse=True)
def every_test_counts_its_own_traces() -> None:
    """chex counts by the source of a function, which the rows of a table share."""
    chex.clear_trace_counter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """With -n a file is one worker's: for all its tests together it starts eight devices or a benchmark."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
