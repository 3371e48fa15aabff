"""Against thousands of small leaves, each of which costs a call: keep their state in a few flat arrays."""

from __future__ import annotations

from typing import Any

import jax
import optax

from gradxform.core import trees
from gradxform.core.arguments import count_of
from gradxform.core.body import Body, Transformation, Wrapper, body_of
from gradxform.core.leaves import column
from gradxform.core.packing import Packed, Packing
from gradxform.core.packing import PackedLeaves as PackedLeaves
from gradxform.core.program import Program
from gradxform.core.rules import Rule


def packed(tx: optax.GradientTransformation, max_size: int = 4096) -> Transformation:
    """(u₁, …, uₙ) ← split(tx(g₁ ⧺ … ⧺ gₙ)): one array of state for all small leaves that get the same.

    An array that a compiled step takes or returns costs a few microseconds on a CPU, however small. Leaves of at most
    ``max_size`` elements on which the same rules act are joined for the step; larger ones stay as they are, since
    copying them costs more, and so do frozen ones and those on which a rule acts that looks at each leaf as a whole,
    such as `orthogonalize`. Masks and the patterns of `by_path` see the parameters as they are.

    Updates and state are those of ``tx``, up to the rounding of what a compiler fuses otherwise; a global norm is of
    all leaves, but summed in another order. It is slower where leaves are few.

    Where parameters themselves may be one array, that is faster still, with any transformation::

        flat, unravel = jax.flatten_util.ravel_pytree(params)
        grads = jax.grad(lambda flat: loss(unravel(flat), batch))(flat)
        flat, state = gx.step(tx, grads, state, flat)

    Args:
      tx: Transformations of this library, in a `chain` or `by_path`. Guards and other wrappers go around it, as in
        ``skip_nonfinite(packed(tx))``.
      max_size: How many elements a packed leaf may have, at least 1.

    Returns:
      A transformation whose state is that of ``tx`` with `PackedLeaves` for every moment, or where there is no small
      leaf, that of ``tx``. `unpack_state` and `pack_state` exchange it with the state of ``tx``. What is sharded
      by `jax.jit` has its small leaves gathered. `optax.tree_map_params` maps the flat arrays like leaves.

    Raises:
      TypeError, ValueError: if ``tx`` contains anything but rules for one array, such as another library's
        transformation; if every small leaf has a rule that looks at it as a whole; if ``update`` gets no params.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = [{"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)} for _ in range(100)]
      >>> tx = gx.packed(gx.adamw(1e-3))
      >>> state = tx.init(params)
      >>> print(state.mu.packed[0].shape, gx.unpack_state(tx, state, params).mu[99]["bias"])
      (1600,) [0. 0. 0. 0.]
    """
    body = body_of("tx of packed", tx)
    stages = body.flat if isinstance(body, Program) else [body]
    for stage in stages:
        if not isinstance(stage, Rule):
            raise TypeError(
                f"packed joins leaves, and {stage!r} may look at each: put it around, as in "
                "skip_nonfinite(packed(tx)), or beside, as in chain(optax_tx, packed(tx))"
            )
    assert isinstance(body, Program)
    return Transformation.of(Packed(body, count_of("max_size", max_size)))


def unpack_state(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """The state of the same transformation without `packed`: to save it, look at it or go on without.

    Args:
      tx: What `packed` returned, or that in guards or other wrappers.
      state: Its state.
      params: The parameters it is for; shapes and dtypes are enough unless a mask looks at values.

    Raises:
      TypeError, ValueError: if ``tx`` is not packed, or ``state`` is not its state for these parameters.

    Example: see `packed`.
    """
    body, packing = _found("unpack_state", tx, params)

    def unpacked(node: Any) -> Any:
        if not isinstance(node, body.tx.state_type):
            return node
        if packing.kinds:
            for name in body.moments:
                packing.check(f"state.{name}", getattr(node, name))
        return node._replace(
            **{n: packing.unpack(f"state.{n}", node.count, getattr(node, n)) for n in _moments(body, packing)}
        )

    return _mapped("unpack_state", body, unpacked, state)


def pack_state(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """The state of a packed transformation from that of the same one without `packed`.

    Args:
      tx: See `unpack_state`.
      state: The state without `packed`, such as one restored from a checkpoint.
      params: See `unpack_state`.

    Raises:
      TypeError, ValueError: see `unpack_state`.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> params = [jnp.ones(3), jnp.ones(4)]
      >>> state = gx.adamw(1e-3).init(params)
      >>> print(gx.pack_state(gx.packed(gx.adamw(1e-3)), state, params).nu.packed[0])
      [0. 0. 0. 0. 0. 0. 0.]
    """
    body, packing = _found("pack_state", tx, params)

    def packed_one(name: str, tree: Any) -> PackedLeaves:
        if isinstance(tree, PackedLeaves):
            raise TypeError(f"state.{name} is packed already")
        slots = column(f"state.{name}", tree, packing.structure)
        for place, slot in enumerate(slots):
            shape = packing.shapes[place]
            if not isinstance(slot, optax.MaskedNode) and trees.aval(slot)[0] != shape:
                where = trees.name_leaf(f"state.{name}", packing.structure, place)
                raise ValueError(f"{where} is {trees.describe(slot)}, for these parameters its shape is {list(shape)}")
        return packing.pack(slots)

    def one(node: Any) -> Any:
        if not isinstance(node, body.tx.state_type):
            return node
        return node._replace(**{name: packed_one(name, getattr(node, name)) for name in _moments(body, packing)})

    return _mapped("pack_state", body, one, state)


def _moments(body: Packed, packing: Packing) -> list[str]:
    """The fields in which the packed state differs."""
    return body.moments if packing.kinds else []


def _found(name: str, tx: Any, params: Any) -> tuple[Packed, Packing]:
    """What packs in a transformation, and the packing for these parameters."""
    body: Body = body_of(f"tx of {name}", tx)
    while isinstance(body, Wrapper) and not isinstance(body, Packed):
        body = body.tx
    if not isinstance(body, Packed):
        raise TypeError(f"{name} needs what gx.packed(…) returns, or that in wrappers, got {tx!r}")
    leaves, structure = trees.flatten("params", params)
    return body, body.packing(params, leaves, structure)[0]


def _mapped(name: str, body: Packed, function: Any, state: Any) -> Any:
    """`state` with `function` of the state of what is packed."""

    def is_it(node: Any) -> bool:
        return isinstance(node, body.tx.state_type)

    if not any(map(is_it, jax.tree.leaves(state, is_leaf=is_it))):
        raise TypeError(f"state of {name} has no {body.tx.state_type._fields} in it, which {body.tx!r} keeps")
    return jax.tree.map(function, state, is_leaf=is_it)
