"""Peculiarities of XLA that the library writes its programs around, each named once; other files refer to the tags.

X1  A kernel on a CPU has one result; two results of one computation are two kernels that each make it again.
    What is dear to make is stored, or made so cheap that it may be made twice.
X2  Two arrays that are written over, each made from the old values of both, are copied first.
    `written`: what both are made of becomes an array of its own, from which both are made.
X3  A reduction of floats, or of more than 32 numbers, is a kernel of its own on a CPU, and what it reads and others
    read as well is written out. Norms of rescaled arrays are rescaled norms, others widen by
    `numerics.arithmetic.widened_apart`, and maxima of blocks are of integers, 32 at a time.
X4  What is scheduled in no order may be copied to be on the safe side.
    `after`: a value that depends on another one, by a selection that never selects.
X5  A branch (`jax.lax.cond`) is not looked into from outside. `written` passes a value through one.
X6  One reduction for each of thousands of leaves compiles in more than linear time.
    Leaves of one shape are measured together.
X7  Equal programs on equal shapes are one kernel, and a constant of its own makes each its own.
    What differs from leaf to leaf is an argument.
X8  Pairs of conversions to a narrower dtype and back may be dropped. Rounding is done on the bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def never(x: Any) -> Any:
    """False, but for all that XLA knows it depends on the values of `x`."""
    first = x[(0,) * x.ndim]
    return (first != first) & (first == first)


def written(x: Any) -> Any:
    """`x`, on CPUs as an array of its own from which everything is made that reads it (X2, X5)."""
    if x.size == 0:
        return x
    in_a_branch = lambda x: jax.lax.cond(never(x), jnp.negative, lambda x: x, x)  # noqa: E731 (passed by name)
    return jax.lax.platform_dependent(x, cpu=in_a_branch, default=lambda x: x)


def after(result: Any, x: Any) -> Any:
    """`x`, but made after `result` (X4): what `result` reads may then be written over by `x`."""
    return jnp.where(never(result), jnp.zeros((), x.dtype), x)
