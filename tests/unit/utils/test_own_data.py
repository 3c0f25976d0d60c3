"""One's own images with captions, questions and statements."""

import json
import sys
from types import SimpleNamespace

import pytest

from tests.unit.utils.raw import image_bytes, read_rows, write_images, write_karpathy, write_lines
from vlmo.datasets.nlvr2_dataset import sentence_identifiers
from vlmo.errors import VLMoError
from vlmo.tasks.nlvr2 import Statement, nlvr2_csv
from vlmo.utils import write_easy_vqa, write_own_captions, write_own_karpathy, write_own_pairs, write_own_vqa


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "raw" / "images", 12)
    return tmp_path / "raw"


def splits_of(out, pattern="*_caption_karpathy_{}.arrow"):
    """image ids by split"""
    splits = ("train", "restval", "val", "test")
    paths = {split: list(out.glob(pattern.format(split))) for split in splits}
    return {split: [row["image_id"] for row in read_rows(path)] for split in splits for path in paths[split]}


def test_captions_from_each_kind_of_list(root, tmp_path):
    records = [{"image": f"images/{n // 2}.jpg", "caption": f'caption, "{n}"', "split": "train"} for n in range(4)]
    records.append({"image": "images/5.jpg", "caption": "é", "split": "validation"})
    write_lines(root / "captions.jsonl", records)
    table = [("image", "caption", "split"), *(record.values() for record in records)]
    (root / "b.tsv").write_text("".join("\t".join(row) + "\n" for row in table), encoding="utf-8")
    quoted = [[cell.replace('"', '""') for cell in row] for row in table]
    (root / "c.csv").write_text(
        "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in quoted), encoding="utf-8"
    )
    for annotations in (None, "b.tsv", str(root / "c.csv")):
        out = tmp_path / f"out_{annotations is None}"
        write_own_captions.make_arrow(str(root), str(out), annotations=annotations, name="mine")
        train = read_rows(out / "mine_caption_karpathy_train.arrow")
        assert [row["caption"] for row in train] == [
            ['caption, "0"', 'caption, "1"'],
            ['caption, "2"', 'caption, "3"'],
        ]
        assert splits_of(out) == {"train": ["0.jpg", "1.jpg"], "restval": [], "val": ["5.jpg"], "test": []}


def test_lists_of_captions_and_other_names_of_columns(root, tmp_path):
    write_lines(root / "a.jsonl", [{"file": f"{n}.jpg", "text": ["a", " ", "b "], "image_id": n} for n in range(12)])
    options = {"annotations": "../a.jsonl", "image_key": "file", "caption_key": "text"}
    write_own_captions.make_arrow(str(root / "images"), str(tmp_path / "out"), **options)
    assert {split: len(ids) for split, ids in splits_of(tmp_path / "out").items()} == {
        "train": 10,
        "restval": 0,
        "val": 1,
        "test": 1,
    }
    assert read_rows(tmp_path / "out" / "coco_caption_karpathy_val.arrow")[0]["caption"] == ["a", "b"]


def test_held_out_images_are_seeded(root, tmp_path):
    write_lines(root / "captions.jsonl", [{"image": f"images/{n}.jpg", "caption": "a"} for n in range(12)])
    results = []
    for number, seed in enumerate((0, 0, 1)):
        write_own_captions.make_arrow(str(root), str(tmp_path / str(number)), val_share=0.4, seed=seed)
        results.append(splits_of(tmp_path / str(number)))
    assert results[0] == results[1] != results[2]
    assert len(results[0]["val"]) == 5


def test_own_data_under_the_names_of_web_data(root, tmp_path):
    write_lines(root / "captions.jsonl", [{"image": f"images/{n}.jpg", "caption": "a"} for n in range(12)])
    report = write_own_captions.make_arrow(str(root), str(tmp_path / "out"), name="gcc", test_share=0)
    assert report.rows == {"conceptual_caption_train_0.arrow": 11, "conceptual_caption_val_0.arrow": 1}
    report = write_own_captions.make_arrow(str(root), str(tmp_path / "out"), name="sbu", test_share=0, val_share=0)
    assert report.rows == {"sbu_0.arrow": 12}
    with pytest.raises(VLMoError, match="sbu has no val split"):
        write_own_captions.make_arrow(str(root), str(tmp_path / "out"), name="sbu", test_share=0)


def test_every_wrong_record_is_named(root, tmp_path):
    write_lines(
        root / "captions.jsonl",
        [
            {"image": "images/0.jpg", "caption": "a", "split": "train"},
            {"image": "images/99.jpg", "caption": "a"},
            {"image": "../secret.jpg", "caption": "a"},
            {"caption": "a"},
            {"image": "images/1.jpg"},
            {"image": "images/1.jpg", "caption": " "},
            {"image": "images/2.jpg", "caption": 7},
            {"image": "images/0.jpg", "caption": "a", "split": "val"},
            {"image": "images/3.jpg", "caption": "a", "split": "other"},
        ],
    )
    with pytest.raises(VLMoError) as error:
        write_own_captions.make_arrow(str(root), str(tmp_path / "out"))
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{root}/captions.jsonl:{number}" for number in range(2, 10)]
    for line, words in zip(
        lines,
        ("does not exist", "leads out of", "'image' is missing", "'caption' is missing", "'caption' is empty")
        + ("must be str or list", "is in the splits 'train' and 'val'", "unknown split 'other'"),
        strict=True,
    ):
        assert words in line


def test_missing_images_can_be_left_out(root, tmp_path):
    write_lines(root / "captions.jsonl", [{"image": f"images/{n}.jpg", "caption": "a"} for n in range(14)])
    report = write_own_captions.make_arrow(str(root), str(tmp_path / "out"), skip_missing=True)
    assert report.skipped == {"file not found": 2}


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (["train", "train"], {}, "none is 'val'"),
        (["val", "val"], {}, "nothing is left to train on"),
        ([None], {}, "nothing is left to train on"),
        ([None, None], {"val_share": 1.0}, "val_share=1.0"),
        ([None] * 3, {"name": "a/b"}, "name='a/b'"),
        ([], {}, "has no records"),
    ],
)
def test_useless_splits_and_options(splits, options, message, root, tmp_path):
    records = [{"image": f"images/{n}.jpg", "caption": "a"} | ({"split": s} if s else {}) for n, s in enumerate(splits)]
    write_lines(root / "captions.jsonl", records)
    with pytest.raises(VLMoError, match=message):
        write_own_captions.make_arrow(str(root), str(tmp_path / "out"), **options)


def test_missing_lists(root, tmp_path):
    with pytest.raises(VLMoError, match="captions.jsonl, .*captions.csv, .*captions.json exists"):
        write_own_captions.make_arrow(str(root), str(tmp_path / "out"))
    with pytest.raises(VLMoError, match="no.csv found neither in"):
        write_own_captions.make_arrow(str(root), str(tmp_path / "out"), annotations="no.csv")


def test_karpathy_under_any_name(tmp_path):
    write_karpathy(tmp_path / "raw", 3, split="restval")
    write_own_karpathy.make_arrow(str(tmp_path / "raw"), str(tmp_path / "out"), name="f8k")
    assert splits_of(tmp_path / "out", "f8k_caption_karpathy_{}.arrow")["restval"] == ["0.jpg", "1.jpg", "2.jpg"]
    with pytest.raises(VLMoError, match="missing in .*: a.json, pictures"):
        write_own_karpathy.make_arrow(str(tmp_path / "raw"), str(tmp_path), annotations="a.json", images="pictures")
    with pytest.raises(VLMoError, match="name='../f8k'"):
        write_own_karpathy.make_arrow(str(tmp_path / "raw"), str(tmp_path), name="../f8k")


def question(image, answers, split=None, **more):
    record = {"image": f"images/{image}.jpg", "question": f"what is {image}?", "answers": answers}
    return record | ({"split": split} if split else {}) | more


def test_questions(root, tmp_path):
    write_lines(
        root / "questions.jsonl",
        [
            question(0, "cat", "train", question_id=70, image_id=7),
            question(0, ["dog"] * 6 + ["cat"] * 3 + ["cow"], "train", question_id=71),
            question(1, 3, "train"),
            question(2, " dog ", "val"),
            question(3, "unheard", "test"),
            {"image": "images/4.jpg", "question": "who knows?", "split": "test"},
        ],
    )
    report = write_own_vqa.make_arrow(str(root), str(tmp_path / "out"))
    out = tmp_path / "out"
    assert json.loads((out / "vqav2_answers.json").read_text()) == ["cat", "dog", "3"]
    first, second = read_rows(out / "vqav2_train.arrow")
    assert first["answers"] == [["cat"], ["dog", "cat"]] and first["answer_labels"] == [[0], [1, 0]]
    assert first["answer_scores"] == [[1.0], [1.0, 0.9]]
    assert (first["image_id"], first["question_id"]) == (7, [70, 71])
    assert (second["image_id"], second["question_id"], second["answers"]) == (1, [2], [["3"]])
    (val,) = read_rows(out / "vqav2_rest_val.arrow")
    assert val["answers"] == [["dog"]] and read_rows(out / "vqav2_trainable_val.arrow") == []
    assert [row["answers"] for row in read_rows(out / "vqav2_test.arrow")] == [
        [[]],
        [None],
    ]  # of the latter nothing is known
    assert "3 answers: train with vqav2_label_size=3" in report.notes


def test_questions_without_splits(root, tmp_path):
    write_lines(root / "questions.jsonl", [question(n // 2, "Yes." if n % 2 else "a yes") for n in range(20)])
    write_own_vqa.make_arrow(str(root), str(tmp_path / "out"), normalise=True, val_share=0.3)
    rows = {name: read_rows(tmp_path / "out" / f"vqav2_{name}.arrow") for name in ("train", "rest_val", "test")}
    assert [len(found) for found in rows.values()] == [7, 3, 3]
    assert sorted(row["image"] for row in rows["rest_val"]) == sorted(row["image"] for row in rows["test"])
    assert rows["train"][0]["answers"] == [["yes"], ["yes"]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (question(0, None), "jsonl:3: 'answers' must be str or int or list"),
        (question(0, True), "jsonl:3: 'answers' must be"),
        (question(0, ["a", None]), "jsonl:3: 'answers' must be an answer or a list"),
        (question(0, "a", question_id="x"), "jsonl:3: 'question_id' must be"),
        (
            {"image": "images/1.jpg", "question": "a?", "split": "train"},
            "jsonl:3: 'answers' is missing, which only",
        ),
        ({"image": "images/1.jpg", "question": "a?"}, "jsonl:3: 'answers' is missing"),
        ({"image": "images/1.jpg", "answers": "a"}, "jsonl:3: 'question' is missing"),
    ],
)
def test_wrong_questions(record, message, root, tmp_path):
    write_lines(root / "questions.jsonl", [question(8, "a", "train"), question(9, "a", "val"), record])
    with pytest.raises(VLMoError, match=message):
        write_own_vqa.make_arrow(str(root), str(tmp_path / "out"))


def test_rare_answers(root, tmp_path):
    write_lines(
        root / "questions.jsonl", [question(n, "a" if n else "b", "val" if n > 5 else "train") for n in range(10)]
    )
    report = write_own_vqa.make_arrow(str(root), str(tmp_path / "out"), min_occurrences=2)
    assert report.rows["vqav2_train.arrow"] == 5
    with pytest.raises(VLMoError, match="lower min_occurrences"):
        write_own_vqa.make_arrow(str(root), str(tmp_path / "out"), min_occurrences=10)


def pair(first, second, label, **more):
    return {
        "image_0": f"images/{first}.jpg",
        "image_1": f"images/{second}.jpg",
        "sentence": "same",
        "label": label,
        **more,
    }


def test_pairs(root, tmp_path):
    write_lines(
        root / "pairs.jsonl",
        [
            pair(0, 1, True, split="train", identifier="x"),
            pair(0, 1, "false", split="train"),
            pair(2, 3, 1, split="val"),
            pair(4, 5, "0", split="test"),
        ],
    )
    write_own_pairs.make_arrow(str(root), str(tmp_path / "out"))
    (train,) = read_rows(tmp_path / "out" / "nlvr2_train.arrow")
    assert train["answers"] == ["True", "False"] and train["identifier"] == "x"
    assert train["image_1"] == image_bytes(1)
    assert read_rows(tmp_path / "out" / "nlvr2_dev.arrow")[0]["answers"] == ["True"]
    assert read_rows(tmp_path / "out" / "nlvr2_test1.arrow")[0]["answers"] == ["False"]


def test_wrong_pairs(root, tmp_path):
    write_lines(root / "pairs.jsonl", [pair(0, 1, "maybe"), pair(0, 99, True), {"image_0": "images/0.jpg"}])
    with pytest.raises(VLMoError) as error:
        write_own_pairs.make_arrow(str(root), str(tmp_path / "out"))
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "2", "3"]


def test_easy_vqa(root, tmp_path, monkeypatch):
    images = {number: str(root / "images" / f"{number}.jpg") for number in range(12)}
    package = SimpleNamespace(
        get_train_questions=lambda: (["what shape?", "is it red?", "what?"], ["circle", "yes", "circle"], [0, 0, 1]),
        get_test_questions=lambda: (["what shape?"], ["circle"], [5]),
        get_train_image_paths=lambda: images,
        get_test_image_paths=lambda: images,
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", package)
    report = write_easy_vqa.make_arrow(str(tmp_path / "easy"), str(tmp_path / "out"))
    assert report.rows["vqav2_train.arrow"] == 2
    for name in ("rest_val", "test"):
        (row,) = read_rows(tmp_path / "out" / f"vqav2_{name}.arrow")
        assert row["image"] == image_bytes(5) and row["answers"] == [["circle"]]
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(VLMoError, match="pip install easy-vqa"):
        write_easy_vqa.make_arrow(str(tmp_path / "easy"), str(tmp_path / "out"))


def test_cells_that_hold_a_list(root, tmp_path):
    rows = "".join(f"images/{n}.jpg,\"['a cat {n}', 'a dog']\",{'val' if n else 'train'}\n" for n in range(2))
    (root / "captions.csv").write_text("image,caption,split\n" + rows)
    write_own_captions.make_arrow(str(root), str(tmp_path / "out"))
    (row,) = read_rows(tmp_path / "out" / "coco_caption_karpathy_train.arrow")
    assert row["caption"] == ["a cat 0", "a dog"]
    rows = "".join(f"images/{n}.jpg,what?,\"['cat', 'cat', 'dog']\",{'val' if n else 'train'}\n" for n in range(2))
    (root / "questions.csv").write_text("image,question,answers,split\n" + rows)
    write_own_vqa.make_arrow(str(root), str(tmp_path / "vqa"))
    (row,) = read_rows(tmp_path / "vqa" / "vqav2_train.arrow")
    assert json.loads((tmp_path / "vqa" / "vqav2_answers.json").read_text()) == ["cat"]
    assert row["answers"] == [["cat"]] and row["answer_scores"] == [[1.0]]  # two of three
    (root / "captions.csv").write_text("image,caption\nimages/0.jpg,['a' 'b']\n")
    with pytest.raises(VLMoError, match="csv:2: 'caption'.*looks like a list"):
        write_own_captions.make_arrow(str(root), str(tmp_path / "out"))


def test_statements_keep_their_identifiers(root, tmp_path):
    records = [pair(0, 1, True, split="train")]
    records += [pair(2, 3, n, split="val", identifier=f"item,{n}") for n in (0, 1)]
    records += [pair(4, 5, True, split="test"), pair(4, 5, False, split="test", identifier="mine")]
    write_lines(root / "pairs.jsonl", records)
    write_own_pairs.make_arrow(str(root), str(tmp_path / "out"))
    assert sentence_identifiers(tmp_path / "out" / "nlvr2_dev.arrow") == {"item,0": ["item,0", "item,1"]}
    assert sentence_identifiers(tmp_path / "out" / "nlvr2_test1.arrow") == {"pair-2": ["pair-2-0", "mine"]}
    assert sentence_identifiers(tmp_path / "out" / "nlvr2_train.arrow") == {}
    assert nlvr2_csv([Statement("nlvr2_dev", "item,0", "", True, True)]) == '"item,0",true\n'
    write_lines(root / "pairs.jsonl", [*records, pair(6, 7, True, identifier="mine")])
    with pytest.raises(VLMoError, match="jsonl:6: 'identifier' 'mine' is that of .*jsonl:5"):
        write_own_pairs.make_arrow(str(root), str(tmp_path / "out"))


def test_two_questions_of_one_number(root, tmp_path):
    records = [question(0, "a", "train", question_id=5), question(1, "a", "val", question_id=5)]
    write_lines(root / "questions.jsonl", records)
    with pytest.raises(VLMoError, match="jsonl:2: question_id 5 is that of .*jsonl:1"):
        write_own_vqa.make_arrow(str(root), str(tmp_path / "out"))


def test_an_image_in_two_splits_of_karpathys_list(tmp_path):
    write_karpathy(tmp_path / "raw", 2)
    path = tmp_path / "raw" / "dataset.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"split": "test"})
    path.write_text(json.dumps(content))
    report = write_own_karpathy.make_arrow(str(tmp_path / "raw"), str(tmp_path / "out"))
    assert any("several splits" in note and "0.jpg" in note for note in report.notes)
