"""Arrays that are kept as others: moments as codes, parameters with what they lack. A step decodes them in its kernels.

An encoded array is a leaf of JAX's trees. It stands in a state or among parameters where the array would, and goes
through transformations untouched, until a rule's compiled call takes it apart. So a pair of wrappers costs no more
memory than the dearer one.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gradxform._core.meshes import partitioned
from gradxform._core.rule import Array, Rule
from gradxform.numerics import arithmetic as numerics


class Encoded(abc.ABC):
    """An array that is kept as others."""

    @abc.abstractmethod
    def arrays(self) -> Any:
        """What it is kept as."""

    @abc.abstractmethod
    def renewed(self, arrays: Any) -> Encoded:
        """The same kept as other arrays of these shapes."""


class EncodedMoment(Encoded):
    """A moment of one leaf that is kept as codes."""

    @staticmethod
    @abc.abstractmethod
    def on_leaf(rules: tuple[Rule, ...]) -> Callable[..., tuple[Any, tuple[Any, ...]]]:
        """`compiled.on_leaf` for a leaf some of whose moments are encoded like this one."""


class Form(abc.ABC):
    """How a float32 value is kept as a narrower parameter and what that lacks: mathematics on one array; hashable."""

    @abc.abstractmethod
    def read(self, arrays: Any) -> Array:
        """The value, in float32."""

    @abc.abstractmethod
    def write(self, value: Array, update: Array, arrays: Any, accepted: Any) -> Any:
        """What the value plus an update is kept as; as it is where `accepted`, None or a 0-d boolean, is False."""


_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedParam(Encoded):
    """A parameter that stands for a float32 value; a step gives it back with the new value, whatever is wanted."""

    form: Form
    kept: Any
    """What it is kept as; the first array is the parameter itself."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any] = _FLOAT32

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """What `trees.avals` asks every leaf for."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def arrays(self) -> Any:
        return self.kept

    def renewed(self, arrays: Any) -> EncodedParam:
        return dataclasses.replace(self, kept=arrays)

    def decoded(self) -> Array:
        """The value, as an array."""
        return _read(self.form, self.kept)

    def moved(self, update: Any, accepted: Any) -> EncodedParam:
        """The parameter after an update."""
        return self.renewed(_write(self.form, self.kept, update, accepted))


@functools.partial(jax.jit, static_argnums=0)
def _read(form: Form, arrays: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return partitioned(form.read, jax.tree.leaves(arrays)[0], arrays)


@functools.partial(jax.jit, static_argnums=0)
def _write(form: Form, arrays: Any, update: Any, accepted: Any) -> Any:
    def written(arrays: Any, update: Any, accepted: Any) -> Any:
        return form.write(form.read(arrays), numerics.cast(update, np.float32), arrays, accepted)

    with jax.numpy_dtype_promotion("standard"):
        return partitioned(written, arrays, arrays, update, accepted)


def decoded(leaf: Any) -> Any:
    """A leaf as an array."""
    return leaf.decoded() if isinstance(leaf, EncodedParam) else leaf


def _without(leaf: Encoded, arrays: Any) -> Encoded:
    """An encoded leaf with nothing in place of its arrays."""
    return leaf.renewed(jax.tree.map(lambda array: (), arrays))


def cond(condition: Any, on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """`jax.lax.cond` of functions whose results hold encoded leaves at the same places."""
    held: list[Any] = []

    def as_arrays(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            leaves, structure = jax.tree.flatten(function())
            arrays = [leaf.arrays() if isinstance(leaf, Encoded) else leaf for leaf in leaves]
            pairs = zip(leaves, arrays, strict=True)  # those of the branch must not leave it, not even to be replaced
            held[:] = [[_without(leaf, own) if isinstance(leaf, Encoded) else None for leaf, own in pairs], structure]
            return arrays

        return run

    given = jax.lax.cond(condition, as_arrays(on_true), as_arrays(on_false))
    leaves, structure = held
    pairs = zip(leaves, given, strict=True)
    return structure.unflatten([leaf.renewed(new) if isinstance(leaf, Encoded) else new for leaf, new in pairs])
