"""The learning doctor in whole runs; the table of all cases: `python -m benchmarks.sabotages`."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import sabotages
from tests import tables, tiny
from vlmo import doctor
from vlmo.training.runner import run


@pytest.fixture
def options(tmp_path):
    tables.write_coco(tmp_path, rows=40)
    return {
        "data_root": str(tmp_path),
        "tokenizer": str(tables.write_vocabulary(tmp_path)),
        "log_dir": str(tmp_path / "result"),
        "datasets": ["coco"],
    }


def test_a_run_says_what_chance_is_and_what_is_wrong(options, capsys):
    columns = {"image": [tables.png(row) for row in range(40)], "caption": [["a cat ."] * 2] * 40}
    columns |= {"image_id": list(map(str, range(40))), "split": ["train"] * 40}
    for split in ("train", "restval"):
        tables.write_table(Path(options["data_root"], f"coco_caption_karpathy_{split}.arrow"), columns)
    steps = {"max_steps": 8, "log_every_n_steps": 4, "batch_size": 12, "per_gpu_batchsize": 6}
    run(tiny.config("task_mlm_itm_itc_base", **options, **steps, learning_checks=True, peak_teraflops=1.0))
    printed = capsys.readouterr().out
    assert "(chance 1.792)" in printed and "MFU" in printed and "seen 48" in printed
    (folder,) = Path(options["log_dir"]).glob("*/version_0")
    found = [json.loads(line) for line in (folder / "learning.jsonl").read_text().splitlines()]
    assert "one_caption" in {each["code"] for each in found} and all(each["sentence"] for each in found)
    with (folder / "metrics.csv").open(newline="") as file:
        logged = {tag for row in csv.DictReader(file) for tag, value in row.items() if value}
    assert {"itc/train/loss_chance", "itm/train/accuracy_chance", "train/update_ratio"} <= logged
    assert {"train/grad_norm/vl_expert", "features/pooler/effective_rank", "itc/train/false_negatives"} <= logged


def test_doctor_learn_names_data_and_overfits(options, capsys):
    words = [f"{name}={value}" for name, value in (tiny.SMALL | options).items()]
    given = ["learn", "--seconds", "30", "--samples", "4", "--rate", "3e-3", "with"]
    assert doctor.main([*given, "task_finetune_irtr_coco_base_image384", *words]) == 0
    printed = capsys.readouterr().out
    assert "can be driven to zero" in printed
    assert doctor.main(["learn", "with"]) == 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("sabotages")
    return sabotages.make_world(out), out


@pytest.mark.slow
@pytest.mark.parametrize("name", sabotages.SABOTAGES)
def test_sabotages_are_named(name, world):
    found = sabotages.run_case(name, *world)["findings"]
    assert sabotages.named(sabotages.CASES[name], found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in sabotages.HEALTHY if name.endswith("1")])
def test_healthy_runs_are_left_alone(name, world):
    assert not sabotages.run_case(name, *world)["findings"]
