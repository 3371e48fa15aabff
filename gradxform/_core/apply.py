"""The last line of every training step: θ ← θ + u."""

from __future__ import annotations

from typing import Any

import jax
import optax

from gradxform._core import trees
from gradxform._core.body import body_of
from gradxform._core.call import Call
from gradxform._core.explain import check_order
from gradxform._core.leaves import Leaves, like_params


def apply_updates(params: Any, updates: Any) -> Any:
    """θ ← θ + u, in the parameters' dtypes.

    Args:
      params: A tree of arrays. Leaves that are no floating-point or complex arrays stay as they are.
      updates: A tree of the same structure and shapes, as ``update`` returns it. A leaf that stays as it is has None or
        zeros of its own dtype.

    Returns:
      The new parameters. The sum is rounded once, from at least float32.

    Raises:
      ValueError: if a leaf is missing, left over or of another shape.
      TypeError: if a leaf is no floating-point or complex array, or an update is complex for a real parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> print(gx.apply_updates({"w": jnp.ones(2)}, {"w": jnp.array([0.5, -0.5])}))
      {'w': Array([1.5, 0.5], dtype=float32)}
    """
    check_order("apply_updates(params, updates)", params=params, updates=updates)
    given, structure = jax.tree.flatten(params)
    changes = like_params(updates, params, structure)
    leaves = Leaves.of(updates, params, [_adds_nothing(*pair) for pair in zip(given, changes, strict=True)])
    return leaves.result("params", [None if leaf.update is None else leaf.moved() for leaf in leaves.leaves])


def _adds_nothing(param: Any, update: Any) -> bool:
    """Whether `update` is what a frozen leaf that is no floating-point array gets: zeros of its own dtype, or None."""
    dtype, own = trees.aval(update)[1], trees.aval(param)[1]
    return not trees.trainable(own) and (update is None or (dtype is not None and dtype in (own, jax.dtypes.float0)))


def step(tx: optax.GradientTransformation, grads: Any, state: Any, params: Any, **extra_args: Any) -> tuple[Any, Any]:
    """θ, s ← θ + u, s′ where u, s′ = tx.update(g, s, θ): a whole training step after the gradient.

    The same as ``update`` and then `apply_updates`, except that parameters below float32 are rounded once, after the
    sum. It is faster where ``tx`` can add while it computes: `accumulate` touches no parameter between its steps, and
    `quantize_state` needs no array for the update.

    Compile it in a function that takes ``params, state`` and returns them in this order, with
    ``jax.jit(…, donate_argnums=…)``: JAX gives donated buffers to results first come, first served, so another order
    costs a copy of everything.

    Args:
      tx: Any transformation, ours or another ``(init, update)`` pair.
      grads: The gradient, a tree like ``params``.
      state: What ``tx.init`` or the last `step` returned.
      params: A tree of floating-point or complex arrays.
      **extra_args: What ``update`` takes besides, such as ``value=loss``.

    Returns:
      The new parameters, in their own dtypes, and the new state.

    Raises:
      TypeError, ValueError: what ``update`` and `apply_updates` raise.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.adamw(0.1)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def train(params, state, x):
      ...     return gx.step(tx, jax.grad(lambda p: jnp.sum((p - x) ** 2))(params), state, params)
      >>> params = jnp.zeros(2)
      >>> params, state = train(params, tx.init(params), jnp.array([1.0, -2.0]))
      >>> print(params)
      [ 0.1 -0.1]
    """
    if params is None:
        raise ValueError("step needs the parameters: call step(tx, grads, state, params)")
    check_order("step(tx, grads, state, params)", grads=grads, params=params)
    new_params, new_state, _ = body_of("tx of step", tx).step(grads, state, params, Call(extra_args, wants="params"))
    return new_params, new_state
