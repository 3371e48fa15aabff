"""One small rule for each door of `lift`, as a researcher writes it; each again in NumPy; and ways to take steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradxform as gx
from tests.support.trees import gradient

STEPS = 3
SHAPES = {"bias": (3,), "gain": (3,), "kernel": (4, 3), "temperature": ()}  # small leaves of one shape are one group


def only(tree: Any, *names: str) -> Any:
    """Some of the leaves of a dict."""
    return {name: tree[name] for name in names}


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {name: draw(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
GRADIENTS = {name: draw(seed, STEPS, *shape) for seed, (name, shape) in enumerate(SHAPES.items(), 10)}
LOSSES = jnp.array([1.5, 0.5, 2.0])


# totals, and memory that starts from a number, from the parameters, and as an array


def dog(decay: Any = 0.5, axis_name: Any = None) -> gx.Transformation:
    """u ← r/√s·(1 + tanh(p)/10)·m, with r the farthest from θ₀, s = s₀ + Σ‖u‖², p of the last step, p = ⟨u, m⟩."""
    return gx.lift(
        _dog_start,
        _dog_step,
        constructor=dog,
        totals=_dog_totals,
        gather=_dog_gather,
        memory={"farthest": 0.1, "squares": sum_of_magnitudes, "products": (0.0, 0.0)},
        reports=("farthest",),
        needs_params=True,
        axis_name=axis_name,
        decay=gx.fraction(decay),
    )


def sum_of_magnitudes(params: list[jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.abs(param)) for param in params), start=jnp.zeros(()))


def _dog_start(param):
    return {"start": gx.Slot(param, role="kept"), "mu": jnp.zeros_like(param)}


def _dog_totals(update, state, param, step):
    return {
        "away": gx.Norm(gx.numerics.norm(param - state["start"])),
        "size": gx.Norm(gx.numerics.norm(update)),
        "product": jnp.sum(update * state["mu"]),
    }


def _dog_gather(total, step):
    farthest, squares = jnp.maximum(step.farthest, total["away"]), step.squares + total["size"] ** 2
    products = jnp.stack([step.products[1], total["product"]])
    return {"farthest": farthest, "squares": squares, "products": products, "rate": farthest / jnp.sqrt(squares)}


def _dog_step(update, state, param, step):
    mu = step.keep("mu", step.decay * state["mu"] + (1 - step.decay) * update)
    return step.rate * (1 + jnp.tanh(step.products[0]) / 10) * mu, {"mu": mu, "start": state["start"]}


def dog_twin(params: Any, gradients: Any, rates: Any = 4.0, decay: float = 0.5) -> tuple[Any, dict[str, Any]]:
    """`chain(dog(decay), scale_by_learning_rate(rate))` in float64: the parameters, and what it remembers."""
    rates = rates if isinstance(rates, Mapping) else dict.fromkeys(params, rates)
    start = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    new, mu = dict(start), {name: np.zeros_like(leaf) for name, leaf in start.items()}
    farthest, squares, products = 0.1, sum(np.abs(leaf).sum() for leaf in start.values()), [0.0, 0.0]
    for step in range(len(next(iter(gradients.values())))):
        now = {name: np.asarray(gradients[name][step], np.float64) for name in new}
        farthest = max(farthest, np.sqrt(sum(np.square(new[name] - start[name]).sum() for name in new)))
        squares += sum(np.square(leaf).sum() for leaf in now.values())
        products = [products[1], sum((now[name] * mu[name]).sum() for name in new)]
        mu = {name: decay * mu[name] + (1 - decay) * now[name] for name in new}
        factor = farthest / np.sqrt(squares) * (1 + np.tanh(products[0]) / 10)
        new = {name: new[name] - rates[name] * factor * mu[name] for name in new}
    return new, {"farthest": farthest, "squares": squares, "products": products}


def trained_dog(rate: Any = 4.0, decay: Any = 0.5) -> gx.Transformation:
    return gx.chain(dog(decay), gx.scale_by_learning_rate(rate))


# gather alone: numbers of all leaves that need no leaf


def warming(power: Any = 0.5) -> gx.Transformation:
    """u ← Σ k⁻ᵖ·u, the sum over the steps so far, this one included."""
    return gx.lift(None, _warming_step, constructor=warming, gather=_warming_sum, memory={"sum": 0.0}, power=power)


def _warming_sum(measured, step):
    assert measured == {}
    return {"sum": step.sum + step.number**-step.power}


def _warming_step(update, state, param, step):
    return step.sum * update, state


def warming_twin(params: Any, gradients: Any) -> Any:
    sums = np.cumsum(np.arange(1, STEPS + 1) ** -0.5)
    return {n: leaf - 0.1 * np.tensordot(sums, np.asarray(gradients[n], np.float64), 1) for n, leaf in params.items()}


# extra arguments


def polyak() -> gx.Transformation:
    """u ← −f/‖u‖²·u"""
    return gx.lift(None, _polyak_step, constructor=polyak, totals=_square, gather=_polyak_length, extra=("value",))


def _square(update, state, param, step):
    return {"square": jnp.sum(jnp.square(update))}


def _polyak_length(total, step):
    return {"length": step.value / total["square"]}


def _polyak_step(update, state, param, step):
    return -step.length * update, state


def polyak_twin(params: Any, gradients: Any, losses: Any = LOSSES) -> Any:
    new = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    for step, loss in enumerate(np.asarray(losses, np.float64)):
        now = {name: np.asarray(leaf[step], np.float64) for name, leaf in gradients.items()}
        length = loss / sum(np.square(leaf).sum() for leaf in now.values())
        new = {name: new[name] - length * now[name] for name in new}
    return new


# random keys


def noisy(deviation: Any = 0.5, key: Any = 7, axis_name: Any = None) -> gx.Transformation:
    """u ← u + σ·z,  z ~ N(0, 1)"""
    return gx.lift(None, _noisy_step, constructor=noisy, key=key, axis_name=axis_name, deviation=deviation)


def _noisy_step(update, state, param, step):
    return update + step.deviation * jax.random.normal(step.key, update.shape, update.dtype), state


def noisy_twin(params: Any, gradients: Any) -> Any:
    """From JAX's own functions, which make the same numbers of the same seed."""
    seed = jax.random.bits(jax.random.fold_in(jax.random.key(7), np.uint32(0)), (2,), np.uint32)
    new = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    for step in range(STEPS):
        now = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
        for key, name in zip(jax.random.split(now, len(new)), sorted(new), strict=True):
            noise = jax.random.normal(key, np.shape(new[name]), np.float32)
            new[name] = new[name] - 0.1 * (np.asarray(gradients[name][step], np.float64) + 0.5 * np.asarray(noise))
    return new


# slots by shape


def factored() -> gx.Transformation:
    """u ← u/√v, with v of a matrix the outer product of its rows' and its columns' sums of squares."""
    return gx.lift(_factored_start, _factored_step, constructor=factored, slots=("rows", "columns", "nu"))


def _factored_start(param):
    if param.ndim != 2:
        return {"nu": jnp.zeros_like(param), "rows": None, "columns": None}
    return {
        "rows": gx.Slot(jnp.zeros(param.shape[0], param.dtype), axes=(0,), role="non_negative"),
        "columns": gx.Slot(jnp.zeros(param.shape[1], param.dtype), axes=(1,), role="non_negative"),
    }


def _factored_step(update, state, param, step):
    squares = jnp.square(update)
    if "nu" in state:
        nu = step.keep("nu", state["nu"] + squares)
        return update / jnp.sqrt(nu), {"nu": nu}
    rows, columns = state["rows"] + jnp.sum(squares, 1), state["columns"] + jnp.sum(squares, 0)
    outer = rows[:, None] * columns[None, :] / jnp.sum(rows)
    return update / jnp.sqrt(outer), {"rows": rows, "columns": columns}


def factored_twin(params: Any, gradients: Any) -> Any:
    new = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    for name in new:
        total = 0.0
        for now in np.asarray(gradients[name], np.float64):
            total = total + np.square(now)
            nu = total if now.ndim != 2 else np.outer(total.sum(1), total.sum(0)) / total.sum()
            new[name] = new[name] - 0.1 * now / np.sqrt(nu)
    return new


# a view


def averaged(decay: Any = 0.5) -> gx.Transformation:
    """a ← β·a + (1 − β)·(θ + u): evaluate a/(1 − βᵗ)."""
    return gx.lift(
        _averaged_start,
        _averaged_step,
        constructor=averaged,
        view=_averaged_view,
        last=True,
        needs_params=True,
        decay=gx.fraction(decay),
    )


def _averaged_start(param):
    return {"average": gx.Slot(jnp.zeros_like(param), role="kept")}


def _averaged_step(update, state, param, step):
    return update, {"average": step.decay * state["average"] + (1 - step.decay) * (param + update)}


def _averaged_view(state, param, step):
    weight = 1 - step.decay**step.number
    return jnp.where(weight > 0, state["average"] / jnp.where(weight > 0, weight, 1), param)


def average_of(walk: list[Any], decay: float = 0.5) -> Any:
    """The average of the parameters after each step, in float64."""
    weights = decay ** np.arange(len(walk))[::-1]

    def mean(*leaves: Any) -> np.ndarray:
        return np.tensordot(weights / weights.sum(), np.stack([np.asarray(x, np.float64) for x in leaves]), 1)

    return jax.tree.map(mean, *walk)


RULES: dict[str, tuple[gx.Transformation, Any]] = {
    "totals": (trained_dog(), lambda params, gradients: dog_twin(params, gradients)[0]),
    "gather alone": (gx.chain(warming(), gx.scale_by_learning_rate(0.1)), warming_twin),
    "extra": (polyak(), polyak_twin),
    "key": (gx.chain(noisy(), gx.scale_by_learning_rate(0.1)), noisy_twin),
    "slots": (gx.chain(factored(), gx.scale_by_learning_rate(0.1)), factored_twin),
    "view": (gx.chain(gx.scale(-0.1), averaged()), lambda params, gradients: sgd_twin(params, gradients)[-1]),
}
"""For each door a transformation, and its parameters after all steps in float64."""


def sgd_twin(params: Any, gradients: Any, rate: float = 0.1) -> list[Any]:
    """The parameters after each step."""
    sums = {name: np.cumsum(np.asarray(leaf, np.float64), 0) for name, leaf in gradients.items()}
    return [{name: leaf - rate * sums[name][step] for name, leaf in params.items()} for step in range(STEPS)]


# Ways to take all steps: each gives the parameters and the state after them


def by_hand(tx: Any, params: Any, gradients: Any, update: Any = None, state: Any = None, losses: Any = LOSSES) -> Any:
    update = tx.update if update is None else update
    state = tx.init(params) if state is None else state
    for step in range(len(jax.tree.leaves(gradients)[0])):
        updates, state = update(gradient(gradients, step), state, params, value=losses[step])
        params = gx.apply_updates(params, updates)
    return params, state


def compiled(tx: Any, params: Any, gradients: Any, losses: Any = LOSSES) -> Any:
    return by_hand(tx, params, gradients, jax.jit(tx.update), jax.jit(tx.init)(params), losses)


def scanned(tx: Any, params: Any, gradients: Any, losses: Any = LOSSES, state: Any = None) -> Any:
    def step(carry: Any, now: Any) -> Any:
        given, value = now
        updates, state = tx.update(given, carry[1], carry[0], value=value)
        return (gx.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, tx.init(params) if state is None else state), (gradients, losses))[0]


def donated(tx: Any, params: Any, gradients: Any, losses: Any = LOSSES) -> Any:
    """Compiled whole steps that write over what they are given."""

    def step(params: Any, state: Any, grads: Any, value: Any) -> Any:
        return gx.step(tx, grads, state, params, value=value)

    run, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
    params = jax.tree.map(jnp.array, params)
    for number in range(len(losses)):
        params, state = run(params, state, gradient(gradients, number), losses[number])
    return params, state


WAYS = {"by hand": by_hand, "compiled": compiled, "scanned": scanned, "donated": donated}


def assert_near(actual: Any, expected: Any, rtol: float = 2e-5) -> None:
    """Close to a twin: an element may be as far off as `rtol` of the largest of its array."""

    def near(one: Any, other: Any) -> None:
        other = np.asarray(other, np.float64)
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=0, atol=rtol * max(np.abs(other).max(), 1e-9)
        )

    jax.tree.map(near, dict(actual), dict(expected))
