"""The leaves of one step, checked, with what is known of each before anything is computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform._core import meshes, trees
from gradxform._core.compiled import moved
from gradxform._core.encoded import EncodedParam, decoded
from gradxform._core.explain import OTHER_PARAMETERS
from gradxform.numerics import arithmetic as numerics

HOLE = optax.MaskedNode()
"""What stands in a tree in place of a leaf that is left out; JAX does not count it as a leaf."""


class Leaf(NamedTuple):
    """A leaf of one step."""

    update: Any
    """None if the leaf stays as it is, because it is frozen, is no array or has no gradient."""
    param: Any
    """None where the step was given no parameters."""
    shape: tuple[int, ...]
    arithmetic: Any
    """The dtype of the leaf's arithmetic."""
    final: Any
    """The dtype in which its update is returned: the parameter's."""

    def gives_param(self, wants: Literal["updates", "params"]) -> bool:
        """Whether the parameter is the result, not its update: if it is wanted, or encoded, which always comes back."""
        return self.param is not None and (wants == "params" or isinstance(self.param, EncodedParam))

    def moved(self, accepted: Any = None) -> Any:
        """The parameter after the update."""
        return moved(self.arithmetic, self.param, self.update, accepted)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """All leaves of one step."""

    structure: Any
    leaves: list[Leaf]
    given: list[Any]
    """The updates as they came, also those of frozen leaves."""
    has_params: bool

    @classmethod
    def of(cls, updates: Any, params: Any, frozen: Sequence[bool]) -> Leaves:
        """Flatten and check: same structure and shapes, no complex update for a real parameter."""
        if params is None:
            given, structure = jax.tree.flatten(updates)
            params_given, param_avals = [None] * len(given), None
        else:
            params_given, structure = jax.tree.flatten(params)
            given, param_avals = like_params(updates, params, structure), trees.avals(params_given)
        used = (
            [None if rests else update for rests, update in zip(frozen, given, strict=True)] if any(frozen) else given
        )
        facts = _facts(structure, trees.avals(used), param_avals)
        pairs = zip(used, params_given, facts, strict=True)
        return cls(structure, [Leaf(update, param, *fact) for update, param, fact in pairs], given, params is not None)

    def seen(self, sees: Sequence[bool], encoded: bool = False) -> tuple[Any, Any]:
        """The trees of updates and parameters for what sees some of the leaves; a hole for each that it does not.

        Parameters are decoded unless they are asked for `encoded`; None in their place where the step has none.
        """
        updates = [leaf.update for leaf in self.leaves]
        params = [leaf.param if encoded else decoded(leaf.param) for leaf in self.leaves] if self.has_params else None
        given = masked(sees, self.structure.unflatten(updates), updates, self.structure)
        if params is None:
            return given, None
        return given, masked(sees, self.structure.unflatten(params), params, self.structure)

    def updated(self, updates: Sequence[Any]) -> Leaves:
        """The same leaves with other updates."""
        pairs = zip(self.leaves, updates, strict=True)
        return dataclasses.replace(self, leaves=[Leaf(update, *leaf[1:]) for leaf, update in pairs])

    def checked(self, who: str, new: Any, given: Any, acts: Sequence[bool]) -> list[Any]:
        """The new updates of a stage that was `given` these; raises if it changed the structure or a shape."""
        remedy = "every stage must keep the structure"
        try:
            parts = self.structure.flatten_up_to(new)
        except ValueError:
            parts = None
        used = [act and leaf.update is not None for act, leaf in zip(acts, self.leaves, strict=True)]
        if parts is None or not jax.tree_util.all_leaves([p for p, each in zip(parts, used, strict=True) if each]):
            trees.check_same_structure(who, jax.tree.structure(new), "updates", jax.tree.structure(given), remedy)
            raise TypeError(f"{who} are {type(new).__name__}, not a tree like the updates; {remedy}")
        for index, (part, leaf, each) in enumerate(zip(parts, self.leaves, used, strict=True)):
            if each:
                trees.check_trainable(who, self.structure, index, trees.avals([part])[0])
                made, old, real = trees.aval(part), trees.aval(leaf.update), "real updates must stay real"
                trees.check_update(who, made, old, self.structure, index, "updates", real)
        return parts

    def result(self, wants: Literal["updates", "params"], results: Sequence[Any]) -> Any:
        """The tree of the results. Leaves that stay as they are give themselves or no update, whichever is wanted."""
        whole = [
            self._unmoved(wants, leaf, given) if leaf.update is None else result
            for leaf, given, result in zip(self.leaves, self.given, results, strict=True)
        ]
        return self.structure.unflatten(whole)

    def _unmoved(self, wants: Literal["updates", "params"], leaf: Leaf, given: Any) -> Any:
        if leaf.gives_param(wants):
            return leaf.param
        return no_update(leaf.param if self.has_params else given)


def no_update(leaf: Any, dtype: Any = None) -> Any:
    """Zeros like a leaf, −0 in dtypes that have it, which changes no number when added; None for what is no array."""
    _, own = trees.aval(leaf)
    if own is None or own == jax.dtypes.float0:
        return None if own is None else leaf
    zeros = jnp.zeros_like(leaf, dtype=dtype)
    return meshes.divided_like(leaf, numerics.no_update(zeros) if trees.trainable(zeros.dtype) else zeros)


def like_params(updates: Any, params: Any, structure: Any) -> list[Any]:
    """One update for each leaf of the parameters; a None among the updates may stand for a whole subtree."""
    given, own = jax.tree.flatten(updates)
    if own == structure:
        return given
    if not given:
        raise ValueError(f"updates has no leaf, params has {structure.num_leaves}; pass gradients of these params")
    spread: list[Any] = []

    def put(update: Any, part: Any) -> None:
        if update is not None and not jax.tree_util.all_leaves([part]):
            raise ValueError
        spread.extend([update] * jax.tree.structure(part).num_leaves)

    try:
        jax.tree.map(put, updates, params, is_leaf=lambda node: node is None)
    except ValueError:
        remedy = "pass gradients or updates of these params"
        trees.check_same_structure("updates", own, "params", structure, remedy)
        raise
    return spread


@functools.lru_cache(maxsize=512)
def _facts(
    structure: Any, updates: tuple[trees.Aval | None, ...], params: tuple[trees.Aval | None, ...] | None
) -> list[tuple[tuple[int, ...], Any, Any]]:
    """Shape, arithmetic and final dtype of each leaf; raises where an update does not fit its parameter."""
    facts: list[tuple[tuple[int, ...], Any, Any]] = []
    for index, (update, param) in enumerate(zip(updates, updates if params is None else params, strict=True)):
        if update is None:
            shape, dtype = ((), None) if param is None else param
            facts.append((shape, trees.compute_dtype(dtype) if trees.trainable(dtype) else None, dtype))
            continue
        assert param is not None
        trees.check_trainable("updates", structure, index, update)
        if params is not None:
            trees.check_trainable("params", structure, index, param)
            trees.check_update("updates", update, param, structure, index)
        facts.append((param[0], trees.compute_dtype(update[1], param[1]), param[1]))
    return facts


def masked(acts: Sequence[bool], tree: Any, leaves: Sequence[Any], structure: Any) -> Any:
    """The tree with a hole in place of each leaf that is not acted on."""
    if all(acts):
        return tree
    return structure.unflatten([leaf if act else HOLE for leaf, act in zip(leaves, acts, strict=True)])


def column(name: str, tree: Any, structure: Any) -> list[Any]:
    """A value for each leaf of `structure`, a hole where `tree` leaves one out."""
    slots, own = jax.tree.flatten(tree)
    if own == structure:
        return slots
    try:
        parts = structure.flatten_up_to(tree)
    except ValueError:
        trees.check_same_structure(name, own, "updates", structure, OTHER_PARAMETERS)
        raise
    if not all(isinstance(part, optax.MaskedNode) or jax.tree_util.all_leaves([part]) for part in parts):
        trees.check_same_structure(name, own, "updates", structure, OTHER_PARAMETERS)
    return parts


def widened(leaf: Any) -> Any:
    """A parameter in the dtype of its arithmetic, strongly typed, as the `init` of a rule sees it."""
    dtype = trees.compute_dtype(trees.dtype_of(leaf))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return numerics.cast(leaf, dtype)
