"""Arrays on meshes: the devices they lie on, the axes they are divided over, and who divides the work on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gradxform._core.compat import AxisType, auto_axes, reshard, varying_axes
from gradxform._core.trees import concrete, name_leaf

# Traced arrays, whose types may show how they are divided


def spec_of(x: Any, shape: tuple[int, ...] | None = None) -> PartitionSpec:
    """The PartitionSpec in x's type; with `shape`, that for another array of this shape, replicated if it can't be."""
    sharding = jax.typeof(x).sharding
    return sharding.spec if shape is None or _divides(sharding, shape) else PartitionSpec()


def partitioned(function: Callable[..., Any], like: Any, *arguments: Any) -> Any:
    """``function(*arguments)``; the compiler divides its work, and results are divided `like` these arrays or specs.

    So mathematics on one array need not say how each product or reshape is divided. On meshes whose axes are types, as
    JAX's `make_mesh` makes them, it would have to; on other meshes the compiler divides the work anyway.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(arguments)]
    meshes = [each.mesh for each in shardings if AxisType.Explicit in each.mesh.axis_types and _is_divided(each)]
    if not meshes:
        return function(*arguments)

    def placed(result: Any) -> NamedSharding:
        return NamedSharding(meshes[0], result if isinstance(result, PartitionSpec) else spec_of(result))

    automatic = auto_axes(function, axes=meshes[0].explicit_axes, out_sharding=jax.tree.map(placed, like))
    return automatic(*arguments)


def divided_like(other: Any, x: Any) -> Any:
    """`x`, divided as another array of its shape is, if that array's type shows it."""
    sharding = jax.typeof(other).sharding
    return reshard(x, sharding) if AxisType.Explicit in sharding.mesh.axis_types else x


def beside(leaf: Any, slot: Any) -> Any:
    """A new array, divided over devices as a traced leaf of its shape is; without this it would lie on one device.

    The leaf takes part in a selection that never selects it, which costs nothing. A selection by a scalar would be gone
    before the compiler divides the work.
    """
    if concrete(leaf) or jnp.shape(slot) != leaf.shape or not jnp.issubdtype(slot.dtype, jnp.inexact):
        return slot
    own = leaf if jnp.iscomplexobj(slot) else leaf.real
    return jnp.where(False, own.astype(slot.dtype), slot)


def _is_divided(sharding: NamedSharding) -> bool:
    """Whether an array is divided over any axis of its mesh."""
    return any(axes is not None for axes in sharding.spec)


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be divided like that."""
    if len(sharding.spec) > len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


# Concrete arrays


def everywhere(tree: Any) -> NamedSharding | None:
    """The sharding over all devices of the mesh that the arrays of a tree are on; None if they are on no mesh."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree) if concrete(leaf)]
    meshes = [each.mesh for each in shardings if isinstance(each, NamedSharding) and isinstance(each.mesh, Mesh)]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else None


def spread(state: Any, params: Any) -> Any:
    """The state, with arrays that `init` made from nothing moved to all devices of the parameters' mesh, if any.

    A scalar on one device beside arrays on a mesh would be traced anew when it comes back from a step, and a checkpoint
    would bring it back bound to that device.
    """
    sharding = everywhere(params)
    if sharding is None:
        return state

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not concrete(leaf) or leaf.committed:
            return leaf
        return jax.device_put(leaf, sharding) if isinstance(leaf.sharding, SingleDeviceSharding) else leaf

    return jax.tree.map(moved, state)


def put_like(other: Any, x: Any) -> Any:
    """`x` on the devices of another, concrete array, and divided as that is, if the shape of `x` allows it."""
    sharding = getattr(other, "sharding", None) if concrete(other) else None
    if not isinstance(sharding, NamedSharding):
        return x
    return jax.device_put(x, sharding if _divides(sharding, x.shape) else NamedSharding(sharding.mesh, PartitionSpec()))


# Inside `shard_map` and `pmap`


def sharded_over(leaf: Any, axis_name: tuple[str, ...] | None, who: str, structure: Any, index: int) -> tuple[str, ...]:
    """The axes in `axis_name` over which a leaf inside `shard_map` or `pmap` is one shard of several.

    Raises if the leaf is sharded over other axes. Where JAX does not track what varies, under `pmap` or
    ``check_vma=False``, every leaf counts as sharded over all of `axis_name`.
    """
    if axis_name == ():
        return ()
    varying = varying_over(leaf)
    strange = varying.difference(axis_name or ())
    if strange:
        raise ValueError(
            f"{name_leaf('updates', structure, index)} varies over the mesh axis {', '.join(sorted(strange))}, and "
            f"{who} would see one shard of it: say axis_name={sorted(varying)}, or average the gradients first if "
            "they are of different batches; axis_name=() takes each shard by itself"
        )
    if axis_name is None:
        return ()
    return tracked(axis_name, varying)


def tracked(axes: tuple[str, ...], varying: frozenset[str]) -> tuple[str, ...]:
    """The axes in `axes` over which an array varies; all of them where JAX does not track that."""
    return tuple(axis for axis in axes if axis in varying or not varying_over(jax.lax.axis_index(axis)))


def check_whole(leaf: Any, who: str, structure: Any, index: int) -> None:
    """Raise if a leaf inside `shard_map` is one shard of several."""
    if varying := varying_over(leaf):
        raise ValueError(
            f"{name_leaf('updates', structure, index)} varies over the mesh axis {', '.join(sorted(varying))}, and "
            f"{who} needs whole arrays; let jit shard it, or average the gradients first"
        )


def varying_over(x: Any) -> frozenset[str]:
    """The mesh axes over which JAX knows an array to differ."""
    return frozenset() if concrete(x) else varying_axes(x)
