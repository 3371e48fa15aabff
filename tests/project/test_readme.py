"""The README's Python runs, from top to bottom, as a reader would paste it."""

from __future__ import annotations

import pathlib
import re

import jax
import pytest

pytestmark = pytest.mark.once

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_code_blocks_run(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    for package in re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks), flags=re.MULTILINE):
        pytest.importorskip(package)
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the frameworks rely on both
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    loss, learning_rate, count, _ = printed.split("\n")[0].split(" ", 3)
    assert float(loss) < 1e-2, "the first loop should have fitted the line"
    assert float(learning_rate) < 1e-5, "the schedule should have ended"
    assert int(count) == 500
    assert "clipped 1, grad_norm 4.47, nonfinite 0, " in printed
    assert "float32[64@devices,64]\n" in printed
    assert ", update_ratio 0.00112, skipped 1, skipped_in_a_row 0, learning_rate 0.001\n" in printed
