"""Codes of one or two bytes: how far off they are, what stays as it was, and what they do at the ends of the range."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradxform.numerics.rounding import mix, random_bits, seed_for
from gradxform.wrappers.quantization.codecs import CODECS, Root8
from gradxform.wrappers.quantization.codecs.codec import largest_of, largest_of_written
from gradxform.wrappers.quantization.codecs.maps import dynamic_map, midpoints

pytestmark = pytest.mark.once

every_codec = pytest.mark.parametrize("codec", [codec(signed) for codec in CODECS.values() for signed in (True, False)])
RANDOM = np.random.default_rng(0)


def drawn(bits):
    """These bits for the numbers, and others made of them for the scales."""
    if bits is None:
        return None
    return lambda some: bits if some.shape == bits.shape else mix(bits.ravel()[: some.size]).reshape(some.shape)


there_and_back = jax.jit(lambda codec, x, bits: codec.decode(*codec.encode(x, drawn(bits))), static_argnums=0)


def through(codec, blocks, bits=None):
    return np.asarray(there_and_back(codec, jnp.asarray(blocks, jnp.float32), bits))


def width(codec):
    return codec.block if codec.block > 1 else 64


ROWS = 16  # of every array, so that each codec is compiled once


def example(codec, spread=1.0, rows=ROWS):
    """Numbers of several sizes in each block, and blocks of several sizes."""
    x = RANDOM.normal(size=(rows, width(codec))) * np.exp(spread * RANDOM.normal(size=(rows, width(codec))))
    x *= 10.0 ** RANDOM.uniform(-2, 2, (rows, 1))
    x[:, 0] = np.abs(x).max(1)  # the signed maps end at 1 above, and before −1 below
    return (x if codec.signed else x * x).astype(np.float32)


# Of a number x in a block whose largest is s, half the distance between the codes around it: half a 127th of s; half a
# 127th in roots; half a 127th of what is companded, of slope 1/2 at 0 and 2 at s; a 14th of its decade in the map, of
# which the coarsest has one number; and of the square roots of what is not negative.
BOUNDS = {
    ("root8", True): lambda x, s: np.sqrt(np.abs(x) * s) / 127 + s / 254**2,
    ("root8", False): lambda x, s: (
        2 * x**0.75 * s**0.25 / 255 * (1 + 2 / 255 * (s / np.maximum(x, s / 255**4)) ** 0.25) ** 3
    ),
    ("companded8", True): lambda x, s: (1 + np.abs(x) / s) ** 2 / 4 / 127 * s + np.abs(x) / 2048,
    ("companded8", False): lambda x, s: np.sqrt(x * s) / 255 + s / 255**2 + x / 1024,
    ("dynamic8", True): lambda x, s: 0.45 * np.abs(x) + s * 1e-6,
    ("dynamic8", False): lambda x, s: 0.3 * x + s * 1e-6,
    ("dynamic4", True): lambda x, s: 0.45 * np.abs(x) + s * 1e-2,
    ("dynamic4", False): lambda x, s: s / 16,
    ("bfloat16", True): lambda x, s: np.abs(x) / 256,
    ("bfloat16", False): lambda x, s: x / 256,
}


@every_codec
def test_decoded_numbers_are_near(codec):
    blocks = example(codec)
    largest = np.abs(blocks).max(1, keepdims=True)
    bound = BOUNDS[codec.name, codec.signed](blocks.astype(float), largest.astype(float))
    assert (np.abs(through(codec, blocks) - blocks) <= bound * (1 + 1e-3)).all()


@every_codec
def test_greater_numbers_do_not_become_smaller_ones(codec):
    blocks = np.sort(example(codec, spread=3.0), axis=1)
    assert (np.diff(through(codec, blocks), axis=1) >= 0).all()


@every_codec
def test_what_was_decoded_is_coded_as_it_was(codec):
    once = through(codec, example(codec, spread=2.0))
    for _ in range(2):
        again = through(codec, once)
        # the largest of a block in float16, or as a map's 1 times the scale, is what it was, and so is every code
        np.testing.assert_array_equal(again, once) if codec.name != "companded8" else np.testing.assert_allclose(
            again, once, rtol=2.0**-9
        )
        once = again


@pytest.mark.parametrize(("name", "least"), {"dynamic8": -0.99296875, "dynamic4": -0.8875, "root8": -1.0}.items())
def test_the_largest_of_a_block_if_negative_shrinks_where_the_map_ends_before_it(name, least):
    blocks = np.full((ROWS, 256), 0.01)
    blocks[:, 7] = -2.0
    assert through(CODECS[name](True), blocks)[:, 7] == pytest.approx(2.0 * least, rel=2.0**-14)  # scales of 16 bits


@every_codec
def test_zeros_stay_zeros_and_what_is_positive_stays_so(codec):
    zeros = np.zeros((ROWS, width(codec)), np.float32)
    bits = random_bits(jnp.uint32(1), zeros.shape)
    np.testing.assert_array_equal(through(codec, zeros), zeros)
    np.testing.assert_array_equal(through(codec, zeros, bits), zeros)
    if not codec.signed:
        tiny = zeros.copy()
        tiny[:, 0], tiny[:, 1] = 1.0, 1e-30
        for some in (None, bits):
            assert (through(codec, tiny, some)[:, :2] > 0).all()
            if codec.name != "dynamic4":  # whose map has no zero
                assert (through(codec, tiny, some)[:, 2:] == 0).all()


@every_codec
def test_what_is_not_finite_or_must_not_be_negative_is_seen_in_its_block_only(codec):
    blocks = example(codec)
    for wrong in (np.nan, np.inf, *([] if codec.signed else [-1e-6])):
        spoilt = blocks.copy()
        spoilt[1, 3] = wrong
        decoded = through(codec, spoilt)
        assert not np.isfinite(decoded[1, 3])
        np.testing.assert_array_equal(np.delete(decoded, 1, 0), np.delete(through(codec, blocks), 1, 0))


@every_codec
def test_numbers_of_every_size_stay_finite_and_keep_their_size(codec):
    sizes = np.array([3e38, 1e30, 1e10, 1e-10, 1e-20, 1e-30] + [1.0] * (ROWS - 6))
    if codec.name == "companded8":  # 6e-8 to 65504
        sizes = np.clip(sizes, *((1e-6, 6e4) if codec.signed else (1e-12, 4e9)))
    blocks = np.linspace(0.5, 1, width(codec)) * sizes[:, None]
    if codec.name.startswith("dynamic"):
        blocks = np.minimum(blocks, 2.0**126)
    np.testing.assert_allclose(through(codec, blocks), blocks, rtol=0.25)


def test_float16_scales_end_without_infinities():
    for signed in (True, False):
        codec = CODECS["companded8"](signed)
        blocks = (
            np.linspace(0.5, 1, 64) * np.array([1e38, 1e30, 1e10, 1e-10, 1e-20, 1e-30] + [1.0] * (ROWS - 6))[:, None]
        )
        decoded = through(codec, blocks)
        assert np.isfinite(decoded).all()
        np.testing.assert_allclose(decoded[:2, -1], 65504.0 if signed else 65504.0**2, rtol=1e-6)
        assert signed or (decoded > 0).all()


@every_codec
def test_random_codes_are_neighbours_and_right_in_the_mean(codec):
    x, draws = example(codec), 100
    bits = jnp.stack([random_bits(seed_for(jnp.uint32(3), i), x.shape) for i in range(draws)])
    decoded = np.stack([through(codec, x, some) for some in bits]).astype(float)
    power = {("root8", True): 2, ("root8", False): 4, ("companded8", False): 2}
    root = 1 / power.get((codec.name, codec.signed), 1)  # what is evenly spaced is right in the mean
    exact, drawn = (np.sign(y) * np.abs(y) ** root for y in (x.astype(float), decoded))
    largest = exact.max(1, keepdims=True)
    inside = np.full(x.shape, True)
    if not codec.signed:  # what is positive does not become 0
        inside = exact > largest * {"dynamic4": 1 / 16, "dynamic8": 1e-6, "bfloat16": 0}.get(codec.name, 1 / 255)
    elif codec.name.startswith("dynamic"):
        inside = exact > largest * codec.map[0]
    off = ((drawn.mean(0) - exact) / largest)[inside].mean()
    noise = np.sqrt((drawn.var(0) / largest**2)[inside].mean() / inside.sum() / draws)
    # what is companded is right in the mean of its code, of which it is up to 2/127² of the largest beside the tangent
    assert abs(off) < 5 * noise + 1e-6 + (2 / 127**2 if codec.name == "companded8" and codec.signed else 0)
    distinct = max(len(np.unique(column)) for column in decoded[:, 0].T)
    assert distinct <= (4 if codec.name == "companded8" else 2)  # its scales are drawn too


def test_a_second_moment_sticks_to_its_code_unless_it_is_rounded_at_random():
    for codec in (CODECS["root8"](False), CODECS["companded8"](False)):
        start = jnp.linspace(0.5, 1, codec.block)[None]

        def decayed(rounding, codec=codec, start=start):
            def step(v, i):
                bits = random_bits(seed_for(jnp.uint32(0), i), v.shape) if rounding else None
                # the largest does not shrink, as in a block where one gradient stays large
                v = codec.decode(*codec.encode((0.999 * v).at[:, -1].set(1.0), drawn(bits)))
                return v, None

            return jax.lax.scan(step, start, jnp.arange(500))[0][0, :-1]

        right = 0.999**500 * start[0, :-1]
        nearest = decayed(False) / right
        assert nearest.min() > 1.6  # 0.999⁻⁵⁰⁰: all of them stood still
        # 500 roundings of about a 250th of a root each, by chance one way or the other
        assert abs(jnp.mean(jnp.log(decayed(True) / right))) < 0.03


@pytest.mark.parametrize("size", [1, 2, 32, 37, 64, 96, 100, 256, 2048, 5000])
def test_the_largest_of_blocks_of_any_size(size):
    class Other(Root8):
        block = size

    x = RANDOM.normal(size=(2, 3 * size)).astype(np.float32)
    signed, positive = np.asarray(largest_of([Other(True), Other(False)], [jnp.asarray(x), jnp.asarray(x * x)]))
    np.testing.assert_array_equal(signed, np.abs(x).reshape(2, 3, size).max(-1))
    np.testing.assert_array_equal(positive, (x * x).reshape(2, 3, size).max(-1))
    for wrong in (np.nan, -np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[1, size] = wrong
        for codec in (Other(True), Other(False)):
            [found] = largest_of([codec], [jnp.asarray(spoilt if codec.signed else spoilt * spoilt)])
            assert np.isnan(found).tolist() == [[False] * 3, [False, True, False]]
    zeros = np.where(x < 0, np.float32(-0.0), np.float32(0.0))
    for codec in (Other(True), Other(False)):
        np.testing.assert_array_equal(largest_of([codec], [jnp.asarray(zeros)])[0], np.zeros((2, 3)))


def test_codes_and_scales_of_arrays_of_any_shape():
    numbers = np.random.default_rng(1).normal(size=3 * 1024).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def there_and_back(codec, x):
        codes, scales = codec.encode(x)
        return codes, scales, codec.decode(codes, scales)

    for codec in (kind(signed) for kind in CODECS.values() for signed in (True, False)):
        flat = numbers if codec.signed else numbers * numbers
        *_, expected = there_and_back(codec, jnp.asarray(flat))
        # the last axis a whole number of blocks, or half a block, or of odd length
        for shape in ((3, 4, 256), (24, 128), (1024, 3)):
            codes, scales, decoded = there_and_back(codec, jnp.asarray(flat.reshape(shape)))
            assert codes.shape == codec.code_shape(shape), codec
            assert scales is None or scales.shape == codec.scale_shape(shape), codec
            np.testing.assert_allclose(decoded.ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in CODECS.values() if kind.scale_dtype is not None])
def test_the_largest_of_what_lies_in_memory_is_the_same(kind):
    for codec in (kind(True), kind(False)):
        x = example(codec)
        x[1] = 3e38 if not codec.signed else np.where(np.arange(codec.block) % 2, 3e38, -3e38)  # of no sum
        x[2, 1], x[3, 2], x[4] = np.nan, np.inf, 0
        np.testing.assert_array_equal(
            largest_of_written(codec, jnp.asarray(x)), largest_of([codec], [jnp.asarray(x)])[0]
        )


def test_the_dynamic_maps():
    for bits, signed, size in ((7, True, 256), (7, False, 256), (3, True, 16)):
        numbers = dynamic_map(bits, signed)
        assert len(numbers) == size == len(np.unique(numbers))
        assert numbers[-1] == 1
        assert 0 in numbers
        bounds = midpoints(numbers)
        assert (numbers[:-1] < bounds).all()
        assert (bounds <= numbers[1:]).all()
        np.testing.assert_allclose(bounds, (numbers[1:].astype(float) + numbers[:-1]) / 2, rtol=1e-6, atol=1e-12)


def test_codecs_are_values():
    for codec in CODECS.values():
        assert codec() == codec(True)
        assert hash(codec()) == hash(codec(True))
        assert codec() != codec(False)
        assert dataclasses.replace(codec(), signed=False) == codec(False)
    assert {name: codec().bytes_per_number for name, codec in CODECS.items()} == {
        "root8": 1 + 4 / 256,
        "companded8": 1 + 2 / 32,
        "dynamic8": 1 + 4 / 256,
        "dynamic4": 0.5 + 4 / 128,
        "bfloat16": 2,
    }
