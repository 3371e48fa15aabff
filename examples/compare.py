"""One image classifier, seven optimizers: a table, and a picture of their curves.

    python examples/compare.py            # a minute on two CPU cores
    python examples/compare.py --quick    # two epochs
    python examples/compare.py --search   # finds the learning rates below again, some minutes

A small convolutional network learns scikit-learn's digits: 1344 images of 8 × 8 pixels for training, 453 for
the test. All optimizers start at the same weights and see the same mini-batches, and each has its own learning
rate: the one of a grid whose training loss, averaged over the run with seed 0, is the lowest.
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradxform as gx

BATCH, BATCHES = 96, 14
RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FAIRNESS = "Each rate is the best of 0.002, 0.005, 0.01, …, 5 by mean training loss."


def adamw(learning_rate):
    """AdamW that decays the kernels and leaves the biases alone."""
    return gx.adamw(learning_rate, weight_decay=0.1, mask=".*kernel")


def warmup_cosine(peak, steps):
    """Up to `peak` in a tenth of the steps, then down to zero: a schedule of optax."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps=steps // 10, decay_steps=steps)


# name: (colour, learning rate, what to make of a learning rate and the number of steps)
OPTIMIZERS = {
    "GD": ("#999999", 0.5, lambda rate, steps: gx.accumulate(gx.sgd(rate), every=BATCHES)),
    "SGD": ("#E69F00", 0.5, lambda rate, steps: gx.sgd(rate)),
    "Momentum": ("#56B4E9", 1.0, lambda rate, steps: gx.momentum(rate)),
    "AdaGrad": ("#009E73", 0.05, lambda rate, steps: gx.adagrad(rate)),
    "Adam": ("#0072B2", 0.02, lambda rate, steps: gx.adam(rate)),
    "AdamW": ("#D55E00", 0.02, lambda rate, steps: adamw(rate)),
    "AdamW + schedule": ("#CC79A7", 0.1, lambda rate, steps: adamw(warmup_cosine(rate, steps))),
}


class Classifier(nn.Module):
    """Two convolutions and a dense layer: images to ten scores."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def loss(params, images, labels):
    """The mean cross-entropy, optax's."""
    return optax.softmax_cross_entropy_with_integer_labels(Classifier().apply(params, images), labels).mean()


@jax.jit
def evaluate(params, training, test):
    """The loss on all training images and the accuracy on the test images."""
    images, labels = test
    return loss(params, *training), jnp.mean(Classifier().apply(params, images).argmax(axis=1) == labels)


def train(tx, seed, training, test, batches, tick):
    """Train with `tx`: rows of step, training loss and test accuracy, and the median milliseconds per step."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, images, labels):
        updates, state = tx.update(jax.grad(loss)(params, images, labels), state, params)
        return gx.apply_updates(params, updates), state

    images, labels = training
    params = Classifier().init(jax.random.key(seed), images[:1])
    state = tx.init(params)
    rows, seconds = [(0, *evaluate(params, training, test))], []
    for step, batch in enumerate(batches, start=1):
        mini_batch = images[batch], labels[batch]
        start = time.perf_counter()
        params, state = jax.block_until_ready(train_step(params, state, *mini_batch))
        seconds.append(time.perf_counter() - start)
        if step % (BATCHES // 2) == 0:
            rows.append((step, *evaluate(params, training, test)))
        tick()
    return np.array(rows, float), 1000 * np.median(seconds[1:])


def load(seed, epochs):
    """The training and the test set, and the mini-batches as rows of indices."""
    digits = load_digits()
    images, labels, size = np.float32(digits.images[..., None]), digits.target, BATCH * BATCHES
    images, test_images, labels, test_labels = train_test_split(
        images, labels, train_size=size, stratify=labels, random_state=seed
    )
    mean, deviation = images.mean(), images.std()
    training = jnp.asarray((images - mean) / deviation), jnp.asarray(labels)
    test = jnp.asarray((test_images - mean) / deviation), jnp.asarray(test_labels)
    shuffle = np.random.default_rng(seed)
    batches = np.concatenate([shuffle.permutation(size).reshape(BATCHES, BATCH) for _ in range(epochs)])
    return training, test, batches


def draw(curves, path):
    """Training loss and test accuracy against the step, one line per optimizer."""
    with mpl.rc_context({"font.size": 16, "axes.titlesize": 18, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(14, 6.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, rows in curves.items():
            steps, losses, accuracies = rows.T
            left.semilogy(steps, losses, color=OPTIMIZERS[name][0], lw=2, label=name)
            right.plot(steps, accuracies, color=OPTIMIZERS[name][0], lw=2)
        label = f"mini-batches seen; GD steps once in {BATCHES}"
        left.set(title="Training loss", xlabel=label, xlim=(0, steps[-1]))
        right.set(title="Test accuracy", xlabel=label, xlim=(0, steps[-1]), ylim=(0.8, 1))
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        for axes in (left, right):
            axes.grid(color="#e8e8e8")
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)


def main():
    """Train with every optimizer, then print the table and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it runs")
    parser.add_argument("--search", action="store_true", help="try every learning rate and keep the best")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the mini-batches")
    options = parser.parse_args()
    training, test, batches = load(options.seed, epochs=2 if options.quick else 30)

    console = Console()
    table = Table("optimizer", title=f"After {len(batches)} mini-batches of {BATCH} images")
    for column in ("rate", "training loss", "test accuracy", "ms per step"):
        table.add_column(column, justify="right")
    curves = {}
    with Progress(console=console, transient=True) as progress:
        runs = len(OPTIMIZERS) * (len(RATES) if options.search else 1)
        task = progress.add_task("", total=runs * len(batches))
        for name, (_, known, make) in OPTIMIZERS.items():
            progress.update(task, description=name)
            tick = functools.partial(progress.advance, task)
            results = []
            for rate in RATES if options.search else (known,):
                rows, milliseconds = train(make(rate, len(batches)), options.seed, training, test, batches, tick)
                mean_loss = np.nan_to_num(rows[:, 1].mean(), nan=np.inf)
                results.append((mean_loss, rate, milliseconds, rows))
            _, rate, milliseconds, curves[name] = min(results, key=lambda result: result[0])
            _, final_loss, accuracy = curves[name][-1]
            table.add_row(name, f"{rate:g}", f"{final_loss:.5f}", f"{accuracy:.3f}", f"{milliseconds:.2f}")
    console.print(table, FAIRNESS, highlight=False)
    picture = options.out / "compare.png"
    draw(curves, picture)
    print(f"The curves are in {picture}.")


if __name__ == "__main__":
    main()
