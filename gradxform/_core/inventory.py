"""Every array of a state: where it stands, which leaf it is for, and what it holds. Known before anything is allocated.

Whatever reads states looks here: `describe` for bytes, `quantize_state` for the moments to encode. Nothing is guessed
from shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jax.tree_util import DictKey, GetAttrKey

from gradxform._core import trees

Role: TypeAlias = Literal["signed", "non_negative", "kept"]
"""A moment of either sign, one that is never negative, or what is no moment and must stay exact."""

ROLES: dict[str, Role] = {
    **dict.fromkeys(("mu", "m", "m1", "m2", "trace", "exp_avg", "momentum", "momentum_buffer", "velocity"), "signed"),
    **dict.fromkeys(
        ("nu", "nu_max", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum_of_squares", "e_g", "e_x"), "non_negative"
    ),
    **dict.fromkeys(("mean", "acc_grads", "grad_acc", "residual"), "kept"),  # gradients not used yet, what params lack
}
"""What fields of these names hold in this library, optax and torch."""


class StateArray(NamedTuple):
    """One array of a state."""

    path: tuple[Any, ...]
    """The keys to it from the state's root, as `jax.tree_util.tree_flatten_with_path` gives them."""
    leaf: int | None
    """Which leaf of the parameters it is for; None if it is for all."""
    field: str
    """The part of the state that it belongs to, ``inner/mu``: the path without the leaf's."""
    role: Role | None
    """What it holds; None if it is not known."""
    of_rule: bool
    """Whether it is a moment of a rule, which may be decoded in the kernels of a step."""
    aval: trees.Aval


def state_shapes(init: Any, params: Any) -> Any:
    """The shapes and dtypes of the state that `init` makes; leaves that are no arrays are passed to it as they are."""
    leaves, structure = jax.tree.flatten(params)
    places = [place for place, leaf in enumerate(leaves) if trees.aval(leaf)[1] is not None]

    def of_arrays(arrays: list[Any]) -> Any:
        seen = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            seen[place] = array
        return init(structure.unflatten(seen))

    return jax.eval_shape(of_arrays, [leaves[place] for place in places])


def names_of(field: str) -> tuple[str, str, str]:
    """The names by which a field may be meant, the most exact first: ``inner/mu_2``, ``mu_2``, ``mu``."""
    name = field.rpartition("/")[2]
    return field, name, re.sub(r"_\d+$", "", name)


def shared(state: Any, *fields: str) -> list[StateArray]:
    """The arrays of a state's fields that belong to no leaf."""
    return [
        StateArray((GetAttrKey(field), *path), None, field, None, False, trees.aval(leaf))
        for field in fields
        for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(state, field))[0]
    ]


def per_leaf(
    prefix: Sequence[Any], tree: Any, params: Any, role: Role | None, of_rule: bool = False
) -> list[StateArray]:
    """The arrays of a part of a state that is a tree like the parameters, with an array or a hole for each leaf."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    parts = jax.tree.structure(params).flatten_up_to(tree)
    field = jax.tree_util.keystr(tuple(prefix), simple=True, separator="/")
    return [
        StateArray((*prefix, *path, *more), index, field, role, of_rule, trees.aval(leaf))
        for index, (path, part) in enumerate(zip(paths, parts, strict=True))
        for more, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
    ]


def per_leaf_by_name(name: str, trees_by_name: Mapping[str, Any], params: Any) -> list[StateArray]:
    """`per_leaf` for the field `name`, a dict of such trees."""
    prefixes = {key: (GetAttrKey(name), DictKey(key)) for key in trees_by_name}
    return [array for key, tree in trees_by_name.items() for array in per_leaf(prefixes[key], tree, params, "kept")]


def within(field: str, arrays: Sequence[StateArray], leaves: Sequence[int] | None = None) -> list[StateArray]:
    """The arrays of an inner state that is a field of another; `leaves` are the places of its leaves among all."""
    return [
        array._replace(
            path=(GetAttrKey(field), *array.path),
            field=f"{field}/{array.field}".rstrip("/"),
            leaf=array.leaf if leaves is None or array.leaf is None else leaves[array.leaf],
        )
        for array in arrays
    ]


def of_foreign(init: Any, params: Any) -> list[StateArray]:
    """The arrays of another library's state: each is for the leaf whose path is the end of its own."""
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(params)):  # a bare array has no path: give it one
        named = of_foreign(init, {_BARE: params})
        return [array._replace(path=tuple(key for key in array.path if key != DictKey(_BARE))) for array in named]
    places = {path: place for place, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0])}
    longest = max(map(len, places), default=0)
    found: list[StateArray] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state_shapes(init, params))[0]:
        ends = (path[-length:] for length in range(min(longest, len(path)), 0, -1))
        end = next((end for end in ends if end in places), ())
        prefix = path[: len(path) - len(end)]
        field = jax.tree_util.keystr(prefix, simple=True, separator="/")
        place = places.get(end)
        role = None if place is None else ROLES.get(names_of(field)[-1])
        found.append(StateArray(path, place, field, role, False, trees.aval(leaf)))
    return found


_BARE = "the only leaf"
