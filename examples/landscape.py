"""What each idea adds to gradient descent, in six small pictures.

    python examples/landscape.py            # a quarter of a minute
    python examples/landscape.py --quick    # fewer noisy runs

Every title is a claim. The numbers behind it are printed, and the exit code is 1 if one of them fails.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

import gradxform as gx


def instantaneous_adagrad(rate):
    """AdaGrad without memory: each element of the gradient divided by its own size."""
    return gx.chain(gx.normalize_by_rms(decay=0.0), gx.scale_by_learning_rate(rate))


MAKE = {
    "GD": gx.sgd,
    "SGD": gx.sgd,
    "Momentum": gx.momentum,
    "AdaGrad (g / |g|)": instantaneous_adagrad,
    "Adam": gx.adam,
    "AdamW": functools.partial(gx.adamw, weight_decay=0.01),
    "Adam + L2": functools.partial(gx.adam_l2, weight_decay=0.01),
}
COLOUR = dict(zip(MAKE, ["#999999", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"], strict=True))
RATES = np.array([a * 10.0**n for n in (-2, -1, 0) for a in (1.0, 1.8, 3.2, 5.6)], np.float32)


def walk(tx, gradient, start, steps, key):
    """The points that `tx` visits from `start` on, for ``gradient(params, key)``."""

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(gradient(params, key), state, params)
        params = gx.apply_updates(params, updates)
        return (params, state), params

    _, path = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(key, steps))
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, path)


def noisy(loss, size):
    """The gradient of `loss` as a mini-batch shows it: with noise of standard deviation `size`."""
    return lambda params, key: jax.grad(loss)(params) + size * jax.random.normal(key, params.shape)


def best_walk(make, loss, noise, start, steps, key):
    """The walk at the rate of `RATES` that ends lowest, and its losses; all rates walk at once."""
    paths = jax.vmap(lambda rate: walk(make(rate), noisy(loss, noise), start, steps, key))(RATES)
    losses = np.asarray(jax.vmap(jax.vmap(loss))(paths))
    best = np.nanargmin(losses[:, -20:].mean(axis=1))
    return np.asarray(paths[best]), losses[best]


def parabola_walk(tx, curvature, steps):
    """One weight on its way down to 0."""
    return np.asarray(walk(tx, lambda x, key: curvature * x, jnp.array(1.05), steps, jax.random.key(0)))


def draw_surface(ax, loss, x, y, levels, minimum):
    """Contours of a loss, and a star at its minimum."""
    grid = np.stack(np.meshgrid(np.linspace(*x, 150), np.linspace(*y, 150)), axis=-1).astype(np.float32)
    ax.contour(grid[..., 0], grid[..., 1], jax.vmap(jax.vmap(loss))(grid), levels, colors="#d8d8d8", linewidths=1)
    ax.plot(*minimum, "*", color="black", ms=16, zorder=5)
    ax.set(xlim=x, ylim=y, xticks=[], yticks=[])


def draw_valley(map_ax, loss_ax, key):
    """A valley a hundred times as steep across as along, turned against the axes; only SGD's gradient is noisy."""
    axes = jnp.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]], jnp.float32)
    bottom, steps, shown = jnp.array([4.0, 2.0]), 200, 60
    start = bottom + axes @ jnp.array([-9.0, 2.0])

    def valley(point):
        along, across = axes.T @ (point - bottom)
        return 0.005 * along**2 + 0.5 * across**2

    draw_surface(map_ax, valley, (-6, 5.5), (-4, 3.4), [0.01, 0.05, 0.15, 0.4, 1, 2, 4, 7, 11, 16], bottom)
    left, arrival = {}, {}
    for name, make in MAKE.items():
        path, loss = best_walk(make, valley, 0.03 if name == "SGD" else 0.0, start, steps, key)
        left[name] = np.linalg.norm(path[shown] - bottom) / np.linalg.norm(start - bottom)
        arrival[name] = int(np.argmax(loss < loss[0] / 1000))
        map_ax.plot(*path[: shown + 1].T, color=COLOUR[name], lw=2)
        map_ax.plot(*path[shown], "o", color=COLOUR[name], mec="white", ms=11, zorder=6)
        loss_ax.semilogy(loss, color=COLOUR[name], lw=2, label=name)
    map_ax.plot(0, 0, "+", color="black", ms=12, mew=2, zorder=6)
    map_ax.annotate("0: weight decay\npulls to here", (0, 0), (0.4, -2.4), arrowprops={"arrowstyle": "-", "shrinkB": 8})
    map_ax.set_title(f"After {shown} steps in a steep valley GD and SGD\nare on the way, Momentum and Adam are there")
    loss_ax.set_title("GD is slow: Momentum and Adam\nneed less than half its steps")
    loss_ax.set(xlim=(0, steps), ylim=(1e-7, 5), xlabel="step", ylabel="loss in the valley")
    return [
        (
            f"way left after {shown} steps",
            ", ".join(f"{name} {left[name]:.0%}" for name in ("GD", "SGD", "Momentum", "Adam")),
            min(left["GD"], left["SGD"]) > 0.2 and max(left["Momentum"], left["Adam"]) < 0.1,
        ),
        (
            "steps to 1/1000 of the loss",
            ", ".join(f"{name} {arrival[name]}" for name in ("GD", "Momentum", "Adam")),
            0 < max(arrival["Momentum"], arrival["Adam"]) < arrival["GD"] / 2,
        ),
    ]


def draw_dent(ax, key, runs):
    """A bowl with a dent in its side, the same learning rate and the same noise for both."""
    start, steps, rate = jnp.array([-5.0, 1.0]), 120, 0.6

    def bowl(point):
        x, y = point
        return 0.05 * x**2 + 0.2 * y**2 - 0.25 * jnp.exp(-((x + 2.5) ** 2 + y**2) / 0.32)

    draw_surface(ax, bowl, (-5.6, 1.8), (-1.6, 1.6), np.linspace(-0.3, 3, 34), (0.0, 0.0))
    over = {}
    for name, tx in {"SGD": gx.sgd(rate), "Momentum": gx.momentum(rate)}.items():
        run = functools.partial(walk, tx, noisy(bowl, 0.1), start, steps)
        paths = np.asarray(jax.vmap(run)(jax.random.split(key, runs)))
        over[name] = int(np.sum(np.linalg.norm(paths[:, -1], axis=1) < 1))
        for path in paths[:5]:
            ax.plot(*path.T, color=COLOUR[name], lw=1.2)
            ax.plot(*path[-1], "o", color=COLOUR[name], mec="white", ms=9, zorder=6)
    ax.text(-2.5, 0.45, "SGD", color=COLOUR["SGD"], ha="center", weight="bold")
    ax.text(0.0, 0.55, "Momentum", color=COLOUR["Momentum"], ha="center", weight="bold")
    ax.set_title("SGD gets stuck in a small local minimum,\nMomentum carries over it")
    return [
        (
            "runs that get past the dent",
            f"SGD {over['SGD']}, Momentum {over['Momentum']} of {runs}",
            over["SGD"] < 0.1 * runs and over["Momentum"] > 0.9 * runs,
        )
    ]


def draw_steps(ax):
    """The same steps on a flat parabola and on one 10 000 times as steep."""
    rate, steps, flat, steep = 0.1, 30, 0.01, 100.0
    gd = [parabola_walk(gx.sgd(rate), curvature, steps) for curvature in (flat, steep)]
    by_size = [parabola_walk(instantaneous_adagrad(rate), curvature, steps) for curvature in (flat, steep)]
    ax.plot(gd[0], color=COLOUR["GD"], lw=3)
    ax.plot(gd[1][:2], color=COLOUR["GD"], lw=3)
    ax.plot(by_size[0], color=COLOUR["AdaGrad (g / |g|)"], lw=7, alpha=0.35)
    ax.plot(by_size[1], color=COLOUR["AdaGrad (g / |g|)"], lw=2)
    ax.text(29, 0.9, "GD on the flat loss hardly moves", color="#666666", ha="right")
    ax.text(1.2, -0.33, "GD on the steep loss\nis off in one step", color="#666666")
    ax.text(29, 0.15, "g / |g|: both losses alike", color=COLOUR["AdaGrad (g / |g|)"], ha="right")
    ax.axhline(0, color="black", lw=0.8, zorder=0)
    ax.set(xlim=(0, steps), ylim=(-0.4, 1.2), xlabel="step", ylabel="weight")
    ax.set_title("g / |g| ignores the size of the gradient,\nthen oscillates around the minimum")
    tail = by_size[1][-10:]
    turns = np.count_nonzero(np.diff(np.sign(tail)))
    return [
        (
            "flat and steep differ by",
            f"GD {np.abs(gd[0] - gd[1]).max():.1g}, g / |g| {np.abs(by_size[0] - by_size[1]).max():.1g}",
            np.abs(by_size[0] - by_size[1]).max() < 1e-4 < 1 < np.abs(gd[0] - gd[1]).max(),
        ),
        (
            "g / |g|, last ten steps",
            f"{turns} turns, {np.abs(tail).min():.2f} away or more",
            turns == 9 and np.abs(tail).min() > 0.4 * rate,
        ),
    ]


def draw_settling(ax):
    """The same learning rate, and ten times as long."""
    rate, steps = 0.1, 300
    distance = {}
    for name in ("AdaGrad (g / |g|)", "Adam"):
        distance[name] = np.abs(parabola_walk(MAKE[name](rate), 1.0, steps))
        ax.semilogy(distance[name], color=COLOUR[name], lw=2)
    ax.text(290, 0.08, "g / |g|", color=COLOUR["AdaGrad (g / |g|)"], ha="right")
    ax.text(290, 3e-5, "Adam", color=COLOUR["Adam"], ha="right", weight="bold")
    ax.set(xlim=(0, steps), ylim=(1e-9, 3), xlabel="step", ylabel="distance to the minimum")
    ax.set_title("Adam settles,\ng / |g| goes on oscillating")
    ends = [float(path[-20:].max()) for path in distance.values()]
    return [("distance left at the end", "g / |g| {:.2g}, Adam {:.0e}".format(*ends), ends[1] < 1e-4 * ends[0])]


def draw_decay(ax, key):
    """Gradients of pure noise, so that what happens to the weights is decay."""
    rate, decay, steps, sizes = 1e-3, 0.5, 2000, {"small": 0.1, "large": 10.0}
    start = {size: jnp.ones(64) for size in sizes}

    def noise(params, key):
        return {size: scale * jax.random.normal(key, (64,)) for size, scale in sizes.items()}

    ends = {}
    for name, make in {"AdamW": gx.adamw, "Adam + L2": gx.adam_l2}.items():
        path = walk(make(rate, weight_decay=decay), noise, start, steps, key)
        for size, weights in path.items():
            norms = np.linalg.norm(weights, axis=1)
            small = size == "small"
            ax.plot(norms / norms[0], color=COLOUR[name], lw=7 if small else 2.5, alpha=0.35 if small else 1)
            ends[name, size] = norms[-1] / norms[0]
    ax.text(1950, 0.98, "Adam + L2, large gradients", color=COLOUR["Adam + L2"], ha="right")
    ax.text(1950, 0.6, "AdamW, large and\nsmall gradients", color=COLOUR["AdamW"], ha="right")
    ax.text(60, 0.1, "Adam + L2, gradients\n1/100 as large", color=COLOUR["Adam + L2"])
    ax.set(xlim=(0, steps), ylim=(0, 1.1), xlabel="step", ylabel="weight norm, at first 1")
    ax.set_title("AdamW shrinks all weights alike,\nAdam with L2 in the loss does not")
    gap = {name: abs(ends[name, "large"] - ends[name, "small"]) for name in ("AdamW", "Adam + L2")}
    return [
        (
            f"norm left with {name}",
            f"large gradients {ends[name, 'large']:.2f}, small {ends[name, 'small']:.2f}",
            gap["AdamW"] < 0.01 < 0.5 < gap["Adam + L2"],
        )
        for name in gap
    ]


def main():
    """Draw, save, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer noisy runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    key = jax.random.key(options.seed)

    with mpl.rc_context({"font.size": 16, "axes.titlesize": 17, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(14, 13.5), layout="constrained")
        (top, second), (third, fourth), (fifth, last) = figure.subplots(3, 2)
        rows = [
            *draw_valley(top, second, key),
            *draw_dent(third, key, runs=20 if options.quick else 200),
            *draw_steps(fourth),
            *draw_settling(fifth),
            *draw_decay(last, key),
        ]
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        options.out.mkdir(parents=True, exist_ok=True)
        picture = options.out / "landscape.png"
        figure.savefig(picture, dpi=100)
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)  # a third of the size

    table = Table("claim", "measured", "holds")
    for claim, measured, holds in rows:
        table.add_row(claim, measured, "yes" if holds else "NO")
    Console().print(table)
    print(f"The six pictures are in {picture}.")
    sys.exit(not all(holds for *_, holds in rows))


if __name__ == "__main__":
    main()
