"""Which arrays of a state are coded, and how the state is taken apart into codes, scales and the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from gradxform._core import trees
from gradxform._core.inventory import StateArray, names_of, state_shapes
from gradxform._core.leaves import HOLE, column
from gradxform.wrappers.quantization.codecs.codec import Codec
from gradxform.wrappers.quantization.coded import coded_avals

HOLDS = ("signed", "non_negative", "kept")
"""What a field of a state may hold."""


def checked_fields(fields: Any) -> tuple[tuple[str, str], ...]:
    """The argument `fields`, checked and hashable."""
    if not isinstance(fields, Mapping | None):
        raise TypeError(f"fields must map names of state fields to what they hold, got {fields!r}")
    for name, role in (fields or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"fields must map names of state fields to what they hold, got the name {name!r}")
        if role not in HOLDS:
            raise ValueError(f"fields[{name!r}] must be one of {', '.join(map(repr, HOLDS))}, got {role!r}")
    return tuple(sorted((fields or {}).items()))


class CodedArray(NamedTuple):
    """An array of a state that is kept as codes."""

    path: tuple[Any, ...]
    """The keys to it from the state's root."""
    place: int
    """Its index among the leaves of the state."""
    field: str
    number: int
    """The index of its field among all that are coded, so that each has random bits of its own."""
    leaf: int
    codec: Codec
    aval: trees.Aval


@dataclasses.dataclass(frozen=True)
class Coding:
    """Which arrays of a state are coded."""

    structure: Any
    """The structure of the state."""
    fields: tuple[str, ...]
    """The parts of the state that hold moments."""
    arrays: tuple[CodedArray, ...]
    in_kernels: bool
    """Whether all are moments of rules, which decode and encode them in the kernels of a step."""

    @property
    def _coded(self) -> set[int]:
        return {array.place for array in self.arrays}

    @classmethod
    def of(
        cls,
        init: Any,
        inventory: Sequence[StateArray],
        fields: Sequence[str],
        params: Any,
        codec_of: Callable[[StateArray], Codec | None],
    ) -> Coding:
        """The coding for parameters of these shapes; ``codec_of(array)`` is None for what is kept as it is."""
        paths, structure = jax.tree_util.tree_flatten_with_path(state_shapes(init, params))
        places = {path: place for place, (path, _) in enumerate(paths)}
        shapes = [trees.aval(leaf)[0] for leaf in jax.tree.leaves(params)]
        moments = [
            a for a in inventory if a.leaf is not None and a.aval[0] == shapes[a.leaf] and trees.trainable(a.aval[1])
        ]
        moments.sort(key=lambda moment: places[moment.path])
        codecs = list(map(codec_of, moments))
        coded = [(moment, codec) for moment, codec in zip(moments, codecs, strict=True) if codec is not None]
        arrays = tuple(
            CodedArray(a.path, places[a.path], a.field, fields.index(a.field), a.leaf, codec, a.aval)
            for a, codec in coded
            if a.leaf is not None
        )
        return cls(structure, tuple(fields), arrays, all(moment.of_rule for moment, _ in coded))

    def opened(
        self, codes: Mapping[str, Any], scales: Mapping[str, Any], kept: Any, structure: Any, decode: Callable[..., Any]
    ) -> Any:
        """The state, checked, with ``decode(array, codes, scales)`` in place of each array that is coded."""
        if sorted(codes) != sorted(self.fields) or sorted(scales) != sorted(self.fields):
            raise ValueError(
                f"state.codes has the fields {sorted(codes)}, here they are {sorted(self.fields)}; {trees.ANEW}"
            )
        try:
            leaves = self.structure.flatten_up_to(kept)
        except ValueError as error:
            expected = [HOLE if place in self._coded else place for place in range(self.structure.num_leaves)]
            here = jax.tree.structure(self.structure.unflatten(expected))
            what = "tx.init(params).inner"
            trees.check_same_structure("state.inner", jax.tree.structure(kept), what, here, trees.ANEW)
            raise ValueError(f"state.inner is another transformation's, or of other params; {trees.ANEW}") from error
        columns = {
            (what, field): column(f"state.{what}[{field!r}]", tree[field], structure)
            for field in self.fields
            for what, tree in (("codes", codes), ("scales", scales))
        }
        for array in self.arrays:
            given: list[Any] = []
            for what, expected in zip(("codes", "scales"), coded_avals(array.codec, array.aval[0]), strict=True):
                given.append(columns[what, array.field][array.leaf])
                if expected is not None:
                    name = f"state.{what}[{array.field!r}]"
                    trees.check_slot(name, given[-1], expected, structure, array.leaf, check_dtype=True)
            leaves[array.place] = decode(array, *given)
        return self.structure.unflatten(leaves)

    def closed(
        self, state: Any, structure: Any, encode: Callable[..., tuple[Any, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """The codes and scales of a state, which ``encode(array, value)`` gives for each coded array, and the rest."""
        leaves = self.structure.flatten_up_to(state)
        columns = {field: [(HOLE, HOLE)] * structure.num_leaves for field in self.fields}
        for array in self.arrays:
            columns[array.field][array.leaf] = encode(array, leaves[array.place])
            leaves[array.place] = HOLE
        codes, scales = (
            {field: structure.unflatten([pair[i] for pair in pairs]) for field, pairs in columns.items()}
            for i in (0, 1)
        )
        return codes, scales, self.structure.unflatten(leaves)


def role_of(array: StateArray, given: Mapping[str, str]) -> str | None:
    """What an array holds: what is `given` for its field, else what its rule or its name tells; None if unknown."""
    return next((given[name] for name in names_of(array.field) if name in given), array.role)
