"""The surface is one file: what it names is public, documented, in the README, and cheap to import."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import pathlib
import pydoc
import re
import subprocess
import sys
import types

import pytest

import gradxform as gx
from gradxform.catalog import CATALOG

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = pathlib.Path(gx.__file__)
IMPORTS = [node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
PUBLIC = [alias.name for node in IMPORTS for alias in node.names]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(gx, name))]
DOCUMENTED = [name for name in PUBLIC if inspect.isfunction(getattr(gx, name)) or inspect.isclass(getattr(gx, name))]


def test_the_surface_is_what_the_file_exports():
    assert all(alias.asname == alias.name for node in IMPORTS for alias in node.names)
    visible = {name for name, value in vars(gx).items() if name[0] != "_" and not isinstance(value, types.ModuleType)}
    assert visible == set(PUBLIC)
    assert len(PUBLIC) == len(set(PUBLIC))


def test_all_and_dir_follow_the_file():
    assert gx.__all__ == PUBLIC
    everything: dict[str, object] = {}
    exec("from gradxform import *", everything)
    assert {name for name in everything if name[0] != "_"} == set(PUBLIC)
    shown = {name for name in dir(gx) if not name.startswith("__")}
    assert shown == {*PUBLIC, "numerics", "rules"}
    assert {"__all__", "__doc__", "__version__"} <= set(dir(gx))


def test_the_version_is_that_which_is_installed(monkeypatch):
    assert gx.__version__ == importlib.metadata.version("gradxform")

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert gx.__version__ == "0+unknown"


def test_help_shows_the_groups_and_every_name():
    shown = pydoc.plain(pydoc.render_doc(gx))
    assert inspect.getdoc(gx).splitlines()[0] in shown
    assert gx.__version__ in shown.partition("VERSION")[2]
    listed = shown.partition("CLASSES")[2]
    assert [name for name in PUBLIC if not re.search(rf"\b{name}\b", listed)] == []


def test_the_docstring_names_what_exists():
    named = re.findall(r"(?<!`)`(\w+)`(?!`)|gx\.(\w+)", gx.__doc__)
    assert {one or other for one, other in named} <= set(PUBLIC)


def test_public_things_know_their_own_name():
    for name in FUNCTIONS:
        assert getattr(gx, name).__name__ == name


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in CATALOG])
def test_the_readme_names_what_is_in_no_row_of_the_catalog(name):
    assert re.search(rf"\b{name}\b", (ROOT / "README.md").read_text(encoding="utf-8")), f"README.md lacks {name}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_docstring_starts_with_a_formula_or_a_sentence(name):
    first = inspect.getdoc(getattr(gx, name)).splitlines()[0]
    assert re.search(r"[←=]|\.$", first), first


def sections(name: str) -> dict[str, str]:
    """The docstring's sections by their titles."""
    parts = re.split(r"^([A-Z][a-z]+):", inspect.getdoc(getattr(gx, name)), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_explains_every_argument(name):
    explained = re.findall(r"^  ([\w*, ]+):", sections(name).get("Args", ""), flags=re.MULTILINE)
    named = [argument.strip(" *") for line in explained for argument in line.split(",")]
    assert sorted(named) == sorted(inspect.signature(getattr(gx, name)).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_has_an_example(name):
    example = sections(name).get("Example", "")
    assert ">>>" in example or re.search(r"see `\w+`", example)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_of_what_builds_a_transformation_says_what_raises(name):
    signature = inspect.signature(getattr(gx, name))
    builds = signature.return_annotation == "Transformation" and bool(signature.parameters)
    assert not builds or re.search(r"(Type|Value)Error", sections(name).get("Raises", ""))


def test_the_package_is_typed():
    assert (SOURCE.parent / "py.typed").is_file()


def test_importing_it_imports_no_framework():
    foreign = "flax haiku equinox torch keras tensorflow sklearn matplotlib rich hypothesis pytest"
    later = f"{foreign} gradxform._core.other_names"
    report = f"import gradxform, sys; print([name for name in {later.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_it_starts_no_device():
    """Until a device is used, a program may still say which and how many, or join others."""
    program = "import gradxform, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "3"
