"""Complex leaves count by their magnitudes: first moments are complex, second moments are |g|², and phases stay.

torch takes the real and the imaginary part as two real parameters; `optax.contrib.split_real_and_imaginary` does that
with any transformation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform.catalog import evaluate
from tests.support.tables import ANY_LEAF, OPTIMIZERS, counterparts, entry_of
from tests.support.trees import LOSS, STEPS, assert_same, walk
from tests.twins import elementwise as twins

pytestmark = pytest.mark.once

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

PARAMS = {"w": jnp.asarray([1.0, -2.0]), "z": jnp.asarray([1 + 2j, -0.5j, 3.0], jnp.complex64)}
GRADS = {"w": jnp.asarray([0.3, 12.0]), "z": jnp.asarray([3 - 4j, 0, 0.1j], jnp.complex64)}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def example(dtype):
    """A real and a complex leaf; the parts of each complex element differ in size by up to 10⁴."""
    return tuple({"w": x, "z": x + 1j * np.flip(x, -1)} for x in twins.example(dtype, steps=20))


def assert_near(path, their_path, bound):
    """Relative to the largest that an element has been, or to 1."""
    for name, leaf in path.items():
        theirs = np.asarray(their_path[name])
        assert leaf.dtype == theirs.dtype
        assert (np.abs(leaf - theirs) / np.maximum(1, np.abs(theirs).max(axis=0))).max() <= bound


@every_optimizer
def test_first_moments_are_complex_and_second_moments_real(name):
    state = OPTIMIZERS[name].init(PARAMS)
    of_leaves = [field for field in state._fields if isinstance(getattr(state, field), dict)]
    kinds = {field: leaf.dtype for field in of_leaves if hasattr(leaf := getattr(state, field)["z"], "dtype")}
    assert kinds == {field: jnp.float32 if field.startswith("nu") else jnp.complex64 for field in kinds}


# By magnitudes, as optax


# In optax the inner products of Prodigy and L-BFGS are complex, and are no lengths: so is a real leaf's update then.
COMPLEX_IN_OPTAX = [entry for entry in ANY_LEAF if entry.name not in ("prodigy", "lbfgs")]


@counterparts("optax", COMPLEX_IN_OPTAX)
def test_same_walk_as_optax(entry, ours, theirs):
    if entry.name == "adafactor":  # whose momentum is real in optax
        ours, theirs = (call.replace("momentum=β, ", "") for call in (ours, theirs))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # optax multiplies integer counts by floats
        path, their_path = (twins.walk(tx, *example("float64")) for tx in (evaluate(ours), evaluate(theirs, optax)))
    # both round θ and the moments at each of twenty steps, by 2⁻⁵³; optax keeps Adafactor's decay in float32
    assert_near(path, their_path, 1e-6 if entry.name == "adafactor" else 1e-14)


# By parts, as torch


@counterparts("torch", ANY_LEAF)
def test_split_into_parts_it_is_the_same_walk_as_torch(entry, ours, theirs, dtype):
    torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
    from tests.support.torch import Deferred, walk_in_torch

    their_path = walk_in_torch(evaluate(theirs, torch, optim=Deferred(torch.optim)), *example(dtype))
    with jax.numpy_dtype_promotion("standard"):  # optax joins the parts by a product with 1j
        path = twins.walk(optax.contrib.split_real_and_imaginary(evaluate(ours)), *example(dtype))
    # both round θ and the moments at each of twenty steps; torch keeps NAdam's product of β₁ in float32 always
    assert_near(path, their_path, 1e-14 if dtype == "float64" and "NAdam" not in theirs else 2e-6)


@every_optimizer
def test_split_into_parts_each_part_is_a_leaf(name):
    def split(tree):
        return {"w": tree["w"], "x": tree["z"].real, "y": tree["z"].imag}

    gradients, tx = jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), GRADS), OPTIMIZERS[name]
    # optax's wrapper hands on no extra argument
    told = optax.GradientTransformation(tx.init, functools.partial(tx.update, value=LOSS))
    with jax.numpy_dtype_promotion("standard"):
        whole, _ = walk(optax.contrib.split_real_and_imaginary(told), PARAMS, gradients)
    parts, _ = walk(tx, split(PARAMS), split(gradients))
    for update, expected in zip(whole, parts, strict=True):
        assert_same(split(update), expected)


def test_split_into_parts_a_pattern_names_each_part():
    tx = optax.contrib.split_real_and_imaginary(gx.add_decoupled_weight_decay(0.5, mask="z/(real|imaginary)"))
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    assert_same(updates, {"w": zero["w"], "z": 0.5 * PARAMS["z"]})


# Mixed trees


def test_clip_by_value_keeps_the_phase():
    grads = jnp.asarray([3 + 4j, -0.3 - 0.4j, 0, 3e30 - 4e30j], jnp.complex64)
    clipped, _ = gx.clip_by_value(1.0).update(grads, gx.clip_by_value(1.0).init(grads))
    # a magnitude, a quotient and a product: three roundings of 2⁻²⁴, and one more of the root
    np.testing.assert_allclose(clipped, [0.6 + 0.8j, -0.3 - 0.4j, 0, 0.6 - 0.8j], rtol=3e-7)


@pytest.mark.parametrize(("clip", "divisors"), [(gx.clip_by_global_norm, (13, 13)), (gx.clip_by_leaf_norm, (12, 5))])
def test_a_norm_counts_both_parts(clip, divisors):
    grads = {"w": jnp.asarray([12.0]), "z": jnp.asarray([3j, 4.0], jnp.complex64)}
    clipped, _ = clip(1.0).update(grads, clip(1.0).init(grads))
    for leaf, divisor in zip("wz", divisors, strict=True):
        np.testing.assert_allclose(clipped[leaf], grads[leaf] / divisor, rtol=3e-7)  # as in the test before


@every_optimizer
def test_accumulated_gradients_act_by_their_complex_mean(name):
    tx = gx.accumulate(OPTIMIZERS[name], every=2)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    twice = jax.tree.map(lambda leaf: 2 * leaf, GRADS)
    (first, second), _ = walk(tx, PARAMS, jax.tree.map(lambda *leaves: jnp.stack(leaves), zero, twice), steps=2)
    assert_same(first, zero)
    assert_same(second, OPTIMIZERS[name].update(GRADS, OPTIMIZERS[name].init(PARAMS), PARAMS, value=LOSS)[0])


@pytest.mark.parametrize("mask", ["z", lambda path, leaf: jnp.iscomplexobj(leaf)], ids=["pattern", "predicate"])
def test_masks_choose_among_real_and_complex_leaves(mask):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(0.5, weight_decay=0.5, mask=mask))
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    assert_same(updates, {"w": zero["w"], "z": -0.25 * PARAMS["z"]})


# Dtypes that differ


@pytest.mark.parametrize("transform", [lambda update: update, jax.jit], ids=["eager", "compiled"])
@every_optimizer
def test_a_complex_gradient_of_a_real_parameter_is_refused_by_name(name, transform):
    tx = OPTIMIZERS[name]
    grads = GRADS | {"w": GRADS["w"].astype(jnp.complex64)}
    with pytest.raises(TypeError, match=r"updates\['w'\] is complex64, params\['w'\] is float32; take the real part"):
        transform(tx.update)(grads, tx.init(PARAMS), PARAMS, value=LOSS)


@every_optimizer
def test_a_real_gradient_of_a_complex_parameter_has_no_imaginary_part(name):
    grads = GRADS | {"z": GRADS["z"].real}
    explicit = GRADS | {"z": GRADS["z"].real.astype(jnp.complex64)}
    tx = OPTIMIZERS[name]
    ours, expected = (tx.update(g, tx.init(PARAMS), PARAMS, value=LOSS) for g in (grads, explicit))
    assert_same(ours, expected)


def test_a_python_complex_number_is_a_leaf():
    updates, _ = gx.adam(0.1).update(3 + 4j, gx.adam(0.1).init(1j), 1j)
    np.testing.assert_allclose(updates, -0.06 - 0.08j, rtol=5e-7)  # Adam is exact to eight roundings of 2⁻²⁴


# Descent


TARGET = 1 + 2j


def descend(tx, conjugate, steps):
    def step(_, carry):
        z, state = carry
        grad = jax.grad(lambda z: jnp.abs(z - TARGET) ** 2)(z)
        update, state = tx.update(conjugate(grad), state, z, value=LOSS)
        return gx.apply_updates(z, update), state

    start = jnp.asarray(1.7 + 1.5j, jnp.complex64)
    return jax.jit(lambda: jax.lax.fori_loop(0, steps, step, (start, tx.init(start)))[0])()


@every_optimizer
def test_the_conjugate_of_jaxs_gradient_points_uphill(name):
    tx = OPTIMIZERS[name]
    if "schedule_free" not in name:
        # with the rate falling to zero, even steps that keep their length end nearer than one of them
        tx = gx.chain(tx, gx.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 400)))
    assert abs(descend(tx, jnp.conj, 400) - TARGET) < 1e-2


def test_jaxs_gradient_itself_does_not():
    moved = descend(gx.sgd(0.1), lambda grad: grad, 10)
    assert abs(moved.imag - TARGET.imag) > abs(1.5 - TARGET.imag)


# At the ends of the range


@pytest.mark.parametrize("value", [complex(1, np.inf), complex(1, -np.inf), complex(np.inf, 1), complex(1, np.nan)])
@every_optimizer
def test_a_part_that_is_not_finite_shows(name, value):
    grads = jnp.asarray(np.array([[value, 1 + 1j]], np.complex64))
    (update,), _ = walk(OPTIMIZERS[name], jnp.zeros(2, jnp.complex64), grads, steps=1)
    # Adafactor bounds the size of each leaf itself, which is unknown then
    assert jnp.isfinite(update).tolist() == [False, "clipping_threshold" not in entry_of(name).arguments]


@pytest.mark.parametrize("size", [1e14, 1e20, 1e37])
@every_optimizer
def test_huge_gradients_keep_their_phase(name, size):
    grads = jnp.asarray(size * np.exp(1j * np.array([0.3, 1.5, -3.0])), jnp.complex64)
    # of so high a loss as gradients, for Polyak's steps are their quotient
    updates, _ = walk(OPTIMIZERS[name], jnp.zeros_like(grads), jnp.stack([grads, grads]), steps=2, value=size)
    for update in updates[1:] if entry_of(name).name == "soap" else updates:  # whose first step is 0
        turned = np.angle(np.asarray(update, complex) / -np.asarray(grads, complex))
        assert np.abs(turned).max() < 1e-6  # a few roundings of 2⁻²⁴


@pytest.mark.parametrize("gradient", [jnp.float64, jnp.complex128])
def test_a_complex_update_too_large_for_the_params_becomes_the_largest_they_hold(gradient):
    with jax.enable_x64(True):
        params, grads = jnp.zeros(2, jnp.complex64), jnp.asarray([1e300, -1e300], gradient)
        updates, _ = walk(gx.sgd(0.1), params, grads[None], steps=1)
        np.testing.assert_array_equal(updates[0].real, np.finfo(np.float32).max * np.array([-1, 1], np.float32))
