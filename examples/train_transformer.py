"""Flax NNX: a character-level transformer, and every step's gradient norm, clipping and update size in a picture.

    python examples/train_transformer.py                     # under two minutes on two CPU cores
    python examples/train_transformer.py --quick             # forty steps
    python examples/train_transformer.py --optimizer soap    # or one of eight others

The text is Python's own help, `pydoc_data.topics`: nothing is downloaded. `observe` keeps the numbers of the last
step in the optimizer's state and `metrics` reads them, here inside a compiled loop of twenty steps: the log is what
the loop returns, one array per number. All optimizers are trained by the same loop, which passes the loss for those
that ask for it and evaluates what `eval_params` gives: averages, where the optimizer keeps them.
"""

import argparse
import pathlib
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import rich
from flax import nnx
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import gradxform as gx
from gradxform.wrappers.quantization import CODECS

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 128, 4, 64, 16
CLIP, LOOP = 1.0, 20  # the largest gradient norm, steps per compiled loop
KERNELS = ".*kernel"  # what decays: the matrices that are products' factors, not the embedding, biases and scales
HIDDEN = {  # the matrices of the blocks, for Muon; query, key and value are three in one
    "blocks/.*/query_key_value/kernel": "in 3*out",
    "blocks/.*/(attention_out|hidden|out)/kernel": "in out",
}


def adamw(rate):
    """AdamW with the numbers that language models have."""
    return gx.adamw(rate, b2=0.95, weight_decay=0.1, mask=KERNELS)


# name: (learning rate, or its peak, what to make of a schedule of it)
OPTIMIZERS = {
    "adamw": (3e-3, adamw),
    "lion": (1e-3, lambda rate: gx.lion(rate, weight_decay=0.3, mask=KERNELS)),
    "nadam": (3e-3, lambda rate: gx.nadam(rate, b2=0.95)),
    "adafactor": (0.1, lambda rate: gx.adafactor(rate)),
    "prodigy": (1.0, lambda rate: gx.prodigy(rate)),
    "schedule_free_adamw": (3e-3, lambda rate: gx.schedule_free_adamw(rate, b2=0.95, weight_decay=0.1)),
    "soap": (3e-3, lambda rate: gx.soap(rate, weight_decay=0.1, mask=KERNELS)),
    "muon": (3e-3, lambda rate: gx.muon(rate, HIDDEN, adamw(rate), scale="adam_rms", weight_decay=0.1)),
    "noisy_sgd": (1.0, lambda rate: gx.noisy_sgd(rate, eta=1e-8)),
    "polyak_sgd": (1.0, lambda rate: gx.polyak_sgd(rate)),
}


def transformation(name, rate, steps):
    """Clip the gradient's norm, then an optimizer; its rate rises and falls to zero, if it is not free of schedules."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=steps // 20, decay_steps=steps)
    if name == "schedule_free_adamw":
        schedule = gx.live(rate)  # it stays what it is, and stands in the state for the log
    return gx.chain(gx.clip_by_global_norm(CLIP), OPTIMIZERS[name][1](schedule))


class Block(nnx.Module):
    """Attention to what came before, then a perceptron at every position; each adds to its input."""

    def __init__(self, rngs):
        zeros = nnx.initializers.zeros  # a block starts as the identity
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query_key_value = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.attention_out = nnx.Linear(WIDTH, WIDTH, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.hidden_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(4 * WIDTH, WIDTH, kernel_init=zeros, rngs=rngs)

    def __call__(self, x):
        heads = self.query_key_value(self.attention_norm(x)).reshape(*x.shape[:2], 3 * HEADS, WIDTH // HEADS)
        query, key, value = jnp.split(heads, 3, axis=2)
        attended = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + self.attention_out(attended.reshape(x.shape))
        return x + self.out(jnp.square(nnx.relu(self.hidden(self.hidden_norm(x)))))


def rotate(x):
    """Turn each pair of features by an angle that grows with the position (Su et al. 2021, arXiv 2104.09864)."""
    _, length, _, features = x.shape
    frequencies = 10_000.0 ** -np.linspace(0, 1, features // 2, endpoint=False)
    angles = np.float32(np.arange(length)[:, None, None] * frequencies)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)


class Transformer(nnx.Module):
    """From characters to the logits of the character that follows each of them."""

    def __init__(self, characters, rngs):
        self.embed = nnx.Embed(characters, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.logits = nnx.Linear(WIDTH, characters, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, text):
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def loss_fn(model, windows):
    """The mean cross-entropy of every window's characters but the first, in nats."""
    logits = model(windows[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@nnx.jit
def train_steps(model, optimizer, batches):
    """One step per batch, in one compiled loop; what is measured in each comes out stacked."""

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def step(carry, windows):
        model, optimizer = carry
        loss, grads = nnx.value_and_grad(loss_fn)(model, windows)
        optimizer.update(model, grads, value=loss)  # for optimizers that ask for it, such as polyak_sgd
        return carry, {"loss": loss, **gx.metrics(optimizer.opt_state)}

    _, log = step((model, optimizer), batches)
    return log


@nnx.jit
def write(model, window, key):
    """The 200 characters with which the model goes on from a window, drawn at temperature 0.7."""

    def step(window, key):
        character = jax.random.categorical(key, model(window[None])[0, -1] / 0.7)
        return jnp.append(window[1:], character), character

    return jax.lax.scan(step, window, jax.random.split(key, 200))[1]


def to_evaluate(model, optimizer):
    """A copy of the model with the parameters to evaluate: those that are trained, or their averages."""
    copy = nnx.clone(model)
    nnx.update(copy, gx.eval_params(optimizer, model))
    return copy


def load():
    """The alphabet, and the text as indices into it: nine tenths for training, the last for validation."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))  # topics repeat one another, and validation must be new
    alphabet, indices = np.unique(list(text), return_inverse=True)
    return alphabet, *np.split(indices.astype(np.int32), [len(text) * 9 // 10])


def count_losses(training, validation, size):
    """The validation losses of guessing by the frequency of each character, and of each pair of characters."""
    pairs = np.ones((size, size))
    np.add.at(pairs, (training[:-1], training[1:]), 1)
    single = np.log(pairs.sum(axis=0) / pairs.sum())
    double = np.log(pairs / pairs.sum(axis=1, keepdims=True))
    return -single[validation].mean(), -double[validation[:-1], validation[1:]].mean()


def train(model, optimizer, training, held_out, loops, random):
    """Train for `loops` loops: the log of all steps, rows of step and validation loss, the best seconds per step."""
    windows, evaluate = sliding_window_view(training, CONTEXT + 1), nnx.jit(loss_fn)
    logs, validation, seconds = [], [(0, evaluate(to_evaluate(model, optimizer), held_out))], []
    progress = Progress("step", MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn())
    task = progress.add_task("", total=loops * LOOP)
    with Live(progress, transient=True) as live:
        for loop in range(1, loops + 1):
            batches = windows[random.integers(len(windows), size=(LOOP, BATCH))]
            start = time.perf_counter()
            logs.append(jax.device_get(train_steps(model, optimizer, batches)))
            seconds.append((time.perf_counter() - start) / LOOP)
            if loop % 5 == 0 or loop == loops:
                validation.append((loop * LOOP, evaluate(to_evaluate(model, optimizer), held_out)))
            progress.advance(task, LOOP)
            live.update(Group(progress, last_step(logs[-1], validation[-1][1])))
    log = {name: np.concatenate([log[name] for log in logs]) for name in logs[0]}
    return log, np.array(validation), min(seconds)


def rates(log):
    """The learning rate of every step; for polyak_sgd the largest that it may take."""
    return log.get("learning_rate", log.get("max_learning_rate"))


def last_step(log, validation):
    """The numbers under the progress bar."""
    table = Table("loss", "validation loss", "learning rate", "gradient norm", "update / parameters", box=None)
    loss, norm, ratio = (log[name][-1] for name in ("loss", "grad_norm", "update_ratio"))
    table.add_row(f"{loss:.3f}", f"{validation:.3f}", f"{rates(log)[-1]:.1e}", f"{norm:.2f}", f"{ratio:.1e}")
    return table


def draw(log, validation, bigram, path):
    """The log as four panels over the same steps."""
    steps, clipped = np.arange(1, len(log["loss"]) + 1), log["clipped"] > 0
    blue, pale, grey = "#0072B2", "#A9CCE3", "#555555"
    dots = {"color": "#D55E00", "marker": "o", "mec": "white", "ls": "", "clip_on": False, "zorder": 5}
    style = {"font.size": 16, "axes.titlesize": 18, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(14, 9), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        (loss, rate), (norm, ratio) = figure.subplots(2, 2, sharex=True)
        loss.plot(steps, log["loss"], color=pale, lw=1, label="training, every step")
        means = log["loss"].reshape(-1, LOOP).mean(axis=1)
        loss.plot(steps[LOOP // 2 :: LOOP], means, color=blue, lw=2.5, label=f"training, mean of {LOOP} steps")
        loss.plot(*validation.T, **dots, ms=9, label="validation")
        loss.axhline(bigram, color=grey, ls="--", label="validation, by counts of pairs")
        loss.set(title="Loss, nats per character", xlim=(0, len(steps)))
        loss.legend(frameon=False)
        rate.plot(steps, rates(log), color=blue, lw=2.5)
        rate.set(title="Learning rate", ylim=0)
        norm.plot(steps, log["grad_norm"], color=blue, lw=1)
        norm.plot(steps[clipped], log["grad_norm"][clipped], **dots, ms=7, label="clipped")
        norm.axhline(CLIP, color=grey, ls="--", zorder=3, label=f"threshold, {CLIP}")
        norm.set(title=f"Gradient norm: {clipped.sum()} of {len(steps)} steps clipped", xlabel="step", ylim=0)
        norm.legend(frameon=False)
        ratio.plot(steps, log["update_ratio"], color=blue, lw=1)
        ratio.set(title="Update norm / parameter norm", xlabel="step", ylim=0)
        ratio.yaxis.set_major_formatter("{x:.1%}")
        for axes in (loss, rate, norm, ratio):
            axes.grid(color="#e8e8e8")
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def main():
    """Train, showing how it goes; then print what the model has learnt, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help=f"rounded up to a multiple of {LOOP}")
    names = ", ".join(f"{name} ({rate:g})" for name, (rate, _) in OPTIMIZERS.items())
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        metavar="NAME",
        help=f"one of these, with the learning rate of each: {names}; lbfgs is not there, for it is for full batches",
    )
    parser.add_argument("--rate", type=float, help="the learning rate, or its peak, in place of the optimizer's own")
    parser.add_argument("--quick", action="store_true", help="forty steps, to see that it runs")
    parser.add_argument("--codec", choices=CODECS, help="keep the moments in few bits, as `quantize_state` does")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the mini-batches and the sample")
    options = parser.parse_args()
    loops = 2 if options.quick else -(-options.steps // LOOP)
    steps = loops * LOOP

    alphabet, training, validation = load()
    held_out = sliding_window_view(validation, CONTEXT + 1)[::CONTEXT]
    model = Transformer(len(alphabet), nnx.Rngs(options.seed))
    rate = OPTIMIZERS[options.optimizer][0] if options.rate is None else options.rate
    tx = transformation(options.optimizer, rate, steps)
    if options.codec:
        tx = gx.quantize_state(tx, options.codec)
    optimizer = nnx.Optimizer(model, gx.observe(tx), wrt=nnx.Param)
    random = np.random.default_rng(options.seed)
    log, losses, seconds = train(model, optimizer, training, held_out, loops, random)

    prompt = validation[:CONTEXT]
    text = write(to_evaluate(model, optimizer), prompt, jax.random.key(options.seed))
    shown = Text.assemble(("".join(alphabet[prompt]), "dim"), ("".join(alphabet[text]), "bold"))
    rich.print(Panel(shown, title=f"{CONTEXT} characters of the validation text, and {len(text)} of the model"))
    loss, (unigram, bigram) = losses[-1, 1], count_losses(training, validation, len(alphabet))
    print(f"validation loss {loss:.3f} nats or {loss / np.log(2):.3f} bits per character")
    print(f"guessing by the counts of characters: {unigram:.3f} nats; of pairs of characters: {bigram:.3f} nats")
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    picture = options.out / "transformer.png"
    draw(log, losses, bigram, picture)
    print(f"{size} parameters, {1000 * seconds:.0f} ms per step; the curves are in {picture}.")


if __name__ == "__main__":
    main()
