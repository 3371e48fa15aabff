"""chex where it is installed; else what comparisons need of it, and a test that needs more is skipped."""

from __future__ import annotations

import functools
from typing import Any

import pytest

try:
    from chex import assert_max_traces as assert_max_traces
    from chex import assert_tree_all_finite as assert_tree_all_finite
    from chex import assert_trees_all_close as assert_trees_all_close
    from chex import assert_trees_all_equal as assert_trees_all_equal
    from chex import clear_trace_counter as clear_trace_counter
except ModuleNotFoundError:
    import jax
    import numpy as np

    def assert_trees_all_equal(left: Any, right: Any) -> None:
        jax.tree.map(np.testing.assert_array_equal, left, right)

    def assert_trees_all_close(left: Any, right: Any, rtol: float = 1e-6, atol: float = 0.0) -> None:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), left, right)

    def assert_tree_all_finite(tree: Any) -> None:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))

    def clear_trace_counter() -> None:
        pass

    def __getattr__(name: str) -> Any:
        if not name.startswith("assert_"):
            raise AttributeError(name)
        pytest.skip(f"needs chex.{name}")
