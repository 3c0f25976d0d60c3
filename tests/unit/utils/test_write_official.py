"""The converters of the published data sets beyond the goldens: splits, options, mistakes in the raw data."""

import json

import pytest
import torch

from tests import tables
from tests.unit.utils.raw import image_bytes, read_rows, write_images, write_lines
from vlmo.datasets.nlvr2_dataset import NLVR2Dataset, sentence_numbers
from vlmo.errors import VLMoError
from vlmo.text import TokenMasker, load_tokenizer
from vlmo.utils import (
    write_coco_karpathy,
    write_conceptual_caption,
    write_f30k_karpathy,
    write_nlvr2,
    write_sbu,
    write_vg,
    write_vqa,
)


@pytest.fixture
def vqa(tmp_path):
    """A raw VQAv2 of 2 training and 12 validation images with a question each; no test set."""
    root = tmp_path / "raw"
    for split, images in (("train", range(2)), ("val", range(10, 22))):
        folder = root / f"{split}2014"
        folder.mkdir(parents=True)
        questions, annotations = [], []
        for image in images:
            (folder / f"COCO_{split}2014_{image:012d}.jpg").write_bytes(image_bytes(image))
            questions.append({"image_id": image, "question_id": image * 10, "question": f"is it {image}?"})
            people = [{"answer": "yes", "answer_id": 1}] * 8 + [{"answer": "no", "answer_id": 2}] * 2
            annotations.append({"question_id": image * 10, "multiple_choice_answer": "Yes.", "answers": people})
        write_json(root / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
        write_json(root / f"v2_mscoco_{split}2014_annotations.json", {"info": {}, "annotations": annotations})
    return root


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def image_ids(path):
    return [row["image_id"] for row in read_rows(path)]


def test_vqa_validation_split(vqa, tmp_path):
    out = tmp_path / "out"
    report = write_vqa.make_arrow(str(vqa), str(out), rest_val_images=5)
    rest, trainable = image_ids(out / "vqav2_rest_val.arrow"), image_ids(out / "vqav2_trainable_val.arrow")
    assert (len(rest), len(trainable)) == (5, 7)
    assert trainable + rest == image_ids(out / "vqav2_val.arrow")
    assert sorted(trainable + rest) == list(range(10, 22)) != trainable + rest
    assert "vqav2_test.arrow" not in report.rows
    assert any("v2_OpenEnded_mscoco_test2015_questions.json is not there" in note for note in report.notes)
    write_vqa.make_arrow(str(vqa), str(tmp_path / "again"), rest_val_images=5)
    assert image_ids(tmp_path / "again" / "vqav2_rest_val.arrow") == rest
    write_vqa.make_arrow(str(vqa), str(tmp_path / "other"), rest_val_images=5, seed=1)
    assert image_ids(tmp_path / "other" / "vqav2_rest_val.arrow") != rest


def test_vqa_rest_val_counts_readable_images(vqa, tmp_path):
    (vqa / "val2014" / f"COCO_val2014_{10:012d}.jpg").unlink()
    report = write_vqa.make_arrow(str(vqa), str(tmp_path / "out"), rest_val_images=5)
    assert len(image_ids(tmp_path / "out" / "vqav2_rest_val.arrow")) == 5
    assert len(image_ids(tmp_path / "out" / "vqav2_trainable_val.arrow")) == 6
    assert report.skipped == {"file not found": 1}


def test_vqa_without_enough_validation_images(vqa, tmp_path):
    report = write_vqa.make_arrow(str(vqa), str(tmp_path / "out"))
    assert report.rows["vqav2_rest_val.arrow"] == 12 and report.rows["vqav2_trainable_val.arrow"] == 0
    assert any("a smaller rest_val_images" in note for note in report.notes)


def test_vqa_options(vqa, tmp_path):
    with pytest.raises(VLMoError, match="lower min_occurrences"):
        write_vqa.make_arrow(str(vqa), str(tmp_path), min_occurrences=15)
    with pytest.raises(VLMoError, match="rest_val_images=0"):
        write_vqa.make_arrow(str(vqa), str(tmp_path), rest_val_images=0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("v2_mscoco_val2014_annotations", {"annotations": []}, r"questions\[0\]: question 100 has no entry"),
        ("v2_mscoco_val2014_annotations", {}, "without 'annotations'"),
        ("v2_mscoco_train2014_annotations", {"annotations": [{"answers": []}]}, "'multiple_choice_answer' is missing"),
        (
            "v2_mscoco_train2014_annotations",
            {"annotations": [{"multiple_choice_answer": "a", "answers": [{"answer": 1}], "question_id": 1}]},
            r"annotations\[0\]: answers: 'answer' must be str",
        ),
        ("v2_OpenEnded_mscoco_train2014_questions", {"questions": [{"question_id": 0}]}, "'question' is missing"),
    ],
)
def test_vqa_mistakes(file, content, message, vqa, tmp_path):
    write_json(vqa / f"{file}.json", content)
    with pytest.raises(VLMoError, match=message):
        write_vqa.make_arrow(str(vqa), str(tmp_path / "out"))


@pytest.fixture
def nlvr2(tmp_path):
    """A raw NLVR2 with one pair each in train, dev and test1, in the released files' format."""
    root = tmp_path / "raw"
    for name, folder in (("train", "images/train/57"), ("dev", "dev"), ("test1", "test1")):
        (root / folder).mkdir(parents=True)
        (root / "nlvr2/data").mkdir(parents=True, exist_ok=True)
        for side in (0, 1):
            (root / folder / f"{name}-10-0-img{side}.png").write_bytes(image_bytes(side, "PNG"))
        record = {
            "validation": {"93": "False", "146": "False"},
            "sentence": "An image shows one leather case.",
            "left_url": "https://example.org/a.jpg",
            "right_url": "https://example.org/b.jpg",
            "writer": "4",
            "label": "False",
            "query": "pencil cases42",
            "identifier": f"{name}-10-0-0",
        }
        record |= {"directory": 57} if name == "train" else {}
        write_lines(
            root / f"nlvr2/data/{name}.json", [record, record | {"label": "True", "identifier": f"{name}-10-0-1"}]
        )
    return root


def test_nlvr2_in_the_released_format(nlvr2, tmp_path):
    report = write_nlvr2.make_arrow(str(nlvr2), str(tmp_path / "out"))
    (row,) = read_rows(tmp_path / "out" / "nlvr2_train.arrow")
    assert row["image_0"] == image_bytes(0, "PNG") and row["image_1"] == image_bytes(1, "PNG")
    assert row["answers"] == ["False", "True"] and row["identifier"] == "train-10-0"
    assert set(report.rows) == {"nlvr2_train.arrow", "nlvr2_dev.arrow", "nlvr2_test1.arrow"}


def test_nlvr2_sentences_keep_their_numbers(nlvr2, tmp_path):
    """The released files have the sentences of a pair in any order, and some pairs have only the second."""
    records = [
        {"identifier": f"dev-{number}", "sentence": f"the sentence of {number}", "label": "True"}
        for number in ("10-0-1", "11-0-0", "10-0-0", "12-0-1", "11-0-1")
    ]
    for number in (11, 12):
        for side in (0, 1):
            (nlvr2 / f"dev/dev-{number}-0-img{side}.png").write_bytes(image_bytes(side, "PNG"))
    write_lines(nlvr2 / "nlvr2/data/dev.json", records)
    write_nlvr2.make_arrow(str(nlvr2), str(tmp_path / "out"))
    path = tmp_path / "out" / "nlvr2_dev.arrow"
    assert sentence_numbers(path) == {"dev-10-0": [1, 0], "dev-12-0": [1]}
    tokenizer = load_tokenizer(str(tables.write_vocabulary(tmp_path)))
    masker = TokenMasker(tokenizer, 0.15, whole_word=False)
    dataset = NLVR2Dataset([path], tokenizer, 20, masker, lambda image: torch.zeros(3, 2, 2), {"image_0"})
    samples = [dataset[index] for index in range(len(dataset))]
    assert len(samples) == 5
    for sample in samples:
        assert sample["sentence"] == f"the sentence of {sample['identifier'].removeprefix('dev-')}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"identifier": "train", "sentence": "a", "label": "True"}, "train.json:1: 'identifier' must be like"),
        ({"identifier": "train-1-0-x", "sentence": "a", "label": "True"}, "train.json:1: 'identifier' must be like"),
        ({"identifier": "train-1-0-0", "sentence": "a", "label": "True"}, "train.json:1: 'directory' is missing"),
        (
            {"identifier": "t-1-0-0", "directory": "../../..", "sentence": "a", "label": "True"},
            "train.json:1: .*leads out of",
        ),
        ({"identifier": "t-1-0-0", "directory": 1, "sentence": "a", "label": "maybe"}, "train.json:1: 'label' must be"),
        ({"identifier": "t-1-0-0", "directory": 1, "label": "True"}, "train.json:1: 'sentence' is missing"),
    ],
)
def test_nlvr2_mistakes(record, message, nlvr2, tmp_path):
    write_lines(nlvr2 / "nlvr2/data/train.json", [record])
    with pytest.raises(VLMoError, match=message):
        write_nlvr2.make_arrow(str(nlvr2), str(tmp_path / "out"))


def test_missing_raw_files_are_all_named(tmp_path):
    for module, names in (
        (write_coco_karpathy, "karpathy/dataset_coco.json, train2014, val2014"),
        (write_f30k_karpathy, "karpathy/dataset_flickr30k.json, flickr30k-images"),
        (write_vg, "annotations/region_descriptions.json, images/VG_100K, images/VG_100K_2"),
        (write_conceptual_caption, "train_annot.json, val_annot.json, images_train, images_val"),
        (write_sbu, "annot.json, images_train"),
        (write_nlvr2, "nlvr2/data/train.json, nlvr2/data/dev.json, nlvr2/data/test1.json, images/train, dev, test1"),
    ):
        with pytest.raises(VLMoError) as error:
            module.make_arrow(str(tmp_path), str(tmp_path / "out"))
        assert f"missing in {tmp_path}: {names}\nExpected there:\n" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_karpathy_mistakes(tmp_path):
    write_images(tmp_path / "flickr30k-images", 1)
    good = {"filename": "0.jpg", "split": "train", "sentences": [{"raw": "a"}]}
    for change, message in (
        ({"split": "restval"}, r"images\[1\]: unknown split 'restval'; known: train, val, test"),
        ({"filename": "../0.jpg"}, r"images\[1\]: .*leads out of"),
        ({"filename": 5}, r"images\[1\]: 'filename' must be str"),
        ({"sentences": [{"raw": "a"}, {}]}, r"images\[1\]: sentences: 'raw' is missing"),
    ):
        write_json(tmp_path / "karpathy/dataset_flickr30k.json", {"images": [good, good | change]})
        with pytest.raises(VLMoError, match=message):
            write_f30k_karpathy.make_arrow(str(tmp_path), str(tmp_path / "out"))
    write_json(tmp_path / "karpathy/dataset_flickr30k.json", {"images": [good, good | {"sentences": []}]})
    report = write_f30k_karpathy.make_arrow(str(tmp_path), str(tmp_path / "out"))
    assert report.skipped == {"no caption": 1} and report.rows["f30k_caption_karpathy_train.arrow"] == 1


def test_gcc_shards_and_missing_images(tmp_path, monkeypatch):
    monkeypatch.setattr(write_sbu, "SHARD_ROWS", 2)
    write_images(tmp_path / "images_train", 4)
    entries = [[f"images_train/{number}.jpg", f"caption {number}"] for number in (0, 9, 1, 1, 2, 3)]
    write_json(tmp_path / "annot.json", entries)
    report = write_sbu.make_arrow(str(tmp_path), str(tmp_path / "out"))
    assert report.rows == {"sbu_0.arrow": 2, "sbu_1.arrow": 2} and report.skipped == {"file not found": 1}
    assert read_rows(tmp_path / "out" / "sbu_0.arrow")[1]["caption"] == ["caption 1", "caption 1"]
    write_json(tmp_path / "annot.json", [*entries, ["images_train/0.jpg"]])
    with pytest.raises(VLMoError, match=r"annot.json: \[6\]: expected \[image path, caption\]"):
        write_sbu.make_arrow(str(tmp_path), str(tmp_path / "out"))


def test_vg_mistakes(tmp_path):
    write_images(tmp_path / "images/VG_100K", 1)
    (tmp_path / "images/VG_100K_2").mkdir()
    region = {"phrase": "a", "x": 1, "y": 2.0, "width": 3, "height": 4}
    for regions, message in (
        ([{**region, "x": "1"}], r"\[0\]: regions: 'x' must be int or float"),
        ([region, {**region, "phrase": None}], r"\[0\]: regions: 'phrase' must be str"),
    ):
        write_json(tmp_path / "annotations/region_descriptions.json", [{"id": 0, "regions": regions}])
        with pytest.raises(VLMoError, match=message):
            write_vg.make_arrow(str(tmp_path), str(tmp_path / "out"))
    write_json(
        tmp_path / "annotations/region_descriptions.json", [{"id": 0, "regions": [region]}, {"id": 1, "regions": []}]
    )
    report = write_vg.make_arrow(str(tmp_path), str(tmp_path / "out"))
    assert report.rows == {"vg.arrow": 1} and report.skipped == {"no caption": 1}
    assert read_rows(tmp_path / "out" / "vg.arrow")[0]["y"] == [2]
