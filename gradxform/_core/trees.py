"""Trees of arrays: flattening, leaf names, and the checks that name the argument and the leaf."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform._core.compat import Tracer, canonical_dtype
from gradxform._core.differences import difference

_BOX = jax.tree_util.GetAttrKey("value")

ANEW = "call init(params) again"
"""What an error says to do about a state that does not fit."""

Path = tuple[Any, ...]
Aval = tuple[tuple[int, ...], np.dtype[Any] | None]


_REAL_PART = "take the real part of the gradient first"


def concrete(value: Any) -> bool:
    """Whether `value` has its numbers already, and is no tracer."""
    return not isinstance(value, Tracer)


def unless(accepted: Any, old: Any, new: Any) -> Any:
    """`new` where a step is `accepted`, else `old`; None stands for accepted."""
    return new if accepted is None else jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)


def aval(leaf: Any) -> Aval:
    """Shape and dtype of a leaf as JAX will see it; dtype None if it is no array or number."""
    known: Any = getattr(leaf, "aval", None)  # of arrays, tracers and what is kept encoded
    if known is not None:
        return known.shape, known.dtype
    if isinstance(leaf, float | complex | int) and not isinstance(leaf, bool):
        return (), np.dtype(jnp.result_type(leaf))
    if isinstance(leaf, np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return leaf.shape, canonical_dtype(leaf.dtype)
    return (), None


def rests(leaf: Any) -> bool:
    """Whether a leaf of the parameters is a function, as in whole Equinox models, and so is not trained."""
    return callable(leaf) and aval(leaf)[1] is None


def avals(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """`aval` of each leaf, None for None; a leaf that is no array has its type and value in place of a shape."""
    return tuple(
        [
            (known.shape, known.dtype) if (known := getattr(leaf, "aval", None)) is not None else _aval_or_text(leaf)
            for leaf in leaves
        ]
    )


def _aval_or_text(leaf: Any) -> Any:
    if leaf is None:
        return None
    shape, dtype = aval(leaf)
    return (describe(leaf) if dtype is None else shape), dtype


def dtype_of(leaf: Any) -> np.dtype[Any]:
    """The dtype of a leaf that is known to be an array or a number."""
    dtype = aval(leaf)[1]
    assert dtype is not None
    return dtype


@functools.lru_cache(maxsize=256)
def compute_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the arithmetic: the widest of the leaves' dtypes and float32."""
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


@functools.lru_cache(maxsize=64)
def trainable(dtype: np.dtype[Any] | None) -> bool:
    """Whether an array of this dtype can be a parameter: floating-point or complex."""
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


@functools.lru_cache(maxsize=64)
def is_complex(dtype: np.dtype[Any] | None) -> bool:
    """Whether an array of this dtype has an imaginary part."""
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.complexfloating))


def check_trainable(argument: str, structure: Any, index: int, of: Any) -> None:
    """Raise unless a leaf is a floating-point or complex array; `of` is its `avals`."""
    text, dtype = of
    if trainable(dtype):
        return
    if dtype is None:
        remedy = "keep only arrays, e.g. eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param)"
    elif dtype == jax.dtypes.float0:
        remedy = "this is the gradient of an integer input; differentiate the floating-point leaves only"
    else:
        remedy = f"freeze it, e.g. with chain(freeze({paths(structure)[index]!r}), …), or keep it out of params"
    what = text if dtype is None else f"{dtype}{list(text)}"
    name = name_leaf(argument, structure, index)
    raise TypeError(f"{name} is {what}, and only floating-point or complex leaves are trained; {remedy}")


def check_same_structure(argument: str, structure: Any, other: str, other_structure: Any, remedy: str) -> None:
    """Raise unless both trees have the same leaves at the same places."""
    if structure == other_structure:
        return
    names, others = _names(structure), _names(other_structure)
    missing = next((name for name in others if name not in set(names)), None)
    extra = next((name for name in names if name not in set(others)), None)
    if missing is not None:
        what = f"{argument}{missing} is missing, {other}{missing} is there"
    elif extra is not None:
        what = f"{argument}{extra} has no counterpart in {other}"
    else:
        tree, other_tree = (each.unflatten(range(each.num_leaves)) for each in (structure, other_structure))
        what = difference(argument, tree, other, other_tree) or f"{argument} and {other} differ in structure"
    raise ValueError(f"{what}; {remedy}")


def check_update(
    argument: str,
    update: Aval,
    param: Aval,
    structure: Any,
    index: int,
    other: str = "params",
    remedy: str = _REAL_PART,
) -> None:
    """Raise unless an update has its parameter's shape, and is real where the parameter is."""
    (shape, dtype), (param_shape, param_dtype) = update, param
    if shape == param_shape and (dtype == param_dtype or not is_complex(dtype) or is_complex(param_dtype)):
        return
    name, param_name = name_leaf(argument, structure, index), name_leaf(other, structure, index)
    if shape != param_shape:
        raise ValueError(f"{name} has shape {shape}, {param_name} has {param_shape}; they must be the same")
    raise TypeError(f"{name} is {dtype}, {param_name} is {param_dtype}; {remedy}")


def check_scalar(argument: str, value: Any, family: Any) -> None:
    """Raise unless `value` is a 0-d array of a dtype of this family, such as `np.integer`."""
    shape, dtype = aval(value)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, family):
        raise ValueError(
            f"{argument} is {describe(value)}, it must be a scalar ({family.__name__}); "
            "a state of several runs goes through jax.vmap"
        )


def check_slot(argument: str, slot: Any, expected: Aval, structure: Any, index: int, check_dtype: bool) -> None:
    """Raise unless a moment has the shape and dtype that `init` gives it."""
    shape, dtype = aval(slot)
    same = dtype == expected[1] if check_dtype else is_complex(dtype) == is_complex(expected[1])
    if shape != expected[0] or not same:
        raise ValueError(
            f"{name_leaf(argument, structure, index)} is {describe(slot)}, for these parameters it is "
            f"{expected[1]}{list(expected[0])}; {ANEW}, or restore the state with its own dtypes"
        )


def name_leaf(argument: str, structure: Any, index: int) -> str:
    """How Python reaches the leaf: ``params['dense']['kernel']``."""
    return argument + _names(structure)[index]


@functools.lru_cache(maxsize=64)
def paths(structure: Any) -> tuple[str, ...]:
    """The leaves' paths as people write them: ``dense/kernel``, without the ``value`` of a box such as `nnx.Param`."""
    keys = _key_paths(structure)
    siblings = collections.Counter(path[:-1] for path in keys)
    boxed = [path[-1:] == (_BOX,) and siblings[path[:-1]] == 1 for path in keys]
    return tuple(
        jax.tree_util.keystr(path[:-1] if box else path, simple=True, separator="/")
        for path, box in zip(keys, boxed, strict=True)
    )


def describe(leaf: Any) -> str:
    """Shape and dtype for an array, else type and value."""
    shape, dtype = aval(leaf)
    return f"{type(leaf).__name__} {leaf!r:.60}" if dtype is None else f"{dtype}{list(shape)}"


def _names(structure: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path in _key_paths(structure)]


def _key_paths(structure: Any) -> list[Path]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(structure.unflatten(range(structure.num_leaves)))
    return [path for path, _ in leaves]
