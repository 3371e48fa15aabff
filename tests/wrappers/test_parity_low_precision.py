"""The same low-precision parameters and residuals as FlashOptim and Kahan summation in pytorch_optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

pytestmark = pytest.mark.once

torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="it comes with torch")
flash = pytest.importorskip("pytorch_optimizer.optimizer.flash_adamw", reason="it comes with torch")

RANDOM = np.random.default_rng(0)
# numbers of every size, the smallest below the normal numbers of float16; powers of two, ties and what is beside them
VALUES = np.concatenate(
    [
        RANDOM.normal(size=20_000) * 10.0 ** RANDOM.uniform(-7, 4, 20_000),
        [0.0, 1.0, -1.0, 1 - 2**-9, 1 - 2**-10, 1 + 2**-8, -1 - 2**-11, 2**-14, 2**-24, 3 * 2**-25],
    ]
).astype(np.float32)
PARTS = {"int8": 127, "int16": 32767}

both = pytest.mark.parametrize("residual", PARTS)
every_low = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def split(residual, dtype):
    """VALUES as parameters of `dtype` and a state with their residuals, by one step from zero."""
    tx, zeros = gx.compensated(gx.sgd(1.0), residual), jnp.zeros(VALUES.shape, dtype)
    updates, state = tx.update(-jnp.asarray(VALUES), tx.init(zeros), zeros)
    return gx.apply_updates(zeros, updates), state


def in_torch(x):
    """A tensor of the same dtype and numbers."""
    dtype = getattr(torch, str(x.dtype))
    return torch.from_numpy(np.array(x.astype(jnp.float32) if x.dtype.itemsize < 4 else x)).to(dtype)


def in_double(tensor):
    return tensor.detach().double().numpy()


@every_low
@both
def test_parameters_are_the_same_and_residuals_differ_by_a_part_at_most(residual, dtype):
    params, state = split(residual, dtype)
    values = torch.from_numpy(VALUES.copy())
    np.testing.assert_array_equal(in_double(in_torch(params)), in_double(values.to(getattr(torch, dtype))))
    theirs = flash.compute_ecc_bits(values, in_torch(params), 2 + np.dtype(residual).itemsize).numpy().astype(int)
    difference = np.asarray(state.residual).astype(int) - theirs
    assert state.residual.dtype == residual
    if residual == "int16":
        assert (difference == 0).all()
    else:
        # theirs is the nearest part, ours one of the two beside the value at random: a quarter of them differs, but
        # not the same way on average, so that five standard errors are 2.5 over the root of their number
        assert set(np.unique(difference)) == {-1, 0, 1}
        assert abs(difference.mean()) <= 2.5 / np.sqrt(len(VALUES))


@every_low
@both
def test_both_decode_the_same_value(residual, dtype):
    params, state = split(residual, dtype)
    stay = optax.GradientTransformation(
        lambda params: params, lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), params)
    )
    wide = params.astype(jnp.float32)
    ours = gx.compensated(stay, residual).update(wide, state._replace(inner=wide), params)[1].inner
    theirs = flash.reconstruct_fp32_param(in_torch(params), torch.from_numpy(np.array(state.residual)))
    # the residual times half a step over its parts, in two orders, and a sum: some roundings to float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2.0**-22, atol=0)


# Without memory, Adam is a step of α along the gradient's sign: the same as SGD with gradients of ±1, of which both
# libraries' arithmetic in bfloat16 loses nothing but what the parameter and its residual cannot hold.
STEPS, RATE = 300, 1e-3
SIGNS = np.where(RANDOM.random((STEPS, 256)) < 0.75, 1.0, -1.0)
STARTS = np.linspace(1.0, 1.992, 256).astype(jnp.bfloat16).astype(np.float64)


def walk(tx):
    params = jnp.asarray(STARTS, jnp.bfloat16)

    def step(carry, signs):
        updates, state = tx.update(signs, carry[1], carry[0])
        params = gx.apply_updates(carry[0], updates)
        return (params, state), params

    _, path = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(SIGNS, jnp.bfloat16))
    return np.asarray(path).astype(np.float64)


def walk_in_torch(build):
    param = torch.nn.Parameter(torch.from_numpy(STARTS.copy()).bfloat16())
    optimizer, path = build([param]), []
    for signs in SIGNS:
        param.grad = torch.from_numpy(signs.copy()).bfloat16()
        optimizer.step()
        path.append(in_double(param).copy())
    return np.stack(path)


def stable_adamw(params):
    return pytorch_optimizer.StableAdamW(params, lr=RATE, betas=(0.0, 0.0), kahan_sum=True, weight_decay=0.0)


def flash_adamw(bits):
    return lambda params: pytorch_optimizer.FlashAdamW(
        params, lr=RATE, betas=(0.0, 0.0), weight_decay=0.0, quantize=False, master_weight_bits=bits
    )


@pytest.mark.parametrize(
    ("residual", "reference"),
    [("bfloat16", stable_adamw), ("int8", flash_adamw(24)), ("int16", flash_adamw(32))],
    ids=["Kahan's sum", "24 bits", "32 bits"],
)
def test_both_stay_within_an_ulp_of_the_float64_walk(residual, reference):
    exact = STARTS - RATE * np.cumsum(SIGNS, axis=0)
    ulp = 2.0 ** (np.floor(np.log2(exact)) - 7)
    paths = {"ours": walk(gx.compensated(gx.sgd(RATE), residual)), "theirs": walk_in_torch(reference)}
    # half an ulp is the parameter's own rounding. A step is 32.5 parts of an int8 residual; to nearest, as theirs
    # is, it is half a part short or long every time, which adds up
    limits = {"ours": 1.0, "theirs": 2.0 if residual == "int8" else 1.0}
    for whose, path in paths.items():
        assert (np.abs(path - exact) <= limits[whose] * ulp).all(), whose
    plain = walk(gx.sgd(RATE))
    assert (plain == STARTS).all()
    assert np.abs(plain - exact).max() > 20 * ulp.max()
