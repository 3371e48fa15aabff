"""Bare JAX: handwritten digits, and a learning rate that follows the loss without recompiling."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradxform as gx

x, y = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(x / 16), y, test_size=357, random_state=0)
tx = gx.adam(gx.live(3e-3))  # a live value stands in the state, where `set_hyperparams` sets it


def predict(params, x):
    """The logits of every class."""
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(params, x, y):
    """Mean cross entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, x, y):
    """One step; the results take the place of the donated arguments, in their order."""
    print("compiling train_step")  # runs while JAX traces, so it counts the compilations
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return gx.apply_updates(params, updates), state, loss


init, key1, key2 = jax.nn.initializers.he_normal(), *jax.random.split(jax.random.key(0))
params = {"w1": init(key1, (64, 128)), "b1": jnp.zeros(128), "w2": init(key2, (128, 10)), "b2": jnp.zeros(10)}
state = tx.init(params)
shuffle, last, rate = np.random.default_rng(0), np.inf, 3e-3
for _ in range(5 if "--quick" in sys.argv else 40):
    losses = []
    for batch in shuffle.permutation(len(x)).reshape(-1, 48):
        params, state, loss = train_step(params, state, x[batch], y[batch])
        losses.append(loss)
    rate *= 1.05 if np.mean(losses) < last else 0.5  # bolder while it goes well, half as bold after a setback
    state, last = gx.set_hyperparams(state, learning_rate=rate), np.mean(losses)
accuracy = np.mean(np.argmax(predict(params, x_test), axis=1) == y_test)
print(f"learning rate {gx.get_hyperparams(state)['learning_rate']:.2g}, test accuracy {accuracy:.3f}")
