"""AdamW on one leaf, written in several ways, beside optax, torch and C: ``python benchmarks/forms.py --help``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
import report
from cases import Case
from facts import facts
from libraries import ADAMW, OPTAX_ADAMW, OUR_ADAMW, Contender, in_step, outsiders
from measure import measure_all, results_of
from results import Found, new_file
from rows import label

Arrays: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""p, m and v of a leaf."""

Form: TypeAlias = Callable[[jax.Array, jax.Array, Arrays], Arrays]
"""(number of the step, g, (p, m, v)) → (p, m, v)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every form, print the table, write it."""
    parser = argparse.ArgumentParser(
        description="What becomes of AdamW's formula on one large leaf when it is written in other ways. Two minutes."
    )
    parser.add_argument("--size", metavar="N", type=int, default=1 << 24, help="elements of the leaf, a power of two")
    parser.add_argument("--rounds", metavar="N", type=int, default=9)
    parser.add_argument("--markdown", metavar="FILE", type=new_file, help="write the table")
    options = parser.parse_args(arguments)
    run = min(1 << 18, options.size)
    forms: dict[str, Form] = {
        "the formula": formula,
        "two halves, put together": in_halves,
        f"runs of {label(run)}": functools.partial(in_runs, length=run),
        f"runs of {label(run)}, moments kept apart": functools.partial(in_runs, length=run, between=kept_apart),
    }
    contenders = (
        OPTAX_ADAMW,
        OUR_ADAMW,
        Contender("gradxform, gx.step", OUR_ADAMW.make, in_step),
        *(contender(name, form) for name, form in forms.items()),
    )
    name = f"forms of AdamW, one leaf, {label(options.size)}"
    case = Case(name, {"leaf": (options.size,)}, contenders, (), outsiders(), rounds=options.rounds)
    console = report.wide_console()
    found = Found(results_of(measure_all([case], console)), facts=facts())
    console.print(report.in_a_line(found.facts), report.terminal([], found), sep="\n")
    if options.markdown:
        options.markdown.write_text(report.markdown([], found))


def formula(count: jax.Array, g: jax.Array, arrays: Arrays, between: Callable[..., Any] = lambda *both: both) -> Arrays:
    """AdamW as it stands in the paper; `between` sees the new moments before they are used."""
    p, m, v = arrays
    b1, b2 = ADAMW["b1"], ADAMW["b2"]
    m, v = between(m + (1 - b1) * (g - m), v + (1 - b2) * (g * g - v))
    m_hat, v_hat = m * (1 / (1 - b1**count)), v * (1 / (1 - b2**count))
    return p - ADAMW["learning_rate"] * (m_hat / (jnp.sqrt(v_hat) + ADAMW["eps"]) + ADAMW["weight_decay"] * p), m, v


def in_halves(count: jax.Array, g: jax.Array, arrays: Arrays) -> Arrays:
    """Two halves that do not wait for one another."""
    halves = (slice(len(g) // 2), slice(len(g) // 2, None))
    parts = [formula(count, g[half], jax.tree.map(lambda x, half=half: x[half], arrays)) for half in halves]
    return jax.tree.map(lambda *both: jnp.concatenate(both), *parts)


def in_runs(count: jax.Array, g: jax.Array, arrays: Arrays, length: int, **options: Any) -> Arrays:
    """One run of elements after the other, in place: what is read twice should still be in the cache."""

    def body(number: jax.Array, arrays: Arrays) -> Arrays:
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, number * length, length)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, number * length, 0)

        return jax.tree.map(put, arrays, formula(count, cut(g), jax.tree.map(cut, arrays), **options))

    return jax.lax.fori_loop(0, len(g) // length, body, arrays)


def kept_apart(m: jax.Array, v: jax.Array) -> Any:
    """The two as they are, through a condition that nothing is fused across: else each kernel makes its own."""
    return jax.lax.cond(v[0] >= 0, lambda m, v: (m, v), lambda m, v: (v, m), m, v)


class Moments(NamedTuple):
    """The state of AdamW."""

    count: Any
    mu: Any
    nu: Any


def contender(name: str, form: Form) -> Contender:
    """A form as an optimizer."""

    def init(params: Any) -> Moments:
        return Moments(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def advance(_: Any, grads: Any, state: Moments, params: Any) -> tuple[Any, Moments]:
        count = state.count + 1
        numbers = {key: (params[key], state.mu[key], state.nu[key]) for key in params}
        new = {key: form(count.astype(jnp.float32), grads[key], arrays) for key, arrays in numbers.items()}
        p, m, v = ({key: arrays[place] for key, arrays in new.items()} for place in range(3))
        return p, Moments(count, m, v)

    return Contender(name, lambda: optax.GradientTransformation(init, optax.identity().update), advance)


if __name__ == "__main__":
    main()
