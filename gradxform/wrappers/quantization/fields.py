"""The fields of a state: its parts that are trees like the parameters, and what their names say that they hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

from gradxform._core import trees
from gradxform._core.leaves import HOLE, column
from gradxform.wrappers.quantization.codecs.codec import Codec
from gradxform.wrappers.quantization.coded import coded_avals

KINDS = ("signed", "non_negative", "kept")
_SIGNED = ("mu", "m", "m1", "m2", "trace", "exp_avg", "momentum", "momentum_buffer", "velocity")
_NON_NEGATIVE = ("nu", "nu_max", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum_of_squares", "e_g", "e_x")
_KEPT = ("mean", "acc_grads", "grad_acc", "residual")  # gradients not used yet, and what parameters lack
KNOWN = {name: kind for kind, names in zip(KINDS, (_SIGNED, _NON_NEGATIVE, _KEPT), strict=True) for name in names}
"""What fields of these names hold in this library, optax and torch."""


def checked_fields(fields: Any) -> tuple[tuple[str, str], ...]:
    """The argument `fields`, checked and hashable."""
    if not isinstance(fields, Mapping | None):
        raise TypeError(f"fields must map names of state fields to what they hold, got {fields!r}")
    for name, kind in (fields or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"fields must map names of state fields to what they hold, got the name {name!r}")
        if kind not in KINDS:
            raise ValueError(f"fields[{name!r}] must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    return tuple(sorted((fields or {}).items()))


def names_of(path: str) -> tuple[str, ...]:
    """By what a field may be named, the most exact first: ``inner/mu_2``, ``mu_2``, ``mu``."""
    name = path.rpartition("/")[2]
    return path, name, re.sub(r"_\d+$", "", name)


@dataclasses.dataclass(frozen=True)
class Field:
    """A part of a state that is a tree like the parameters."""

    name: str
    codecs: tuple[Codec | None, ...]
    """How each leaf is coded; None where it is kept."""
    avals: tuple[trees.Aval, ...]
    """Shape and dtype of each leaf."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Those of a state, and how it is parted into codes, scales and what is kept."""

    structure: Any
    """Of the state, each field a leaf."""
    placed: tuple[tuple[int, Field], ...]
    """Each field, and its place among those leaves."""

    @classmethod
    def of(
        cls,
        state: Any,
        structure: Any,
        avals: Sequence[trees.Aval],
        codec_of: Callable[[str, trees.Aval], Codec | None],
    ) -> Fields:
        """The fields of a state for parameters of these shapes; ``codec_of(name of the field, leaf of it)``."""

        def like(node: Any) -> bool:
            return _alike(node, structure, avals)

        nodes, whole = jax.tree_util.tree_flatten_with_path(state, is_leaf=like)
        placed: list[tuple[int, Field]] = []
        for place, (path, node) in enumerate(nodes):
            if like(node):
                name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
                parts = tuple(trees.aval(part) for part in structure.flatten_up_to(node))
                placed.append((place, Field(name, tuple(codec_of(name, part) for part in parts), parts)))
        return cls(whole, tuple(placed))

    @property
    def names(self) -> list[str]:
        return [field.name for _, field in self.placed]

    def opened(
        self, codes: Mapping[str, Any], scales: Mapping[str, Any], kept: Any, structure: Any, decode: Callable[..., Any]
    ) -> Any:
        """The state, with ``decode(number of the field, codec, aval, codes, scales)`` of what is coded; all checked."""
        if sorted(codes) != sorted(self.names) or sorted(scales) != sorted(self.names):
            raise ValueError(
                f"state.codes has the fields {sorted(codes)}, here they are {sorted(self.names)}; {trees.ANEW}"
            )
        try:
            parts = self.structure.flatten_up_to(kept)
        except ValueError as error:
            raise ValueError(f"state.inner is not of what is wrapped, or for other parameters; {trees.ANEW}") from error
        for number, (place, field) in enumerate(self.placed):
            leaves = column(f"state.inner.{field.name}", parts[place], structure)
            arrays = {
                f"state.{kind}[{field.name!r}]": column(f"state.{kind}[{field.name!r}]", tree[field.name], structure)
                for kind, tree in (("codes", codes), ("scales", scales))
            }
            for index, (codec, aval) in enumerate(zip(field.codecs, field.avals, strict=True)):
                if codec is not None:
                    for (name, some), expected in zip(arrays.items(), coded_avals(codec, aval[0]), strict=True):
                        if expected is not None:
                            trees.check_slot(name, some[index], expected, structure, index, check_dtype=True)
                    leaves[index] = decode(number, codec, aval, *(some[index] for some in arrays.values()))
            parts[place] = structure.unflatten(leaves)
        return self.structure.unflatten(parts)

    def closed(
        self, state: Any, structure: Any, encode: Callable[..., tuple[Any, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """Codes, scales and what is kept of a state: ``encode(number of the field, codec, value)`` of what is coded."""
        parts = self.structure.flatten_up_to(state)
        codes: dict[str, Any] = {}
        scales: dict[str, Any] = {}
        for number, (place, field) in enumerate(self.placed):
            pairs = list(zip(field.codecs, structure.flatten_up_to(parts[place]), strict=True))
            coded = [(HOLE, HOLE) if codec is None else encode(number, codec, value) for codec, value in pairs]
            codes[field.name], scales[field.name] = (structure.unflatten([pair[i] for pair in coded]) for i in (0, 1))
            parts[place] = structure.unflatten([value if codec is None else HOLE for codec, value in pairs])
        return codes, scales, self.structure.unflatten(parts)


def _alike(node: Any, structure: Any, avals: Iterable[trees.Aval]) -> bool:
    """Whether a part of a state is a tree like the parameters: an array of its shape, or nothing, for each."""
    if structure.num_leaves == 0:
        return jax.tree.structure(node) == structure
    try:
        parts = structure.flatten_up_to(node)
    except ValueError:
        return False
    holes = [isinstance(part, optax.MaskedNode) for part in parts]
    found = [(trees.aval(part)[0], trees.trainable(trees.aval(part)[1])) for part in parts]
    return not all(holes) and all(
        hole or one == (shape, True) for hole, one, (shape, _) in zip(holes, found, avals, strict=True)
    )
