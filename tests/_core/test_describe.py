"""What `describe` tells is true: groups, hyperparameters, and the bytes that the state takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

pytestmark = pytest.mark.once

PARAMS = {
    "embed": jnp.ones((4, 3), jnp.bfloat16),
    "layers": [{"kernel": jnp.ones((3, 3), jnp.bfloat16), "bias": jnp.ones(3)} for _ in range(2)],
    "scale": jnp.ones(()),
}
PATHS = ["embed", "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "scale"]
NARROW = {"embed", "layers/0/kernel", "layers/1/kernel"}


def each(narrow: int, wide: int) -> dict[str, int]:
    """Bytes of state by leaf, for an element of bfloat16 and of float32."""
    return {path: narrow if path in NARROW else wide for path in PATHS}


ADAM = each(8, 8)
TRAINED = {**ADAM, "embed": 0}
NO_LAYERS = {path: 0 for path in PATHS if "layers" in path}
LABELS = {"embed": "adam", "layers": "none", "scale": "adam"}
TREE = {"embed": True, "layers": False, "scale": False}


def described(tx: Any, params: Any = PARAMS) -> dict[str, gx.LeafDescription]:
    return {leaf.path: leaf for leaf in gx.describe(tx, params, show=False).leaves}


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# Bytes: for each transformation those of an element of each leaf


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (gx.sgd(0.1), each(0, 0)),
        (gx.momentum(0.1), each(4, 4)),
        (gx.adamw(gx.live(0.1), mask=".*kernel"), ADAM),
        (gx.adamw(0.1, mask=TREE), ADAM),
        (gx.adam(0.1, state_dtype="bfloat16"), each(4, 4)),
        (gx.adam(0.1, mu_dtype="bfloat16"), each(6, 6)),
        (gx.rmsprop(0.1, centered=True, momentum=0.9), each(12, 12)),
        (gx.accumulate(gx.adam(0.1), every=4), each(12, 12)),
        (gx.skip_spikes(gx.adam(0.1), window=8), ADAM),
        (gx.observe(gx.adam(0.1), by="leaf"), ADAM),
        (gx.master_weights(gx.adam(0.1)), each(12, 8)),
        (gx.compensated(gx.adam(0.1), "int8"), each(9, 8)),
        (gx.stochastic_rounding(gx.adam(0.1), 0), ADAM),
        (gx.chain(gx.freeze(TREE), gx.clip_by_global_norm(1.0), gx.adam(0.1)), TRAINED),
        (gx.by_path({"embed": gx.freeze()}, default=gx.adam(0.1)), TRAINED),
        (gx.observe(gx.by_path({"embed": gx.freeze()}, default=gx.adam(0.1)), by="group"), TRAINED),
        (gx.by_path({"embed": optax.sgd(0.1, 0.9)}, default=gx.adam(0.1)), {**ADAM, "embed": 2}),
        (gx.chain(gx.freeze("embed"), optax.adam(0.1)), {**each(4, 8), "embed": 0}),
        (optax.adamw(0.1), each(4, 8)),
        (optax.chain(optax.clip(1.0), gx.adam(0.1)), ADAM),
        (optax.partition({"none": optax.set_to_zero(), "adam": gx.adam(0.1)}, LABELS), {**ADAM, **NO_LAYERS}),
        (optax.masked(gx.adam(0.1), {"embed": False, "layers": True, "scale": True}), TRAINED),
        (optax.MultiSteps(gx.momentum(0.1), 2).gradient_transformation(), ADAM),
        (optax.inject_hyperparams(gx.adam)(learning_rate=0.1), ADAM),
        (gx.freeze(), each(0, 0)),
        (gx.identity(), each(0, 0)),
    ],
    ids=lambda some: "" if isinstance(some, dict) else repr(some)[:40],
)  # fmt: skip
def test_the_bytes_are_those_of_the_state(tx, expected):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        found = gx.describe(tx, PARAMS, show=False)
    assert {leaf.path: leaf.state_bytes for leaf in found.leaves} == {
        path: size * math.prod(leaf.shape) for (path, size), leaf in zip(expected.items(), found.leaves, strict=True)
    }
    with jax.numpy_dtype_promotion("standard"):
        assert found.state_bytes == nbytes(tx.init(PARAMS))


@pytest.mark.parametrize("threshold", [2, 128])
def test_the_bytes_of_factored_moments(threshold):
    tx = optax.adafactor(0.1, min_dim_size_to_factor=threshold)
    found, state = gx.describe(tx, PARAMS, show=False), tx.init(PARAMS)
    (factored,) = (
        one for one in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "v_row")) if hasattr(one, "v_row")
    )
    expected = jax.tree.map(lambda *some: nbytes(some), factored.v_row, factored.v_col, factored.v)
    assert [leaf.state_bytes for leaf in found.leaves] == jax.tree.leaves(expected)
    assert found.state_bytes == nbytes(state)


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def equinox_params() -> Any:
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        dense: eqx.nn.Linear
        scale: jax.Array

    return eqx.filter(Model(eqx.nn.Linear(2, 3, key=jax.random.key(0)), jnp.ones(())), eqx.is_array)


def nnx_params() -> Any:
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    return nnx.state(Model(), nnx.Param)


TREES = {
    "array": (lambda: jnp.ones((2, 3)), {"": (2, 3)}),
    "scalar": (lambda: 1.0, {"": ()}),
    "list": (lambda: [jnp.ones(3), [jnp.ones(())]], {"0": (3,), "1/0": ()}),
    "named tuple": (lambda: Layer(jnp.ones((2, 3)), jnp.ones(3)), {"kernel": (2, 3), "bias": (3,)}),
    "equal ends": (lambda: {"a": {"w": jnp.ones(3)}, "w": jnp.ones(2)}, {"a/w": (3,), "w": (2,)}),
    "None": (lambda: {"a": None, "w": jnp.ones(2)}, {"w": (2,)}),
    "Equinox": (equinox_params, {"dense/weight": (3, 2), "dense/bias": (3,), "scale": ()}),
    "Flax NNX": (nnx_params, {"dense/bias": (3,), "dense/kernel": (2, 3)}),
    "nothing": (dict, {}),
}


@pytest.mark.parametrize(("build", "shapes"), TREES.values(), ids=TREES)
def test_every_kind_of_parameters(build, shapes):
    params, tx = build(), gx.chain(optax.trace(0.9), gx.adam(0.1))
    found = gx.describe(tx, params, show=False)
    assert {leaf.path: leaf.shape for leaf in found.leaves} == shapes
    assert [leaf.state_bytes for leaf in found.leaves] == [12 * leaf.size for leaf in found.leaves]
    assert found.state_bytes == nbytes(tx.init(params))
    assert found.state_bytes_per_parameter == (12 if shapes else 0)


def test_a_hundred_billion_parameters_cost_nothing_to_describe():
    params = {f"layer_{i}": jax.ShapeDtypeStruct((32768, 32768), jnp.bfloat16) for i in range(94)}
    held = {id(array) for array in jax.live_arrays()}
    tx = gx.compensated(gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(1e-3)), "int8")
    found = gx.describe(tx, params, show=False)
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in held) < 1000  # nothing but scalars
    assert found.size == 94 * 2**30
    assert found.state_bytes == 9 * found.size + found.shared_bytes
    assert found.leaves[0].bytes == 2**31
    assert "94 leaves of bfloat16, 100,931,731,456 parameters, 201.9 GB; state 908.4 GB, 9 bytes per" in str(found)
    twice = gx.describe(tx, {"a": params, "b": params}, show=False)
    assert "state 1.817 TB" in str(twice)


# Groups and hyperparameters


def values(leaf: gx.LeafDescription) -> dict[str, Any]:
    return {name: h.value for name, h in leaf.hyperparameters.items()}


def test_every_leaf_has_its_group_and_its_hyperparameters():
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    tx = gx.chain(
        gx.clip_by_global_norm(1.0),
        gx.by_path(
            {"embed": gx.freeze(), ".*bias": {"weight_decay": 0.0}, "scale": gx.sgd(0.5, momentum=0.9)},
            default=gx.adamw(schedule, b2=0.95, mask=".*(kernel|bias)"),
        ),
    )
    leaves = described(tx)
    assert {path: leaf.group for path, leaf in leaves.items()} == {
        "embed": "embed",
        "layers/0/bias": ".*bias",
        "layers/0/kernel": "default",
        "layers/1/bias": ".*bias",
        "layers/1/kernel": "default",
        "scale": "scale",
    }
    assert [path for path, leaf in leaves.items() if leaf.frozen] == ["embed"]
    assert values(leaves["embed"]) == {}
    adam = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "learning_rate": schedule, "max_norm": 1.0}
    kernel, bias = values(leaves["layers/1/kernel"]), values(leaves["layers/0/bias"])
    assert {name: kernel[name] for name in adam} == adam
    assert {**kernel, "weight_decay": 0.0} == bias
    assert kernel["weight_decay"] == 1e-4
    assert values(leaves["scale"]) == {"max_norm": 1.0, "learning_rate": 0.5, "momentum": 0.9, "dampening": 0.0}
    assert [leaves["embed"].dtype, leaves["embed"].shape] == [np.dtype(jnp.bfloat16), (4, 3)]


def test_a_mask_takes_a_hyperparameter_away():
    leaves = described(gx.adamw(0.1, mask=".*kernel"))
    assert {path for path, leaf in leaves.items() if "weight_decay" in leaf.hyperparameters} == NARROW - {"embed"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: gx.accumulate(tx, every=2),
        gx.skip_nonfinite,
        lambda tx: gx.observe(tx, by="group"),
        gx.master_weights,
        lambda tx: gx.chain(gx.clip_by_value(1.0), gx.accumulate(tx, every=2)),
        lambda tx: gx.chain(tx, gx.identity()),
    ],
    ids=["accumulate", "skip", "observe", "master_weights", "in a chain", "chain"],
)
def test_it_sees_through_wrappers(wrap):
    leaves = described(wrap(gx.by_path({"embed": gx.freeze(), "scale": gx.sgd(0.5)}, default=gx.adam(0.1))))
    assert {path for path, leaf in leaves.items() if leaf.frozen} == {"embed"}
    assert {leaf.group for leaf in leaves.values()} == {"embed", "scale", "default"}
    assert values(leaves["scale"])["learning_rate"] == 0.5
    assert values(leaves["layers/0/bias"])["b2"] == 0.999


def test_groups_of_two_by_path_are_both_told():
    first = gx.by_path({"embed": gx.clip_by_value(1.0)}, default=gx.clip_by_value(2.0))
    leaves = described(gx.chain(first, gx.by_path({".*bias": gx.sgd(0.1)}, default=gx.adam(0.2))))
    assert leaves["embed"].group == "embed default"
    assert leaves["layers/0/bias"].group == "default .*bias"
    assert values(leaves["layers/0/bias"])["max_value"] == 2.0


def test_the_inside_of_a_foreign_transformation_is_not_known():
    leaves = described(optax.chain(gx.by_path({"embed": gx.freeze()}, default=gx.adam(0.1))))
    assert {(leaf.group, leaf.frozen, *leaf.hyperparameters) for leaf in leaves.values()} == {("", False)}
    assert leaves["embed"].state_bytes == 0


@pytest.mark.parametrize(
    ("tx", "params", "error", "message"),
    [
        (3, PARAMS, TypeError, "tx of describe must be a transformation, .* got 3"),
        (gx.adam(0.1), {"w": jnp.arange(3)}, TypeError, r"params\['w'\] is int32\[3\]"),
        (gx.by_path({"w": gx.sgd(0.1)}), PARAMS, ValueError, "no pattern matches 'embed'"),
        (gx.master_weights(gx.sgd(0.1)), {"w": jnp.ones(2)}, ValueError, "master_weights has nothing to do"),
    ],
)
def test_what_init_refuses_is_refused(tx, params, error, message):
    with pytest.raises(error, match=message):
        gx.describe(tx, params)


# What is printed


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rich._console", None)


def block() -> Any:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    return {
        "attention": {name: {"kernel": array(64, 64)} for name in ("query", "out")},
        "mlp": {"up": {"kernel": array(64, 256), "bias": array(256)}},
        "norm_1": {"scale": array(64)},
        "norm_2": {"scale": array(64)},
    }


def transformer(layers: int) -> Any:
    table = jax.ShapeDtypeStruct((1000, 64), jnp.bfloat16)
    return {"blocks": [block() for _ in range(layers)], "embed": {"table": table}, "head": {"kernel": table}}


def lines(text: str) -> list[str]:
    """What is printed, without the ruled lines."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip(" ─")]


def test_the_table_of_a_transformer(capsys):
    groups = {
        ".*(bias|scale)": {"weight_decay": 0.0},
        "embed/.*": gx.freeze(),
        "head/.*": {"learning_rate": gx.times(0.5)},
    }
    default = gx.adamw(optax.linear_schedule(0.1, 0.0, 5), weight_decay=0.1)
    found = gx.describe(gx.chain(gx.clip_by_global_norm(1.0), gx.by_path(groups, default)), transformer(12))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert lines(printed) == [
        "path leaves shape state",
        "default 36 2.359 MB",
        "blocks/{0…11}/attention/out/kernel 12 64×64 393.2 kB",
        "blocks/{0…11}/attention/query/kernel 12 64×64 393.2 kB",
        "blocks/{0…11}/mlp/up/kernel 12 64×256 1.573 MB",
        ".*(bias|scale): weight_decay=0.0 36 36.86 kB",
        "blocks/{0…11}/mlp/up/bias 12 256 24.58 kB",
        "blocks/{0…11}/norm_{1,2}/scale 24 64 12.29 kB",
        "embed/.*: frozen 1 0 B",
        "embed/table 1 1000×64 0 B",
        "head/.*: learning_rate=0.5*polynomial_schedule 1 512 kB",
        "head/kernel 1 1000×64 512 kB",
        "hyperparameters, unless said above: max_norm=1.0, b2=0.999, eps=1e-08, b1=0.9,",
        "weight_decay=0.1, learning_rate=polynomial_schedule",
        "74 leaves of bfloat16, 427,520 parameters, 363,520 of them trained, 855 kB;",
        "state 2.908 MB, 6.802 bytes per parameter",
    ]
    assert lines(str(found))[:-3] == lines(printed)[:-4]
    gx.describe(gx.sgd(0.1), transformer(1), show=False)
    assert capsys.readouterr().out == ""


def test_small_tables(capsys):
    gx.describe(gx.adam(0.1), jnp.ones(2))
    gx.describe(gx.adamw(0.1, mask="w"), {"w": jnp.ones((2, 1)), "[b]": jnp.ones((), jnp.bfloat16)})
    gx.describe(gx.by_path({"w": optax.trace(0.9), "b": gx.sgd(0.1)}), {"w": jnp.ones(3), "b": jnp.ones(2)})
    gx.describe(gx.freeze(), {"w": jnp.ones(2)})
    gx.describe(gx.sgd(0.1), {})
    assert lines(capsys.readouterr().out) == [
        "path shape state",
        "(the only leaf) 2 16 B",
        "hyperparameters: b2=0.999, eps=1e-08, b1=0.9, learning_rate=0.1",
        "1 leaf of float32, 2 parameters, 8 B; state 20 B, 8 bytes per parameter",
        "path shape dtype state",
        "w 2×1 float32 16 B",
        "no weight_decay 8 B",
        "[b] scalar bfloat16 8 B",
        "hyperparameters, unless said above: b2=0.999, eps=1e-08, b1=0.9,",
        "weight_decay=0.0001, learning_rate=0.1",
        "2 leaves, 3 parameters, 10 B; state 28 B, 8 bytes per parameter",
        "path shape state",
        "b: learning_rate=0.1 0 B",
        "b 2 0 B",
        "w: no hyperparameters known 12 B",
        "w 3 12 B",
        "2 leaves of float32, 5 parameters, 20 B; state 16 B, 2.4 bytes per parameter",
        "path shape state",
        "frozen 0 B",
        "w 2 0 B",
        "1 leaf of float32, 2 parameters, 0 of them trained, 8 B; state 4 B, 0 bytes per",
        "parameter",
        "path shape state",
        "0 leaves, 0 parameters, 0 B; state 4 B, 0 bytes per parameter",
    ]


@pytest.mark.parametrize(
    ("paths", "rows"),
    [
        (["a0", "a1", "a2"], ["a{0…2}"]),
        (["a0", "a1"], ["a{0,1}"]),
        (["a1", "a10", "a2", "a5"], ["a{1,2,5,10}"]),
        (["a8", "a9", "a10", "b0"], ["a{8…10}", "b0"]),
        (["0/w1", "0/w2", "1/w1", "1/w2"], ["{0,1}/w{1,2}"]),
        (["0/w1", "0/w2", "1/w1"], ["0/w1", "0/w2", "1/w1"]),
        (["a", "b"], ["a", "b"]),
        (["3"], ["3"]),
    ],
)
def test_leaves_that_only_numbers_tell_apart_are_one_row(paths, rows):
    leaf = jax.ShapeDtypeStruct((2,), jnp.float32)
    found = gx.describe(gx.sgd(0.1), dict.fromkeys(paths, leaf), show=False)
    printed = [line.split()[0] for line in lines(str(found))]
    assert [path for path in printed[1:] if path not in ("hyperparameters:", f"{len(paths)}")] == rows


def test_leaves_of_other_shapes_and_groups_are_other_rows():
    params = {f"layer_{i}": jax.ShapeDtypeStruct((2 if i < 2 else 3,), jnp.float32) for i in range(4)}
    printed = lines(
        str(gx.describe(gx.by_path({"layer_0": gx.freeze()}, default=gx.momentum(0.1)), params, show=False))
    )
    rows = [line.split()[0] for line in printed if "layer" in line]
    assert rows == ["layer_0:", "layer_0", "layer_1", "layer_{2,3}"]
