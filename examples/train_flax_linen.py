"""Flax Linen: a convolutional network on handwritten digits in a `TrainState`, with a schedule one can read."""

import functools
import sys

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradxform as gx

x, y = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(x / 16).reshape(-1, 8, 8, 1), y, test_size=357, random_state=0)
epochs, batch_size = 3 if "--quick" in sys.argv else 20, 48
tx = gx.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.01, warmup_steps=30, decay_steps=epochs * len(x) // batch_size))


class Classifier(nn.Module):
    """The logits of every class for 8×8 images."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(train_state, x, y):
    """One step; the new state takes the place of the donated one."""

    def loss_fn(params):
        logits = train_state.apply_fn({"params": params}, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(train_state.params)
    return train_state.apply_gradients(grads=grads), loss


model = Classifier()
params = model.init(jax.random.key(0), x[:1])["params"]
train_state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
shuffle = np.random.default_rng(0)
for epoch in range(epochs):
    for batch in shuffle.permutation(len(x)).reshape(-1, batch_size):
        train_state, loss = train_step(train_state, x[batch], y[batch])
    rate = gx.get_hyperparams(train_state.opt_state)["learning_rate"]
    print(f"epoch {epoch + 1}: loss {loss:.3f}, learning rate {rate:.5f}")
logits = model.apply({"params": train_state.params}, x_test)
print(f"test accuracy {np.mean(np.argmax(logits, axis=1) == y_test):.3f}")
