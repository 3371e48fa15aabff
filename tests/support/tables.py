"""The catalog as tables: a new row there is a new row of every test that reads these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform import catalog
from gradxform.catalog import Entry, evaluate

RATE = 0.1


def built(text: str, **symbols: Any) -> gx.Transformation:
    """The transformation that a call in the catalog's symbols builds."""
    return evaluate(text, **{"α": RATE, **symbols})


def examples(entries: Iterable[Entry]) -> dict[str, gx.Transformation]:
    """What all examples of these entries build, by the text of the call."""
    return {text: built(text) for entry in entries for text in entry.examples}


# Optimizers that take a leaf of any shape
ANY_LEAF = [entry for entry in catalog.OPTIMIZERS if entry.sees != "matrix"]
OPTIMIZERS = examples(ANY_LEAF)

# The same with nothing added to the divisor, but for a variance, which is 0 where gradients are equal.
WITHOUT_EPS = {
    text: built(text)
    for entry in ANY_LEAF
    if "eps" in entry.arguments
    for text in (f"{example[:-1]}, eps=0.0)" for example in entry.examples if "centered" not in example)
}

# All that there is, and parameters that each takes
EVERYTHING = examples(catalog.CATALOG.values())


def wrapping(text: str) -> Callable[[Any], gx.Transformation]:
    """An example of a wrapper, around another transformation than the Adam that all of them hold."""
    assert "adam(α)" in text
    return lambda tx: built(text.replace("adam(α)", "tx"), tx=tx)


WRAPPERS = {entry.name: wrapping(entry.examples[0]) for entry in catalog.WRAPPERS}


def entry_of(text: str) -> Entry:
    """The row of the catalog that an example is in."""
    return catalog.CATALOG[text.partition("(")[0]]


def draw_for(text: str, seed: int, lead: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """A matrix and, unless it is for matrices alone, a vector; of bfloat16 if it is for low precision alone."""
    entry, random = entry_of(text), np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"kernel": (4, 3), "bias": (3,)}
    if entry.sees == "matrix" and "other" not in entry.arguments:
        del shapes["bias"]
    dtype = jnp.bfloat16 if "low_precision" in entry.function.__module__ else jnp.float32
    return {name: jnp.asarray(random.normal(size=(*lead, *shape)), dtype) for name, shape in shapes.items()}


def of_degree(degree: int, among: dict[str, gx.Transformation]) -> list[str]:
    """The examples among these whose entry says this degree."""
    return [text for text in among if entry_of(text).degree == degree]


def counterparts(library: str, entries: Iterable[Entry] = catalog.CATALOG.values()) -> Any:
    """Rows of an entry, a call of ours, and that of the library that does the same."""
    rows = [
        pytest.param(entry, ours, theirs, id=f"{ours} = {library}.{theirs}")
        for entry in entries
        if not isinstance(pairs := getattr(entry, library), str)
        for ours, theirs in pairs.items()
    ]
    return pytest.mark.parametrize(("entry", "ours", "theirs"), rows)
