"""Equinox: breast cancer diagnosis by gradient descent on the full batch, at the memory of a mini-batch."""

import sys

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import gradxform as gx

x, y = load_breast_cancer(return_X_y=True)
x, x_test, y, y_test = train_test_split(x, y, test_size=143, random_state=0)
x, x_test = np.float32((x - x.mean(0)) / x.std(0)), np.float32((x_test - x.mean(0)) / x.std(0))
# 426 patients are 6 mini-batches of 71: the mean of their 6 gradients is the gradient of the full batch
tx = gx.accumulate(gx.sgd(0.5, momentum=0.9), every=6)


@eqx.filter_value_and_grad
def loss_and_grad(model, x, y):
    """Mean cross entropy of a yes or no."""
    return optax.losses.sigmoid_binary_cross_entropy(jax.vmap(model)(x), y).mean()


@eqx.filter_jit(donate="all-except-first")
def train_step(batch, model, state):
    """One mini-batch; the results take the place of the donated arguments, in their order."""
    loss, grads = loss_and_grad(model, *batch)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


model = eqx.nn.MLP(30, "scalar", width_size=32, depth=1, key=jax.random.key(0))
state = tx.init(eqx.filter(model, eqx.is_inexact_array))
for _ in range(10 if "--quick" in sys.argv else 60):
    losses = []
    for batch in np.arange(len(x)).reshape(6, 71):
        model, state, loss = train_step((x[batch], y[batch]), model, state)
        losses.append(loss)
accuracy = np.mean((jax.vmap(model)(x_test) > 0) == y_test)
print(f"{state.inner.count} full-batch steps, loss {np.mean(losses):.3f}, test accuracy {accuracy:.3f}")
