"""Arrays on meshes: the devices they lie on, the axes they are divided over, and who divides the work on them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gradxform._core.compat import AxisType, auto_axes, reshard, varying_axes
from gradxform._core.trees import concrete, name_leaf

_LOG = logging.getLogger("gradxform")

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


def beside(leaf: Any, slot: Any, axes: tuple[int | None, ...] | None, name: str) -> Any:
    """A new array, divided over devices as a leaf is; without this it would lie on one device.

    Traced, the leaf takes part in a selection that never selects it, which costs nothing. A selection by a scalar would
    be gone before the compiler divides the work.

    Args:
      leaf: The leaf.
      slot: The new array.
      axes: For each of its axes that of the leaf that it goes along, or None; None if it goes along all if it can.
      name: What the leaf is called where the array can't be divided.
    """
    if concrete(leaf):
        sharding = getattr(leaf, "sharding", None)
        unlike = axes is None and slot.shape != jnp.shape(leaf)  # of a Python number, too
        if not isinstance(sharding, NamedSharding) or unlike or isinstance(slot, jax.ShapeDtypeStruct):
            return slot
        return jax.device_put(slot, NamedSharding(sharding.mesh, spec_along(leaf, axes, slot.shape, name)))
    if axes is not None:  # an axis of blocks is shorter than the leaf's, and the compiler divides it as it likes
        pairs = zip(axes, jnp.shape(slot), strict=True)
        axes = tuple(axis if axis is not None and leaf.shape[axis] == length else None for axis, length in pairs)
    unlike = jnp.shape(slot) != leaf.shape if axes is None else divided_by_type(leaf)  # where init runs divided
    if unlike or not jnp.issubdtype(slot.dtype, jnp.inexact):
        return slot
    own = leaf if axes is None else _along(leaf, axes)
    return jnp.where(False, (own if jnp.iscomplexobj(slot) else own.real).astype(slot.dtype), slot)


def _along(leaf: Any, axes: tuple[int | None, ...]) -> Any:
    """An array whose axes are these of a leaf, of length 1 for None."""
    first = leaf[tuple(slice(None) if axis in axes else 0 for axis in range(leaf.ndim))]
    left = sorted({axis for axis in axes if axis is not None})
    order = [left.index(axis) for axis in dict.fromkeys(axes) if axis is not None]
    once = {axis: axes.index(axis) for axis in left}  # an axis that two go along divides the first of them
    gone = [place for place, axis in enumerate(axes) if axis is None or once[axis] != place]
    return jnp.expand_dims(jnp.transpose(first, order), gone)


def divided_by_type(x: Any) -> bool:
    """Whether the type of an array says that it is divided over a mesh."""
    sharding = jax.typeof(x).sharding
    return AxisType.Explicit in sharding.mesh.axis_types and _is_divided(sharding)


def spec_along(leaf: Any, axes: tuple[int | None, ...] | None, shape: tuple[int, ...], name: str) -> PartitionSpec:
    """How a new array is divided whose axes go along `axes` of a leaf; see `beside`."""
    sharding = leaf.sharding if concrete(leaf) else jax.typeof(leaf).sharding
    own = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    if axes is None:
        return PartitionSpec(*own) if shape == leaf.shape else PartitionSpec()
    used = [None if axis is None or axis in axes[:place] else own[axis] for place, axis in enumerate(axes)]
    spec = PartitionSpec(*used)
    if _divides(NamedSharding(sharding.mesh, spec), shape):
        return spec
    _LOG.info("an array of shape %s of the state of %s is replicated: it can't be divided by %s", shape, name, spec)
    return PartitionSpec()


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
