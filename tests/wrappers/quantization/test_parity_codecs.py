"""The same codes, scales and steps as torchao and FlashOptim, in PyTorch and in JAX, where they overlap."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform.wrappers.quantization.codecs import CODECS
from gradxform.wrappers.quantization.codecs.maps import dynamic_map

pytestmark = pytest.mark.once

torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
pytest.importorskip("torchao", reason="it comes with torch")
pytest.importorskip("flashoptim_jax", reason="it comes with torch")
with warnings.catch_warnings():  # of extensions for GPUs that cannot be loaded
    warnings.simplefilter("ignore")
    from flashoptim_jax import quantization as flash_jax
    from pytorch_optimizer.optimizer import flash_adamw
    from torchao.optim import subclass_4bit, subclass_8bit
    from torchao.optim.adam import single_param_adam

RANDOM = np.random.default_rng(0)
there = jax.jit(lambda codec, blocks: codec.encode(blocks.reshape(-1)), static_argnums=0)
back = jax.jit(lambda codec, *coded: codec.decode(*coded), static_argnums=0)
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "non_negative"])


def example(codec, rows=256):
    """Numbers of six decades in each block, and blocks of several sizes."""
    x = RANDOM.normal(size=(rows, codec.block)) * 10.0 ** RANDOM.uniform(-3, 0, (rows, codec.block))
    x *= 10.0 ** RANDOM.uniform(-2, 2, (rows, 1))
    return (x if codec.signed else x * x).astype(np.float32)


@both_signs
@pytest.mark.parametrize(("name", "theirs"), [("dynamic8", subclass_8bit), ("dynamic4", subclass_4bit)])
def test_dynamic_codes_are_those_of_torchao(name, theirs, signed):
    codec = CODECS[name](signed)
    numbers = theirs.get_qmap_signed() if signed else theirs.get_qmap_unsigned()
    np.testing.assert_array_equal(codec.map, np.asarray(numbers, np.float32))
    blocks = example(codec)
    codes, scales = there(codec, blocks)
    state = theirs.OptimState8bit if name == "dynamic8" else theirs.OptimState4bit
    quantized = state.zeros(blocks.size, signed, codec.block)
    quantized.copy_(torch.from_numpy(blocks.reshape(-1)))
    np.testing.assert_array_equal(scales, quantized.scale.numpy())
    ours, others = np.array(codes).reshape(-1), quantized.codes.numpy()
    if name == "dynamic8" and not signed:  # positive numbers that they code as 0
        assert (ours[(ours != others)] == 1).all()
        assert (others[(ours != others)] == 0).all()
        others = np.where(blocks.reshape(-1) > 0, np.maximum(others, 1), others)
    np.testing.assert_array_equal(ours, others)
    quantized.codes.copy_(torch.from_numpy(ours))
    np.testing.assert_array_equal(np.asarray(back(codec, codes, scales)).reshape(-1), quantized.dequantize().numpy())


def test_dynamic_maps_are_those_of_bitsandbytes():
    # bitsandbytes 0.50.2, functional.create_dynamic_map(signed): the float32 bits of all 256 numbers, hashed
    for signed, known in ((True, BITSANDBYTES[0]), (False, BITSANDBYTES[1])):
        bits = dynamic_map(7, signed).view(np.uint32).astype(np.uint64)
        assert int((bits * np.arange(1, 257, dtype=np.uint64)).sum() % np.uint64(2**61 - 1)) == known


BITSANDBYTES = (51200865550848, 34477682547726)


@both_signs
def test_companded_codes_are_those_of_flashoptim(signed):
    codec = CODECS["companded8"](signed)
    blocks = example(codec, rows=2048)
    codes, scales = map(np.asarray, there(codec, blocks))
    decoded = np.asarray(back(codec, codes, scales)).reshape(-1)
    flat = torch.from_numpy(blocks.reshape(-1))
    form = (True, False, True) if signed else (False, True, False)
    in_torch = [one.numpy() for one in flash_adamw.quantize_state(flat, *form)]
    quantize = flash_jax.quantize_momentum if signed else flash_jax.quantize_variance
    dequantize = flash_jax.dequantize_momentum if signed else flash_jax.dequantize_variance
    in_jax = quantize(jnp.asarray(blocks.reshape(-1)))
    for values, widths in (in_torch, (np.asarray(in_jax.values), np.asarray(in_jax.scales))):
        # a float32 root can lie half-way between two float16 numbers, and not all processors round it alike
        same = scales == widths
        assert same.mean() > 0.995
        np.testing.assert_array_max_ulp(scales, widths, maxulp=1)
        others = values if signed else np.where(blocks.reshape(-1) > 0, np.maximum(values, 1), values)
        # quotients of float32 in another order: a number between two codes can fall to either
        apart = np.abs(codes.astype(int) - others.reshape(-1)).reshape(blocks.shape)[same]
        assert (apart != 0).mean() < 1e-4
        assert apart.max() <= 1
    # some float32 roundings in another order
    theirs = dequantize(flash_jax.QuantizedArray(jnp.asarray(codes.reshape(-1)), jnp.asarray(scales)))
    np.testing.assert_allclose(decoded, theirs, rtol=1e-6)
    theirs = flash_adamw.dequantize_state(
        *(torch.from_numpy(some.copy()) for some in (codes.reshape(-1), scales)), *form
    )
    np.testing.assert_allclose(decoded, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["dynamic8", "dynamic4"])
def test_adamw_walks_with_that_of_torchao(name):
    steps, rate, decay = 10, 1e-2, 0.1
    theta = RANDOM.normal(size=(16, 512)).astype(np.float32)
    gradients = [RANDOM.normal(size=theta.shape).astype(np.float32) for _ in range(steps)]
    tx = gx.quantize_state(gx.adamw(rate, weight_decay=decay), name, rounding="nearest")
    params, state, update = jnp.asarray(theta), tx.init(jnp.asarray(theta)), jax.jit(tx.update)
    zeros = subclass_8bit.OptimState8bit.zeros if name == "dynamic8" else subclass_4bit.OptimState4bit.zeros
    block = CODECS[name].block
    theirs, mu, nu = torch.from_numpy(theta.copy()), zeros(theta.shape, True, block), zeros(theta.shape, False, block)
    if name == "dynamic4":  # begins at a 16th of 1e-12, which is nothing
        nu.scale.zero_()
    for number, gradient in enumerate(gradients, 1):
        step, lr = torch.tensor(float(number)), torch.tensor(rate)
        single_param_adam(
            theirs, torch.from_numpy(gradient), step, mu, nu, None, lr, 0.9, 0.999, decay, 1e-8, True, False
        )
        updates, state = update(jnp.asarray(gradient), state, params)
        params = gx.apply_updates(params, updates)
        # float32 in another order: what falls between two codes can take either, a step of at most the rate apart
        far = np.abs(np.asarray(params) - theirs.numpy()) > 1e-6
        assert far.mean() < 2e-3
        assert np.abs(np.asarray(params) - theirs.numpy()).max() < rate
        for ours, others in ((state.codes["mu"], mu), (state.codes["nu"], nu)):
            different = np.asarray(ours).reshape(-1) != others.codes.numpy().reshape(-1)
            assert different.mean() < 2e-3
