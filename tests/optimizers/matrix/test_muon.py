"""Muon and its parts: against twins, as matrices of every layout, in every transformation around them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.support.trees import assert_same
from tests.twins import elementwise as twins
from tests.twins import matrices as muon_twins

pytestmark = pytest.mark.once

METHODS = ("newton_schulz", "polar_express", "gram")
# Five steps on matrices whose sides are at most 24. A step multiplies what was rounded off by up to 8.2 where the
# singular value is small, 2 to 4 after the first; in units of 2⁻²⁴ or 2⁻⁵³, ten times what was measured.
TOLERANCE = {"float32": 3e-5, "float64": 1e-13}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def apply(tx, update, params=None):
    return tx.update(update, tx.init(update if params is None else params), params)[0]


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


# Orthogonalisation


@pytest.mark.parametrize("shape", [(6, 6), (5, 24), (24, 5)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_orthogonalize_is_its_twin(method, shape, dtype):
    update = draw(*shape, dtype=dtype)
    actual = apply(gx.orthogonalize(method=method), jnp.asarray(update))
    assert actual.dtype == dtype
    expected = muon_twins.orthogonalize(update.astype(np.float64), method)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["polar_express", "gram"])
def test_eight_steps_are_orthogonal_to_the_arithmetics_precision(method, dtype):
    left, right = (np.linalg.qr(draw(24, 24, seed=seed, dtype=np.float64))[0] for seed in (1, 2))
    sizes = np.geomspace(0.01, 1, 8)
    matrix = (left[:, :8] * sizes) @ right[:8]
    actual = apply(gx.orthogonalize(method=method, steps=8), jnp.asarray(matrix[:, :24], dtype))
    short = left[:, :8].T @ np.asarray(actual, np.float64)
    # a wide matrix of eight singular values among twenty-four: the others stay zero
    np.testing.assert_allclose(short, right[:8], rtol=0, atol=1000 * jnp.finfo(dtype).eps)
    wide = apply(gx.orthogonalize(method=method, steps=8), jnp.asarray(matrix[:8], dtype))
    np.testing.assert_allclose(singular_values(wide), 1, rtol=0, atol=1000 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("method", ["polar_express", "gram"])
def test_steps_beyond_the_table_stay_at_one_and_zeros_at_zero(method):
    """Rounding errors, which are of no singular value, do not grow into one."""
    tx = gx.orthogonalize(method=method, steps=14)
    np.testing.assert_allclose(singular_values(apply(tx, jnp.asarray(draw(6, 9)))), 1, rtol=0, atol=1e-6)
    of_rank_three = jnp.asarray(draw(12, 3) @ draw(3, 24, seed=1))
    sizes = singular_values(apply(tx, of_rank_three))
    np.testing.assert_allclose(sizes[:3], 1, rtol=0, atol=1e-4)
    assert sizes[3] < 1.1


def test_coefficients_take_the_place_of_the_methods():
    update = jnp.asarray(draw(4, 9))
    for method, own in (("polar_express", muon_twins.JORDAN[0]), ("gram", [muon_twins.JORDAN[0]] * 5)):
        actual = apply(gx.orthogonalize(method=method, coefficients=own), update)
        np.testing.assert_allclose(actual, apply(gx.orthogonalize(), update), rtol=0, atol=TOLERANCE["float32"])
    # Newton's cubic, 15 times
    cubic = apply(gx.orthogonalize(coefficients=(1.5, -0.5, 0), steps=15), update)
    np.testing.assert_allclose(singular_values(cubic), 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [None, "jordan", "adam_rms", "spectral"])
def test_the_scale_depends_on_the_layout(scale):
    update = draw(4, 12)
    for layout, matrix in (("in out", update), ("out in", update.T)):
        actual = apply(gx.orthogonalize(layout, scale=scale), jnp.asarray(update))
        expected = muon_twins.orthogonalize(matrix.astype(np.float64), scale=scale)
        expected = expected if layout == "in out" else expected.T
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE["float32"])


def test_adam_rms_is_a_root_mean_square_of_a_fifth():
    update = apply(gx.orthogonalize(method="polar_express", steps=8, scale="adam_rms"), jnp.asarray(draw(6, 30)))
    assert float(jnp.sqrt(jnp.mean(jnp.square(update)))) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_a_gradient_does_not_matter_however_large_or_small(method):
    update = draw(5, 9)
    tx = gx.orthogonalize(method=method, eps=0.0)
    ordinary = apply(tx, jnp.asarray(update))
    largest = np.abs(update).max()
    for size in (2.0**-120, 2.0**-60, 2.0**60, 2.0**120):
        assert_same(apply(tx, jnp.asarray(update * np.float32(size))), ordinary)
    full = apply(tx, jnp.asarray(update / largest * np.finfo(np.float32).max))
    np.testing.assert_allclose(full, ordinary, rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("tx", [gx.orthogonalize(), gx.orthogonalize(method="gram", eps=0.0), gx.normalize_by_neuron()])
def test_finite_updates_stay_finite_and_others_make_their_matrix_nan(tx):
    for value in (0.0, 1e-45, 1e-38, 1e-20, 3e38):
        assert np.isfinite(apply(tx, jnp.full((3, 6), value))).all()
    assert_same(apply(tx, jnp.zeros((3, 6))), jnp.zeros((3, 6)))
    assert apply(tx, jnp.zeros((0, 6))).shape == (0, 6)
    for value in (np.nan, np.inf):
        assert np.isnan(apply(tx, jnp.full((3, 6), 1.0).at[1, 2].set(value))).any()
        stacked = gx.orthogonalize("each in out")
        ruined = apply(stacked, jnp.ones((2, 3, 6)).at[1, 1, 2].set(value))
        assert np.isnan(ruined[1]).all()
        assert np.isfinite(ruined[0]).all()


def test_gradients_below_eps_give_small_steps():
    update = draw(4, 4)
    update *= 1e-10 / np.linalg.norm(update)
    small = apply(gx.orthogonalize(eps=1e-7), jnp.asarray(update))
    expected = muon_twins.orthogonalize(update.astype(np.float64), eps=1e-7)
    np.testing.assert_allclose(small, expected, rtol=1e-5)
    assert np.abs(small).max() < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_narrow_products_are_near_the_wide_ones(method):
    update = jnp.asarray(draw(6, 18))
    narrow, wide = (apply(gx.orthogonalize(method=method, dtype=dtype), update) for dtype in ("bfloat16", None))
    assert narrow.dtype == np.float32
    # roundings of 2⁻⁹ that five steps of slope 2 to 8 may enlarge
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=0.1)
    assert not np.array_equal(narrow, wide)


def test_a_batch_of_matrices_is_one_product_off_the_cpu(monkeypatch):
    update = jnp.asarray(draw(3, 5, 7))
    in_turn = apply(gx.orthogonalize("each in out"), update)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    batched = gx.orthogonalize("each in out", coefficients=muon_twins.JORDAN[0])  # no trace of the one before
    np.testing.assert_allclose(apply(batched, update), in_turn, rtol=0, atol=TOLERANCE["float32"])
    assert "3,5,5" in str(jax.make_jaxpr(lambda u: apply(batched, u))(update))


# Layouts


def parts(layout, update):
    """The matrices of a leaf, cut out by hand, and what puts them back."""
    if layout == "each in out":
        return list(update), np.stack
    if layout == "in each out":
        return list(update.transpose(1, 0, 2)), lambda some: np.stack(some).transpose(1, 0, 2)
    if layout == "in out each":
        return list(update.transpose(2, 0, 1)), lambda some: np.stack(some, axis=-1)
    if layout in ("in (4+1+1)*out", "in (8 + 2 + 2) * out"):
        return np.split(update, (8, 10), axis=1), lambda some: np.concatenate(some, axis=1)
    if layout == "(2+1)*in out":
        return np.split(update, (6,), axis=0), np.concatenate
    if layout == "each (1+2)*in 2*out":
        cut = [half for one in update for side in np.split(one, (2,), axis=0) for half in np.split(side, 2, axis=1)]

        def together(some):
            sides = [np.concatenate(some[i : i + 2], axis=1) for i in range(0, len(some), 2)]
            return np.stack([np.concatenate(sides[i : i + 2], axis=0) for i in range(0, len(sides), 2)])

        return cut, together
    if layout == "in 3*out":
        return np.split(update, 3, axis=1), lambda some: np.concatenate(some, axis=1)
    if layout == "2*in out":
        return np.split(update, 2, axis=0), np.concatenate
    if layout == "each in 3*out":
        cut = [piece for one in update for piece in np.split(one, 3, axis=1)]
        return cut, lambda some: np.stack([np.concatenate(some[i : i + 3], axis=1) for i in range(0, len(some), 3)])
    if layout == "in in in out":  # a convolution's kernel, HWIO
        return [update.reshape(-1, update.shape[-1])], lambda some: some[0].reshape(update.shape)
    if layout == "out in in in":  # OIHW
        return [update.reshape(len(update), -1).T], lambda some: some[0].T.reshape(update.shape)
    if layout == "in out out":  # heads as one matrix
        return [update.reshape(len(update), -1)], lambda some: some[0].reshape(update.shape)
    raise AssertionError(layout)


SHAPES = {
    "each in out": (3, 4, 6),
    "in each out": (4, 3, 6),
    "in out each": (4, 6, 3),
    "in 3*out": (4, 18),
    "in (4+1+1)*out": (4, 12),
    "in (8 + 2 + 2) * out": (4, 12),
    "(2+1)*in out": (9, 4),
    "each (1+2)*in 2*out": (2, 6, 8),
    "2*in out": (8, 6),
    "each in 3*out": (2, 4, 18),
    "in in in out": (2, 3, 2, 5),
    "out in in in": (5, 2, 3, 2),
    "in out out": (4, 2, 3),
}


@pytest.mark.parametrize("layout", SHAPES)
def test_a_leaf_of_matrices_is_its_matrices(layout):
    updates = draw(2, *SHAPES[layout])
    actual = twins.transform(gx.orthogonalize(layout, scale="jordan"), updates)[0]
    cut, together = parts(layout, updates[0])
    expected = together([muon_twins.orthogonalize(one.astype(np.float64), scale="jordan") for one in cut])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE["float32"])


def test_queries_that_share_keys_and_values_are_three_leaves_of_their_own():
    qkv = jnp.asarray(draw(16, 48))
    fused = gx.normuon(0.02, {"qkv": "in (32+8+8)*out"}, weight_decay=0.1)
    apart = gx.normuon(0.02, ".", weight_decay=0.1)
    pieces = dict(zip("qkv", jnp.split(qkv, (32, 40), axis=1), strict=True))
    expected = apply(apart, pieces, pieces)
    together = jnp.concatenate([expected[name] for name in "qkv"], axis=1)
    np.testing.assert_allclose(apply(fused, {"qkv": qkv}, {"qkv": qkv})["qkv"], together, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layout", SHAPES)
def test_neurons_of_a_leaf_of_matrices_are_its_matrices(layout):
    updates = draw(3, *SHAPES[layout])
    actual = twins.transform(gx.normalize_by_neuron(0.9, layout=layout), updates)
    cuts = zip(*(parts(layout, update)[0] for update in updates.astype(np.float64)), strict=True)
    walks = [muon_twins.normalize_by_neuron(np.stack(steps), 0.9) for steps in cuts]
    together = parts(layout, updates[0])[1]
    for t, update in enumerate(actual):
        # quotients of float32 moments, and a norm of at most 36 elements
        np.testing.assert_allclose(update, together([walk[t] for walk in walks]), rtol=3e-6, atol=1e-7)
    state = gx.normalize_by_neuron(layout=layout).init(updates[0])
    assert state.nu.size == sum(one.shape[1] for one in parts(layout, updates[0])[0])


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "in",
        "each out",
        "in out foo",
        "in 3*each out",
        "in 0*out",
        "in*2 out",
        "out",
        "in (3)*out",
        "in (3+0)*out",
        "in 3+2*out",
        "(2+1)*each in out",
    ],
)
def test_layouts_that_are_none(layout):
    for build in (gx.orthogonalize, functools.partial(gx.normalize_by_neuron, layout=layout)):
        with pytest.raises(ValueError, match=r"layout .* must be one word per axis: 'in', 'out', 'each'"):
            build(layout)


@pytest.mark.parametrize("tx", [gx.orthogonalize("in 3*out"), gx.normalize_by_neuron(layout="in 3*out")])
def test_a_leaf_that_has_not_the_layout_says_both_and_the_remedy(tx):
    name = str(tx).partition("(")[0]
    problem = rf"{name}: updates\['b'\] has shape \(3,\), and the layout 'in 3\*out' is of 2 axes"
    with pytest.raises(ValueError, match=problem):
        apply(tx, {"a": jnp.ones((3, 6)), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\(3, 8\), and the layout 'in 3\*out' cuts axis 1 into 3 equal blocks"):
        apply(tx, jnp.ones((3, 8)))
    uneven = gx.orthogonalize("in (4+1+1)*out")
    with pytest.raises(
        ValueError, match=r"\(3, 8\), and the layout 'in \(4\+1\+1\)\*out' cuts axis 1 into .* as 4:1:1"
    ):
        apply(uneven, jnp.ones((3, 8)))
    with pytest.raises(ValueError, match=r"updates is complex64\[3, 6\]; matrices must be real"):
        apply(tx, jnp.ones((3, 6), complex))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "svd"}, ValueError, "method must be one of 'newton_schulz', 'polar_express', 'gram', got 'svd'"),
        ({"method": None}, TypeError, "method must be a string"),
        ({"scale": "rms"}, ValueError, "scale must be one of 'jordan', 'adam_rms', 'spectral', got 'rms'"),
        ({"scale": 2.0}, TypeError, "scale must be a string"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number"),
        ({"coefficients": (1.0, 2.0)}, ValueError, r"coefficients must be \(a, b, c\)"),
        ({"coefficients": 1.0}, TypeError, r"coefficients must be \(a, b, c\)"),
        ({"coefficients": [(1.0, 2.0, np.nan)]}, ValueError, "every number in coefficients must be in"),
        ({"layout": 2}, TypeError, "layout must be a string"),
        ({"layout": ["in", "out"]}, TypeError, "layout must be a string"),
        ({"coefficients": [(1.0, 2.0, 3.0)] * 6}, ValueError, "coefficients must be at most steps=5 triples, got 6"),
    ],
    ids=str,
)
def test_options(options, error, words):
    with pytest.raises(error, match=words):
        gx.orthogonalize(**options)


# The optimizers


def rate(step):
    return 0.1 * jnp.exp(-0.05 * jnp.asarray(step, float))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("muon", {}),
        ("muon", {"learning_rate": rate, "nesterov": False, "weight_decay": 0.1, "scale": "adam_rms"}),
        ("muon", {"beta": 0.5, "method": "gram", "scale": "spectral", "eps": 1e-3}),
        ("normuon", {}),
        ("normuon", {"learning_rate": rate, "beta2": 0.5, "weight_decay": 0.1, "method": "polar_express", "eps": 1e-3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_optimizer_walks_with_its_twin(name, options, dtype):
    options = {"learning_rate": 0.02, **options}
    theta, gradients = draw(5, 16, dtype=dtype), draw(12, 5, 16, seed=1, dtype=dtype)
    actual = twins.walk(getattr(gx, name)(matrices="", **options), theta, gradients)
    expected = getattr(muon_twins, name)(theta.astype(np.float64), gradients.astype(np.float64), **options)
    # twelve steps of at most 0.1·2.6, each with the error above, and the roundings of θ
    np.testing.assert_allclose(actual, expected, rtol=0, atol=10 * TOLERANCE[dtype])


MODEL = {
    "embed": jnp.asarray(draw(9, 4, seed=3)),
    "layers": {"qkv": jnp.asarray(draw(2, 4, 12, seed=4)), "scale": jnp.ones((2, 4))},
    "mlp": {"kernel": jnp.asarray(draw(4, 6, seed=5)), "bias": jnp.zeros(6)},
}
GRADS = jax.tree.map(lambda leaf: jnp.asarray(draw(*leaf.shape, seed=6)), MODEL)
LAYOUTS = {"layers/qkv": "each in 3*out", ".*/kernel": "in out"}


def test_each_leaf_gets_what_its_group_gets_alone():
    updates = apply(gx.muon(0.02, LAYOUTS, gx.adamw(3e-4), weight_decay=0.1), GRADS, MODEL)
    for pick, tx in (
        (lambda tree: tree["layers"]["qkv"], gx.muon(0.02, {"": "each in 3*out"}, weight_decay=0.1)),
        (lambda tree: tree["mlp"]["kernel"], gx.muon(0.02, "", weight_decay=0.1)),
        (lambda tree: {"b": tree["mlp"]["bias"], "e": tree["embed"], "s": tree["layers"]["scale"]}, gx.adamw(3e-4)),
    ):
        assert_same(pick(updates), apply(tx, pick(GRADS), pick(MODEL)))


def test_one_state_with_the_matrices_moments_and_the_others():
    state = gx.normuon(gx.live(0.02), LAYOUTS, gx.adamw(rate)).init(MODEL)
    assert state._fields == ("count", "values", "mu", "mu_2", "nu", "nu_2", "nu_3")  # a nu per layout
    assert state.mu["mlp"] == {"kernel": state.mu["mlp"]["kernel"], "bias": optax.MaskedNode()}
    assert state.nu["layers"]["qkv"].shape == (2, 1, 12)
    assert isinstance(state.mu_2["layers"]["qkv"], optax.MaskedNode)
    assert list(state.hyperparams) == ["learning_rate", "other/learning_rate"]


def test_learning_rates_are_live_and_scheduled_each_on_its_own():
    tx = gx.muon(gx.live(0.02), LAYOUTS, gx.sgd(gx.live(0.5)))
    state = gx.set_hyperparams(tx.init(MODEL), **{"learning_rate": 0.04, "other/learning_rate": 0.25})
    updates, _ = jax.jit(tx.update)(GRADS, state, MODEL)
    np.testing.assert_allclose(updates["embed"], -0.25 * GRADS["embed"], rtol=1e-6)
    expected = apply(gx.muon(0.04, LAYOUTS, gx.sgd(0.25)), GRADS, MODEL)
    np.testing.assert_allclose(updates["mlp"]["kernel"], expected["mlp"]["kernel"], rtol=1e-6)
    one = gx.live(0.02)
    assert list(gx.muon(one, LAYOUTS, gx.sgd(one)).init(MODEL).hyperparams) == ["learning_rate"]


def test_describe_shows_who_gets_what_and_how_its_axes_are_read():
    found = gx.describe(gx.muon(0.02, LAYOUTS, gx.adamw(3e-4)), MODEL, show=False)
    groups = {leaf.path: leaf.group for leaf in found.leaves}
    assert groups == {
        "embed": "other",
        "layers/qkv": "layers/qkv (muon, each in 3*out)",
        "layers/scale": "other",
        "mlp/bias": "other",
        "mlp/kernel": ".*/kernel (muon, in out)",
    }
    rates = {leaf.path: leaf.hyperparameters["learning_rate"].value for leaf in found.leaves}
    assert (rates["mlp/kernel"], rates["embed"]) == (0.02, 3e-4)


def test_jit_is_eager_scan_is_loop_and_vmap_is_loop():
    tx = gx.normuon(gx.live(0.02), {"qkv": "each in 3*out"}, gx.sgd(1.0), method="gram")
    params, grads = ({"qkv": tree["layers"]["qkv"], "b": tree["mlp"]["bias"]} for tree in (MODEL, GRADS))
    same = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6))
    state = tx.init(params)
    first, after = tx.update(grads, state, params)
    second, _ = tx.update(grads, after, params)

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), grads)
    scanned = jax.jit(lambda both: jax.lax.scan(step, state, both)[1])(both)
    same(scanned, jax.tree.map(lambda *some: jnp.stack(some), first, second))

    def at(rate, grads):
        return tx.update(grads, gx.set_hyperparams(state, learning_rate=rate), params)[0]["qkv"]

    swept = jax.vmap(at)(jnp.array([0.02, 0.04]), jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), grads))
    same(swept, jnp.stack([first["qkv"], -2 * first["qkv"]]))


def test_low_precision_parameters_have_float32_arithmetic_and_state():
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (GRADS, MODEL))
    tx = gx.normuon(0.02, LAYOUTS, gx.adamw(3e-4))
    updates, state = tx.update(low[0], tx.init(low[1]), low[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(np.float32)}
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), low)
    expected = tx.update(wide[0], tx.init(wide[1]), wide[1])[0]
    assert_same(updates, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected))
    half = gx.normuon(0.02, LAYOUTS, gx.adamw(3e-4), state_dtype="bfloat16").init(MODEL)
    assert {leaf.dtype for leaf in jax.tree.leaves((half.mu, half.nu))} == {jnp.dtype(jnp.bfloat16)}


def test_one_norm_over_all_leaves_around_and_inside():
    def of(tx):
        return apply(tx, GRADS, MODEL)

    clip = gx.clip_by_global_norm(0.1)
    around = of(gx.chain(clip, gx.muon(0.02, LAYOUTS, gx.sgd(1.0))))
    factor = 0.1 / optax.tree.norm(GRADS)
    np.testing.assert_allclose(around["embed"], -factor * GRADS["embed"], rtol=1e-6)
    inside = of(gx.muon(0.02, LAYOUTS, gx.chain(clip, gx.sgd(1.0))))
    alone = {"b": GRADS["mlp"]["bias"], "e": GRADS["embed"], "s": GRADS["layers"]["scale"]}
    np.testing.assert_allclose(inside["embed"], -0.1 / optax.tree.norm(alone) * GRADS["embed"], rtol=1e-6)
    frozen = of(gx.chain(gx.freeze("mlp/.*"), clip, gx.muon(0.02, LAYOUTS, gx.sgd(1.0))))
    assert not np.any(frozen["mlp"]["kernel"])
    rest = optax.tree.norm({name: leaf for name, leaf in GRADS.items() if name != "mlp"})
    np.testing.assert_allclose(frozen["embed"], -0.1 / rest * GRADS["embed"], rtol=1e-6)


def test_guards_and_batches_go_around_it():
    tx = gx.observe(gx.skip_nonfinite(gx.accumulate(gx.muon(gx.live(0.02), LAYOUTS, gx.adamw(3e-4)), every=2)))
    step = jax.jit(tx.update)
    state = tx.init(MODEL)
    for grads in (GRADS, jax.tree.map(lambda g: 3 * g, GRADS)):
        updates, state = step(grads, state, MODEL)
    expected = apply(gx.muon(0.02, LAYOUTS, gx.adamw(3e-4)), jax.tree.map(lambda g: 2 * g, GRADS), MODEL)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), updates, expected)
    ruined, state = step(jax.tree.map(lambda g: g * jnp.nan, GRADS), state, MODEL)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(ruined))
    shown = gx.metrics(state)
    assert shown["skipped"] == 1
    assert shown["learning_rate"] == jnp.float32(0.02)


def test_any_transformation_takes_the_others():
    ours, theirs = (apply(gx.muon(0.02, LAYOUTS, other), GRADS, MODEL) for other in (gx.sgd(0.1), optax.sgd(0.1)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, theirs)
    still = apply(gx.muon(0.02, LAYOUTS, gx.freeze()), GRADS, MODEL)
    assert not np.any(still["embed"])
    assert np.any(still["mlp"]["kernel"])


@pytest.mark.parametrize(
    ("matrices", "other", "error", "words"),
    [
        ({"mlp/.*": "in out"}, gx.sgd(0.1), ValueError, r"'mlp/bias' has shape \(6,\), .* or let other= take the leaf"),
        ({"layers/qkv": "each in 5*out"}, gx.sgd(0.1), ValueError, r"muon: 'layers/qkv' has shape \(2, 4, 12\)"),
        (".*/kernel", None, ValueError, "muon: no pattern matches 'embed', .* give other="),
        ({".*kernel": "in out", "mlp/k.*": "in out"}, gx.sgd(0.1), ValueError, "both match 'mlp/kernel'"),
        ({"nothing": "in out"}, gx.sgd(0.1), ValueError, "muon: pattern 'nothing' matches none of the paths embed"),
        ({}, gx.sgd(0.1), TypeError, "matrices must be a pattern or a dict"),
        (["a"], gx.sgd(0.1), TypeError, "matrices must be a pattern or a dict"),
        ({"(": "in out"}, gx.sgd(0.1), ValueError, "muon: pattern .* no regular expression"),
        ({"a": 2}, gx.sgd(0.1), TypeError, "layout must be a string"),
        (".*kernel", "adam", TypeError, "the group 'other' must be a transformation"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_with_its_remedy(matrices, other, error, words):
    with pytest.raises(error, match=words):
        gx.muon(0.02, matrices, other).init(MODEL)


def test_an_equal_optimizer_is_equal_and_hashes_alike():
    one, two = (gx.normuon(0.02, LAYOUTS, gx.adamw(3e-4), coefficients=[1.5, -0.5, 0.0]) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != gx.normuon(0.02, LAYOUTS, gx.adamw(3e-4), coefficients=[1.5, -0.5, 0.1])


def test_it_learns_what_a_matrix_does():
    x, truth = jnp.asarray(draw(64, 16)), jnp.asarray(draw(16, 8, seed=1)) / 4

    def loss(params):
        return jnp.mean(jnp.square(x @ params["kernel"] + params["bias"][None] - x @ truth - 1))

    params = {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}
    tx = gx.muon(optax.cosine_decay_schedule(0.1, 100), "kernel", gx.adam(0.05))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (gx.apply_updates(params, updates), state), loss(params)

    _, losses = jax.lax.scan(step, (params, tx.init(params)), length=100)
    assert losses[-1] < 1e-3 * losses[0]


# Leaves of one shape together


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_leaves_of_a_shape_may_go_together(name):
    random = np.random.default_rng(0)
    shapes = [(6, 4), (6, 4), (4, 6), (6, 4)]
    params = {f"{i}/kernel": jnp.asarray(random.normal(size=shape), jnp.float32) for i, shape in enumerate(shapes)}
    params |= {"bias": jnp.ones(4), "other": jnp.ones(4)}
    gradients = jax.tree.map(lambda leaf: 0.3 * leaf + 0.1, params)
    alone, together = (
        getattr(gx, name)(0.02, ".*/kernel", gx.adamw(0.1), weight_decay=0.1, batched=batched)
        for batched in (False, True)
    )
    results = []
    for tx in (alone, together):
        theta, state = params, tx.init(params)
        for _ in range(2):
            theta, state = jax.jit(lambda p, s, tx=tx: gx.step(tx, gradients, s, p))(theta, state)
        results.append((theta, state))
    # products of matrices summed in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_how_many_leaves_go_together_is_seen_in_the_program():
    params = {f"{i}/kernel": jnp.ones((6, 4)) for i in range(5)}

    def calls(batched):
        tx = gx.muon(0.02, ".*/kernel", batched=batched)
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params)).count("name=leaf_update")

    assert (calls(False), calls(True)) == (5, 1)
    assert calls(None) == 5  # on a CPU


def test_guards_and_frozen_leaves_among_those_that_go_together():
    params = {f"{i}/kernel": jnp.eye(4) for i in range(3)}
    muon = gx.muon(0.02, ".*/kernel", batched=True)
    tx = gx.skip_nonfinite(gx.chain(gx.by_path({"1/kernel": gx.freeze()}, default=gx.identity()), muon))
    state = tx.init(params)
    good = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(good, state, params)
    assert (updates["1/kernel"] == 0).all()
    assert (updates["0/kernel"] == updates["2/kernel"]).all()
    bad, after = tx.update(jax.tree.map(lambda leaf: leaf * jnp.nan, good), state, params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(bad))
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (after.inner, state.inner)), strict=True))
