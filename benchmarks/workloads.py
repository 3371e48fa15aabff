"""What is optimized: trees of float32 arrays, from one large leaf to thousands of small ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Tree: TypeAlias = dict[str, np.ndarray]


def size(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(math.prod(shape) for shape in shapes.values())


PERIOD = (1 << 20) + 7
"""Random numbers start again after so many elements of a leaf: a prime, so that no two rows of a matrix are alike."""


def trees(shapes: Shapes) -> tuple[Tree, Tree]:
    """Parameters and gradients, the same at every call."""
    rng = np.random.default_rng(0)

    def normal(scale: float) -> Tree:
        return {name: leaf(scale, shape) for name, shape in shapes.items()}

    def leaf(scale: float, shape: tuple[int, ...]) -> np.ndarray:
        numbers = scale * rng.standard_normal(min(math.prod(shape), PERIOD), np.float32)
        return np.resize(numbers, shape)

    return normal(0.02), normal(0.01)


def thinned(leaf: Any) -> Any:
    """A leaf of NumPy, JAX or torch as one axis; of more than a million elements about so many, evenly spread."""
    flat = leaf.reshape(-1)
    apart = len(flat) // PERIOD | 1  # odd, so that every lane of a vector is seen
    return flat if apart == 1 else flat[::apart]


def gpt2_like(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """The leaves of a GPT-2 with tied embeddings: 12 a layer and 4 more."""
    layer: Shapes = {
        "norm_1/scale": (width,),
        "norm_1/bias": (width,),
        "attention/in": (width, 3 * width),
        "attention/in_bias": (3 * width,),
        "attention/out": (width, width),
        "attention/out_bias": (width,),
        "norm_2/scale": (width,),
        "norm_2/bias": (width,),
        "mlp/in": (width, 4 * width),
        "mlp/in_bias": (4 * width,),
        "mlp/out": (4 * width, width),
        "mlp/out_bias": (width,),
    }
    stack = {f"layer_{index}/{name}": shape for index in range(layers) for name, shape in layer.items()}
    ends: Shapes = {"tokens": (vocabulary, width), "positions": (context, width)}
    return {**ends, **stack, "norm/scale": (width,), "norm/bias": (width,)}


def small_leaves(count: int) -> Shapes:
    """`count` leaves of 8 shapes, 27 to 1024 elements each."""
    shapes = ((64,), (128,), (8, 8), (16, 16), (32, 32), (64, 16), (3, 3, 3), (12, 24))
    return {f"leaf_{index}": shapes[index % len(shapes)] for index in range(count)}


def equal_leaves(count: int, *shape: int) -> Shapes:
    """`count` leaves of one shape."""
    return {f"leaf_{index}": shape for index in range(count)}


def flattened(tree: Mapping[str, Any]) -> np.ndarray:
    """All leaves as one array."""
    return np.concatenate([np.ravel(leaf) for leaf in tree.values()])


def unflattened(array: np.ndarray, like: Tree) -> Tree:
    """The leaves out of one array."""
    ends = np.cumsum([leaf.size for leaf in like.values()])
    parts = np.split(array, ends[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}
