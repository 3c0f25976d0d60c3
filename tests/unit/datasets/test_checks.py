"""Everything wrong with the files of a run is reported at once."""

import importlib
import json
from types import SimpleNamespace

import pyarrow as pa
import pytest

from tests import tables
from vlmo.datasets.checks import check_tables, find_files, split_files
from vlmo.datasets.scan import DatasetStats, cluster_advice
from vlmo.datasets.vqa_dataset import answers_in_tables
from vlmo.registry import DATASETS


def check(root, *names, splits=("train", "val"), needed=None, label_size=3):
    specs = {name: DATASETS[name] for name in names}
    return check_tables(str(root), specs, splits, needed or [splits[:1]], SimpleNamespace(vqav2_label_size=label_size))


WRITERS = {
    "coco": tables.write_coco,
    "f30k": tables.write_f30k,
    "wikibk": tables.write_wikibk,
    "vqa": tables.write_vqa,
    "nlvr2": tables.write_nlvr2,
}


@pytest.mark.parametrize("name", WRITERS)
def test_good_files_pass(name, tmp_path):
    WRITERS[name](tmp_path)
    for splits in (("train", "val"), ("test",), ("val", "test")):
        findings = check(tmp_path, name, splits=splits)
        assert (findings.problems, findings.warnings) == ([], [])


def test_shards_are_found_in_numerical_order(tmp_path):
    for number in (10, 9, 0):
        tables.write_captions(tmp_path, f"sbu_{number}", rows=1)
    (tmp_path / "sbu_x.arrow").touch()
    assert [path.stem for path in split_files(tmp_path, DATASETS["sbu"], "train")] == ["sbu_0", "sbu_9", "sbu_10"]
    assert find_files(tmp_path, ["vg"]) == {"vg": []}
    findings = check(tmp_path, "sbu")
    assert findings.problems == []
    assert findings.warnings == ["sbu: sbu_*.arrow: continuing without the shards 1, 2, 3, 4, 5, 6, 7, 8"]


def test_data_root_is_needed(tmp_path):
    assert "data_root: is empty" in check("", "coco").problems[0]
    assert "is not a folder" in check(tmp_path / "absent", "coco").problems[0]


def test_all_missing_files_are_listed_with_what_makes_them(tmp_path):
    problems = check(tmp_path, "coco", "gcc", "vg").problems
    assert [line.split(f"{tmp_path}/")[-1] for line in problems if line.endswith("is missing")] == [
        "coco_caption_karpathy_train.arrow is missing",
        "coco_caption_karpathy_val.arrow is missing",
        "conceptual_caption_train_*.arrow is missing",
        "conceptual_caption_val_*.arrow is missing",
        "vg.arrow is missing",
    ]
    assert "from vlmo.utils.write_coco_karpathy import make_arrow" in problems[2]
    assert f"python -m vlmo.utils.convert coco_karpathy ROOT {tmp_path}" in problems[2]
    assert len(problems) == 8


def test_evaluation_needs_no_training_files(tmp_path):
    tables.write_vqa(tmp_path)
    for path in tmp_path.glob("vqav2_*rain*.arrow"):
        path.unlink()
    assert check(tmp_path, "vqa", splits=("test",)).problems == []
    assert check(tmp_path, "vqa", splits=("val",)).problems == []


def test_optional_files_are_warned_about(tmp_path):
    tables.write_coco(tmp_path)
    (tmp_path / "coco_caption_karpathy_restval.arrow").unlink()
    findings = check(tmp_path, "coco")
    assert findings.problems == []
    missing = tmp_path / "coco_caption_karpathy_restval.arrow"
    assert findings.warnings == [f"coco: {missing} is missing; continuing without it"]


def test_no_data_for_the_first_split(tmp_path):
    tables.write_captions(tmp_path, "vg")
    assert check(tmp_path, "vg").problems == []
    assert "none has texts for test in" in check(tmp_path, "vg", splits=("test",)).problems[0]


def test_damaged_files_and_wrong_columns(tmp_path):
    tables.write_coco(tmp_path)
    train, restval, val, _ = (
        tmp_path / f"coco_caption_karpathy_{split}.arrow" for split in ("train", "restval", "val", "test")
    )
    train.write_bytes(train.read_bytes()[:-100])
    tables.write_table(restval, {"picture": [b""], "caption": [["a"]]})
    tables.write_table(val, {"image": ["path.jpg"], "caption": ["a"]})
    problems = check(tmp_path, "coco").problems
    assert len(problems) == 4
    assert problems[0].startswith(f"{train}: is not a complete Arrow file")
    assert problems[1] == f"{restval}: has no column 'image'; it has picture, caption"
    assert problems[2] == f"{val}: column 'image' is string, not binary"
    assert problems[3] == f"{val}: column 'caption' is string, not a list of texts"


def test_tables_without_samples(tmp_path):
    tables.write_coco(tmp_path)
    nothing = {"image": pa.nulls(0), "caption": pa.nulls(0)}
    tables.write_table(tmp_path / "coco_caption_karpathy_restval.arrow", nothing)  # optional: may be empty
    tables.write_table(tmp_path / "coco_caption_karpathy_train.arrow", nothing)
    no_captions = {"image": [b""], "caption": pa.array([[]], pa.list_(pa.string()))}
    val = tables.write_table(tmp_path / "coco_caption_karpathy_val.arrow", no_captions)
    findings = check(tmp_path, "coco")
    assert findings.problems == [f"coco: {tmp_path}/coco_caption_karpathy_train.arrow: has no caption"]
    assert findings.warnings == [f"coco: {val}: has no caption; continuing without it"]
    tables.write_captions(tmp_path, "coco_caption_karpathy_train")
    assert check(tmp_path, "coco").problems == []


def test_something_must_be_left_to_measure(tmp_path):
    tables.write_coco(tmp_path)
    splits, needed = ("train", "val", "test"), [("train",), ("val", "test")]
    nothing = {"image": pa.nulls(0), "caption": pa.nulls(0)}
    tables.write_table(tmp_path / "coco_caption_karpathy_test.arrow", nothing)
    findings = check(tmp_path, "coco", splits=splits, needed=needed)
    assert (findings.problems, len(findings.warnings)) == ([], 1)
    assert findings.texts == {"train": 16, "val": 8, "test": 0}
    tables.write_table(tmp_path / "coco_caption_karpathy_val.arrow", nothing)
    findings = check(tmp_path, "coco", splits=splits, needed=needed)
    assert findings.problems == [f"datasets=['coco']: none has texts for val or test in {tmp_path}"]


def test_labels_beyond_the_classifier(tmp_path):
    tables.write_vqa(tmp_path, answers=13)  # of which 5 occur
    assert check(tmp_path, "vqa", label_size=12).problems == ["vqa: the data has 13 answers: pass vqav2_label_size=13"]
    assert check(tmp_path, "vqa", label_size=13).problems == []
    (tmp_path / "vqav2_answers.json").unlink()
    assert check(tmp_path, "vqa", label_size=4).problems == ["vqa: the data has 5 answers: pass vqav2_label_size=5"]
    assert check(tmp_path, "vqa", label_size=5).problems == []
    (tmp_path / "vqav2_answers.json").write_text('{"yes": 0}')
    assert "must be a list of answers" in check(tmp_path, "vqa").problems[0]


def test_answers_from_the_tables(tmp_path):
    tables.write_vqa(tmp_path, answers=13)
    paths = sorted(tmp_path.glob("vqav2_*.arrow"))
    assert answers_in_tables(paths) == json.loads((tmp_path / "vqav2_answers.json").read_text())[:5]
    assert answers_in_tables([tmp_path / "vqav2_test.arrow"]) == []


@pytest.mark.parametrize("name", DATASETS)
def test_remedies_name_converters_that_exist(name):
    assert callable(importlib.import_module(f"vlmo.utils.write_{DATASETS[name].make_arrow}").make_arrow)


@pytest.mark.parametrize("captions", [[[b"a"]], [[1]], [[["a", "cat"]]], [[{"raw": "a"}]]])
def test_texts_of_another_type(captions, tmp_path):
    tables.write_coco(tmp_path)
    path = tables.write_table(tmp_path / "coco_caption_karpathy_val.arrow", {"image": [b"x"], "caption": captions})
    (problem,) = check(tmp_path, "coco").problems
    assert problem.startswith(str(path)) and "'caption'" in problem and "a list of texts" in problem


def test_answers_file_of_other_tables(tmp_path):
    tables.write_vqa(tmp_path)
    path = tmp_path / "vqav2_answers.json"
    answers = json.loads(path.read_text())
    path.write_text(json.dumps(answers[::-1]))
    (problem,) = check(tmp_path, "vqa").problems
    assert str(path) in problem and "not made together" in problem
    path.write_text(json.dumps(answers[:1]))
    (problem,) = check(tmp_path, "vqa").problems
    assert "has 1 answers" in problem


def test_what_is_no_arrow_file_is_called_what_it_is(tmp_path):
    tables.write_coco(tmp_path)
    train, val = (tmp_path / f"coco_caption_karpathy_{split}.arrow" for split in ("train", "val"))
    table = pa.ipc.open_file(train).read_all()
    with pa.ipc.new_stream(train, table.schema) as writer:
        writer.write_table(table)
    val.write_bytes(b"PAR1....PAR1")
    stream, parquet = check(tmp_path, "coco").problems
    assert "Arrow stream" in stream and "open_stream" in stream and "Parquet" in parquet


def test_a_cluster_is_advised_for_hours_of_images():
    found = DatasetStats(rows=10_000_000, sampled=16, seconds=0.08)
    assert "about 7 hours on 2 cores" in cluster_advice(found, 2)
    assert cluster_advice(found, 8) == cluster_advice(DatasetStats(), 2) == ""
