"""One transformer, four optimizers: an average in place of a schedule, and matrices that are treated as matrices.

    python examples/compare_transformer.py            # under 25 minutes on two CPU cores
    python examples/compare_transformer.py --quick    # forty steps, one learning rate, one seed

The model, the text, the loop and the optimizers are those of train_transformer.py, with shorter runs. Every optimizer
is trained with the same four learning rates from the same three seeds, which give the weights and the mini-batches. Its
rate is the one whose mean loss on one half of the validation text is the lowest at the end; what is shown is the loss
on the other half. Every title is measured, and so is the table.
"""

import argparse
import json
import pathlib
import time

import jax
import matplotlib as mpl
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from train_transformer import BATCH, CONTEXT, LOOP, Transformer, load, loss_fn, to_evaluate, train_steps, transformation

STEPS, SEEDS, RATES = 240, 3, (0.001, 0.003, 0.01, 0.03)
OPTIMIZERS = {  # in colours that the colour-blind can tell apart
    "adamw": ("AdamW", "#0072B2"),
    "schedule_free_adamw": ("schedule-free AdamW", "#D55E00"),
    "soap": ("SOAP", "#009E73"),
    "muon": ("Muon", "#CC79A7"),
}
evaluate = nnx.jit(loss_fn)


def train(tx, seed, characters, windows, halves, steps, tick):
    """The losses on both halves of the validation text after every loop, and the least milliseconds per step."""
    model = Transformer(characters, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    random, losses, milliseconds = np.random.default_rng(seed), [], []
    for loop in range(steps // LOOP + 1):
        if loop:
            batches = windows[random.integers(len(windows), size=(LOOP, BATCH))]
            start = time.perf_counter()
            jax.block_until_ready(train_steps(model, optimizer, batches))
            milliseconds.append(1000 * (time.perf_counter() - start) / LOOP)
            tick()
        trained = to_evaluate(model, optimizer)
        losses.append([float(evaluate(trained, half)) for half in halves])
    return {"losses": losses, "milliseconds": min(milliseconds)}


def search(name, rates, seeds, steps, data, progress, task):
    """All runs of one optimizer, by rate and seed."""
    runs = {}
    for rate in rates:
        tx = transformation(name, rate, steps)
        progress.update(task, description=f"{OPTIMIZERS[name][0]}, {rate:g}")
        runs[rate] = [train(tx, seed, *data, steps, lambda: progress.advance(task, LOOP)) for seed in range(seeds)]
    return runs


def best(runs):
    """The rate that ends lowest on the first half, and its losses on the second: one row per seed."""
    ends = {rate: np.mean([run["losses"][-1][0] for run in each]) for rate, each in runs.items()}
    rate = min(ends, key=lambda rate: np.nan_to_num(ends[rate], nan=np.inf))
    return rate, np.array([run["losses"] for run in runs[rate]])[:, :, 1]


def steps_to(loss, steps, curve):
    """After how many steps a curve is as low as this loss, between its points on a straight line; None if never."""
    below = np.flatnonzero(curve[1:] <= loss)
    if not len(below):
        return None
    around = [below[0], below[0] + 1]
    return round(float(np.interp(-loss, -curve[around], steps[around])))


def end_of(losses, others):
    """Where these last losses, one per seed, are beside others from the same weights and mini-batches, in words."""
    above = losses - others
    if not (np.all(above < 0) or np.all(above > 0)):
        return "ends level, for seeds differ, with"
    return f"ends {abs(above.mean()):.2f} nats {'below' if above.mean() < 0 else 'above'}"


def draw(steps, chosen, tried, path):
    """The mean loss of the seeds, in a band from lowest to highest; one panel for averages, one for matrices."""
    curves = {name: curve for name, (_, curve) in chosen.items()}
    means = {name: curve.mean(axis=0) for name, curve in curves.items()}
    grey, lowest, end = "#555555", min(curve.min() for curve in curves.values()), means["adamw"][-1]
    reached = {name: steps_to(end, steps, means[name]) for name in ("soap", "muon")}
    style = {"font.size": 16, "axes.titlesize": 17, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(14, 7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        averages, matrices = figure.subplots(1, 2, sharey=True)
        for axes, names in (averages, ("adamw", "schedule_free_adamw")), (matrices, ("adamw", "soap", "muon")):
            for name in names:
                label, colour = OPTIMIZERS[name]
                rate = "rate" if name == "schedule_free_adamw" else "peak rate"
                axes.fill_between(
                    steps, curves[name].min(axis=0), curves[name].max(axis=0), color=colour, alpha=0.2, lw=0
                )
                axes.plot(steps, means[name], color=colour, lw=2.5, label=f"{label}, {rate} {chosen[name][0]:g}")
            axes.axhline(end, color=grey, ls="--", lw=1.2, zorder=0)
            axes.text(steps[-1] / 50, end - 0.02, "where AdamW ends", color=grey, fontsize=14, va="top")
            axes.set(xlabel="step", xlim=(0, steps[-1]), ylim=(lowest - 0.1, lowest + 1.5))
            axes.legend(frameon=False, loc="upper right", fontsize=15)
            axes.grid(color="#e8e8e8")
            axes.spines[["top", "right"]].set_visible(False)
        averages.set_ylabel("validation loss, nats per character")
        end_of_free = end_of(curves["schedule_free_adamw"][:, -1], curves["adamw"][:, -1])
        averages.set_title(f"Schedule-free AdamW, at a constant rate,\n{end_of_free} AdamW with a cosine")
        for name, step in reached.items():
            if step is not None:
                matrices.plot(step, end, "o", color=OPTIMIZERS[name][1], mec="white", ms=11, zorder=5)
        parts = [f"{OPTIMIZERS[name][0]} {f'after {step}' if step else 'never'}" for name, step in reached.items()]
        matrices.set_title(f"{' and '.join(parts)} steps are\nwhere AdamW ends after {steps[-1]}")
        note = (
            "AdamW, SOAP and Muon have a warmup and a cosine, schedule-free AdamW a constant rate.\n"
            f"Each rate is the best of {tried}. Lines are means of {len(curves['adamw'])} seeds, bands reach from the "
            "lowest to the highest."
        )
        figure.supxlabel(note, fontsize=14, color=grey)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def main():
    """Train with every optimizer, rate and seed; print the table, save all losses and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run, rounded up to a multiple of {LOOP}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, of the weights and the mini-batches")
    parser.add_argument("--quick", action="store_true", help="one short run of each optimizer, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for picture and losses")
    options = parser.parse_args()
    loops, seeds, rates = -(-options.steps // LOOP), options.seeds, RATES
    if options.quick:
        loops, seeds, rates = 2, 1, (0.003,)
    steps = LOOP * np.arange(loops + 1)

    alphabet, training, validation = load()
    held_out = sliding_window_view(validation, CONTEXT + 1)[:: 4 * CONTEXT]
    data = len(alphabet), sliding_window_view(training, CONTEXT + 1), (held_out[::2], held_out[1::2])
    console = Console()
    columns = "{task.description}", BarColumn(), "{task.completed:g} of {task.total:g} steps", TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(OPTIMIZERS) * len(rates) * seeds * steps[-1])
        runs = {name: search(name, rates, seeds, steps[-1], data, progress, task) for name in OPTIMIZERS}
    chosen = {name: best(each) for name, each in runs.items()}

    table = Table("optimizer", title=f"Validation loss after {steps[-1]} steps, mean of {seeds} seeds")
    for column in (*(f"{rate:g}" for rate in rates), "best rate, other half", "ms per step"):
        table.add_column(column, justify="right")
    for name, (_, curve) in chosen.items():
        ends = [np.mean([run["losses"][-1][0] for run in each]) for each in runs[name].values()]
        last = curve[:, -1]
        table.add_row(
            OPTIMIZERS[name][0],
            *(f"{end:.3f}" for end in ends),
            f"{last.mean():.3f} ({last.min():.3f} to {last.max():.3f})",
            f"{min(run['milliseconds'] for each in runs[name].values() for run in each):.0f}",
        )
    console.print(table, highlight=False)
    draw(steps, chosen, len(rates), options.out / "optimizers.png")
    (options.out / "optimizers.json").write_text(json.dumps({"steps": steps.tolist(), "runs": runs}))
    print(f"The curves are in {options.out / 'optimizers.png'}, all losses in {options.out / 'optimizers.json'}.")


if __name__ == "__main__":
    main()
