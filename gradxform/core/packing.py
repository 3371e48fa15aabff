"""Small leaves that get the same, as one flat array: which they are, and how trees of them are joined and split."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from gradxform import numerics
from gradxform.core import meshes, trees
from gradxform.core.body import Call, Report, Wrapper
from gradxform.core.compiled import slot_avals
from gradxform.core.leaves import HOLE, Leaves, column, masked
from gradxform.core.passes import Segment
from gradxform.core.program import Program
from gradxform.core.rules import NOTHING, Rule
from gradxform.core.selection import Selection


class PackedLeaves(NamedTuple):
    """A tree like the parameters, in which small leaves are parts of flat arrays."""

    packed: tuple[Any, ...]
    """The flat arrays, one for all small leaves that get the same."""
    others: Any
    """The tree of the other leaves, with holes in place of the small ones."""


@dataclasses.dataclass(frozen=True, eq=False)
class Resolved(Program):
    """A program whose masks were asked about other leaves, of which these are made."""

    selection: Selection

    def select(self, params: Any, leaves: list[Any], structure: Any) -> Selection:
        return self.selection


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which leaves of a tree are in which flat array."""

    structure: Any
    shapes: list[tuple[int, ...]]
    kinds: list[list[int]]
    """The places of the leaves in each flat array."""
    others: list[bool]
    """Whether each leaf stays as it is."""

    def pack(self, leaves: list[Any]) -> PackedLeaves:
        """The packed tree of these leaves."""
        flat = tuple(_joined([leaves[place] for place in kind]) for kind in self.kinds)
        return PackedLeaves(flat, masked(self.others, None, leaves, self.structure))

    def unpack(self, name: str, count: Any, tree: PackedLeaves, like: Sequence[Any] | None = None) -> Any:
        """The tree that a packed one stands for; the leaves of flat arrays in the dtypes of these, or theirs."""
        leaves = column(f"{name}.others", tree.others, self.structure)
        for kind, flat in zip(self.kinds, tree.packed, strict=True):
            if not isinstance(flat, optax.MaskedNode):
                own = tuple(trees.dtype_of(flat if like is None else like[place]) for place in kind)
                parts = _split(tuple(self.shapes[place] for place in kind), own, count, flat)
                for place, part in zip(kind, parts, strict=True):
                    leaves[place] = part if like is None else meshes.divided_like(like[place], part)
        return self.structure.unflatten(leaves)

    def check(self, name: str, tree: Any) -> None:
        """Raise unless a part of a state is packed like this."""
        if not isinstance(tree, PackedLeaves):
            raise TypeError(f"{name} is not packed; make a packed state of a plain one with pack_state")
        if len(tree.packed) != len(self.kinds):
            raise ValueError(
                f"{name} has {len(tree.packed)} packed arrays, here it has {len(self.kinds)}; {trees.ANEW}"
            )
        for place, (kind, flat) in enumerate(zip(self.kinds, tree.packed, strict=True)):
            size = sum(int(np.prod(self.shapes[i])) for i in kind)
            if not isinstance(flat, optax.MaskedNode) and trees.aval(flat)[0] != (size,):
                first = trees.name_leaf("params", self.structure, kind[0])
                rest = f" and {len(kind) - 1} more" if len(kind) > 1 else ""
                raise ValueError(
                    f"{name}.packed[{place}] is {trees.describe(flat)}, for {first}{rest} its shape is [{size}]; "
                    f"{trees.ANEW}"
                )


@dataclasses.dataclass(frozen=True, repr=False)
class Packed(Wrapper):
    """The body of `packed`."""

    tx: Program
    max_size: int = 4096

    @property
    def needs_params(self) -> bool:
        return True

    def init(self, params: Any) -> Any:
        leaves, structure = trees.flatten("params", params)
        packing, program = self.packing(params, leaves, structure)
        if not packing.kinds:
            return self.tx.init(params)
        small, others = packing.pack(leaves)
        return program.init(PackedLeaves(tuple(meshes.put_beside(flat, leaves) for flat in small), others))

    def step(self, updates: Any, state: Any, params: Any, call: Call) -> tuple[Any, Any, Report]:
        return self.guarded(updates, state, params, call, None)

    def guarded(self, updates: Any, state: Any, params: Any, call: Call, taken: Any) -> tuple[Any, Any, Report]:
        return self._run("guarded", updates, state, params, call, taken)

    def advance(self, updates: Any, state: Any, params: Any, call: Call, taken: Any = None) -> tuple[Any, Any, Report]:
        return self._run("advance", updates, state, params, call, taken)

    def _run(self, how: str, updates: Any, state: Any, params: Any, call: Call, taken: Any) -> tuple[Any, Any, Report]:
        """The method `how` of what is wrapped, with the packed trees."""
        if params is None:
            raise ValueError(f"{self.name} needs the parameters: call update(updates, state, params)")
        leaves = Leaves.of(updates, params)
        packing, program = self.packing(params, leaves.params, leaves.structure)
        if not packing.kinds:
            return getattr(self.tx, how)(updates, state, params, call, taken)
        self._check(state, packing, leaves)
        small = packing.pack(leaves.updates), state, packing.pack(leaves.params)
        result, new_state, report = getattr(program, how)(*small, call, taken)
        return packing.unpack("updates", state.count, result, leaves.params), new_state, report

    def _check(self, state: Any, packing: Packing, leaves: Leaves) -> None:
        """Raise unless the state is packed like this, and the leaves of an array are sharded alike in `shard_map`."""
        if isinstance(state, self.tx.state_type):
            for name in self.moments:
                packing.check(f"state.{name}", getattr(state, name))
        for kind in packing.kinds:
            for tree, some in (("updates", leaves.updates), ("params", leaves.params)):
                varying = {meshes.varying_over(some[place]): place for place in kind}
                if len(varying) > 1:
                    one, other = (trees.name_leaf(tree, leaves.structure, i) for i in list(varying.values())[:2])
                    raise ValueError(
                        f"{one} and {other} vary over different mesh axes, and {self.name} makes one array of them; "
                        "average the gradients first, or pack outside shard_map"
                    )

    @functools.cached_property
    def moments(self) -> list[str]:
        """The fields of the state that are trees like the parameters."""
        return [name for segment in self.tx.segments if isinstance(segment, Segment) for name in segment.fields]

    def packing(self, params: Any, leaves: list[Any], structure: Any) -> tuple[Packing, Program]:
        """Which leaves are packed, and what is done with the packed tree: known from shapes, dtypes and masks."""
        selection = self.tx.select(params, leaves, structure)
        rules = [selection.rules_by_leaf(segment.rules) for segment in self.tx.segments if isinstance(segment, Segment)]
        kinds: dict[Any, list[int]] = {}
        obstacles: dict[str, int] = {}
        for place, (leaf, frozen, *own) in enumerate(zip(leaves, selection.frozen, *rules, strict=True)):
            shape, dtype = trees.aval(leaf)
            acts = any(rule is not NOTHING for some in own for rule in some)
            if frozen or not acts or int(np.prod(shape)) > self.max_size:
                continue
            if obstacle := next(filter(None, map(obstacle_in, own)), None):
                obstacles.setdefault(obstacle, place)
                continue
            kinds.setdefault((trees.compute_dtype(dtype), *map(id, own)), []).append(place)
        if obstacles and not kinds:
            obstacle, place = next(iter(obstacles.items()))
            name = trees.name_leaf("params", structure, place)
            raise ValueError(
                f"{self.name} has nothing to do: {obstacle} looks at each leaf as a whole, so that {name} cannot be "
                f"packed; put it outside, as in chain({obstacle}(…), {self.name}(…))"
            )
        inside = {place for kind in kinds.values() for place in kind}
        others = [place not in inside for place in range(len(leaves))]
        packing = Packing(structure, [trees.aval(leaf)[0] for leaf in leaves], list(kinds.values()), others)
        seen = [*(kind[0] for kind in kinds.values()), *(place for place, stays in enumerate(others) if stays)]
        chosen = {mask: [flags[place] for place in seen] for mask, flags in selection.chosen.items()}
        frozen = [selection.frozen[place] for place in seen]
        return packing, Resolved(self.tx.stages, Selection(chosen, frozen, {}))


@functools.lru_cache(maxsize=4096)
def obstacle_in(rules: tuple[Rule, ...]) -> str | None:
    """The first rule that must see a leaf as a whole: for its own norm, its matrix, or a state of another shape."""
    for rule in rules:
        for inner in rule.walk():
            if inner.whole or (inner.measure is not None and inner.measure.joint is None):
                return inner.name
        if any(shape != _PROBE for shape, _ in slot_avals((rule,), _PROBE, np.dtype(np.float32))):
            return rule.name
    return None


_PROBE = (2, 3)


def _joined(leaves: list[Any]) -> Any:
    """The leaves one after the other, in their dtype, or if they have several that of their arithmetic."""
    holes = [isinstance(leaf, optax.MaskedNode) for leaf in leaves]
    if any(holes):
        if not all(holes):
            raise ValueError(f"the state has leaves that this transformation's has not, or the reverse; {trees.ANEW}")
        return HOLE
    dtypes = {trees.dtype_of(leaf) for leaf in leaves}
    dtype = dtypes.pop() if len(dtypes) == 1 else trees.compute_dtype(*dtypes)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.ShapeDtypeStruct((sum(int(np.prod(leaf.shape)) for leaf in leaves),), dtype)
    return _concatenated(dtype, leaves)


@functools.partial(jax.jit, static_argnums=0)
def _concatenated(dtype: Any, leaves: list[Any]) -> jax.Array:
    def on_whole(leaves: list[Any]) -> jax.Array:
        return jnp.concatenate([numerics.cast(leaf, dtype).reshape(-1) for leaf in leaves])

    return meshes.partitioned(on_whole, PartitionSpec(), leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(shapes: tuple[tuple[int, ...], ...], dtypes: tuple[Any, ...], count: Any, flat: Any) -> list[jax.Array]:
    if len(set(dtypes)) == 1:
        flat = numerics.cast(flat, dtypes[0])
    # XLA would compute the flat array anew for every slice, and compile each by itself; it does not look through a
    # branch, although this one is never taken, and equal slices are one kernel if it does not know where they start
    flat = jax.lax.cond(count < 0, jnp.negative, lambda x: x, flat)
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts = jax.lax.optimization_barrier([np.int32(start) for start in np.cumsum([0, *sizes[:-1]])])
    parts = zip(shapes, dtypes, sizes, starts, strict=True)
    return [numerics.cast(_slice(flat, start, size).reshape(shape), dtype) for shape, dtype, size, start in parts]


def _slice(flat: Any, start: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(flat, (start,), (size,), allow_negative_indices=False)
