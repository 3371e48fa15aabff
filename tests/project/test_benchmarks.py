"""The benchmark runs at tiny sizes, saves, compares and draws. No times; the exact figures are in another file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import pytest

pytestmark = pytest.mark.once

pytest.importorskip("rich", reason="the benchmark prints with rich")

ROOT = pathlib.Path(__file__).parents[2]
PNG = b"\x89PNG"
sys.path.append(str(ROOT / "benchmarks"))

import compare  # noqa: E402 (of the folder above)
import measure  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run as command  # noqa: E402
import two_versions  # noqa: E402
from cases import STEP, Case  # noqa: E402
from libraries import OUR_ADAMW, Contender, update_and_apply  # noqa: E402
from presets import PRESETS  # noqa: E402
from rows import ROWS, cases  # noqa: E402
from workloads import PERIOD, thinned, trees  # noqa: E402


def run(program: str, *arguments: str | pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """What a run of three cases wrote."""
    pytest.importorskip("matplotlib", reason="the benchmark draws with matplotlib")
    folder = tmp_path_factory.mktemp("benchmarks") / "new"
    files = ("--markdown", folder / "run.md", "--picture", folder / "run.png", "--save", folder / "run.json")
    done = run("run.py", "--quick", "--only", "^AdamW, one leaf|^global norm.*/build|^un-jitted", *files)
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_the_rows_for_a_gpu_run_on_a_cpu(tmp_path):
    # XLA compiles most of the time, and this only has to run
    quickly = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    arguments = ("--preset", "gpu", "--quick", "--budget", "3600", "--markdown", tmp_path / "run.md")
    done = run("run.py", *arguments, **quickly)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "run.md").read_text()
    titles = re.findall("^### (.*)$", table, re.MULTILINE)
    assert titles == [case.name for case in cases(PRESETS["gpu"].tiny())]
    for contender in ("batched", "one by one", "bfloat16", "master_weights", "skip_nonfinite(accumulate)"):
        assert f"| gradxform, {contender} |" in table
    assert "Wrong or failed" not in table


# a machine with nothing but a checkout: no git, no compiler, no torch, no matplotlib, no metadata of this library
BARE = """
import importlib.metadata, runpy, sys
sys.modules["torch"] = sys.modules["matplotlib"] = None
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = importlib.metadata.distribution = missing
sys.argv[:2] = sys.argv[1:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_bare_checkout_is_enough_and_what_it_cannot_draw_is_said(tmp_path):
    arguments = ("--preset", "cpu", "--quick", "--only", "^AdamW, one leaf")
    files = ("--markdown", tmp_path / "run.md", "--picture", tmp_path / "run.png", "--save", tmp_path / "run.json")
    done = subprocess.run(
        [sys.executable, "-c", BARE, ROOT / "benchmarks" / "run.py", *arguments, *files],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "PATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "There will be no" in done.stdout
    assert not (tmp_path / "run.png").exists()
    found = results.load(tmp_path / "run.json")
    assert found.facts["gradxform"] == "0+unknown"
    assert found.results[0].values.keys() == {"optax", "gradxform"}
    assert "| gradxform |" in (tmp_path / "run.md").read_text()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_rows_that_exist_and_no_piece_of_work_twice(name):
    preset = PRESETS[name]
    assert set(preset.rows) <= ROWS.keys()
    names = [case.name for case in cases(preset)]
    assert len(names) == len({*names})
    assert len(names) == len(cases(preset.tiny()))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which passes when the test says so."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def chosen() -> list[Case]:
    return cases(PRESETS["cpu"].tiny())[:5]


def test_with_a_budget_no_row_is_begun_that_would_end_later(monkeypatch, clock, chosen):
    lasts = dict(zip((case.name for case in chosen), (10, 30, 5, 20, 5), strict=True))

    def measured(case, tick, deadline):
        clock[0] += lasts[case.name]
        return results.Found()

    monkeypatch.setattr(measure, "measure", measured)
    found = sum(measure.measure_all(chosen, report.Console(quiet=True), budget=80), results.Found())
    assert found.left_out == [case.name for case in chosen[4:]]  # 15 s are left, the longest took 30
    assert found.seconds == {case.name: lasts[case.name] for case in chosen[:4]}


def test_a_row_that_does_not_come_to_an_end_is_cut_off_and_what_was_found_is_kept(tmp_path):
    arguments = ("--preset", "cpu", "--quick", "--only", "^pairs|^import", "--budget", "1")
    done = run("run.py", *arguments, "--markdown", tmp_path / "run.md", "--save", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    found = results.load(tmp_path / "run.json")
    assert [name.partition(" ")[0] for name in found.left_out] == ["pairs", "import"]
    for text in (done.stdout, (tmp_path / "run.md").read_text()):
        assert "Left out, for want of time: pairs" in text


@pytest.mark.parametrize(("deadline", "rounds"), [(0, measure.LEAST_ROUNDS), (10, 6), (100, 9)])
def test_after_its_deadline_a_row_takes_no_more_rounds_than_it_must(clock, deadline, rounds):
    def task(times):
        clock[0] += 1  # once untimed and once timed in a round

    taken = measure.interleaved({"task": task}, 9, "", lambda what: None, deadline=deadline)
    assert len(taken["task"]) == rounds


def test_files_are_written_after_every_row(monkeypatch, tmp_path, chosen):
    def measured(case, tick, deadline):
        if case.name == chosen[1].name:
            raise KeyboardInterrupt
        return results.Found([results.Result(case.name, STEP, "optax", {"optax": [1.0]})])

    monkeypatch.setattr(measure, "measure", measured)
    files = ("--markdown", str(tmp_path / "run.md"), "--save", str(tmp_path / "run.json"))
    with pytest.raises(KeyboardInterrupt):
        command.main(["--preset", "cpu", "--quick", *files])
    assert [result.case for result in results.load(tmp_path / "run.json").results] == [chosen[0].name]
    assert f"### {chosen[0].name}" in (tmp_path / "run.md").read_text()


def test_who_fails_or_computes_something_else_is_named_and_the_others_are_measured():
    def twice(tx, grads, state, params):
        params, state = update_and_apply(tx, grads, state, params)
        return jax.tree.map(lambda leaf: 2 * leaf, params), state

    def broken():
        raise TypeError("no such argument\nand more")

    ours = dataclasses.replace(OUR_ADAMW, name="gradxform, the same")
    wrong = dataclasses.replace(OUR_ADAMW, name="gradxform, twice", advance=twice)
    contenders = (OUR_ADAMW, ours, wrong, Contender("gradxform, broken", broken))
    case = Case("work", {"leaf": (64,)}, contenders, (), figures=(STEP,), rounds=1)
    never = dataclasses.replace(case, name="nothing", outsiders=(lambda params, grads: 1 / 0,))
    found = sum(measure.measure_all([case, never], report.Console(quiet=True)), results.Found())
    assert found.faults[0] == "work: gradxform, broken: TypeError: no such argument"
    assert found.faults[1].startswith("work: gradxform, twice: params at leaf are off by ")
    assert found.faults[2] == "nothing: ZeroDivisionError: division by zero"
    assert len(found.faults) == 3
    assert found.results[0].values.keys() == {contender.name for contender in contenders[:3]}
    assert all(fault in report.markdown([case], found) for fault in found.faults)


def test_compilations_are_counted_where_they_happen():
    double = jax.jit(lambda x: 2 * x)
    with measure.counted_compilations() as first:
        double(3.0)
    with measure.counted_compilations() as second:
        double(4.0)
    assert (len(first), len(second)) == (1, 0)


def test_large_leaves_are_full_rank_random_and_looked_at_here_and_there():
    params, _ = trees({"large": (2, 2 * PERIOD), "small": (3, 4)})
    assert thinned(params["large"]).size == pytest.approx(PERIOD, rel=0.5)
    assert thinned(params["small"]).shape == (12,)
    matrix, _ = trees({"matrix": (4, PERIOD // 3)})
    assert not any((matrix["matrix"][0] == row).all() for row in matrix["matrix"][1:])


@pytest.fixture
def saved(folder) -> results.Found:
    return results.load(folder / "run.json")


def changed(saved: results.Found, figure: str, factor: float, who: str = "gradxform") -> results.Found:
    """The run with one figure of one contender multiplied."""

    def one(result: results.Result) -> results.Result:
        if result.figure != figure:
            return result
        values = {**result.values, who: [factor * value for value in result.values[who]]}
        return dataclasses.replace(result, values=values)

    return dataclasses.replace(saved, results=[one(result) for result in saved.results])


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
    new = results.Found(saved.results[1:], facts={**saved.facts, "device": "abacus"})
    assert compare.show(saved, new, compare.Console(width=500)) == 0
    shown = capsys.readouterr().out
    assert "Warning" in shown
    assert "→ abacus" in shown
    assert "Not in the new run" in shown


def test_runs_of_other_sizes_are_not_compared(saved, capsys):
    new = dataclasses.replace(saved, facts={**saved.facts, "sizes": "cpu"})
    assert compare.show(saved, new, compare.Console(width=500)) == 1
    assert "different sizes" in capsys.readouterr().out


def timed(old: list[float], new: list[float], exact: bool = False) -> two_versions.Line:
    before, now = (results.Result("work", STEP, "gradxform", {"gradxform": v}, exact) for v in (old, new))
    return two_versions.Line.of(before, now, "gradxform")


@pytest.mark.parametrize(
    ("old", "new", "exact", "verdict"),
    [
        ([1, 2, 3, 4], [2, 3, 4, 5], False, ""),
        ([1, 2, 3, 4], [4, 5, 6, 7], False, "slower"),
        ([4, 5, 6, 7], [1, 2, 3, 4], False, "faster"),
        ([8], [8], True, ""),
        ([8], [9], True, "more"),
        ([8], [0], True, "less"),
    ],
)
def test_a_version_is_slower_where_quartiles_part_and_more_where_an_exact_figure_grew(old, new, exact, verdict):
    line = timed(old, new, exact)
    assert line.verdict == verdict
    assert line.worse == (verdict in ("slower", "more"))


def test_what_is_slower_once_but_not_again_is_chance_and_both_looks_are_shown():
    slower, overlaps = timed([1, 1, 1], [2, 2, 2]), timed([2, 2, 2], [1, 2, 2])
    assert slower.and_again(slower).verdict == "slower"
    both = slower.and_again(overlaps)
    assert not both.verdict
    assert both.cells()[3:6] == ("1.50 s (1.00–2.00)", "2.00 s (2.00–2.00)", "1.500× (1.000–2.000)")


def test_turns_are_put_together_and_an_exact_figure_is_the_largest_of_them():
    def part(seconds: float, copies: float) -> results.Found:
        times = results.Result("work", STEP, "gradxform", {"gradxform": [seconds]})
        exact = results.Result("work", "full-size copies", "gradxform", {"gradxform": [copies]}, exact=True)
        return results.Found([times, exact], ["work: fails"])

    found = two_versions.together([part(1, 0), part(2, 3), part(3, 2)])
    assert [result.values["gradxform"] for result in found.results] == [[1, 2, 3], [3]]
    assert found.faults == ["work: fails"]


def test_two_versions_are_measured_by_turns_and_an_exact_figure_that_grew_fails(tmp_path):
    shutil.copytree(ROOT / "gradxform", tmp_path / "new" / "gradxform")
    with (tmp_path / "new" / "gradxform" / "__init__.py").open("a") as file:
        file.write("_adamw = adamw\nadamw = lambda *a, **k: chain(clip_by_value(1e9), _adamw(*a, **k))\n")
    arguments = ("--quick", "--preset", "cpu", "--only", "^AdamW, one leaf", "--rounds", "1", "--samples", "2")
    files = ("--markdown", tmp_path / "two.md", "--save", tmp_path / "two.json")
    done = run("two_versions.py", ROOT, tmp_path / "new", *arguments, *files, PYTHONPATH="")
    assert done.returncode == 1, done.stderr
    table = (tmp_path / "two.md").read_text()
    rows = [line.split(" | ")[1:3] for line in table.splitlines() if line.startswith("| AdamW")]
    assert rows[:1] == [["gradxform", "compiled step"]]
    assert ["gradxform", "equations"] in rows
    assert re.search(r"equations \| \d+ \| \d+ \| 1\.\d+× \| more \|", table)
    assert str(tmp_path) not in table
    figures = {line["figure"]: line["verdict"] for line in json.loads((tmp_path / "two.json").read_text())["lines"]}
    assert figures["equations"] == "more"
    assert figures["full-size copies"] == ""


@pytest.mark.parametrize(
    ("folder", "pattern", "message"),
    [("nowhere", "", "holds no package gradxform"), (".", "no such work", "nothing matches")],
)
def test_two_versions_say_what_they_cannot_find(folder, pattern, message):
    done = run("two_versions.py", ROOT / folder, "--quick", "--only", pattern)
    assert done.returncode == 1
    assert message in done.stderr


def test_scaling_draws_its_curves(tmp_path):
    pytest.importorskip("matplotlib", reason="the benchmark draws with matplotlib")
    done = run("scaling.py", "--quick", "--rounds", "1", "--picture", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_forms_come_to_the_same_and_fill_a_table(tmp_path):
    done = run("forms.py", "--size", "4096", "--rounds", "2", "--markdown", tmp_path / "forms.md")
    assert done.returncode == 0, done.stderr
    assert "| two halves, put together |" in (tmp_path / "forms.md").read_text()


def test_a_pattern_that_matches_nothing_lists_the_names():
    options = command.parse(["--quick", "--only", "no such work"])
    with pytest.raises(SystemExit, match="un-jitted AdamW, 4 leaves/un-jitted update"):
        command.choose(options, PRESETS["cpu"].tiny())
