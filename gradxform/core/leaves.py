"""The leaves of one update, checked, with what is known of each before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import numerics
from gradxform.core import trees
from gradxform.core.body import Body, Call
from gradxform.core.compiled import cast, measured, stacked
from gradxform.core.rules import Measure

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
    ) -> tuple[list[Mapping[str, jax.Array]], dict[str, jax.Array]]:
        """The numbers of `measure` of every leaf that is acted on, one by one, and stacked; {} if there is none.

        Args:
          measure: What to measure; once per array and `call`, whoever asks.
          acts: Whether each leaf counts.
          call: The update in progress.
          name: Who asks, for messages.
          axis_name: Axes of the mesh over which the leaves are sharded; see `clip_by_global_norm`.
        """
        numbers: list[Mapping[str, jax.Array]] = []
        axes: list[tuple[str, ...]] = []
        for index, (act, leaf, dtype) in enumerate(zip(acts, self.updates, self.arithmetic, strict=True)):
            if act:
                axes.append(trees.sharded_over(leaf, axis_name, name, self.structure, index))
                key = (measure, id(leaf), dtype)
                if key not in call.measured:  # the leaf is kept beside, so that no other gets its id
                    call.measured[key] = (measured(measure)(dtype, leaf), leaf)
                numbers.append(call.measured[key][0])
        if not numbers:
            return [], {}
        if not any(axes):
            return numbers, stacked(numbers)
        assert measure.across is not None
        order = [i for some in dict.fromkeys(axes) for i, own in enumerate(axes) if own == some]
        parts: list[Mapping[str, jax.Array]] = []
        for some in dict.fromkeys(axes):
            together = stacked([one for one, own in zip(numbers, axes, strict=True) if own == some])
            parts.append(measure.across(together, some) if some else together)
        back = np.argsort(order)
        with jax.numpy_dtype_promotion("standard"):
            whole = {key: jnp.concatenate([part[key] for part in parts])[back] for key in parts[0]}
        return [{key: value[i] for key, value in whole.items()} for i in range(len(numbers))], whole

    def rounded(self) -> Any:
        """The whole tree of updates, in the parameters' dtypes."""
        pairs = zip(self.updates, self.final, strict=True)
        return self.structure.unflatten([u if trees.strong(u, dtype) else cast(u, dtype) for u, dtype in pairs])


def column(name: str, tree: Any, structure: Any) -> list[Any]:
    """One value per leaf of `structure`, a hole where `tree` leaves one out."""
    slots, own = jax.tree.flatten(tree)
    if own == structure:
        return slots
    remedy = "this state belongs to other parameters; call init(params) for these"
    try:
        parts = structure.flatten_up_to(tree)
    except ValueError:
        trees.check_same_structure(name, own, "updates", structure, remedy)
        raise
    if not all(isinstance(part, optax.MaskedNode) or jax.tree_util.all_leaves([part]) for part in parts):
        trees.check_same_structure(name, own, "updates", structure, remedy)
    return parts


def widened(leaf: Any) -> Any:
    """A parameter in the dtype of its arithmetic, strongly typed, as the `init` of a rule sees it."""
    dtype = trees.compute_dtype(trees.dtype_of(leaf))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return leaf if trees.strong(leaf, dtype) else numerics.cast(leaf, dtype)
