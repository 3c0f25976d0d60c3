"""The converters make of a raw tree in the official layouts what the original's make of it."""

import hashlib
import importlib
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

GOLDENS = Path(__file__).parents[1] / "goldens" / "converters"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text(encoding="utf-8"))
CONVERTERS = {
    "coco": "coco_karpathy",
    "f30k": "f30k_karpathy",
    "vg": "vg",
    "gcc": "conceptual_caption",
    "sbu": "sbu",
    "vqa": "vqa",
    "nlvr2": "nlvr2",
    "wikibk": "wikibk",
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    with zipfile.ZipFile(GOLDENS / "raw_sample.zip") as archive:
        archive.extractall(root)
    return root


@pytest.fixture(scope="module")
def converted(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("arrow")
    for folder, converter in CONVERTERS.items():
        importlib.import_module(f"vlmo.utils.write_{converter}").make_arrow(str(raw / folder), str(out))
    return out


def read_table(path):
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def comparable(table):
    """Rows in an order of their own, images as the goldens have them."""

    def short(value):
        return hashlib.sha256(value).hexdigest()[:16] if isinstance(value, bytes) else value

    rows = [{column: short(value) for column, value in row.items()} for row in table.to_pylist()]
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_equal_the_originals(name, converted):
    table = read_table(converted / f"{name}.arrow")
    assert comparable(table) == sorted(json.dumps(row, sort_keys=True) for row in EXPECTED[name]["rows"])
    if table.num_rows:  # (of an empty table the original does not know the types)
        assert {column.name: str(column.type) for column in table.schema} == EXPECTED[name]["schema"]


@pytest.mark.parametrize("path", sorted((GOLDENS / "original_arrow").glob("*.arrow")), ids=lambda path: path.stem)
def test_rows_equal_the_original_files(path, converted):
    original = read_table(path)
    ours = read_table(converted / path.name)
    assert comparable(ours) == comparable(original)
    assert ours.schema.equals(original.schema, check_metadata=False)


def test_every_text_is_in_one_table(raw, converted):
    written = [row["caption"] for path in converted.glob("wikibk_*.arrow") for row in read_table(path).to_pylist()]
    lines = [line for path in (raw / "wikibk").glob("*.txt") for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(written) == sorted([line] for line in lines)
    assert len(read_table(converted / "wikibk_val_0.arrow")) == 1


def test_vocabulary_is_written_in_label_order(converted):
    answers = json.loads((converted / "vqav2_answers.json").read_text(encoding="utf-8"))
    for row in EXPECTED["vqav2_train"]["rows"]:
        for texts, labels in zip(row["answers"], row["answer_labels"], strict=True):
            assert [answers[label] for label in labels] == texts


def test_same_files_for_any_number_of_workers(raw, converted, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmo.utils.arrow_writer.CHUNK_ROWS", 2)
    for workers in (1, 2):
        out = tmp_path / str(workers)
        for folder, converter in (("coco", "coco_karpathy"), ("wikibk", "wikibk")):
            make_arrow = importlib.import_module(f"vlmo.utils.write_{converter}").make_arrow
            make_arrow(str(raw / folder), str(out), num_workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
