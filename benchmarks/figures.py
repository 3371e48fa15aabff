"""The figures of a compiled step that no machine changes: `of_step`. Of any library; needs nothing but JAX."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

Advance: TypeAlias = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
"""(tx, grads, state, params) → (params, state), such as ``gradxform.step``."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The same on every run with the same versions of JAX and XLA, on the same kind of device."""

    temporaries: float
    """Bytes per parameter that the program takes for itself while it runs."""
    copies: int
    """``copy`` instructions of large arrays in the compiled text."""
    equations: int
    """In the jaxpr, those of each distinct inner jaxpr once."""
    state: float
    """Bytes per parameter."""


def of_step(tx: Any, params: Any, advance: Advance, least: int | None = None) -> Figures:
    """The figures of one training step with the gradient as an argument, parameters and state donated.

    Args:
      tx: An ``(init, update)`` pair.
      params: A tree of arrays, or of `jax.ShapeDtypeStruct`: nothing is run.
      advance: How the step is taken.
      least: The elements from which on a copy counts; None for those of the smallest leaf.
    """
    step = donated(tx, advance)
    arguments = shapes_of(tx, params, params)
    traced = step.trace(*arguments)
    return of_program(traced, traced.lower().compile(), arguments, least)


def donated(tx: Any, advance: Advance) -> Any:
    """A new compiled function (params, state, grads) → (params, state) that writes over params and state."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return advance(tx, grads, state, params)

    return jax.jit(step, donate_argnums=(0, 1), keep_unused=True)


def shapes_of(tx: Any, params: Any, grads: Any) -> tuple[Any, Any, Any]:
    """What the step takes, as shapes."""
    return jax.eval_shape(lambda params, grads: (params, tx.init(params), grads), params, grads)


def of_program(traced: Any, compiled: Any, arguments: tuple[Any, Any, Any], least: int | None = None) -> Figures:
    """The figures of a step that was traced and compiled with these arguments."""
    params, state, _ = map(jax.tree.leaves, arguments)
    sizes = [leaf.size for leaf in params]
    return Figures(
        temporaries=compiled.memory_analysis().temp_size_in_bytes / sum(sizes),
        copies=count_copies(compiled.as_text(), min(sizes) if least is None else least),
        equations=count_equations(traced.jaxpr),
        state=sum(leaf.size * leaf.dtype.itemsize for leaf in state) / sum(sizes),
    )


def count_copies(text: str, least: int) -> int:
    """The ``copy`` instructions, also those that do not wait, of arrays of so many elements."""
    shapes = re.findall(r"= \(?\w+\[(\d[\d,]*)\][^=\n]* copy(?:-start)?\(", text)
    return sum(math.prod(map(int, shape.split(","))) >= least for shape in shapes)


def count_equations(jaxpr: Any, seen: set[int] | None = None) -> int:
    """The equations of a jaxpr and of each distinct one inside it."""
    seen = set() if seen is None else seen
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    if id(jaxpr) in seen:
        return 0
    seen.add(id(jaxpr))
    inner = (p for equation in jaxpr.eqns for p in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr))
    return len(jaxpr.eqns) + sum(count_equations(p, seen) for p in inner if _is_jaxpr(p))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")
