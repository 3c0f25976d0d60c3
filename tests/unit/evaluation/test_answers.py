"""VQA and NLVR2 by type, against single predictions and the official definitions worked out by hand."""

import json
import random

import numpy as np
import pytest
import torch

from tests import suites, tables
from tests.unit.evaluation.test_predictions import official
from vlmo.errors import VLMoError
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.report import calibration_bins
from vlmo.evaluation.suites import decisions, nlvr2, vqa
from vlmo.evaluation.suites.base import Context, Result
from vlmo.inference import Predictor
from vlmo.registry import SUITES
from vlmo.utils.vqa_answers import label_answers


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Predictor.from_pretrained(suites.checkpoint(tmp_path_factory.mktemp("checkpoint")), device="cpu")


@pytest.fixture
def context(predictor, tmp_path):
    return Context(Scorer(predictor.model, predictor.tokenizer, 3), tmp_path)


def values(result):
    return {(each.part, each.metric): each.value for each in result.measures}


# --- VQA --------------------------------------------------------------------------------------------------------------


def annotate(root, numbers):
    """Types in turn, whatever the answers."""
    kinds = [("yes/no", "is the"), ("number", "how many"), ("other", "what")]
    rows = [
        {"question_id": number, "answer_type": kinds[place % 3][0], "question_type": kinds[place % 3][1]}
        for place, number in enumerate(numbers)
    ]
    (root / vqa.ANNOTATIONS).write_text(json.dumps({"annotations": rows}))


def test_scores_are_those_of_single_answers_by_type(context, predictor):
    tables.write_vqa(context.root)
    data = vqa.read_questions(context.root / vqa.TABLE)
    annotate(context.root, data.ids)
    names = json.loads((context.root / "vqav2_answers.json").read_text())
    images = [picture.load() for picture in data.pictures for _ in range(2)]
    predictor.answers = names
    said = [names.index(best[0].text) for best in predictor.answer(images, data.texts)]
    scores = np.array([own.get(label, 0) for own, label in zip(data.answers, said, strict=True)])
    assert 0 < scores.mean() < 1
    result = SUITES["vqa"].run(context)
    expected = {"all": scores.mean()}
    for place, (answer, question) in enumerate((("yes/no", "is the"), ("number", "how many"), ("other", "what"))):
        expected |= dict.fromkeys((f"answer: {answer}", f"question: {question}"), scores[place::3].mean())
    assert values(result) == pytest.approx({(part, "score"): value for part, value in expected.items()}, abs=1e-6)
    assert not result.notes and int(result.confusion["answers"].counts.sum()) == 8
    sure, right = result.calibration["answers"]
    assert len(sure) == 8 and right.tolist() == pytest.approx(scores.tolist())
    assert result.worst and all("answered" in each.lines[1] for each in result.worst)


def test_scores_are_the_official_accuracy():
    """Of each nine of the ten people, min(how many said it / 3, 1); the mean over the ten nines."""
    draw = random.Random(0)
    names = ["yes", "no", "2", "red"]
    for _ in range(200):
        people = draw.choices(names, weights=[draw.random() + 0.01 for _ in names], k=10)
        nines = [people[:out] + people[out + 1 :] for out in range(10)]
        _, labels, scores = label_answers(people, {name: label for label, name in enumerate(names)})
        answers = [dict(zip(labels, scores, strict=True))] * 4
        found = vqa.score_of(answers, torch.arange(4), torch.zeros(4))
        for label, name in enumerate(names):
            expected = np.mean([min(nine.count(name) / 3, 1) for nine in nines])
            assert float(found[label]) == pytest.approx(expected, abs=1e-6)
    assert vqa.score_of([{0: 1.0}], torch.tensor([0]), torch.tensor([torch.nan])).tolist() == [0]


def test_types_without_annotations_are_told_by_the_words(context):
    tables.write_vqa(context.root)
    result = SUITES["vqa"].run(context)
    assert {part for part, _ in values(result)} == {"all", "answer: other"} and vqa.ANNOTATIONS in result.notes[0]
    assert [vqa.kind_of(text) for text in ("yes", "no", "2", "2.5", "two dogs", "")] == [
        *("yes/no", "yes/no", "number", "number", "other", "other")
    ]
    assert vqa.commonest([{0: 1.0, 1: 0.3}, {1: 1.0}, {1: 0.6, 2: 1.0}]) == pytest.approx(1.9 / 3)


def test_other_answers_than_the_checkpoints_are_an_error(context, predictor, monkeypatch):
    tables.write_vqa(context.root)
    monkeypatch.setattr(predictor.model, "answers", ["answer 0", "another", "answer 2"])
    with pytest.raises(VLMoError, match="label 1 is 'answer 1', the checkpoint was trained with 'another'"):
        SUITES["vqa"].run(context)


def test_checkpoints_without_the_head(tmp_path):
    context = Context(Scorer(suites.model(), suites.predictor().tokenizer), tmp_path)
    for name in ("vqa", "nlvr2"):
        with pytest.raises(VLMoError, match=f"suite {name}: needs a checkpoint with {name}_classifier"):
            SUITES[name].run(context)


# --- NLVR2 ------------------------------------------------------------------------------------------------------------


def write_statements(root, rows=9, damaged=()):
    """Three pairs a set share two sentences."""
    columns = {
        "image_0": [b"damaged" if row in damaged else tables.png(row) for row in range(rows)],
        "image_1": [tables.png(20 + row) for row in range(rows)],
        "questions": [[f"a cat {'abc'[row // 3]}", f"the dog {'xyz'[row // 3]}"] for row in range(rows)],
        "answers": [["True" if row % 2 else "False", "False"] for row in range(rows)],
        "identifier": [f"dev-{row // 3}-{row % 3}" for row in range(rows)],
    }
    return tables.write_table(root / "nlvr2_dev.arrow", columns)


def test_accuracy_and_consistency_are_those_of_the_official_script(context, predictor):
    data = nlvr2.read_statements(write_statements(context.root))
    images = [[pair[side].load() for pair in data.pictures for _ in range(2)] for side in (0, 1)]
    said = ["true" if share > 0.5 else "false" for share in predictor.compare(images[0], images[1], data.texts)]
    csv = "".join(f"{identifier},{word}\n" for identifier, word in zip(data.identifiers, said, strict=True))
    labels = {identifier: str(bool(truth)) for identifier, truth in zip(data.identifiers, data.truth, strict=True)}
    accuracy, consistency = official(csv, labels)
    result = SUITES["nlvr2"].run(context)
    found = values(result)
    assert found == pytest.approx({("dev", "accuracy"): accuracy, ("dev", "consistency"): consistency}, abs=1e-6)
    assert 0 < accuracy < 1
    assert result.measures[1].chance == pytest.approx(1 / 8) and result.measures[1].number == 6
    assert len(result.best[0].pictures) == 2


@pytest.mark.parametrize("seed", range(5))
def test_consistency_on_random_judgements(tmp_path, seed):
    data = nlvr2.read_statements(write_statements(tmp_path))
    right = torch.rand(18, generator=torch.Generator().manual_seed(seed)) > 0.3
    said = ["true" if truth == good else "false" for truth, good in zip(data.truth.bool(), right, strict=True)]
    csv = "".join(f"{identifier},{word}\n" for identifier, word in zip(data.identifiers, said, strict=True))
    labels = {identifier: str(bool(truth)) for identifier, truth in zip(data.identifiers, data.truth, strict=True)}
    found = [each.value for each in nlvr2.measures(data, right, "dev")]
    assert found == pytest.approx(official(csv, labels), abs=1e-6)


def test_images_that_cannot_be_decoded_count_as_wrong(context):
    write_statements(context.root, damaged=(4,))
    result = SUITES["nlvr2"].run(context)
    assert "1 pairs of images cannot be decoded" in result.notes[0]
    assert len(result.calibration["dev"][0]) == 16 and result.measures[0].number == 18


# --- calibration and confusion ----------------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Bins 0.2-0.3 (two items, one right) and 0.9-1 (two items, both right)."""
    bins, error = calibration_bins(torch.tensor([0.21, 0.29, 0.95, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert [each[2] for each in bins] == [2, 2]
    assert [each[:2] for each in bins] == [pytest.approx((0.25, 0.5)), pytest.approx((0.975, 1.0))]
    assert error == pytest.approx(0.5 * 0.25 + 0.5 * 0.025)


def test_confusion_keeps_the_classes_that_are_confused_most(monkeypatch):
    truth, chosen = torch.tensor([0, 1, 1, 2, 3, 3]), torch.tensor([0, 2, 1, 1, 3, 0])
    whole = decisions.confusion("abcd", truth, chosen)
    assert whole.counts.tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]]
    monkeypatch.setattr(decisions, "MOST_CLASSES", 2)
    few = decisions.confusion("abcd", truth, chosen)
    assert (few.names, few.counts.tolist(), few.classes) == (["b", "c"], [[1, 1], [1, 0]], 4)


def test_examples_are_the_choices_that_it_is_surest_of():
    made = decisions.Decisions(
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([0.6, 0.9, 0.8, torch.nan], dtype=torch.float64),
        torch.tensor([1.0, 0, 1, 0]),
    )
    result = Result([])
    decisions.add_decisions(result, "dev", "ab", made, lambda number: ([], [str(number)]))
    assert [each.lines for each in result.best] == [["2"], ["0"]] and [each.lines for each in result.worst] == [["1"]]
