"""A run that is interrupted and continues from what was saved is, bit by bit, the run that was not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("equinox")
pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("sklearn")

import equinox as eqx
import flax.serialization
import orbax.checkpoint as ocp
import sklearn.datasets

import gradxform as gx

pytestmark = pytest.mark.once

STEPS, INTERRUPTED = 20, 10
OPTIMIZERS = {
    "scheduled": gx.adamw(optax.cosine_decay_schedule(0.02, STEPS)),
    "accumulated": gx.accumulate(gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.02)), every=4),  # two are pending
    "live": gx.chain(gx.clip_by_global_norm(1.0), gx.adam(gx.live(0.02))),
    "with optax": gx.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), gx.adagrad(0.02)),
    "three moments": gx.rmsprop(0.02, centered=True, momentum=0.9),
    "bfloat16 moments": gx.adamw(0.02, state_dtype=jnp.bfloat16),
    "groups": gx.by_path(
        {".*/bias": {"learning_rate": gx.times(0.5)}, "hidden/kernel": gx.momentum(0.5), "digits/kernel": gx.freeze()},
        default=gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(gx.live(0.02))),
    ),
    "guarded and observed": gx.observe(
        gx.skip_spikes(gx.skip_nonfinite(gx.chain(gx.clip_by_zscore(warmup=4), gx.adamw(0.02))), window=8)
    ),
    "stochastic rounding": gx.stochastic_rounding(gx.adamw(0.02), 0),
    "compensated": gx.compensated(gx.adamw(0.02), "int8"),
    "8-bit moments": gx.quantize_state(gx.adamw(0.02), min_size=256),
    "master weights": gx.master_weights(gx.accumulate(gx.adamw(0.02), every=4)),
}
LOW_PRECISION = {"stochastic rounding", "compensated", "master weights"}
SET_BEFORE_SAVING = {"live": {"learning_rate": 0.01}}


@functools.cache
def batches():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    return [(images[i : i + 16], jnp.asarray(labels[i : i + 16])) for i in range(0, 16 * STEPS, 16)]


def start(name):
    draw, dtype = np.random.default_rng(0).normal, jnp.bfloat16 if name in LOW_PRECISION else jnp.float32
    return {
        "hidden": {"kernel": jnp.asarray(draw(size=(64, 16)) / 8, dtype), "bias": jnp.zeros(16, dtype)},
        "digits": {"kernel": jnp.asarray(draw(size=(16, 10)) / 4, dtype), "bias": jnp.zeros(10)},
    }


def loss(params, batch):
    images, labels = batch
    params = jax.tree.map(jnp.float32, params)
    hidden = jnp.tanh(images @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = hidden @ params["digits"]["kernel"] + params["digits"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Run:
    """Training with one optimizer: its middle, its end, and how often the step was traced."""

    def __init__(self, name):
        self.tx, self.traced, self.step = OPTIMIZERS[name], 0, jax.jit(self._step)
        params, state = self.train(start(name), self.tx.init(start(name)), range(INTERRUPTED))
        self.middle = params, gx.set_hyperparams(state, SET_BEFORE_SAVING.get(name, {}))
        self.end = self.train(*self.middle, range(INTERRUPTED, STEPS))

    def _step(self, params, state, batch):
        self.traced += 1
        updates, state = self.tx.update(jax.grad(loss)(params, batch), state, params)
        return gx.apply_updates(params, updates), state

    def train(self, params, state, steps):
        for index in steps:
            params, state = self.step(params, state, batches()[index])
        return params, state


@functools.cache
def run_of(name):
    return Run(name)


every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def through_orbax(saved, template, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "middle", saved)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "middle", template)


def through_flax(saved, template, folder):
    (folder / "middle").write_bytes(flax.serialization.to_bytes(saved))
    return flax.serialization.from_bytes(template, (folder / "middle").read_bytes())


def through_equinox(saved, template, folder):
    eqx.tree_serialise_leaves(folder / "middle.eqx", saved)
    return eqx.tree_deserialise_leaves(folder / "middle.eqx", template)


# Orbax takes seconds, so it gets the states that differ in kind
WAYS = [
    *((name, through) for name in OPTIMIZERS for through in (through_flax, through_equinox)),
    *((name, through_orbax) for name in ("live", "groups", "guarded and observed", "8-bit moments", "master weights")),
]


@pytest.mark.parametrize(("name", "through"), WAYS, ids=lambda value: getattr(value, "__name__", value))
def test_an_interrupted_run_ends_where_the_other_does(name, through, tmp_path):
    run = run_of(name)
    params = jax.eval_shape(functools.partial(start, name))
    restored = through(run.middle, (params, jax.eval_shape(run.tx.init, params)), tmp_path)
    ended = run.train(*restored, range(INTERRUPTED, STEPS))
    assert jax.tree.structure(ended) == jax.tree.structure(run.end)
    for one, other in zip(*map(jax.tree.leaves, (ended, run.end)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert run.traced == 1


@every_optimizer
def test_a_run_that_continues_without_its_state_ends_elsewhere(name):
    run = run_of(name)
    params, _ = run.middle
    ended, _ = run.train(params, run.tx.init(params), range(INTERRUPTED, STEPS))
    for first, one, other in zip(*map(jax.tree.leaves, (start(name), ended, run.end[0])), strict=True):
        assert (one != other).any() or (first == other).all(), "only a frozen leaf is the same"
