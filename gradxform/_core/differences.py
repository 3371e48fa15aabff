"""Where two trees first differ, in one line however large they are."""

from __future__ import annotations

from typing import Any

import jax


def difference(name: str, tree: Any, other_name: str, other: Any, *, prefix: bool = False) -> str | None:
    """How `tree` first differs from `other`: ``mask['b'] is missing, params['b'] is there``; None if it doesn't.

    Args:
      name, other_name: What messages call the two.
      tree, other: The trees; the values of their leaves do not count.
      prefix: Whether a leaf of `tree` may stand for a whole part of `other`.
    """
    leaf, other_leaf = _is_leaf(tree), _is_leaf(other)
    if leaf and (prefix or other_leaf):
        return None
    if leaf or other_leaf or type(tree) is not type(other):
        return f"{name} is {_what(tree)}, {other_name} is {_what(other)}"
    parts, others = _parts(tree), _parts(other)
    if missing := [key for key in others if key not in parts]:
        return f"{name}{missing[0]} is missing, {other_name}{missing[0]} is there"
    if extra := [key for key in parts if key not in others]:
        return f"{name}{extra[0]} has no counterpart in {other_name}"
    within = (difference(name + key, parts[key], other_name + key, others[key], prefix=prefix) for key in parts)
    if found := next(filter(None, within), None):
        return found
    alike = prefix or jax.tree.structure(tree) == jax.tree.structure(other)
    return None if alike else f"{name} and {other_name} differ in what a {type(tree).__name__} holds besides its leaves"


def _is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])


def _parts(tree: Any) -> dict[str, Any]:
    """The children of a node, by the way Python reaches them, such as ``['kernel']``."""
    parts, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    return {jax.tree_util.keystr(keys): part for keys, part in parts}


def _what(tree: Any) -> str:
    if tree is None or isinstance(tree, bool):
        return str(tree)
    return "a leaf" if _is_leaf(tree) else f"a {type(tree).__name__}"
