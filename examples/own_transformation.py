"""Your own optimizer in ten lines: Lion (Chen et al. 2023, arXiv 2302.06675), and what it can do without more."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradxform as gx


def scale_by_lion(b1=0.9, b2=0.99):
    """u ← sign(β₁·m + (1 − β₁)·g),  m ← β₂·m + (1 − β₂)·g"""
    return gx.lift(_init, _update, constructor=scale_by_lion, b1=gx.fraction(b1), b2=gx.fraction(b2))


def _init(param):
    return {"mu": jnp.zeros_like(param)}


def _update(update, state, param, step):
    direction = jnp.sign(step.b1 * state["mu"] + (1 - step.b1) * update)
    return direction, {"mu": step.b2 * state["mu"] + (1 - step.b2) * update}


def lion(learning_rate, b1=0.9, weight_decay=0.0):
    """Lion with decay of the weights."""
    decay = gx.add_decoupled_weight_decay(weight_decay, mask="weight")
    return gx.chain(scale_by_lion(b1), decay, gx.scale_by_learning_rate(learning_rate))


def train(way, tx, epochs, dtype=jnp.float32, later=None):
    """Softmax regression on handwritten digits, with the hyperparameters `later` in the second half."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(np.float32(x / 16), y, test_size=357, random_state=0)

    def loss_fn(params, x, y):
        logits = x @ params["weight"].astype(x.dtype) + params["bias"].astype(x.dtype)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return gx.apply_updates(params, updates), state

    params = {"weight": jnp.zeros((64, 10), dtype), "bias": jnp.zeros(10, dtype)}
    state = tx.init(params)
    shuffle = np.random.default_rng(0)
    for epoch in range(epochs):
        if later and epoch == epochs // 2:
            state = gx.set_hyperparams(state, later)
        for batch in shuffle.permutation(len(x)).reshape(-1, 48):
            params, state = train_step(params, state, x[batch], y[batch])
    accuracy = np.mean(np.argmax(x_test @ np.float32(params["weight"]) + np.float32(params["bias"]), axis=1) == y_test)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in gx.get_hyperparams(state, tx).items())
    print(f"{way:24} test accuracy {accuracy:.3f}, mu in {state.mu['weight'].dtype}, in the end {shown}")


def main(epochs):
    """Train with Lion in six ways."""
    steps = epochs * 30
    train("as it is", lion(0.01), epochs)
    train("weight decay", lion(0.01, weight_decay=0.1), epochs)
    train("learning rate scheduled", lion(optax.cosine_decay_schedule(0.01, steps)), epochs)
    train("b1 scheduled", lion(0.01, b1=optax.linear_schedule(0.5, 0.95, steps)), epochs)
    train("learning rate live", lion(gx.live(0.01)), epochs, later={"learning_rate": 0.001})
    train("bfloat16 parameters", lion(0.01), epochs, dtype=jnp.bfloat16)


if __name__ == "__main__":
    main(epochs=4 if "--quick" in sys.argv else 30)
