"""`python -m benchmarks.stages`: every row runs, and is not run again."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def stages(tmp_path, *options):
    command = [sys.executable, "-m", "benchmarks.stages", "--quick", "--seeds", "1", *options]
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_rows_on_the_demo_world(tmp_path):
    first = stages(tmp_path)
    assert first.count("$ python run.py with") == 10 + 8 + 7  # pre-training, VQA, retrieval
    again = stages(tmp_path)
    assert "$ python run.py with" not in again
    table = (tmp_path / "results/stages_demo.md").read_text()
    assert table in first and table in again
    assert table.count("\n|") == 8 + 2  # rows, a line below the head, what needs no model
    assert (tmp_path / "results/stages_demo.png").read_bytes().startswith(b"\x89PNG")
    assert "1+2+3,1,VQA score,0." in (tmp_path / "results/stages_demo.csv").read_text()
    assert "3 local,1,2,itc/train/i2t_accuracy," in (tmp_path / "results/stages_demo_curves.csv").read_text()
