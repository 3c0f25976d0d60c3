"""The learning doctor in whole runs; the table of all cases: `python -m benchmarks.sabotages`."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import sabotages
from benchmarks import sabotages_cases as cases
from tests import tables, tiny
from tests.processes import run_on
from vlmo import doctor
from vlmo.config import resolve
from vlmo.training.runner import run

STAGE3 = "task_mlm_itm_itc_base"
MEASURED = {"itc/train/loss_chance", "itm/train/accuracy_chance", "train/update_ratio", "train/grad_norm/vl_expert"}
MEASURED |= {"features/pooler/effective_rank", "itc/train/false_negatives", "train/duplicate_captions"}


@pytest.fixture
def options(tmp_path):
    tables.write_coco(tmp_path)
    for first, split in ((100, "train"), (200, "restval")):
        tables.write_captions(tmp_path, f"coco_caption_karpathy_{split}", 40, first=first)
    return {
        "data_root": str(tmp_path),
        "tokenizer": str(tables.write_vocabulary(tmp_path)),
        "log_dir": str(tmp_path / "result"),
        "datasets": ["coco"],
    }


def write_unknown_words(options):
    """Training tables of 80 images, each with two texts of its own that the vocabulary mostly does not know."""
    words = [word for word in tables.WORDS if not word.startswith("#")]
    for first, split in ((0, "train"), (80, "restval")):
        texts = [f"☃ ☂ ☃ ☂ {words[n // len(words)]} {words[n % len(words)]}" for n in range(first, first + 80)]
        columns = {"image": [tables.png(first + row) for row in range(40)]}
        columns |= {"caption": [texts[2 * row : 2 * row + 2] for row in range(40)], "split": [split] * 40}
        columns |= {"image_id": [str(first + row) for row in range(40)]}
        tables.write_table(Path(options["data_root"], f"coco_caption_karpathy_{split}.arrow"), columns)


def findings(folder):
    """What was said, by code; each code once."""
    file = folder / "learning.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = {each["code"]: each["sentence"] for each in lines}
    assert len(found) == len(lines)
    return found


def logged(folder):
    """Values by step and tag, without times."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [(row["step"], tag, value) for row in csv.DictReader(file) for tag, value in row.items() if value]
    times = ("_wait", "_per_sec", "epoch")
    return {(step, tag): float(value) for step, tag, value in rows if not tag.endswith(times)}


def test_a_run_says_what_chance_is_and_what_is_wrong(options, capsys):
    write_unknown_words(options)
    steps = {"max_steps": 8, "log_every_n_steps": 4, "batch_size": 12, "per_gpu_batchsize": 6}
    run(tiny.config("task_mlm_itm_itc_base", **options, **steps, learning_checks=True, peak_teraflops=1.0))
    printed = capsys.readouterr().out
    assert "(chance 1.792)" in printed and "MFU" in printed and "seen 48" in printed
    (folder,) = Path(options["log_dir"]).glob("*/version_0")
    found = findings(folder)
    assert "unknown_words" in found and all(found.values())
    assert {tag for _, tag in logged(folder)} >= MEASURED


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_look_at_the_whole_step(options, micro, strategy, tmp_path):
    """They log what one does of the same samples, and the first of them alone says what is wrong, once."""
    write_unknown_words(options)
    options |= {"model_arch": micro, "loggers": ["csv"], "learning_checks": True, "layout_invariant": True}
    options |= {"max_steps": 4, "log_every_n_steps": 2, "batch_size": 11, "per_gpu_batchsize": 4, "warmup_steps": 1}
    for world, how in ((1, "auto"), (2, strategy)):
        config = tiny.config(STAGE3, **options | {"log_dir": str(tmp_path / how), "strategy": how})
        run_on(world, config, tmp_path / f"{how} processes")
    one, two = (next((tmp_path / how).glob("*/version_*")) for how in ("auto", strategy))
    expected, found = logged(one), logged(two)
    assert {tag for _, tag in expected} >= MEASURED and expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert findings(one) == findings(two) and "unknown_words" in findings(two)


def test_doctor_learn_names_data_and_overfits(options, capsys):
    words = [f"{name}={value}" for name, value in (tiny.SMALL | options).items()]
    given = ["learn", "--seconds", "30", "--samples", "4", "--rate", "3e-3", "with"]
    assert doctor.main([*given, "task_finetune_irtr_coco_base_image384", *words]) == 0
    printed = capsys.readouterr().out
    assert "can be driven to zero" in printed
    assert doctor.main(["learn", "with"]) == 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return cases.make_world(tmp_path_factory.mktemp("sabotages"), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.SABOTAGES)
def test_sabotages_are_named(name, world):
    found = sabotages.run_case(name, world)["findings"]
    assert sabotages.named(world.cases[name], found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("healthy") and name[-1] == "1"])
def test_healthy_runs_are_left_alone(name, world):
    assert not sabotages.run_case(name, world)["findings"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["shuffled captions", "learning rate 0", "healthy: stage 3, 1"])
def test_in_two_processes(name, strategy, world, tmp_path):
    """Each of which sees half of the samples."""
    case, options = world.cases[name], cases.options_of(name, world)
    options |= {"log_dir": str(tmp_path / "runs"), "per_gpu_batchsize": cases.BATCH // 2, "strategy": strategy}
    run_on(2, resolve(case.task, **options), tmp_path / "processes")
    (folder,) = (tmp_path / "runs").glob("*/version_*")
    found = findings(folder)
    assert sabotages.named(case, found) if case.expected else not found
