"""Haiku: breast cancer diagnosis with weight decay on the weights alone, which a path pattern picks."""

import functools
import sys

import haiku as hk
import jax
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import gradxform as gx

x, y = load_breast_cancer(return_X_y=True)
x, x_test, y, y_test = train_test_split(x, y, test_size=143, random_state=0)
x, x_test = np.float32((x - x.mean(0)) / x.std(0)), np.float32((x_test - x.mean(0)) / x.std(0))
model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 1])(x).squeeze(-1)))
tx = gx.adamw(0.003, weight_decay=0.5, mask=".*/w")  # of mlp/~/linear_0/w, mlp/~/linear_0/b, …


def loss_fn(params, x, y):
    """Mean cross entropy of a yes or no."""
    return optax.losses.sigmoid_binary_cross_entropy(model.apply(params, x), y).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, x, y):
    """One step; the results take the place of the donated arguments, in their order."""
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return gx.apply_updates(params, updates), state, loss


params = model.init(jax.random.key(0), x)
state = tx.init(params)
shuffle = np.random.default_rng(0)
for _ in range(10 if "--quick" in sys.argv else 60):
    for batch in shuffle.permutation(len(x)).reshape(-1, 71):
        params, state, loss = train_step(params, state, x[batch], y[batch])
accuracy = np.mean((model.apply(params, x_test) > 0) == y_test)
print(f"loss {loss:.3f}, test accuracy {accuracy:.3f}")
