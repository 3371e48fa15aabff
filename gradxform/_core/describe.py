"""What a transformation does to each leaf of a model, and what it costs, before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from gradxform._core import trees
from gradxform._core.body import Assigned, body_of
from gradxform._core.folding import folded
from gradxform._core.hyperparameters import Hyperparameter


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
        """The bytes of the leaf itself."""
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
        """The bytes of the whole state."""
        return self.shared_bytes + sum(leaf.state_bytes for leaf in self.leaves)

    @property
    def state_bytes_per_parameter(self) -> float:
        """The bytes of the leaves' state, divided by the number of their elements."""
        return sum(leaf.state_bytes for leaf in self.leaves) / max(1, self.size)

    def __rich__(self) -> Any:
        from rich.box import SIMPLE_HEAD  # only needed here, and slower to import than the library
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        usual = self._usual()
        sections: dict[str, list[LeafDescription]] = {}
        for leaf in self.leaves:
            sections.setdefault(_title(leaf, usual), []).append(leaf)
        rows = {title: _folded(sections[title]) for title in sorted(sections, key=bool)}  # those without a title first
        folded = any(len(leaves) > 1 for section in rows.values() for _, leaves in section)
        mixed = len(self._dtypes) > 1
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        table.add_column("path", overflow="fold")
        for title, shown in {"leaves": folded, "shape": True, "dtype": mixed, "state": True}.items():
            if shown:
                table.add_column(title, justify="right" if title in ("leaves", "state") else "left", no_wrap=True)

        def add(path: str, leaves: Sequence[LeafDescription], shape: str, dtype: str, style: str | None = None) -> None:
            cells = [path, *([str(len(leaves))] if folded else []), shape, *([dtype] if mixed else [])]
            table.add_row(*map(Text, [*cells, _bytes(sum(leaf.state_bytes for leaf in leaves))]), style=style)

        for title, section in rows.items():
            if title:
                table.add_section()
                add(title, sections[title], "", "", "bold")
            for path, leaves in section:
                shape = "×".join(map(str, leaves[0].shape)) or "scalar"
                add("  " * bool(title) + (path or "(the only leaf)"), leaves, shape, str(leaves[0].dtype))
        unless = ", unless said above" if len(sections) > 1 else ""
        lines = [f"hyperparameters{unless}: {_joined(usual)}"] if usual else []
        return Group(table, "", *map(Text, [*lines, self._totals()]))

    def _usual(self) -> Mapping[str, Hyperparameter]:
        """The hyperparameters of the default group, or of most parameters if there are no groups."""
        sizes: collections.Counter[tuple[tuple[str, Hyperparameter], ...]] = collections.Counter()
        for leaf in self.leaves:
            if not leaf.frozen and leaf.group in ("", "default"):
                sizes[tuple(leaf.hyperparameters.items())] += leaf.size
        return dict(max(sizes, key=sizes.__getitem__, default=()))

    @property
    def _dtypes(self) -> set[np.dtype[Any]]:
        return {leaf.dtype for leaf in self.leaves}

    def _totals(self) -> str:
        trained = sum(leaf.size for leaf in self.leaves if not leaf.frozen)
        frozen = f", {trained:,} of them trained" if trained != self.size else ""
        dtype = f" of {next(iter(self._dtypes))}" if len(self._dtypes) == 1 else ""
        return (
            f"{len(self.leaves)} {'leaf' if len(self.leaves) == 1 else 'leaves'}{dtype}, "
            f"{self.size:,} parameters{frozen}, {_bytes(sum(leaf.bytes for leaf in self.leaves))}; "
            f"state {_bytes(self.state_bytes)}, {self.state_bytes_per_parameter:.4g} bytes per parameter"
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
      tx: Any transformation, ours or another library's.
      params: A tree of arrays or `jax.ShapeDtypeStruct`.
      show: Whether to print the table.

    Returns:
      The same as data: ``leaves`` with ``state_bytes`` each, ``shared_bytes``, ``state_bytes_per_parameter``.

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
    leaves, structure = jax.tree.flatten(params)
    avals = [trees.aval(leaf) for leaf in leaves]
    shapes = structure.unflatten(
        [leaf if aval[1] is None else jax.ShapeDtypeStruct(*aval) for leaf, aval in zip(leaves, avals, strict=True)]
    )
    per_leaf, everything = [0] * len(leaves), 0
    for array in body.inventory(shapes):
        everything += _nbytes(array.aval)
        if array.leaf is not None:
            per_leaf[array.leaf] += _nbytes(array.aval)
    assigned = body.assign(shapes)
    description = Description(
        tuple(
            _leaf(path, leaf, own, size)
            for path, leaf, own, size, (_, dtype) in zip(
                trees.paths(structure), jax.tree.leaves(shapes), assigned, per_leaf, avals, strict=True
            )
            if dtype is not None
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


def _nbytes(aval: Any) -> int:
    shape, dtype = aval
    return int(np.prod(shape)) * dtype.itemsize


def _folded(leaves: Sequence[LeafDescription]) -> list[tuple[str, list[LeafDescription]]]:
    """Rows of leaves that only numbers in their paths tell apart, such as ``blocks/{0…11}/kernel``."""
    rows = folded([leaf.path for leaf in leaves], [(leaf.shape, leaf.dtype, leaf.state_bytes) for leaf in leaves])
    return [(path, [leaves[place] for place in places]) for path, places in rows]


def _title(leaf: LeafDescription, usual: Mapping[str, Hyperparameter]) -> str:
    """How a leaf differs from the usual: its group, that it is frozen, or its hyperparameters."""
    own = leaf.hyperparameters
    if leaf.frozen:
        text = "frozen"
    elif own and own.keys() == usual.keys():
        text = ", ".join(f"{name}={value!r}" for name, value in own.items() if value != usual[name])
    elif not leaf.group and own.keys() < usual.keys():
        text = f"no {', '.join(name for name in usual if name not in own)}"
    else:
        text = _joined(own) or ("no hyperparameters known" if leaf.group else "")
    return ": ".join(filter(None, (leaf.group, text)))


def _joined(hyperparameters: Mapping[str, Hyperparameter]) -> str:
    """Hyperparameters written as arguments, without zeros that switch something off."""
    return ", ".join(f"{name}={value!r}" for name, value in hyperparameters.items() if not value.off)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.4g} {unit}"
