"""How the axes of a leaf make matrices: ``in out``, ``each in 3*out``, ``in (32+8+8)*out`` and ``in in in out``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradxform._core.arguments import is_a
from gradxform._core.rule import Array
from gradxform._core.trees import is_complex

_ROLES = ("each", "in", "out")
_TOKEN = re.compile(r"(?:([1-9]\d*|\([1-9]\d*(?:\+[1-9]\d*)+\))\*(?=in|out))?(each|in|out)")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a leaf: a side of its matrices, or an index over them; and the blocks that the axis consists of."""

    role: str
    """``in``, ``out`` or ``each``."""
    parts: tuple[int, ...] = (1,)
    """The sizes of the blocks, relative to one another."""

    @property
    def uneven(self) -> bool:
        return len(set(self.parts)) > 1

    @property
    def blocks(self) -> int:
        return len(self.parts)

    def borders(self, size: int) -> list[int]:
        """Where an axis of blocks of unequal sizes is cut; between all numbers, if it has one number per block."""
        parts = (1,) * self.blocks if size == self.blocks else self.parts
        unit = size // sum(parts)
        return [unit * end for end in itertools.accumulate(parts)][:-1]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What each axis of a leaf is."""

    text: str
    axes: tuple[Axis, ...]

    def misfit(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why a leaf of this shape and dtype has no real matrices in this layout; None if it has."""
        if is_complex(dtype):
            return f"is {dtype}{list(shape)}; matrices must be real"
        if len(shape) != len(self.axes):
            return (
                f"has shape {shape}, and the layout {self.text!r} is of {len(self.axes)} axes; write one of 'in', "
                "'out' and 'each' per axis"
            )
        for place, (size, axis) in enumerate(zip(shape, self.axes, strict=True)):
            if size % sum(axis.parts):
                blocks = f"blocks as {':'.join(map(str, axis.parts))}" if axis.uneven else f"{axis.blocks} equal blocks"
                return f"has shape {shape}, and the layout {self.text!r} cuts axis {place} into {blocks}"
        return None

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """`misfit`, for ``lift(fits=…)``: equal layouts make equal rules, which bound methods would not."""
        return self.misfit(shape, dtype)

    # Blocks of unequal sizes are leaves of their own

    @functools.cached_property
    def even(self) -> Layout:
        """The layout of what `cut` gives."""
        return Layout(self.text, tuple(Axis(axis.role) if axis.uneven else axis for axis in self.axes))

    def cut(self, leaf: Array) -> list[Array]:
        """A leaf cut at the borders of its blocks of unequal sizes; itself, if there are none."""
        pieces = [leaf]
        for place in self._uneven:
            borders = self.axes[place].borders(leaf.shape[place])
            pieces = [part for piece in pieces for part in jnp.split(piece, borders, place)]
        return pieces

    def joined(self, pieces: list[Array]) -> Array:
        """The leaf of which these are the pieces that `cut` gave."""
        for place in reversed(self._uneven):
            run = self.axes[place].blocks
            pieces = [jnp.concatenate(pieces[i : i + run], place) for i in range(0, len(pieces), run)]
        return pieces[0]

    @functools.cached_property
    def _uneven(self) -> list[int]:
        return [place for place, axis in enumerate(self.axes) if axis.uneven]

    # What follows is for layouts without blocks of unequal sizes, except `all_sides` and `neurons`

    def all_sides(self, shape: tuple[int, ...]) -> set[tuple[int, int]]:
        """`sides` of every matrix of a leaf."""
        cuts = [
            np.diff([0, *axis.borders(n), n]) if axis.uneven else [n] for n, axis in zip(shape, self.axes, strict=True)
        ]
        return {self.even.sides(tuple(map(int, sizes))) for sizes in itertools.product(*cuts)}

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The number of inputs and of outputs of one of the leaf's matrices."""
        _, rows, columns = self._sizes(shape)
        return rows, columns

    def neurons(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array with one number per output: the leaf's, with the inputs of each matrix as one."""
        return tuple(axis.blocks if axis.role == "in" else size for size, axis in zip(shape, self.axes, strict=True))

    def matrices(self, leaf: Array) -> Array:
        """All matrices of a leaf, as an array of shape (number of matrices, in, out)."""
        split = leaf.reshape(self._split(leaf.shape)).transpose(self._order)
        return split.reshape(self._sizes(leaf.shape))

    def leaf(self, matrices: Array, shape: tuple[int, ...]) -> Array:
        """The leaf of this shape that has these matrices."""
        split = self._split(shape)
        apart = matrices.reshape([split[axis] for axis in self._order])
        return apart.transpose(np.argsort(self._order).tolist()).reshape(shape)

    def _split(self, shape: tuple[int, ...]) -> list[int]:
        """The shape in which every axis that consists of blocks is two axes."""
        pairs = zip(shape, (axis.blocks for axis in self.axes), strict=True)
        return [n for size, blocks in pairs for n in ((blocks, size // blocks) if blocks > 1 else (size,))]

    @functools.cached_property
    def _roles(self) -> list[str]:
        """The role of each axis of the split shape, in which blocks are matrices of their own."""
        return [role for axis in self.axes for role in (("each", axis.role) if axis.blocks > 1 else (axis.role,))]

    @functools.cached_property
    def _order(self) -> list[int]:
        return sorted(range(len(self._roles)), key=lambda axis: _ROLES.index(self._roles[axis]))

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        split = self._split(shape)
        each, rows, columns = (
            math.prod(size for size, own in zip(split, self._roles, strict=True) if own == role) for role in _ROLES
        )
        return each, rows, columns


def layout_of(text: str) -> Layout:
    """The layout that `text` describes; raises if it is none."""
    if not is_a(text, str):
        raise TypeError(f"layout must be a string such as 'in out', got {text!r}")
    return _layout_of(text)


@functools.lru_cache(maxsize=256)
def _layout_of(text: str) -> Layout:
    words = re.sub(r"\s*([+*])\s*", r"\1", text).split()
    matches = [match for match in map(_TOKEN.fullmatch, words) if match]
    axes = tuple(Axis(match[2], _blocks(match[1])) for match in matches)
    if len(axes) < len(words) or not {"in", "out"} <= {axis.role for axis in axes}:
        raise ValueError(
            f"layout {text!r} must be one word per axis: 'in', 'out', 'each' (a matrix per index), or such as '3*out' "
            "and '(32+8+8)*out' (blocks of equal and of unequal sizes, a matrix each), with an 'in' and an 'out' among "
            "them"
        )
    return Layout(" ".join(words), axes)


def _blocks(text: str | None) -> tuple[int, ...]:
    """The relative sizes of the blocks that ``3`` or ``(32+8+8)`` stands for."""
    if text is None:
        return (1,)
    return tuple(map(int, text.strip("()").split("+"))) if "+" in text else (1,) * int(text)
