"""The catalog is whole and true: what is public has a row, what a row says holds, and what was forgotten is named."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import pytest

import gradxform as gx
from gradxform import catalog
from gradxform.catalog import CATALOG, Entry, evaluate
from tests.support.tables import entry_of
from tests.support.trees import assert_same
from tests.support.twins import ELSEWHERE, TWINS
from tests.twins import elementwise as twins

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("optimizers", "transforms", "wrappers")
# What it builds is its caller's: of a rule, or of the matrices of a model, for the files of its folder.
NO_ROW = {"lift", "by_layout"}


def builders(functions: Iterable[Any]) -> dict[str, Any]:
    """Those that build a transformation, by name."""
    return {
        function.__name__: function
        for function in functions
        if inspect.isfunction(function)
        and function.__annotations__.get("return") == "Transformation"
        and function.__name__ not in NO_ROW
    }


def defined() -> dict[str, Any]:
    """Every function in the folders of the package that builds a transformation."""
    found = []
    for folder in FOLDERS:
        package = importlib.import_module(f"gradxform.{folder}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = importlib.import_module(module.name)
            found += [value for value in vars(source).values() if getattr(value, "__module__", "") == source.__name__]
    return builders(found)


def forgotten(
    functions: Mapping[str, Callable[..., Any]],
    exported: Collection[str],
    entries: Collection[Entry],
    compared: Collection[str],
) -> Iterator[str]:
    """What is missing for each of `functions` and of the `entries`, in a sentence each."""
    rows = {entry.name for entry in entries}
    for name in functions:
        if name not in exported:
            yield f"{name} has no export line in gradxform/__init__.py"
        if name not in rows:
            yield f"{name} has no row in gradxform/catalog.py"
    for entry in entries:
        if entry.name in functions and entry.name not in compared:
            yield f"{entry.name} has no twin: write tests/twins/*.py {entry.name}(theta, gradients, …)"
        for field in ("idea", "paper"):
            if not getattr(entry, field):
                yield f"{entry.name} says no {field}"
        for library in ("optax", "torch"):
            if not getattr(entry, library):
                yield f"{entry.name} has no counterpart in {library}, and says not why"
        if not entry.examples or any(entry.name != text.partition("(")[0] for text in entry.examples):
            yield f"{entry.name} has no example, or that of another"


EXPORTED = builders(vars(gx).values())
COMPARED = {*TWINS, *(name for names in ELSEWHERE.values() for name in names)}


def test_nothing_was_forgotten():
    assert list(forgotten(defined(), EXPORTED, CATALOG.values(), COMPARED)) == []
    assert EXPORTED.keys() == CATALOG.keys()


def lion(learning_rate: float) -> gx.Transformation:
    return gx.sgd(learning_rate)


LION = Entry(
    function=lion,
    idea="the sign of a momentum",
    examples=("lion(α)",),
    sees="element",
    optax={"lion(α)": "lion(α)"},
    torch="torch has no Lion",
    paper="Chen et al. 2023, arXiv 2302.06675",
)


@pytest.mark.parametrize(
    ("exported", "entry", "compared", "message"),
    [
        (["lion"], LION, ["lion"], None),
        ([], LION, ["lion"], "lion has no export line in gradxform/__init__.py"),
        (["lion"], None, ["lion"], "lion has no row in gradxform/catalog.py"),
        (["lion"], LION, [], "lion has no twin: write tests/twins/*.py lion(theta, gradients, …)"),
        (["lion"], dataclasses.replace(LION, idea=""), ["lion"], "lion says no idea"),
        (["lion"], dataclasses.replace(LION, paper=""), ["lion"], "lion says no paper"),
        (["lion"], dataclasses.replace(LION, optax={}), ["lion"], "lion has no counterpart in optax, and says not why"),
        (["lion"], dataclasses.replace(LION, torch=""), ["lion"], "lion has no counterpart in torch, and says not why"),
        (["lion"], dataclasses.replace(LION, examples=()), ["lion"], "lion has no example, or that of another"),
        (
            ["lion"],
            dataclasses.replace(LION, examples=("sgd(α)",)),
            ["lion"],
            "lion has no example, or that of another",
        ),
    ],
)
def test_what_was_forgotten_is_named(exported, entry, compared, message):
    found = list(forgotten({"lion": lion}, exported, [entry] if entry else [], compared))
    assert found == ([message] if message else [])


def test_a_row_without_a_counterpart_or_a_reason_is_no_row():
    with pytest.raises(TypeError, match="'optax'"):
        Entry(function=lion, idea="", examples=(), sees="element", torch="", paper="")


# What a row says


COMPOSITIONS = [pair for entry in CATALOG.values() for pair in entry.composition.items()]


@pytest.mark.parametrize(("call", "composition"), COMPOSITIONS)
def test_a_composition_is_the_optimizer(call, composition):
    ours, theirs = evaluate(call), evaluate(composition)
    if entry_of(call).sees != "matrix":
        assert ours == theirs
    else:  # in groups of leaves: the same on a matrix, to the bit
        theta, gradients = (twins.as_tree(array)["kernel"] for array in twins.example("float32", steps=5))
        assert_same(
            *(
                jax.tree.map(jax.numpy.asarray, twins.walk(tx, {"kernel": theta}, {"kernel": gradients}))
                for tx in (ours, theirs)
            )
        )


@pytest.mark.parametrize("entry", catalog.OPTIMIZERS, ids=lambda entry: entry.name)
def test_every_optimizer_is_a_composition_of_ideas_that_are_useful_alone(entry):
    assert all(entry_of(call) is entry for call in entry.composition)
    if not entry.composition:  # one idea, which cannot be taken apart
        assert [rule.constructor for rule in evaluate(entry.examples[0]).body.stages] == [entry.function]


def test_the_readme_tells_the_optimizers_as_the_catalog_does():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## One idea at a time")[2].partition("\n\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| `?(.+?)`? \|$", table, flags=re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", table, flags=re.MULTILINE)) >= 9
    for name, idea, composition in rows:
        assert idea == CATALOG[name].idea, name
        assert composition in (CATALOG[name].composition.values() or ["a rule of its own"]), name


def test_the_catalog_is_not_imported_with_the_package():
    program = "import sys, gradxform; print('gradxform.catalog' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
