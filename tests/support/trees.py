"""Walks of a transformation, and what it means that two agree: chex's comparisons, and what chex does not see."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tests.support import chex

STEPS = 3
LOSS = 1.0
"""The loss at every step, for those that read it: ``update(…, value=LOSS)``."""


class Layer(NamedTuple):
    """A node with field names."""

    kernel: Any
    bias: Any


def gradient(gradients: Any, step: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[step], gradients)


def walk(
    tx: Any, params: Any, gradients: Any, steps: int = STEPS, state: Any = None, value: float = LOSS
) -> tuple[list[Any], Any]:
    """Every update and the last state; parameters stay where they are."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params) if state is None else state
    updates = []
    for step in range(steps):
        update, state = tx.update(gradient(gradients, step), state, params, value=value)
        updates.append(update)
    return updates, state


def signature(tree: Any) -> Any:
    """What decides about a retrace: the structure, and each leaf's shape, dtype and weak type."""
    return jax.tree.structure(tree), [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(left: Any, right: Any) -> None:
    """The same structure, shapes, dtypes and values; NaN equals NaN.

    On top of chex, for which a weak type is a strong one and bfloat16 is float32.
    """
    assert signature(left) == signature(right)
    chex.assert_trees_all_equal(left, right)


def assert_close(left: Any, right: Any, rtol: float) -> None:
    """The same structure, shapes and dtypes, and values within `rtol`; zeros and counters to the bit.

    On top of chex, for which a weak type is a strong one, and a counter a number like others.
    """
    assert signature(left) == signature(right)
    chex.assert_trees_all_close(left, right, rtol=rtol, atol=0)
    chex.assert_trees_all_equal(*map(_counters, (left, right)))


def _counters(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
