"""What a transformation does to each leaf of a model, and what it costs, before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from gradxform.core import trees
from gradxform.core.body import Assigned, body_of
from gradxform.core.hyperparameters import Hyperparameter


@dataclasses.dataclass(frozen=True)
class LeafDescription:
    """One leaf: where it stands, and what it gets."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    group: str
    """The pattern of `by_path` that it matches, ``default``, or nothing."""
    frozen: bool
    hyperparameters: dict[str, Hyperparameter]
    state_bytes: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))

    @property
    def bytes(self) -> int:
        """What the leaf itself takes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` found; its `str` is the table that it printed."""

    leaves: tuple[LeafDescription, ...]
    shared_bytes: int
    """State that belongs to no single leaf: counters, hyperparameters, seeds."""

    @property
    def size(self) -> int:
        """The number of elements in all leaves."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def state_bytes(self) -> int:
        """All of the state."""
        return self.shared_bytes + sum(leaf.state_bytes for leaf in self.leaves)

    @property
    def state_bytes_per_parameter(self) -> float:
        """The state of the leaves by the number of their elements."""
        return sum(leaf.state_bytes for leaf in self.leaves) / max(1, self.size)

    def __rich__(self) -> Any:
        from rich.table import Table  # only needed here, and slower to import than the library

        usual = self._usual()
        numbers = [self._numbers(leaf, usual) for leaf in self.leaves]
        lines = [f"hyperparameters, unless said above: {_joined(usual)}"] if usual else []
        table = Table(
            caption="\n".join([*map(_escaped, lines), self._totals()]), caption_justify="left", caption_style=""
        )
        columns = {
            "path": [leaf.path or "(the only leaf)" for leaf in self.leaves],
            "shape": ["×".join(map(str, leaf.shape)) or "scalar" for leaf in self.leaves],
            "dtype": [str(leaf.dtype) for leaf in self.leaves],
            "group": [leaf.group for leaf in self.leaves],
            "hyperparameters": numbers,
            "state": [_bytes(leaf.state_bytes) for leaf in self.leaves],
        }
        shown = {title: cells for title, cells in columns.items() if any(cells)}
        for title in shown:
            table.add_column(title, justify="right" if title == "state" else "left", overflow="fold")
        for row in zip(*shown.values(), strict=True):
            table.add_row(*map(_escaped, row))
        return table

    def _usual(self) -> dict[str, Hyperparameter]:
        """The hyperparameters of the default, or else those that most trained leaves have."""
        trained = [leaf for leaf in self.leaves if not leaf.frozen]
        some = [leaf for leaf in trained if leaf.group == "default"] or trained
        counted = collections.Counter(tuple(leaf.hyperparameters.items()) for leaf in some)
        return dict(max(counted, key=counted.__getitem__, default=()))

    def _numbers(self, leaf: LeafDescription, usual: dict[str, Hyperparameter]) -> str:
        own = leaf.hyperparameters
        if leaf.frozen:
            return "frozen"
        alike = own.keys() == usual.keys()
        return _joined({name: value for name, value in own.items() if not alike or usual[name] != value})

    def _totals(self) -> str:
        trained = sum(leaf.size for leaf in self.leaves if not leaf.frozen)
        frozen = f", {trained:,} of them trained" if trained != self.size else ""
        return (
            f"{len(self.leaves)} {'leaf' if len(self.leaves) == 1 else 'leaves'}, {self.size:,} parameters{frozen}, "
            f"{_bytes(sum(leaf.bytes for leaf in self.leaves))}; state {_bytes(self.state_bytes)}, "
            f"{self.state_bytes_per_parameter:.4g} bytes per parameter"
        )

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def describe(tx: optax.GradientTransformation, params: Any, *, show: bool = True) -> Description:
    """Print which leaf gets what: path, shape, dtype, group, hyperparameters, bytes of state; and the totals.

    Nothing is allocated: shapes are enough.

    Args:
      tx: Any transformation, ours or foreign.
      params: A tree of arrays or `jax.ShapeDtypeStruct`.
      show: Whether to print the table.

    Returns:
      The same, for programs: ``leaves`` with ``state_bytes`` each, ``shared_bytes``, ``state_bytes_per_parameter``.

    Raises:
      TypeError, ValueError: what ``tx.init(params)`` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.bfloat16)}
      >>> found = gx.describe(gx.compensated(gx.adamw(1e-3), "int8"), params, show=False)
      >>> found.state_bytes_per_parameter, found.leaves[0].hyperparameters["b2"]
      (9.0, 0.999)
    """
    body = body_of("tx of describe", tx)
    leaves, structure = trees.flatten("params", params)
    shapes = structure.unflatten([jax.ShapeDtypeStruct(*trees.aval(leaf)) for leaf in leaves])
    state = jax.eval_shape(tx.init, shapes)
    per_leaf = _bytes_by_leaf(tx, state, shapes)
    everything = sum(_nbytes(leaf) for leaf in jax.tree.leaves(state))
    assigned = body.assign(shapes)
    description = Description(
        tuple(
            _leaf(path, leaf, one, size)
            for path, leaf, one, size in zip(
                trees.paths(structure), jax.tree.leaves(shapes), assigned, per_leaf, strict=True
            )
        ),
        everything - sum(per_leaf),
    )
    if show:
        from rich import print as rich_print

        rich_print(description)
    return description


def _leaf(path: str, leaf: jax.ShapeDtypeStruct, assigned: Assigned, state_bytes: int) -> LeafDescription:
    hyperparameters = {} if assigned.frozen else dict(assigned.hyperparameters)
    return LeafDescription(
        path, leaf.shape, np.dtype(leaf.dtype), assigned.group, assigned.frozen, hyperparameters, state_bytes
    )


def _bytes_by_leaf(tx: optax.GradientTransformation, state: Any, shapes: Any) -> list[int]:
    """The bytes of state that belong to each leaf, as optax tells what in a state is like the parameters."""
    leaves, structure = jax.tree.flatten(shapes)
    totals = [0] * len(leaves)

    def add(part: Any, index: int) -> Any:
        totals[index] += sum(_nbytes(leaf) for leaf in jax.tree.leaves(part))
        return part

    places = structure.unflatten(range(len(leaves)))
    optax.tree_map_params(tx, add, state, places, is_leaf=lambda part: isinstance(part, optax.MaskedNode))
    return totals


def _nbytes(leaf: Any) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize


def _joined(hyperparameters: Mapping[str, Hyperparameter]) -> str:
    """As one writes arguments; what is off by default and off is left out."""
    shown = ("learning_rate", "weight_decay")
    return ", ".join(f"{name}={h!r}" for name, h in hyperparameters.items() if name in shown or h.value != 0.0)


def _bytes(number: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number = number / 1000  # pyright: ignore[reportAssignmentType] (a float from here on)
    return f"{number:.4g} {unit}"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
