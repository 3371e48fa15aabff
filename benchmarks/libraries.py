"""Who takes part: the same optimizers with the same numbers, from each library, and how each takes a step."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import figures
import floor
import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import Advance
from workloads import PERIOD, Tree, flattened, thinned, unflattened

import gradxform as gx

Optimizer: TypeAlias = Any
"""An ``(init, update)`` pair."""

ADAMW = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
MAX_NORM = 0.1
"""Below the norm of every workload's gradients, so that the clip always acts."""


def update_and_apply(tx: Optimizer, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """A step as training loops write it."""
    updates, state = tx.update(grads, state, params)
    apply = gx.apply_updates if isinstance(tx, gx.Transformation) else optax.apply_updates
    return apply(params, updates), state


def in_step(tx: Optimizer, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Update and apply in one."""
    return gx.step(tx, grads, state, params)


def with_value(tx: Optimizer, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """The same for optimizers that read the loss, which is 1 here."""
    updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
    apply = gx.apply_updates if isinstance(tx, gx.Transformation) else optax.apply_updates
    return apply(params, updates), state


def each_once(optimizers: list[Optimizer], grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """The first update of each of several optimizers, from states of their own."""
    return [tx.update(grads, tx.init(params), params) for tx in optimizers], state


def update_only(tx: Optimizer, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """The updates in the place of the parameters."""
    return tx.update(grads, state, params)


def state_only(tx: Optimizer, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """No step; the first number that the state shows of the gradients is added to a leaf, so that it counts."""
    _, state = tx.update(grads, state, params)
    leaf = min(params)
    return {**params, leaf: params[leaf] + jax.tree.leaves(state)[0]}, state


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer of a JAX library, and how it takes a step."""

    name: str
    """The library's, then what is special."""
    make: Callable[[], Optimizer]
    advance: Advance = update_and_apply
    flat: bool = False
    """All parameters as one array."""
    calls: int = 1
    """Steps that are not alike, and timed together."""
    dtype: str | None = None
    """Of parameters and gradients, if not float32."""
    within: float | None = None
    """How far parameters may be off, of the way gone, where this one computes with fewer digits than the others."""
    parts: tuple[str, ...] = ()
    """The contenders that this one is put together from."""

    @property
    def library(self) -> str:
        """The module whose caches count."""
        return self.name.partition(",")[0].partition(" ")[0]

    @property
    def ours(self) -> bool:
        """Whether it is this library."""
        return self.library == gx.__name__

    @property
    def form(self) -> tuple[bool, str | None]:
        """What `layout` depends on."""
        return self.flat, self.dtype

    def layout(self, tree: Tree) -> Tree:
        """The tree as this contender stores it."""
        tree = {"all": flattened(tree)} if self.flat else tree
        return {name: leaf.astype(jnp.dtype(self.dtype)) for name, leaf in tree.items()} if self.dtype else tree

    def prepared(self, params: Tree, grads: Tree) -> tuple[Any, Any]:
        """The step of a new optimizer, to be compiled, and shapes of what it takes."""
        tx = self.make()
        return figures.donated(tx, self.advance), figures.shapes_of(tx, self.layout(params), self.layout(grads))

    def forget(self) -> None:
        """Empty JAX's caches and the library's own."""
        jax.clear_caches()
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == self.library:
                for value in vars(module).values():
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()


class Run(Protocol):
    """A training step at work on its own parameters and moments."""

    name: str
    calls: int
    within: float | None

    def __call__(self, steps: int = 1) -> None:
        """Take so many steps, and wait for the last."""
        ...

    def result(self) -> dict[str, Tree]:
        """Where `params` and, as far as they are kept as trees of float32, `mu` and `nu` are now, `thinned`."""
        ...


Outsider: TypeAlias = Callable[[Tree, Tree], Run]
"""What takes part beside JAX, as a function of (params, grads)."""


class JaxRun:
    """A compiled step of a JAX library."""

    def __init__(self, contender: Contender, compiled: Any, like: Any, params: Tree, grads: Any) -> None:
        self.name, self.calls, self.within = contender.name, contender.calls, contender.within
        self._flat, self._compiled, self._start, self._grads = contender.flat, compiled, params, grads
        self._params = jax.tree.map(jnp.array, contender.layout(params))
        # the state's type is made anew when caches are emptied; the program wants the one it was traced with
        # and some states of optax begin with one array twice, which cannot be donated
        leaves = [jnp.array(leaf) for leaf in jax.tree.leaves(contender.make().init(self._params))]
        self._state = jax.tree.unflatten(jax.tree.structure(like), leaves)

    def __call__(self, steps: int = 1) -> None:
        """Take so many steps, and wait for the last."""
        for _ in range(steps):
            self._params, self._state = self._compiled(self._params, self._state, self._grads)
        jax.block_until_ready((self._params, self._state))

    def result(self) -> dict[str, Tree]:
        """Where `params`, `mu` and `nu` are now."""
        trees = {"params": self._params, **{name: self._moment(name) for name in ("mu", "nu")}}
        return {name: self._seen(tree) for name, tree in trees.items() if tree is not None}

    def _seen(self, tree: Any) -> Tree:
        tree = unflattened(np.asarray(tree["all"]), self._start) if self._flat else tree
        # what is small is cut by NumPy, which compiles nothing
        near = {name: leaf if leaf.size > PERIOD else np.asarray(leaf) for name, leaf in tree.items()}
        return {name: np.asarray(thinned(leaf)).astype(np.float32) for name, leaf in near.items()}

    def _moment(self, name: str) -> Any:
        found = [value for _, value in optax.tree_utils.tree_get_all_with_path(self._state, name)]
        forms = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (self._params, *found)]
        return found[0] if len(found) == 1 and forms[0] == forms[1] else None


class TorchRun:
    """A step of torch's own clip and AdamW, which write in place, on the device that JAX uses."""

    calls = 1
    # its float32 norm of 64 M elements is off by 6e-3
    within = 5e-3

    def __init__(self, name: str, options: dict[str, bool], clips: bool, params: Tree, grads: Tree) -> None:
        import torch

        self.name, self._clips = name, clips
        self._wait = (lambda: None) if jax.default_backend() == "cpu" else torch.cuda.synchronize
        on = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self._params = {key: torch.nn.Parameter(torch.tensor(value, device=on)) for key, value in params.items()}
        for key, param in self._params.items():
            param.grad = torch.tensor(grads[key], device=on)
        every = list(self._params.values())
        numbers = {"lr": ADAMW["learning_rate"], "betas": (ADAMW["b1"], ADAMW["b2"])}
        rest = {name: ADAMW[name] for name in ("eps", "weight_decay")}
        self._optimizer = torch.optim.AdamW(every, **numbers, **rest, **options)
        # the clip has no fused variant; foreach is its fastest
        foreach = options.get("foreach", True)
        self._clip = functools.partial(torch.nn.utils.clip_grad_norm_, every, MAX_NORM, foreach=foreach)

    def __call__(self, steps: int = 1) -> None:
        """Take so many steps, and wait for the last; on a CPU each is done on return."""
        for _ in range(steps):
            if self._clips:
                self._clip()
            self._optimizer.step()
        self._wait()

    def result(self) -> dict[str, Tree]:
        """Where `params`, `mu` and `nu` are now."""
        state = {key: self._optimizer.state[param] for key, param in self._params.items()}
        trees = {
            "params": self._params,
            "mu": {key: value["exp_avg"] for key, value in state.items()},
            "nu": {key: value["exp_avg_sq"] for key, value in state.items()},
        }
        return {
            name: {key: thinned(value.detach()).cpu().numpy() for key, value in tree.items()}
            for name, tree in trees.items()
        }


class TorchSoapRun(TorchRun):
    """Steps of the SOAP of pytorch_optimizer, which renews its bases in every tenth."""

    calls = 10

    def __init__(self, numbers: dict[str, Any], params: Tree, grads: Tree) -> None:
        import pytorch_optimizer  # pyright: ignore[reportMissingImports] (it is installed with torch, or not at all)

        super().__init__("pytorch_optimizer", {}, False, params, grads)
        every = list(self._params.values())
        self._optimizer = pytorch_optimizer.SOAP(every, **numbers, weight_decay=0.0)

    def result(self) -> dict[str, Tree]:
        """Where `params` are now."""
        return {"params": {key: thinned(value.detach()).cpu().numpy() for key, value in self._params.items()}}


def has_soap() -> bool:
    """Whether pytorch_optimizer is installed, beside torch."""
    return has_torch() and importlib.util.find_spec("pytorch_optimizer") is not None


def free() -> None:
    """Give back what nobody holds any more; torch and JAX share the memory of a device."""
    gc.collect()
    if has_torch() and jax.default_backend() != "cpu":
        import torch

        torch.cuda.empty_cache()


@functools.cache
def has_torch() -> bool:
    """Whether torch is installed, and can use the device that JAX runs on. Not imported where that is no question."""
    if importlib.util.find_spec("torch") is None:
        return False
    if jax.default_backend() == "cpu":
        return True
    import torch

    return jax.default_backend() == "gpu" and torch.cuda.is_available()


def outsiders(clips: bool = False) -> tuple[Outsider, ...]:
    """The ways in which torch runs AdamW; and without a clip, on a CPU, the floor."""
    variants = {
        "torch fused": {"fused": True},
        "torch foreach": {"foreach": True},
        "torch for-loop": {"foreach": False},
    }
    torches = [functools.partial(TorchRun, name, options, clips) for name, options in variants.items()]
    floors = [functools.partial(floor.FloorRun, ADAMW)]
    has_floor = not clips and jax.default_backend() == "cpu" and floor.compiled() is not None
    return (*(torches if has_torch() else ()), *(floors if has_floor else ()))


def optax_clipped() -> Optimizer:
    """clip + AdamW of optax."""
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(**ADAMW))


def our_clipped() -> Optimizer:
    """clip + AdamW of this library."""
    return gx.chain(gx.clip_by_global_norm(MAX_NORM), gx.adamw(**ADAMW))


def optax_norm() -> Optimizer:
    """The global norm of optax, in the state."""
    return optax.GradientTransformation(
        lambda params: jnp.zeros(()), lambda updates, state, params=None: (updates, optax.global_norm(updates))
    )


OPTAX_ADAMW = Contender("optax", lambda: optax.adamw(**ADAMW))
OUR_ADAMW = Contender("gradxform", lambda: gx.adamw(**ADAMW))
OPTAX_CLIPPED = Contender("optax", optax_clipped)
OUR_CLIPPED = Contender("gradxform", our_clipped)
