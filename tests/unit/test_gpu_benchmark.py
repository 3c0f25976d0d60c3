"""The program for a day with a GPU, rehearsed without one."""

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu


@pytest.mark.parametrize("limit", [0, 1, 7, 100, 5000])
def test_the_largest_batch_is_found_to_an_eighth(limit):
    tried = []

    def fits(number):
        tried.append(number)
        return number <= limit

    found = gpu.largest(fits)
    assert found <= limit and (limit < 2 or found >= min(limit, 4096) * 0.85)
    assert len(tried) < 20


def test_a_part_that_takes_too_long_is_ended_and_what_it_said_counts():
    start = time.monotonic()
    said, code = gpu.run_within(3, [sys.executable, "-c", "import time; print('{}', flush=True); time.sleep(60)"])
    assert code is None and said == "{}\n" and time.monotonic() - start < 50


@pytest.mark.parametrize("part", ["batch", "planner"])
def test_parts_are_rehearsed(part):
    rows = list(gpu.MEASURED[part](True))
    page = gpu.markdown(
        {
            "when": "today",
            "rehearsal": True,
            "machine": gpu.machine(),
            "parts": {part: {"seconds": 1.0, "ended": "in time", "rows": rows}},
        }
    )
    assert "rehearsal" in page and f"## {part}" in page and json.dumps(rows)
    if part == "batch":
        assert {row["largest batch"] for row in rows} == {5}
        assert page.count("| 5 |") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert "--cpu-rehearsal" in str(ended.value) and "\n" not in str(ended.value)
