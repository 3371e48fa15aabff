"""Optimizers of torch on NumPy arrays, stepped as ours are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")


class Deferred:
    """A module of optimizers, without the parameters that torch wants first."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda **options: lambda params: getattr(self.module, name)(params, **options)


def parameter(value: np.ndarray, gradient: np.ndarray) -> Any:
    param = torch.nn.Parameter(torch.from_numpy(value.copy()))
    param.grad = torch.from_numpy(gradient.copy())
    return param


def walk_in_torch(optimizer: Callable[..., Any], params: Any, gradients: Any) -> Any:
    """The parameters after each step of a torch optimizer, stacked: an array, or a tree of arrays."""
    leaves, structure = jax.tree.flatten(params)
    stacked = structure.flatten_up_to(gradients)
    mine = [parameter(leaf, gradient[0]) for leaf, gradient in zip(leaves, stacked, strict=True)]
    stepper, path = optimizer(mine), []
    for step in range(len(stacked[0])):
        for param, gradient in zip(mine, stacked, strict=True):
            param.grad = torch.from_numpy(gradient[step].copy())
        stepper.step()
        path.append([param.detach().numpy().copy() for param in mine])
    return structure.unflatten([np.stack(of_one) for of_one in zip(*path, strict=True)])
