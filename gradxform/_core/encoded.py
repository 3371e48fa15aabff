"""An array that the state keeps as others, such as codes and scales, and that a step decodes in its own kernels."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from gradxform._core.rule import Rule


class Encoded(abc.ABC):
    """What stands in a state where an array would: a leaf of JAX's trees, which the step on its leaf takes apart."""

    @staticmethod
    @abc.abstractmethod
    def on_leaf(rules: tuple[Rule, ...]) -> Callable[..., tuple[Any, tuple[Any, ...]]]:
        """`compiled.on_leaf` for a leaf some of whose moments are encoded like this one."""
