"""How the axes of a leaf make matrices: layouts such as ``in out``, ``each in 3*out`` and ``in in in out``."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from gradxform._core.rule import Array
from gradxform._core.trees import is_complex

_KINDS = ("each", "in", "out")
_TOKEN = re.compile(r"(?:([1-9]\d*)\*(?=in|out))?(each|in|out)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """For each axis of a leaf how many blocks it consists of, and whether it is one of a matrix's sides."""

    text: str
    axes: tuple[tuple[int, str], ...]

    def misfit(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why such a leaf has no real matrices of this layout; None if it has."""
        if is_complex(dtype):
            return f"is {dtype}{list(shape)}; matrices must be real"
        if len(shape) != len(self.axes):
            return (
                f"has shape {shape}, and the layout {self.text!r} is of {len(self.axes)} axes; write one of 'in', "
                "'out' and 'each' per axis"
            )
        for axis, (size, (blocks, _)) in enumerate(zip(shape, self.axes, strict=True)):
            if size % blocks:
                return f"has shape {shape}, and the layout {self.text!r} cuts axis {axis} into {blocks} equal blocks"
        return None

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """`misfit`, for ``lift(fits=…)``: rules are equal where their layouts are, which bound methods are not."""
        return self.misfit(shape, dtype)

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many numbers go into one of the leaf's matrices, and how many come out."""
        _, rows, columns = self._sizes(shape)
        return rows, columns

    def neurons(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one number per output: that of the leaf with the inputs of each matrix as one."""
        pairs = zip(shape, self.axes, strict=True)
        return tuple(blocks if kind == "in" else size for size, (blocks, kind) in pairs)

    def matrices(self, leaf: Array) -> Array:
        """All matrices of a leaf: (how many, in, out)."""
        split = leaf.reshape(self._split(leaf.shape)).transpose(self._order)
        return split.reshape(self._sizes(leaf.shape))

    def leaf(self, matrices: Array, shape: tuple[int, ...]) -> Array:
        """The leaf of this shape that has these matrices."""
        split = self._split(shape)
        apart = matrices.reshape([split[axis] for axis in self._order])
        return apart.transpose(np.argsort(self._order).tolist()).reshape(shape)

    def _split(self, shape: tuple[int, ...]) -> list[int]:
        """The shape with every axis that consists of blocks as two."""
        pairs = zip(shape, self.axes, strict=True)
        return [n for size, (blocks, _) in pairs for n in ((blocks, size // blocks) if blocks > 1 else (size,))]

    @functools.cached_property
    def _kinds(self) -> list[str]:
        """The kind of each axis of the split shape: blocks are matrices of their own."""
        return [one for blocks, kind in self.axes for one in (("each", kind) if blocks > 1 else (kind,))]

    @functools.cached_property
    def _order(self) -> list[int]:
        return sorted(range(len(self._kinds)), key=lambda axis: _KINDS.index(self._kinds[axis]))

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        split = self._split(shape)
        each, rows, columns = (
            math.prod(size for size, own in zip(split, self._kinds, strict=True) if own == kind) for kind in _KINDS
        )
        return each, rows, columns


def layout_of(text: str) -> Layout:
    """The layout that `text` describes; raises if it is none."""
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance] (callers are not all checked)
        raise TypeError(f"layout must be a string such as 'in out', got {text!r}")
    return _layout_of(text)


@functools.lru_cache(maxsize=256)
def _layout_of(text: str) -> Layout:
    matches = [_TOKEN.fullmatch(token) for token in text.split()]
    axes = tuple((int(match[1] or 1), match[2]) for match in matches if match)
    if len(axes) < len(matches) or not {"in", "out"} <= {kind for _, kind in axes}:
        raise ValueError(
            f"layout {text!r} must be one word per axis: 'in', 'out', 'each' (a matrix per index) or such as '3*out' "
            "(blocks, a matrix each), with an 'in' and an 'out' among them"
        )
    return Layout(" ".join(text.split()), axes)
