"""Why an argument may not fit, told from what was passed: sentences for messages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import optax

OTHER_PARAMETERS = (
    "updates and state belong to different parameters: pass the gradient of those that init got, or call init(params) "
    "for these"
)
"""Of a state that differs in structure from the updates: which of the two is wrong cannot be known."""


def is_state(tree: Any) -> bool:
    """Whether a tree is the state of an optimizer, ours or optax's."""
    if type(tree) is tuple:
        return any(map(is_state, tree))
    return _is_named(tree) and _library(tree) in ("gradxform", "optax") and type(tree).__name__.endswith("State")


def check_order(call: str, **trees: Any) -> None:
    """Raise if an optimizer's state stands where updates or parameters belong.

    Args:
      call: How the call is written, such as ``update(updates, state, params)``.
      **trees: The trees of arrays in it, by their names.
    """
    for name, tree in trees.items():
        if is_state(tree):
            raise TypeError(f"{name} is an optimizer's state, {_what(tree)}: swapped? The call is {call}")


def wrong_state(who: str, state: Any, expected: str, fields: Sequence[str]) -> str:
    """Why `state` is not one of `who`, whose states are `expected`, and what to do."""
    return f"state is {_what(state)}, {who}'s is {expected}; {_remedy(state, fields)}"


def _remedy(state: Any, fields: Sequence[str]) -> str:
    restored = isinstance(state, list) and len(state) == len(fields)
    if restored or (isinstance(state, Mapping) and set(fields) & set(state)):
        return (
            "it seems restored from a checkpoint without a target: restore it into jax.eval_shape(tx.init, params), "
            "which has its structure"
        )
    if theirs := _optax_names(state):
        return f"it is optax's ({', '.join(theirs[:3])}), which has no place here: make one anew with tx.init(params)"
    if state is None or _is_named(state) or (type(state) is tuple and not state):
        return "pass what its own init or update returned"
    return "it looks like parameters or gradients: swapped, or left out? The call is update(updates, state, params)"


def no_transformation(name: str, value: Any) -> str:
    """Why `value` is no transformation, and what to do; `name` is what messages call it."""
    hint = ""
    if isinstance(value, list | tuple) and any(isinstance(part, optax.GradientTransformation) for part in value):
        hint = "; unpack it with *, as in chain(*transformations)"
    elif callable(value):
        hint = f"; call it first: {getattr(value, '__name__', 'it')}(…)"
    shown = repr(value)
    return (
        f"{name} must be a transformation, an (init, update) pair, got "
        f"{shown if len(shown) <= 200 else f'{shown[:200]}…'}{hint}"
    )


def pair_of(value: Any) -> optax.GradientTransformation | None:
    """The ``(init, update)`` pair of an object with both as methods, such as `optax.MultiSteps`; None for any other."""
    pair: list[Any] = [getattr(value, "init", None), getattr(value, "update", None)]
    if isinstance(value, type) or not all(map(callable, pair)):
        return None
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(pair[1]).parameters.values())
    made = optax.GradientTransformationExtraArgs if takes_more else optax.GradientTransformation
    return made(*pair)


def _what(tree: Any) -> str:
    return f"{type(tree).__name__}{getattr(tree, '_fields', '')}"


def _is_named(tree: Any) -> bool:
    return isinstance(tree, tuple) and hasattr(tree, "_fields")


def _library(tree: Any) -> str:
    return type(tree).__module__.partition(".")[0]


def _optax_names(state: Any) -> list[str]:
    """The names of optax's states in a state; `EmptyState` only if there is no other."""
    if type(state) in (tuple, list):
        names = list(dict.fromkeys(name for part in state for name in _optax_names(part)))
        return [name for name in names if name != "EmptyState"] or names
    return [type(state).__name__] if is_state(state) and _library(state) == "optax" else []
