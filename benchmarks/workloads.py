"""What is optimized: trees of float32 arrays, from one large leaf to thousands of small ones."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import numpy as np

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Tree: TypeAlias = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A named tree of shapes, and the number of rounds for each kind of figure."""

    name: str
    shapes: Shapes
    steps: int = 15
    """The compiled step."""
    repeats: int = 5
    """What runs in Python: un-jitted calls, tracing, lowering."""
    compiles: int = 3

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def trees(self) -> tuple[Tree, Tree]:
        """Parameters and gradients, the same at every call."""
        rng = np.random.default_rng(0)

        def normal(scale: float) -> Tree:
            return {name: scale * rng.standard_normal(shape, np.float32) for name, shape in self.shapes.items()}

        return normal(0.02), normal(0.01)


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


def small_leaves(count: int, distinct: int = 8) -> Shapes:
    """`count` leaves of `distinct` shapes, 27 to 1024 elements each."""
    shapes = ((64,), (128,), (8, 8), (16, 16), (32, 32), (64, 16), (3, 3, 3), (12, 24))
    return {f"leaf_{index}": shapes[index % distinct] for index in range(count)}


FULL = (
    Workload("one leaf, 16 M", {"leaf": (1 << 24,)}),
    Workload("GPT-2-like, 148 leaves, 47 M", gpt2_like(layers=12, width=512, vocabulary=16384, context=1024)),
    Workload("1000 small leaves", small_leaves(1000), compiles=2),
    Workload("3000 small leaves", small_leaves(3000), steps=9, repeats=3, compiles=1),
)
QUICK = (
    Workload("one small leaf", {"leaf": (1024,)}, steps=2, repeats=2, compiles=1),
    Workload("32 small leaves", small_leaves(32, distinct=2), steps=2, repeats=2, compiles=1),
)
