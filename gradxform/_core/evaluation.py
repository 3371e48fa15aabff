"""Which parameters to evaluate, where they are not those that are trained."""

from __future__ import annotations

import importlib
from typing import Any

import optax

from gradxform._core.body import body_of
from gradxform._core.explain import check_order


def eval_params(tx: Any, state: Any = None, params: Any = None) -> Any:
    """The parameters to evaluate: averages for optimizers that keep them, such as `schedule_free`, else θ itself.

    It looks through `chain`, `by_path` and every wrapper of this library. Evaluate, export and save for use what it
    returns; train on with ``params``.

    Args:
      tx: The transformation. Or a Flax ``TrainState``, alone; or an ``nnx.Optimizer``, followed by its model.
      state: Its state.
      params: The parameters that are trained.

    Returns:
      A tree like the parameters, in their dtypes. For an ``nnx.Optimizer`` what ``nnx.update`` takes:
      ``nnx.update(copy, gx.eval_params(optimizer, model))`` puts them into a copy of the model.

    Raises:
      TypeError, ValueError: if an argument is missing, or the state is another transformation's.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.sgd(0.1)
      >>> params = {"w": jnp.ones(2)}
      >>> print(gx.eval_params(tx, tx.init(params), params))
      {'w': Array([1., 1.], dtype=float32)}
    """
    if not isinstance(tx, optax.GradientTransformation) and hasattr(tx, "opt_state"):
        return _of_flax(tx, state)
    if params is None:
        raise TypeError("eval_params(tx, state, params) needs all three; a Flax TrainState goes alone")
    check_order("eval_params(tx, state, params)", params=params)
    return body_of("tx of eval_params", tx).view(state, params)


def _of_flax(holder: Any, model: Any) -> Any:
    """The same for a Flax ``TrainState`` or ``nnx.Optimizer``, which hold the transformation and its state."""
    if not hasattr(holder, "wrt"):
        return eval_params(holder.tx, holder.opt_state, holder.params)
    if model is None:
        raise TypeError("eval_params(optimizer, model) needs the model: an nnx.Optimizer does not hold it")
    nnx = importlib.import_module("flax.nnx")
    params = nnx.as_pure(nnx.state(model, holder.wrt))
    return eval_params(holder.tx, nnx.as_pure(holder.opt_state), params)
