"""`gx.step` is `update` and `apply_updates` in one, and what is skipped or not due stays as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support.trees import assert_same

pytestmark = pytest.mark.quick

PARAMS = {
    "embed": jnp.asarray(np.random.default_rng(0).normal(size=(16, 32)), jnp.float32),
    "layers": [{"kernel": jnp.asarray([[3.0, 4.0], [-1.0, 0.5]]), "bias": jnp.ones(2)} for _ in range(2)],
}
GRADIENTS = [jax.tree.map(lambda leaf, scale=scale: scale * leaf + 0.5, PARAMS) for scale in (1.0, -3.0, 0.25, 2.0)]
BAD = jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)

CLIPPED = gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.1, weight_decay=0.1))
GROUPED = gx.by_path({"embed": gx.freeze(), ".*bias": {"weight_decay": 0.0}}, default=CLIPPED)
TRANSFORMATIONS = {
    "clipped": CLIPPED,
    "nothing": gx.identity(),
    "bfloat16 moments": gx.adam(0.1, state_dtype="bfloat16"),
    "guarded groups": gx.skip_nonfinite(GROUPED),
    "guarded twice": gx.skip_spikes(gx.skip_nonfinite(gx.clip_by_zscore()), window=2),
    "gradient observed": gx.observe(gx.skip_nonfinite(CLIPPED), of="gradient"),
    "accumulated": gx.accumulate(gx.skip_nonfinite(CLIPPED), every=2),
    "guarded accumulation": gx.skip_nonfinite(gx.accumulate(gx.sgd(0.1, momentum=0.9), every=2)),
    "coded": gx.quantize_state(gx.adamw(0.1), min_size=256),
    "looked up": gx.quantize_state(gx.adamw(0.1), "dynamic8", min_size=256),
    "guarded codes": gx.skip_nonfinite(gx.quantize_state(CLIPPED, min_size=256)),
    "coded guard": gx.quantize_state(gx.skip_nonfinite(gx.adamw(0.1)), min_size=256),
    "foreign last": gx.chain(gx.scale_by_momentum(0.9), optax.scale(-0.1)),
    "guarded foreign": gx.skip_nonfinite(gx.by_path({"embed": optax.sgd(0.1, momentum=0.9)}, default=gx.adamw(0.1))),
    "optax": optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_step_is_update_and_apply_updates(name):
    tx = TRANSFORMATIONS[name]

    @jax.jit
    def two_lines(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return gx.apply_updates(params, updates), state

    @jax.jit
    def one_line(params, state, grads):
        return gx.step(tx, grads, state, params)

    expected = actual = PARAMS, tx.init(PARAMS)
    for grads in (*GRADIENTS[:2], BAD, *GRADIENTS[2:]):
        expected, actual = two_lines(*expected, grads), one_line(*actual, grads)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            # the same operations; where XLA fuses them otherwise, a product and a sum may round once in place of twice
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert jax.tree.structure(expected) == jax.tree.structure(actual)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_step_rounds_low_precision_parameters_once(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    tx = gx.adamw(0.1)
    new, _ = gx.step(tx, params, tx.init(params), params)
    wide, _ = gx.step(tx, jax.tree.map(jnp.float32, params), tx.init(params), jax.tree.map(jnp.float32, params))
    assert_same(new, jax.tree.map(lambda leaf: leaf.astype(dtype), wide))


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if "guard" in name and name != "coded guard"])
def test_a_skipped_step_changes_no_bit(name):
    tx = TRANSFORMATIONS[name]
    params, state = PARAMS, tx.init(PARAMS)
    for grads in GRADIENTS[:2]:
        params, state = jax.jit(lambda p, s, g: gx.step(tx, g, s, p))(params, state, grads)
    after, skipped = jax.jit(lambda p, s, g: gx.step(tx, g, s, p))(params, state, BAD)
    assert_same(after, params)
    if name != "guarded twice":
        assert_same(skipped.inner, state.inner)
    assert jnp.sum(skipped.skipped) == 1 or name == "guarded twice"


def test_the_update_of_a_skipped_step_leaves_minus_zero():
    params = jnp.asarray([-0.0, 1.0])
    tx = gx.skip_nonfinite(gx.adamw(0.1))
    new, _ = gx.step(tx, jnp.asarray([jnp.nan, 1.0]), tx.init(params), params)
    assert_same(new, params)
    assert np.signbit(new[0])


def test_between_steps_accumulation_leaves_parameters_alone():
    tx = gx.accumulate(gx.adamw(0.1), every=3)
    params, state = PARAMS, tx.init(PARAMS)
    train = jax.jit(lambda p, s, g: gx.step(tx, g, s, p))
    for number, grads in enumerate(GRADIENTS, start=1):
        before = params
        params, state = train(params, state, grads)
        assert int(state.pending) == number % 3
        if number != 3:
            assert_same(params, before)


def test_a_moment_that_is_kept_must_be_one_of_the_state():
    def init(param):
        return {"mu": jnp.zeros_like(param)}

    def update(update, state, param, step):
        return step.keep("nu", update), state

    tx = gx.lift(init, update)
    with pytest.raises(ValueError, match=r"keeps 'nu', its init made \['mu'\]"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_a_rule_may_keep_its_moment_or_not():
    def init(param):
        return {"mu": jnp.zeros_like(param)}

    def plain(update, state, param, step):
        mu = state["mu"] + update
        return mu, {"mu": mu}

    def kept(update, state, param, step):
        mu = step.keep("mu", state["mu"] + update)
        return mu, {"mu": mu}

    one, other = (gx.skip_nonfinite(gx.lift(init, update)) for update in (plain, kept))
    states = [tx.init(jnp.ones(2)) for tx in (one, other)]
    for grads in (jnp.ones(2), jnp.asarray([jnp.nan, 1.0]), jnp.full(2, 3.0)):
        results = [tx.update(grads, state, jnp.ones(2)) for tx, state in zip((one, other), states, strict=True)]
        assert_same(*(updates for updates, _ in results))
        states = [state for _, state in results]
        assert_same(states[0].inner.mu, states[1].inner.mu)


def test_a_compiled_rule_knows_what_a_clip_just_before_it_lets_through():
    def limit_after(*stages):
        seen, leaf = [], jnp.ones(2)

        def update(update, state, param, step):
            seen.append(step.at_most)
            return update, state

        tx = gx.chain(*stages, gx.lift(None, update))
        jax.eval_shape(tx.update, leaf, tx.init(leaf))  # outside jit a bound is an argument, not known in advance
        return seen[-1]

    assert limit_after() == np.inf
    assert limit_after(gx.clip_by_global_norm(2.0)) == 2.0
    assert limit_after(gx.clip_by_leaf_norm(3)) == 3.0
    assert limit_after(gx.clip_by_value(0.5)) == 0.5
    assert limit_after(gx.clip_by_global_norm(2.0), gx.scale(4.0)) == np.inf
    assert limit_after(gx.clip_by_global_norm(gx.live(2.0))) == np.inf
    assert limit_after(optax.clip_by_global_norm(2.0)) == np.inf


def test_what_a_constant_clip_bounds_is_not_bounded_again():
    def text(tx):
        return str(jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS))

    clipped, live = (gx.chain(gx.clip_by_global_norm(limit), gx.adamw(0.1)) for limit in (1.0, gx.live(1.0)))
    beyond = gx.chain(gx.clip_by_value(1e30), gx.adamw(0.1))
    assert "clamp" not in text(clipped)
    assert all("clamp" in text(tx) for tx in (gx.adamw(0.1), live, beyond))
    for size in (1e-30, 1.0, 1e19, 1e30, 3e38, np.inf, np.nan):
        grads = jax.tree.map(lambda leaf, size=size: jnp.sign(leaf) * jnp.float32(size), PARAMS)
        (one, state), (other, expected) = (tx.update(grads, tx.init(PARAMS), PARAMS) for tx in (clipped, live))
        assert_same((one, state.mu, state.nu), (other, expected.mu, expected.nu))
        assert all(jnp.isfinite(leaf).all() == np.isfinite(size) for leaf in jax.tree.leaves((one, state.nu)))


def test_a_step_without_parameters_or_with_others_raises():
    tx = gx.sgd(0.1)
    with pytest.raises((TypeError, ValueError), match="params"):
        gx.step(tx, PARAMS, tx.init(PARAMS), None)
    with pytest.raises(ValueError, match="embed"):
        gx.step(tx, PARAMS, tx.init(PARAMS), {"layers": PARAMS["layers"]})
    with pytest.raises(TypeError, match="tx of step"):
        gx.step("adam", PARAMS, (), PARAMS)


# One norm of many leaves


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_the_norm_of_many_leaves_is_that_of_one_vector(scale):
    random = np.random.default_rng(0)
    shapes = [(3,)] * 70 + [(2, 4)] * 5 + [()] * 3 + [(70_000,)] * 2
    leaves = [jnp.asarray(scale * random.normal(size=shape), jnp.float32) for shape in shapes]
    expected = np.sqrt(sum(np.sum(np.asarray(leaf, float) ** 2) for leaf in leaves))
    tx = gx.observe(gx.identity())
    _, state = jax.jit(tx.update)(leaves, tx.init(leaves), leaves)
    # sums of 140,000 squares in float32, in runs
    np.testing.assert_allclose(gx.metrics(state)["grad_norm"], expected, rtol=2e-6)


@pytest.mark.parametrize("sizes", [(0.0, 1e-30), (1e-30, 1e30), (1e-15, 1e15), (1e30, 1e30)])
def test_the_norm_of_leaves_of_unlike_sizes(sizes):
    leaves = [jnp.full(shape, size) for shape, size in zip([(70_000,), (300, 300), (5,)], (*sizes, 0.0), strict=True)]
    expected = np.sqrt(sum(np.sum(np.asarray(leaf, float) ** 2) for leaf in leaves))
    tx = gx.observe(gx.identity())
    for some in (leaves, leaves[::-1]):
        _, state = jax.jit(tx.update)(some, tx.init(some), some)
        # the XLA of JAX 0.10.1 and before adds up in longer runs
        rtol = 2e-6 if jax.__version_info__ >= (0, 10, 2) else 5e-6
        np.testing.assert_allclose(gx.metrics(state)["grad_norm"], expected, rtol=rtol)


def test_leaves_alone_of_their_shape_are_measured_again_together():
    leaves = [jnp.ones((size,)) for size in (3, 4, 5, 70_000, 80_000, 90_000)]
    tx = gx.clip_by_global_norm(1.0)
    jaxpr = str(jax.make_jaxpr(tx.update)(leaves, tx.init(leaves), leaves))
    assert (jaxpr.count("while["), jaxpr.count("cond[")) == (1, 1)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_leaves_are_counted_among_many(bad):
    leaves = [jnp.ones(3)] * 40 + [jnp.ones((2, 2))] * 3 + [jnp.ones(70_000)]
    leaves[7], leaves[41], leaves[43] = (
        leaf.at[(0,) * leaf.ndim].set(bad) for leaf in (leaves[7], leaves[41], leaves[43])
    )
    tx = gx.observe(gx.identity(), of="gradient")
    for update in (tx.update, jax.jit(tx.update)):
        _, state = update(leaves, tx.init(leaves), leaves)
        assert gx.metrics(state)["nonfinite"] == 3
        assert not jnp.isfinite(gx.metrics(state)["grad_norm"])


def test_leaves_of_several_dtypes_have_one_norm():
    leaves = [jnp.ones(3), jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.complex64), jnp.ones(3)]
    tx = gx.clip_by_global_norm(1.0)
    updates, _ = tx.update(leaves, tx.init(leaves), leaves)
    np.testing.assert_allclose(updates[0], np.full(3, 12**-0.5), rtol=1e-6)
