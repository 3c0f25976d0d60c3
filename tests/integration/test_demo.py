"""The demo as a person calls it, with a few steps of everything."""

import sys
from pathlib import Path

import pytest

from vlmo.demo import __main__ as demo

RUNS = ("stage1", "stage2", "stage3", "vqa", "vqa_scratch", "nlvr2", "nlvr2_scratch", "f30k", "f30k_scratch")


def test_quick_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["vlmo.demo", "--out", str(out), "--quick", "--seed", "3"])
    assert demo.main() == 0
    printed = capsys.readouterr().out
    calls = [line for line in printed.splitlines() if line.startswith("$ python run.py with task_")]
    assert len(calls) == len(RUNS) + 6  # the six fine-tuned models are evaluated as well
    assert sum("test_only=True" in call for call in calls) == 6
    for run in RUNS:
        assert list(out.glob(f"{run}_seed3_from_*/version_0/checkpoints/last.ckpt")), run
    for row in ("VQA", "NLVR2", "text to image", "image to text", "chance", "from scratch", "pre-trained"):
        assert row in printed, row
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "curves.png") in printed
    page = (out / "report.html").read_text()
    assert str(out / "report.html") in printed and "vqa_scratch" in page and page.count('<figure><img alt=""') == 12
