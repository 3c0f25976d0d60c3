"""The converter of GQA."""

import json

import pytest

from tests.unit.utils.raw import image_bytes, read_rows, write_images
from vlmo.errors import VLMoError
from vlmo.utils import write_gqa


def question(image, answer, **changes):
    types = {"structural": "query", "semantic": "attr", "detailed": "color"}
    record = {"imageId": str(image), "question": f"what is {answer}?", "answer": answer, "types": types}
    record |= {"groups": {"global": "color", "local": "06-wall"}, "entailed": [], "equivalent": [], "isBalanced": True}
    return record | {"fullAnswer": f"{answer}.", "semantic": [], "semanticStr": ""} | changes


def write(root, name, questions):
    (root / f"{name}_questions.json").write_text(json.dumps(questions))


@pytest.fixture
def raw(tmp_path):
    """Four images, and an answer in val that training lacks."""
    root = tmp_path / "raw"
    write_images(root / "images", 4)
    train = {"02": question(0, "yes"), "03": question(1, "red"), "04": question(0, "red"), "05": question(0, "yes")}
    write(root, "train_balanced", train)
    write(root, "val_balanced", {"20": question(2, "red"), "21": question(2, "mauve")})
    write(root, "testdev_balanced", {"201": question(3, "yes")})
    return root


def test_each_question_has_the_one_answer_of_its_training_label(raw, tmp_path):
    report = write_gqa.make_arrow(str(raw), str(tmp_path / "out"))
    first, second = read_rows(tmp_path / "out" / "gqa_train.arrow")
    assert first == {
        "image": image_bytes(0),
        "questions": ["what is yes?", "what is red?", "what is yes?"],
        "answers": [["yes"], ["red"], ["yes"]],
        "answer_labels": [[0], [1], [0]],
        "answer_scores": [[1.0], [1.0], [1.0]],
        "image_id": "0",
        "question_id": ["02", "04", "05"],
        "split": "train",
    }
    assert (second["image"], second["question_id"]) == (image_bytes(1), ["03"])
    assert json.loads((tmp_path / "out" / "gqa_answers.json").read_text()) == ["yes", "red"]
    (row,) = read_rows(tmp_path / "out" / "gqa_val.arrow")  # (the second stays, and counts as wrong)
    assert (row["answers"], row["answer_labels"]) == ([["red"], []], [[1], []])
    assert "val: 1 questions have an answer that train has not" in report.notes and "2 answers" in report.notes
    assert not (tmp_path / "out" / "gqa_test.arrow").exists()


def test_what_is_answered_and_not_measured(raw, tmp_path):
    unbalanced = question(2, "no", isBalanced=False)
    write(raw, "testdev_all", {"201": question(3, "yes"), "202": unbalanced})
    write(raw, "submission_all", {"202": unbalanced, "300": {"imageId": "2", "question": "who?", "isBalanced": True}})
    choices = {name: {"valid": ["yes"], "plausible": ["yes"]} for name in ("201", "202", "999")}
    (raw / "testdev_choices.json").write_text(json.dumps(choices))
    write_gqa.make_arrow(str(raw), str(tmp_path / "out"))
    (row,) = read_rows(tmp_path / "out" / "gqa_test.arrow")
    assert row["question_id"] == ["202", "300"] and row["answers"] == row["answer_labels"] == []
    measured = json.loads((tmp_path / "out" / "gqa_testdev_questions.json").read_text())
    assert set(measured) == {"201", "202"} and measured["202"]["isBalanced"] is False
    assert set(measured["201"]) == {"answer", "types", "groups", "entailed", "isBalanced"}
    assert set(json.loads((tmp_path / "out" / "gqa_testdev_choices.json").read_text())) == {"201", "202"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("train", {"answer": None}, "train_balanced_questions.json: '7': 'answer' must be str"),
        ("val", {"question": 3}, "val_balanced_questions.json: '7': 'question' must be str"),
        ("train", {"imageId": "../../x"}, "train_balanced_questions.json: '7': .*leads out of"),
        ("testdev", {"isBalanced": "yes"}, "testdev_balanced_questions.json: '7': 'isBalanced' must be bool"),
        ("testdev", {"types": None}, "testdev_balanced_questions.json: '7': 'types' must be dict"),
    ],
)
def test_mistakes(name, changes, message, raw, tmp_path):
    write(raw, f"{name}_balanced", {"7": question(0, "yes") | changes})
    with pytest.raises(VLMoError, match=message):
        write_gqa.make_arrow(str(raw), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.arrow"))


def test_files_that_are_none(raw, tmp_path):
    write(raw, "train_balanced", {})
    with pytest.raises(VLMoError, match="train_balanced_questions.json: has no questions"):
        write_gqa.make_arrow(str(raw), str(tmp_path / "out"))
    (raw / "train_balanced_questions.json").write_text('{"7": {"answer"')
    with pytest.raises(VLMoError, match="train_balanced_questions.json:1: not the JSON expected"):
        write_gqa.make_arrow(str(raw), str(tmp_path / "out"))
    (raw / "val_balanced_questions.json").unlink()
    with pytest.raises(VLMoError, match="missing in .*: val_balanced_questions.json\n"):
        write_gqa.make_arrow(str(raw), str(tmp_path / "out"))
