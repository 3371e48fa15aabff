"""The leaves of one update, checked, with what is known of each before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform._core import meshes, trees
from gradxform._core.compiled import cast, landed, measured, measured_jointly, stacked
from gradxform._core.explain import OTHER_PARAMETERS
from gradxform._core.rule import Measure
from gradxform.numerics import arithmetic as numerics
from gradxform.numerics import norms as euclidean

if TYPE_CHECKING:
    from gradxform._core.body import Body, Call

HOLE = optax.MaskedNode()
"""What a tree has in place of a leaf that is left out: no leaf of JAX's."""


def masked(acts: list[bool], tree: Any, leaves: list[Any], structure: Any) -> Any:
    """The tree with a hole in place of each leaf that is not acted on."""
    if all(acts):
        return tree
    return structure.unflatten([leaf if act else HOLE for leaf, act in zip(leaves, acts, strict=True)])


def trained_leaves(body: Body, params: Any, updates: Any) -> list[bool]:
    """Which leaves a transformation does not freeze; `updates` stand for the parameters where there are none."""
    return [not frozen for frozen in body.frozen(updates if params is None else params)]


def trained(body: Body, params: Any) -> Any:
    """The parameters with holes where a transformation freezes them."""
    leaves, structure = trees.flatten("params", params)
    return masked(trained_leaves(body, params, params), params, leaves, structure)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The leaves of one update, and what is known of each before anything is computed."""

    updates: list[Any]
    params: list[Any]
    structure: Any
    arithmetic: list[np.dtype[Any]]
    """The dtype each leaf is computed in."""
    final: list[np.dtype[Any]]
    """The dtype each update is returned in: the parameter's."""
    whole_params: Any

    @classmethod
    def of(cls, updates: Any, params: Any) -> Leaves:
        """Flatten and check: same structure and shapes, no complex update for a real parameter."""
        leaves, structure = trees.flatten("updates", updates)
        if params is None:
            dtypes = [trees.dtype_of(leaf) for leaf in leaves]
            return cls(leaves, [None] * len(leaves), structure, [trees.compute_dtype(d) for d in dtypes], dtypes, None)
        param_leaves, param_structure = trees.flatten("params", params)
        remedy = "pass gradients or updates of these params"
        trees.check_same_structure("updates", structure, "params", param_structure, remedy)
        arithmetic, final = [], []
        for index, (leaf, param) in enumerate(zip(leaves, param_leaves, strict=True)):
            trees.check_update("updates", leaf, param, structure, index)
            final.append(trees.dtype_of(param))
            arithmetic.append(trees.compute_dtype(trees.dtype_of(leaf), final[-1]))
        return cls(leaves, param_leaves, structure, arithmetic, final, params)

    def measured(
        self, measure: Measure, acts: Iterable[bool], call: Call, name: str, axis_name: tuple[str, ...] | None
    ) -> tuple[list[Mapping[str, jax.Array]], Mapping[str, jax.Array]]:
        """The numbers of `measure` of every leaf that is acted on, one by one, and stacked; {} if there is none.

        A joint measure takes small leaves of one kind together, and has no numbers of single leaves.

        Args:
          measure: What to measure; once per array and `call`, whoever asks.
          acts: Whether each leaf counts.
          call: The update in progress.
          name: Who asks, for messages.
          axis_name: Axes of the mesh over which the leaves are sharded; see `clip_by_global_norm`.
        """
        indices = [index for index, act in enumerate(acts) if act]
        if not indices:
            return [], {}
        axes = [meshes.sharded_over(self.updates[i], axis_name, name, self.structure, i) for i in indices]
        if measure.joint is None:
            numbers = [self._measured_one(measure, i, call) for i in indices]
            parts = {over: [i for i, own in enumerate(axes) if own == over] for over in dict.fromkeys(axes)}
            wholes = [_whole(measure, stacked([numbers[i] for i in some]), over) for over, some in parts.items()]
            if len(wholes) == 1 and not axes[0]:
                return numbers, wholes[0]
            back = np.argsort([i for some in parts.values() for i in some])
            whole = {key: value[back] for key, value in _joined(wholes).items()}
            return [{key: value[i] for key, value in whole.items()} for i in range(len(numbers))], whole
        kinds: dict[Any, list[int]] = {}
        for index, over in zip(indices, axes, strict=True):
            kinds.setdefault((over, self.arithmetic[index]), []).append(index)
        return [], _joined(
            [_whole(measure, self._measured_all(measure, i, call), over) for (over, _), i in kinds.items()]
        )

    def _measured_one(self, measure: Measure, index: int, call: Call) -> Mapping[str, jax.Array]:
        """The numbers of one leaf."""
        leaf, dtype = self.updates[index], self.arithmetic[index]
        key = (measure.of, dtype, id(leaf))
        if key not in call.measured:  # the leaf is kept beside, so that no other gets its id
            call.measured[key] = (measured(measure)(dtype, leaf), leaf)
        return call.measured[key][0]

    def _measured_all(self, measure: Measure, indices: list[int], call: Call) -> Mapping[str, jax.Array]:
        """The numbers of groups that make up leaves of one dtype, stacked; of the leaves if they are known."""
        leaves, dtype = [self.updates[i] for i in indices], self.arithmetic[indices[0]]
        if all((measure.of, dtype, id(leaf)) in call.measured for leaf in leaves):
            return stacked([self._measured_one(measure, i, call) for i in indices])
        key = (measure.joint, dtype, *map(id, leaves))
        if key not in call.measured:
            call.measured[key] = (measured_jointly(measure)(dtype, alike(leaves)), leaves)
        return call.measured[key][0]

    def landed(self) -> Any:
        """The parameters after the updates, in their own dtypes."""
        triples = zip(self.arithmetic, self.params, self.updates, strict=True)
        return self.structure.unflatten([landed(dtype, param, update, None) for dtype, param, update in triples])

    def rounded(self) -> Any:
        """The whole tree of updates, in the parameters' dtypes."""
        pairs = zip(self.updates, self.final, strict=True)
        return self.structure.unflatten([u if numerics.strong(u, dtype) else cast(u, dtype) for u, dtype in pairs])


def alike(leaves: Sequence[Any]) -> list[list[Any]]:
    """Small leaves of one shape, dtype and sharding together, large ones alone."""
    groups: dict[Any, list[Any]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(index if np.size(leaf) > euclidean.SMALL else kind_of(leaf), []).append(leaf)
    return list(groups.values())


def kind_of(leaf: Any) -> Any:
    """What leaves must share to be put together: shape, dtype and how they are divided over a mesh."""
    return (trees.aval(leaf), getattr(leaf, "sharding", None)) if trees.concrete(leaf) else jax.typeof(leaf)


def _whole(measure: Measure, numbers: Mapping[str, jax.Array], axes: tuple[str, ...]) -> Mapping[str, jax.Array]:
    """From the numbers of the shards over some axes of the mesh to those of the whole."""
    if not axes:
        return numbers
    assert measure.across is not None
    return measure.across(numbers, axes)


def _joined(parts: list[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """Stacked numbers one after the other."""
    with jax.numpy_dtype_promotion("standard"):
        return {
            key: jnp.concatenate([part[key] for part in parts]) if len(parts) > 1 else parts[0][key] for key in parts[0]
        }


def column(name: str, tree: Any, structure: Any) -> list[Any]:
    """One value per leaf of `structure`, a hole where `tree` leaves one out."""
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
