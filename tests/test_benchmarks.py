"""The benchmark runs at a tiny size, and the figures that no machine changes are as they should be. No times."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="the benchmark draws with matplotlib")
pytest.importorskip("rich", reason="the benchmark prints with rich")

ROOT = pathlib.Path(__file__).parents[1]
PNG = b"\x89PNG"


def run(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> tuple[str, bytes]:
    folder = tmp_path_factory.mktemp("benchmarks")
    done = run("--quick", "--only", "^32", "--markdown", folder / "table.md", "--picture", folder / "ratios.png")
    assert done.returncode == 0, done.stderr
    assert "32 small leaves: clip + AdamW" in done.stdout
    return (folder / "table.md").read_text(), (folder / "ratios.png").read_bytes()


def figure(table: str, optimizer: str, name: str) -> tuple[float, float]:
    """What the table says of optax and of gradxform."""
    section = table.partition(f": {optimizer}\n")[2].partition("\n##")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
    return tuple(float(cell) for cell in line.split("|")[2:4])


def test_the_files_are_written_and_name_no_folder(tables):
    table, picture = tables
    assert picture.startswith(PNG)
    assert "optax 0." in table
    assert str(ROOT) not in table


@pytest.mark.parametrize(
    "figure_name", ["compiled step", "un-jitted update", "un-jitted init", "trace + lower", "compile"]
)
def test_every_time_is_there(tables, figure_name):
    assert tables[0].count(f"| {figure_name} |") == 2


@pytest.mark.parametrize("optimizer", ["AdamW", "clip + AdamW"])
def test_the_compiled_step_copies_no_array(tables, optimizer):
    assert figure(tables[0], optimizer, "copies of whole arrays")[1] == 0


def test_the_compiled_adamw_needs_no_more_temporaries_than_optax(tables):
    optax, ours = figure(tables[0], "AdamW", "temporary bytes per parameter")
    assert ours <= optax


@pytest.mark.parametrize("optimizer", ["AdamW", "clip + AdamW"])
def test_thirty_two_leaves_of_two_shapes_trace_to_a_third_of_the_equations(tables, optimizer):
    optax, ours = figure(tables[0], optimizer, "equations to trace")
    assert ours <= optax / 3


def test_a_pattern_that_matches_nothing_says_how_names_look():
    done = run("--only", "no such workload")
    assert done.returncode != 0
    assert "WORKLOAD/OPTIMIZER/FIGURE" in done.stderr
