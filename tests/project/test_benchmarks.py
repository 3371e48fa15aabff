"""The benchmark runs at tiny sizes, saves, compares and draws. No times; the exact figures are in another file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

pytest.importorskip("matplotlib", reason="the benchmark draws with matplotlib")
pytest.importorskip("rich", reason="the benchmark prints with rich")

ROOT = pathlib.Path(__file__).parents[2]
PNG = b"\x89PNG"
sys.path.append(str(ROOT / "benchmarks"))

import compare  # noqa: E402 (of the folder above)
import results  # noqa: E402
import run as command  # noqa: E402


def run(program: str, *arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """What a run of three cases wrote."""
    folder = tmp_path_factory.mktemp("benchmarks") / "new"
    files = ("--markdown", folder / "run.md", "--picture", folder / "run.png", "--save", folder / "run.json")
    done = run("run.py", "--quick", "--only", "^AdamW, one leaf|^global norm.*/build|^un-jitted", *files)
    assert done.returncode == 0, done.stderr
    assert "To reach" in done.stdout
    return folder


def test_the_table_has_every_goal_of_what_ran_and_names_no_folder(folder):
    table = (folder / "run.md").read_text()
    assert (folder / "run.png").read_bytes().startswith(PNG)
    assert "optax 0." in table
    assert str(ROOT) not in table
    goals = [line.split(" | ")[1] for line in table.partition("## Everything")[0].splitlines() if "≤" in line]
    exact = ["temporaries, B/param", "full-size copies"]
    assert goals == ["compiled step", *exact, "un-jitted update", "compile"]


@pytest.fixture
def saved(folder) -> results.Saved:
    return results.load(folder / "run.json")


def changed(saved: results.Saved, figure: str, factor: float, who: str = "gradxform") -> results.Saved:
    """The run with one figure of one contender multiplied."""

    def one(result: results.Result) -> results.Result:
        if result.figure != figure:
            return result
        values = {**result.values, who: [factor * value for value in result.values[who]]}
        return dataclasses.replace(result, values=values)

    return results.Saved(saved.facts, [one(result) for result in saved.results])


def test_a_run_does_not_differ_from_itself(folder, capsys):
    assert compare.main([str(folder / "run.json")] * 2) == 0
    assert "Nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figure", "factor", "who", "verdicts", "status"),
    [
        ("compiled step", 9.0, "gradxform", {"slower"}, 0),
        ("compiled step", 0.1, "gradxform", {"faster"}, 0),
        ("equations", 2.0, "gradxform", {"more"}, 1),
        ("equations", 0.5, "gradxform", {"less"}, 0),
        ("equations", 2.0, "optax", {"more"}, 0),
    ],
)
def test_what_changed_is_named_and_only_our_exact_figures_fail(saved, capsys, figure, factor, who, verdicts, status):
    new = changed(saved, figure, factor, who)
    assert {change.verdict for change in compare.changes(saved, new)} == verdicts
    assert compare.show(saved, new, compare.Console(width=200)) == status
    assert "Warning" not in capsys.readouterr().out


def test_another_machine_is_a_warning_and_what_is_gone_is_named(saved, capsys):
    new = results.Saved({**saved.facts, "device": "abacus"}, saved.results[1:])
    assert compare.show(saved, new, compare.Console(width=500)) == 0
    shown = capsys.readouterr().out
    assert "Warning" in shown
    assert "→ abacus" in shown
    assert "Not in the new run" in shown


def test_runs_of_other_sizes_are_not_compared(saved, capsys):
    new = results.Saved({**saved.facts, "sizes": "full"}, saved.results)
    assert compare.show(saved, new, compare.Console(width=500)) == 1
    assert "different sizes" in capsys.readouterr().out


def test_scaling_draws_its_curves(tmp_path):
    done = run("scaling.py", "--quick", "--rounds", "1", "--picture", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_forms_come_to_the_same_and_fill_a_table(tmp_path):
    done = run("forms.py", "--size", "4096", "--rounds", "2", "--markdown", tmp_path / "forms.md")
    assert done.returncode == 0, done.stderr
    assert "| two halves, put together |" in (tmp_path / "forms.md").read_text()


def test_a_pattern_that_matches_nothing_lists_the_names():
    with pytest.raises(SystemExit, match="un-jitted AdamW, 4 leaves/un-jitted update"):
        command.choose(command.parse(["--quick", "--only", "no such work"]))
