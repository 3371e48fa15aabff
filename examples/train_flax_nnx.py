"""Flax NNX: handwritten digits with `nnx.Optimizer`; gradxform's and optax's transformations in one chain."""

import sys

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradxform as gx

x, y = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(x / 16), y, test_size=357, random_state=0)
tx = gx.chain(optax.centralize(), gx.clip_by_global_norm(1.0), gx.adamw(2e-3, weight_decay=0.01))


class Classifier(nnx.Module):
    """A perceptron with one hidden layer and dropout."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        """The logits of every class."""
        return self.out(self.dropout(nnx.relu(self.hidden(x))))


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step, in place."""

    def loss_fn(model):
        return optax.losses.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


model = Classifier(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
shuffle = np.random.default_rng(0)
for _ in range(5 if "--quick" in sys.argv else 30):
    for batch in shuffle.permutation(len(x)).reshape(-1, 48):
        loss = train_step(model, optimizer, x[batch], y[batch])
model.eval()
print(f"loss {loss:.3f}, test accuracy {np.mean(np.argmax(model(x_test), axis=1) == y_test):.3f}")
