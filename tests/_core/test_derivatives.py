"""Steps have derivatives in both directions, for meta-learning and rates that are learned: those of plain formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from tests.support.tables import OPTIMIZERS, entry_of
from tests.support.trees import LOSS, assert_same

pytestmark = pytest.mark.once

CLIPS = {"global": gx.clip_by_global_norm(1.0), "leaf": gx.clip_by_leaf_norm(1.0)}
every_clip = pytest.mark.parametrize("clip", CLIPS)


def draw(seed, shapes, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return [jnp.asarray(3 + random.normal(size=shape), dtype) for shape in shapes]  # longer than they are clipped to


def weighted(leaves):
    """A sum in which no two elements count alike."""
    return sum(jnp.sum(jnp.sin(1 + jnp.arange(leaf.size, dtype=leaf.dtype)) * leaf.ravel()) for leaf in leaves)


@pytest.mark.parametrize("shapes", [[(3,), (3,), (2, 2)], [(70_000,), (3,)]], ids=["small", "large"])
@every_clip
def test_a_clip_has_the_derivatives_of_its_formula(clip, shapes):
    tx, grads, way = CLIPS[clip], draw(0, shapes), draw(1, shapes)

    def clipped(grads):
        return weighted(tx.update(grads, tx.init(grads))[0])

    def formula(grads):
        groups = [grads] if clip == "global" else [[grad] for grad in grads]
        norms = [jnp.sqrt(sum(jnp.sum(grad * grad) for grad in group)) for group in groups]
        return weighted([grad / norm for group, norm in zip(groups, norms, strict=True) for grad in group])

    expected = jax.grad(formula)(grads)
    for transform in (lambda call: call, jax.jit):
        for one, other in zip(transform(jax.grad(clipped))(grads), expected, strict=True):
            # sums of up to 70,000 float32 numbers in another order
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    ours, theirs = (jax.jvp(call, (grads,), (way,))[1] for call in (clipped, formula))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@every_clip
def test_a_clip_of_complex_leaves_has_the_derivative_of_that_of_their_parts(clip):
    tx, parts = CLIPS[clip], draw(0, [(3,), (3,)])

    def clipped(parts):
        z = {"z": jax.lax.complex(*parts)}
        update = tx.update(z, tx.init(z))[0]["z"]
        return weighted([update.real, update.imag])

    def formula(parts):
        norm = jnp.sqrt(sum(jnp.sum(part * part) for part in parts))
        return weighted([part / norm for part in parts])

    for one, other in zip(jax.grad(clipped)(parts), jax.grad(formula)(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@every_clip
def test_the_derivative_of_a_norm_of_zero_is_zero(clip):
    def clipped(grad):
        leaves = {"a": grad, "b": grad}
        return CLIPS[clip].update(leaves, CLIPS[clip].init(leaves))[0]["a"].sum()

    assert_same(jax.grad(clipped)(jnp.zeros(3)), jnp.ones(3))


def test_the_learning_rate_of_clipped_steps_has_a_derivative():
    tx = gx.chain(gx.clip_by_global_norm(1.0), gx.sgd(gx.live(0.1)))

    def after(rate):
        params = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray(0.0)}
        state = gx.set_hyperparams(tx.init(params), learning_rate=rate)
        for _ in range(3):
            params, state = gx.step(tx, params, state, params)
        return jnp.linalg.norm(params["a"])

    # the norm is 5, and each step takes the rate from it, for the gradient is the parameter, clipped to 1
    assert np.isclose(after(0.1), 4.7)
    assert np.isclose(jax.grad(after)(0.1), -3.0)


def smooth(name):
    """Not Lion, for a sign has no derivative at 0; nor noise, beside which so small a gradient is lost."""
    return entry_of(name).name != "lion" and "key" not in entry_of(name).arguments


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if smooth(name)])
def test_the_derivative_of_a_step_where_gradients_are_zero_is_that_of_the_formula(name):
    tx, width = OPTIMIZERS[name], 1e-20  # far below every ε, and the root of Adafactor's, which is 1e-15
    with jax.enable_x64(True):

        def moved(grad):
            updates, _ = tx.update(grad, tx.init(grad), jnp.zeros(2), value=LOSS)
            return weighted([updates])

        slope = jax.grad(moved)(jnp.zeros(2))
        expected = [moved(width * unit) / width for unit in jnp.eye(2)]
    # what the width still is beside ε, of which the smallest is 1e-10
    np.testing.assert_allclose(slope, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "wrap",
    [
        gx.skip_nonfinite,
        gx.skip_spikes,
        gx.observe,
        lambda tx: gx.accumulate(tx, every=2),
        lambda tx: gx.quantize_state(tx, "bfloat16", min_size=1, rounding="nearest"),
    ],
    ids=["skip_nonfinite", "skip_spikes", "observe", "accumulate", "quantize_state"],
)
def test_a_derivative_goes_through_every_wrapper(wrap):
    tx = wrap(gx.chain(gx.clip_by_global_norm(1.0), gx.momentum(gx.live(0.1), 0.5)))

    def after(rate):
        params = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.zeros(2)}
        state = gx.set_hyperparams(tx.init(params), learning_rate=rate)
        for _ in range(2):
            params, state = gx.step(tx, params, state, params)
        return jnp.sum(jnp.square(params["a"]))

    rate, width = 0.1, 1e-2
    slope = (after(rate + width) - after(rate - width)) / (2 * width)
    # the difference of two float32 numbers near 25 has three digits
    np.testing.assert_allclose(jax.jit(jax.grad(after))(rate), slope, rtol=5e-3)
