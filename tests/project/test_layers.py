"""Imports go one way: _core from the bottom of its table up, then the rules, then what is made of them."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "gradxform"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# `| file | idea |`, from the bottom up
ORDER = re.findall(r"^\| `(\w+)\.py` \|", (PACKAGE / "_core" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def imports_of(source: str, module: str) -> Iterator[tuple[str, str]]:
    """The modules that a source imports, and each name from them: also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by dots: write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in MODULES else (node.module or "", alias.name)


IMPORTS = {module: set(imports_of(path.read_text(encoding="utf-8"), module)) for module, path in MODULES.items()}
EDGES = {
    (module, imported)
    for module, names in IMPORTS.items()
    for imported, _ in names
    if imported.partition(".")[0] == "gradxform"
}


def within(folder: str, module: str) -> bool:
    return module == f"gradxform.{folder}" or module.startswith(f"gradxform.{folder}.")


def forbidden(importers: tuple[str, ...], imported: tuple[str, ...]) -> list[str]:
    """The imports of a module in these folders from a module in those."""
    return sorted(
        f"{one} imports {other}"
        for one, other in EDGES
        if any(within(folder, one) for folder in importers) and any(within(folder, other) for folder in imported)
    )


def test_the_table_names_every_file_of_core():
    files = {path.stem for path in (PACKAGE / "_core").glob("*.py")} - {"__init__"}
    assert sorted(ORDER) == sorted(files)


def test_no_file_of_core_imports_one_that_stands_below_it_in_the_table():
    place = {f"gradxform._core.{name}": number for number, name in enumerate(ORDER)}
    assert [
        f"{one} imports {other}"
        for one, other in sorted(EDGES)
        if one in place and other in place and place[other] >= place[one]
    ] == []


@pytest.mark.parametrize(
    ("importers", "imported"),
    [
        (("_core", "numerics"), ("optimizers", "transforms", "wrappers", "rules")),
        (("wrappers",), ("optimizers",)),
        (("transforms",), ("optimizers", "wrappers")),
        (("optimizers",), ("wrappers",)),
        (("_core", "numerics", "rules", "transforms", "optimizers", "wrappers"), ("catalog", "testing")),
    ],
    ids=lambda folders: ", ".join(folders),
)
def test_the_machinery_knows_no_algorithm(importers, imported):
    assert forbidden(importers, imported) == []


def test_the_surface_imports_no_catalog_and_no_tests():
    assert [
        other for one, other in EDGES if one == "gradxform" and within("catalog", other) | within("testing", other)
    ] == []


@pytest.mark.parametrize(
    "module", [name for name in MODULES if within("transforms", name) or within("optimizers", name)]
)
def test_an_algorithm_holds_mathematics_on_one_array(module):
    """It imports and uses nothing of JAX for trees."""
    source = MODULES[module].read_text(encoding="utf-8")
    assert [name for name, _ in IMPORTS[module] if name.startswith(("jax.tree", "optax.tree"))] == []
    assert re.findall(r"\b(?:jax|optax)\.tree\w*\b|\btree_\w+|\bjax\.flatten_util\b", source) == []


def circles(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """What is left of the imports when those from a module that imports none left, or to one that none imports, go."""
    while (inner := {(a, b) for a, b in edges if a in {y for _, y in edges} and b in {x for x, _ in edges}}) != edges:
        edges = inner
    return edges


def test_no_two_modules_import_each_other():
    """However long the way round."""
    assert sorted(f"{one} imports {other}" for one, other in circles(EDGES)) == []


def test_a_circle_is_found_and_what_hangs_on_it_is_not():
    ring = {("a", "b"), ("b", "c"), ("c", "a")}
    assert circles(ring | {("above", "a"), ("c", "below"), ("below", "ground")}) == ring
    assert circles({("a", "b"), ("b", "c"), ("a", "c")}) == set()


MOVED = (
    r"\bjax\.core\b|\bjax\._src\b|\bAxisType\b|\bauto_axes\b|\breshard\b|\bmanual_axis_type\b|\bcanonicalize_dtype\b"
)


def test_names_of_jax_that_have_moved_stand_in_one_file():
    def names(path: pathlib.Path) -> set[str]:
        """What the source says of JAX, whether imported from a file of ours or not."""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("jax")]
        said = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        return set(re.findall(MOVED, "\n".join([*map(ast.unparse, ours), *(x for x in said if x.startswith("jax."))])))

    assert names(PACKAGE / "_core" / "compat.py"), "it is looked for"
    assert {str(path): found for path in MODULES.values() if path.stem != "compat" and (found := names(path))} == {}


def test_imports_are_seen_wherever_they_stand():
    source = """
import gradxform.rules
if TYPE_CHECKING:
    from gradxform._core import trees
def f():
    from gradxform import live
"""
    expected = {("gradxform.rules", ""), ("gradxform._core.trees", ""), ("gradxform", "live")}
    assert set(imports_of(source, "m")) == expected
