"""Who takes part: the same AdamW with the same numbers, from each library."""

from __future__ import annotations

import dataclasses
import functools
import sys
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from workloads import Tree

import gradxform

LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2
MAX_NORM = 0.1
"""Below the norm of every workload's gradients, so that the clip always acts."""

OPTIMIZERS = {"AdamW": False, "clip + AdamW": True}
"""Each optimizer, and whether it clips by the global norm first."""


class Run(Protocol):
    """A training step at work on its own parameters and moments."""

    name: str

    def __call__(self) -> None:
        """Take one step and wait for it."""
        ...

    def result(self) -> dict[str, Tree]:
        """Where `params`, `mu` and `nu` are now."""
        ...


@dataclasses.dataclass(frozen=True)
class JaxLibrary:
    """A library of ``(init, update)`` pairs."""

    module: ModuleType

    @property
    def name(self) -> str:
        """The name of the module."""
        return self.module.__name__

    def optimizer(self, clips: bool) -> optax.GradientTransformationExtraArgs:
        """A new AdamW, behind a clip if `clips`."""
        adamw = self.module.adamw(LEARNING_RATE, b1=B1, b2=B2, eps=EPS, weight_decay=WEIGHT_DECAY)
        return self.module.chain(self.module.clip_by_global_norm(MAX_NORM), adamw) if clips else adamw

    def step(self, tx: optax.GradientTransformationExtraArgs) -> Any:
        """A new compiled function (params, state, grads) → (params, state), which writes over params and state."""

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return self.module.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1))

    def forget(self) -> None:
        """Empty JAX's caches and the library's own."""
        jax.clear_caches()
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == self.name:
                for value in vars(module).values():
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()


OPTAX, GRADXFORM = JaxLibrary(optax), JaxLibrary(gradxform)
JAX_LIBRARIES = (OPTAX, GRADXFORM)


class JaxRun:
    """A compiled step of a JAX library."""

    def __init__(self, library: JaxLibrary, clips: bool, compiled: Any, params: Tree, grads: Tree) -> None:
        self.name, self._compiled = library.name, compiled
        self._params, self._grads = jax.tree.map(jnp.array, (params, grads))
        self._state = library.optimizer(clips).init(self._params)

    def __call__(self) -> None:
        """Take one step and wait for it."""
        self._params, self._state = self._compiled(self._params, self._state, self._grads)
        jax.block_until_ready((self._params, self._state))

    def result(self) -> dict[str, Tree]:
        """Where `params`, `mu` and `nu` are now."""
        moments = {name: optax.tree_utils.tree_get(self._state, name) for name in ("mu", "nu")}
        return jax.tree.map(np.asarray, {"params": self._params, **moments})


class TorchRun:
    """A step of torch's own clip and AdamW, which write in place."""

    def __init__(self, name: str, options: dict[str, bool], clips: bool, params: Tree, grads: Tree) -> None:
        import torch

        self.name, self._clips = name, clips
        self._params = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in params.items()}
        for key, param in self._params.items():
            param.grad = torch.tensor(grads[key])
        every = list(self._params.values())
        numbers = {"lr": LEARNING_RATE, "betas": (B1, B2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
        self._optimizer = torch.optim.AdamW(every, **numbers, **options)
        # the clip has no fused variant; foreach is its fastest
        foreach = options.get("foreach", True)
        self._clip = functools.partial(torch.nn.utils.clip_grad_norm_, every, MAX_NORM, foreach=foreach)

    def __call__(self) -> None:
        """Take one step; on a CPU it is done on return."""
        if self._clips:
            self._clip()
        self._optimizer.step()

    def result(self) -> dict[str, Tree]:
        """Where `params`, `mu` and `nu` are now."""
        state = {key: self._optimizer.state[param] for key, param in self._params.items()}
        return {
            "params": {key: param.detach().numpy() for key, param in self._params.items()},
            "mu": {key: value["exp_avg"].numpy() for key, value in state.items()},
            "nu": {key: value["exp_avg_sq"].numpy() for key, value in state.items()},
        }


def torch_variants() -> dict[str, dict[str, bool]]:
    """The ways in which torch runs AdamW; none where it is not installed, or JAX does not run on the CPU beside it."""
    try:
        import torch  # noqa: F401 (only whether it is there)
    except ImportError:
        return {}
    if jax.default_backend() != "cpu":
        return {}
    return {
        "torch fused": {"fused": True},
        "torch foreach": {"foreach": True},
        "torch for-loop": {"foreach": False},
    }
