"""Arrays in another form: moments as codes, parameters with what rounding took. A step decodes them in its kernels.

An encoded array is a leaf of JAX's trees. It stands in a state or among parameters where the array would, and goes
through transformations untouched, until a rule's compiled call takes it apart. So a pair of wrappers costs no more
memory than the one of them that needs more.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gradxform._core import trees
from gradxform._core.meshes import partitioned
from gradxform._core.rule import Array, Rule
from gradxform.numerics import arithmetic as numerics


class Encoded(abc.ABC):
    """An array that is kept as other arrays."""

    @abc.abstractmethod
    def arrays(self) -> Any:
        """The arrays that it is kept as."""

    @abc.abstractmethod
    def renewed(self, arrays: Any) -> Encoded:
        """The same, kept as new arrays of the same shapes."""

    @abc.abstractmethod
    def emptied(self) -> Encoded:
        """The same without its arrays, to be renewed."""


class EncodedMoment(Encoded):
    """A moment of one leaf that is kept as codes."""

    @abc.abstractmethod
    def decoded(self, aval: trees.Aval) -> Array:
        """The moment, of this shape and dtype."""

    @staticmethod
    @abc.abstractmethod
    def on_leaf(rules: tuple[Rule, ...]) -> Callable[..., tuple[Any, tuple[Any, ...]]]:
        """`compiled.on_leaf` for a leaf with moments that are encoded like this one."""


class Form(abc.ABC):
    """A way to keep a float32 value as a narrower parameter and what that lacks: mathematics on one array; hashable."""

    @abc.abstractmethod
    def read(self, arrays: Any) -> Array:
        """The value, in float32."""

    @abc.abstractmethod
    def write(self, value: Array, update: Array, arrays: Any, accepted: Any) -> Any:
        """The arrays that value + update is kept as; unchanged where `accepted`, None or a 0-d boolean, is False."""


_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedParam(Encoded):
    """A parameter for a float32 value; a step returns it with the new value, also where updates are wanted."""

    form: Form
    kept: Any
    """The arrays that it is kept as; the first is the parameter itself."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any] = _FLOAT32

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype, which `trees.avals` asks of every leaf."""
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

    def emptied(self) -> EncodedParam:
        return self.renewed(None)

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


def arrays_of(param: Any) -> Any:
    """A parameter as compiled calls take it."""
    return param.arrays() if isinstance(param, EncodedParam) else param


def decoded(leaf: Any) -> Any:
    """A leaf as an array."""
    return leaf.decoded() if isinstance(leaf, EncodedParam) else leaf


def cond(condition: Any, on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """`jax.lax.cond` of functions whose results hold encoded leaves at the same places."""
    held: list[Any] = []  # the structure, and what is encoded without its arrays, which belong to the branch

    def as_arrays(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            leaves, structure = jax.tree.flatten(function())
            held[:] = [[leaf.emptied() if isinstance(leaf, Encoded) else None for leaf in leaves], structure]
            return [leaf.arrays() if isinstance(leaf, Encoded) else leaf for leaf in leaves]

        return run

    given = jax.lax.cond(condition, as_arrays(on_true), as_arrays(on_false))
    emptied, structure = held
    pairs = zip(emptied, given, strict=True)
    return structure.unflatten([new if leaf is None else leaf.renewed(new) for leaf, new in pairs])
