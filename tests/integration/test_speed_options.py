"""Runs with the options about speed."""

import gzip
import json

import pytest

STAGE3 = "task_mlm_itm_itc_base"


def test_a_profile_of_some_steps(go):
    run = go(STAGE3, datasets=["coco"], profile_steps=1, max_steps=5)
    with gzip.open(run.folder / "profile_trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep") for event in events) == 1
    assert "aten::addmm" in (run.folder / "profile.txt").read_text()


def test_a_run_that_is_too_short_for_its_profile_says_so(go, caplog):
    go(STAGE3, datasets=["coco"], profile_steps=9)
    assert "profile_steps=9: training ended before 12 forward passes" in caplog.text


def test_a_deterministic_run_gives_the_same_numbers(go):
    runs = [go(STAGE3, datasets=["coco"], deterministic=deterministic) for deterministic in (True, False)]
    assert runs[0].logged("mlm/train/loss") == pytest.approx(runs[1].logged("mlm/train/loss"))


@pytest.mark.slow
def test_a_compiled_run_gives_the_same_losses(go):
    compiled, plain = (go(STAGE3, datasets=["coco"], compile=compiled) for compiled in (True, False))
    assert compiled.logged("itc/train/loss") == pytest.approx(plain.logged("itc/train/loss"), rel=1e-3)
