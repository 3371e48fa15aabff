"""Peculiarities of XLA that this library is written around, each explained once, here; other files refer to the tags.

X1  On CPUs a kernel has one result. Two results of one computation are two kernels, and each repeats the computation.
    So what is expensive is stored, or made cheap enough to be computed twice.
X2  Two arrays that are each overwritten from the old values of both are copied first.
    So `written` makes an array of what both are computed from.
X3  On CPUs a reduction of floats, or of more than 32 numbers, is a kernel of its own. What it reads is written out as
    an array if other kernels read it as well. So norms of rescaled arrays are rescaled norms, arrays are widened by
    `numerics.arithmetic.widened_apart`, and the maxima of blocks are maxima of integers, 32 at a time.
X4  Where two operations have no order, an array may be copied to be on the safe side.
    So `after` makes one value depend on another, by a selection that never selects it.
X5  XLA does not look into a branch (`jax.lax.cond`) from outside. So `written` passes a value through a branch.
X6  Thousands of reductions, one for each leaf, compile in more than linear time.
    So leaves of one shape are measured together.
X7  Equal computations on equal shapes share a kernel; with a constant of its own, each has a kernel of its own.
    So what differs from leaf to leaf is an argument.
X8  A conversion to a narrower dtype and back may be dropped. So rounding is done on the bits.
X9  The result of an expensive operation, such as a quotient or a look-up, is written out as an array; cheap operations
    on it are repeated in every kernel that reads them. So a kernel that must not write has no quotient, steps that
    look numbers up go over one run of blocks after the other, and a quotient for all leaves comes last.
X10 A selection between an old and a new array is made in place only if all that reads the new one comes after it.
    So a rule's moment is selected before the update is made of it: `step.keep`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def never(x: Any) -> Any:
    """False, but XLA cannot know: it seems to depend on the values of `x`."""
    first = x[(0,) * x.ndim]
    return (first != first) & (first == first)


def written(x: Any) -> Any:
    """`x`; on CPUs written out as an array, from which whatever reads it is computed (X2, X5)."""
    if x.size == 0:
        return x

    def in_a_branch(x: Any) -> Any:
        return jax.lax.cond(never(x), jnp.negative, lambda x: x, x)

    return jax.lax.platform_dependent(x, cpu=in_a_branch, default=lambda x: x)


def after(result: Any, x: Any) -> Any:
    """`x`, computed after `result` (X4): then `x` may overwrite what `result` reads."""
    return jnp.where(never(result), jnp.zeros((), x.dtype), x)
