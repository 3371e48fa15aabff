"""Random trees, chains and gradients for the laws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("hypothesis")

from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradxform as gx
from tests.support.tables import ANY_LEAF, OPTIMIZERS, examples
from tests.support.trees import STEPS, Layer

# Few shapes, because each is compiled once per chain: 0-d, a matrix with an axis of size one, no element at all.
SHAPES = ((), (1, 3), (0,))

# Stages that look at all leaves together.
NORMS = (gx.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0))
WHOLE_TREE = (*NORMS, *examples(entry for entry in ANY_LEAF if entry.sees == "tree").values())

# Stages that keep positive gradients positive, so that rounding errors stay relative to the result.
POSITIVE = (
    gx.identity(),
    gx.scale(0.5),
    gx.scale_by_schedule(optax.linear_schedule(1.0, 0.5, 4)),
    gx.scale_by_momentum(0.9),
    gx.scale_by_momentum(0.9, dampening=0.0, nesterov=True),
    gx.chain(gx.scale_by_momentum(0.5), gx.bias_correction(0.5)),
    gx.normalize_by_rms(0.9),
    gx.normalize_by_rss(eps=0.0),
    gx.normalize_by_rms(0.99, of=gx.scale_by_momentum(0.9, debias=True), debias=True),
    gx.clip_by_value(1.0),
    gx.clip_by_leaf_norm(1.0),
    gx.add_decoupled_weight_decay(0.1),
    optax.scale(2.0),
    optax.trace(0.9),
    optax.clip(1.0),
    *NORMS,
)

STAGES = (
    *POSITIVE,
    gx.scale_by_learning_rate(0.1),
    gx.normalize_by_rms(0.9, centered=True),
    gx.accumulate(gx.momentum(0.1), every=2),
    optax.add_decayed_weights(0.1),
    *(tx for tx in OPTIMIZERS.values() if not tx.body.last),  # what must be last takes no other place
)


def structures(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> st.SearchStrategy[Any]:
    """Trees of dicts, lists, tuples, named tuples and None whose leaves are float32 `jax.ShapeDtypeStruct`."""
    leaf = st.sampled_from([jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes])
    nodes = st.recursive(leaf | st.none(), _nodes, max_leaves=5)
    return nodes.filter(lambda tree: 0 < len(jax.tree.leaves(tree)) <= 5)


def _nodes(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(st.sampled_from("abcd"), children, max_size=3),
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.builds(Layer, children, children),
    )


def chains(stages: tuple[Any, ...] = STAGES) -> st.SearchStrategy[Any]:
    """One or two stages as one transformation."""
    return st.lists(st.sampled_from(stages), min_size=1, max_size=2).map(lambda some: gx.chain(*some))


def magnitudes(low: float, high: float) -> st.SearchStrategy[float]:
    """Positive float32 numbers, none of them subnormal: XLA may flush those to zero."""
    return st.floats(low, high, width=32, allow_subnormal=False)


def signed(low: float, high: float) -> st.SearchStrategy[float]:
    """Zero, and numbers of either sign with such magnitudes."""
    return st.one_of(st.just(0.0), magnitudes(low, high), magnitudes(low, high).map(lambda x: -x))


ORDINARY = signed(np.float32(1e-3), np.float32(1e3))


@st.composite
def arrays_like(
    draw: st.DrawFn, structure: Any, elements: st.SearchStrategy[float] = ORDINARY, lead: tuple[int, ...] = ()
) -> Any:
    """Arrays in the shapes and dtypes of `structure`, with the axes `lead` before each shape."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # NumPy gives Hypothesis no bfloat16 and no complex numbers; the first is rounded, the second has one part
        drawn = draw(hnp.arrays(np.float32, (*lead, *leaf.shape), elements=elements))
        return jnp.asarray(drawn.astype(leaf.dtype))

    return jax.tree.map(one, structure)


@st.composite
def problems(
    draw: st.DrawFn,
    elements: st.SearchStrategy[float] = ORDINARY,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    steps: int = STEPS,
) -> tuple[Any, Any]:
    """Parameters, and as many gradients as there are steps, stacked along the first axis of each leaf."""
    structure = draw(structures(shapes))
    return draw(arrays_like(structure, elements)), draw(arrays_like(structure, elements, (steps,)))
