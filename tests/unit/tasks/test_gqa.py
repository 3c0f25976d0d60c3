"""GQA: VQA's loss with one answer, and what a test run writes and measures."""

import json

import torch
import torch.nn.functional as F

from tests import tiny
from vlmo.tasks.base import TaskOutput
from vlmo.tasks.gqa import GQA
from vlmo.tasks.vqa import VQA

NAMED = "task_finetune_gqa_base_image480"


def test_one_answer_is_one_target():
    model = tiny.model(NAMED, gqa_label_size=7)
    labels = {"vqa_labels": torch.tensor([[3], [0], [-1]]), "vqa_scores": torch.tensor([[1.0], [1.0], [0.0]])}
    batch = tiny.batch() | labels | {"answered": torch.tensor([True] * 3)}
    output = model(batch)["gqa"]
    logits = model.gqa_classifier(model.infer(batch)["cls_feats"])
    targets = F.one_hot(torch.tensor([3, 0, 0]), 7).float()
    targets[2] = 0  # its answer is not in the vocabulary: wrong whatever is predicted
    expected = -(targets * logits.sigmoid().log() + (1 - targets) * (-logits).sigmoid().log()).sum() / 3
    assert torch.allclose(output.loss, expected, rtol=1e-5)
    right, count = output.measured["score"]
    assert count == 3 and right == (logits[:2].argmax(-1) == torch.tensor([3, 0])).sum()


def test_its_weights_are_its_own():
    tasks = GQA(), VQA()
    assert [list(task.heads(8)) for task in tasks] == [["gqa_classifier"], ["vqa_classifier"]]
    assert [task.heads(8)[task.head][-1].out_features for task in tasks] == [1878, 3129]
    assert [use.head for task in tasks for use in task.uses] == ["gqa_classifier", "vqa_classifier"]


def answered(task, questions, best, lost=()):
    logits = 9.0 * F.one_hot(torch.tensor(best), 3)
    batch = {"qid": questions, "skipped_targets": [{"qid": name} for name in lost]}
    return task.predictions(batch, TaskOutput(torch.zeros(()), {"logits": logits}), ["red", "blue"])


def question(answer, entailed=(), balanced=True):
    types = {"structural": "query", "semantic": "attr"}
    return {
        "answer": answer,
        "types": types,
        "groups": {"global": "color"},
        "entailed": [*entailed],
        "isBalanced": balanced,
    }


def test_official_figures_where_their_files_are(tmp_path):
    task = GQA(gqa_label_size=3, data_root=str(tmp_path))
    rows = answered(task, ["02", "11", "010"], [1, 0, 0], lost=["7"])
    files = task.write_predictions(rows, tmp_path, "best")
    assert json.loads(files.paths[0].read_text()) == [
        {"questionId": "010", "prediction": "red"},
        {"questionId": "02", "prediction": "blue"},
        {"questionId": "11", "prediction": "red"},
        {"questionId": "7", "prediction": ""},
    ]
    assert files.metrics == {} and "1 of 4 answers are empty" in files.warnings[0]

    questions = {"02": question("blue", ["010", "11"]), "7": question("blue")}
    questions |= {"010": question("red", balanced=False), "11": question("blue", balanced=False)}
    (tmp_path / "gqa_testdev_questions.json").write_text(json.dumps(questions))
    metrics = task.write_predictions(rows, tmp_path, "best").metrics
    assert metrics["gqa/test/accuracy"] == metrics["gqa/test/open"] == 0.5
    assert metrics["gqa/test/consistency"] == 0.5
    assert "gqa/test/validity" not in metrics

    choices = {name: {"valid": ["blue"], "plausible": []} for name in questions}
    (tmp_path / "gqa_testdev_choices.json").write_text(json.dumps(choices))
    metrics = task.write_predictions(rows, tmp_path, "best").metrics
    assert (metrics["gqa/test/validity"], metrics["gqa/test/plausibility"]) == (0.5, 0)


def test_questions_of_another_conversion_are_a_warning(tmp_path):
    (tmp_path / "gqa_testdev_questions.json").write_text(json.dumps({"99": question("red")}))
    task = GQA(data_root=str(tmp_path))
    files = task.write_predictions(answered(task, ["02"], [1]), tmp_path, "best")
    assert files.metrics == {} and "1 of 1 questions are missing, such as 99" in files.warnings[0]
    assert files.paths[0].exists()


def test_without_names_of_the_answers_there_is_no_file(tmp_path):
    task = GQA()
    rows = task.predictions({"qid": ["02"], "skipped_targets": []}, None, None)
    with_nothing = task.write_predictions(rows, tmp_path, "best")
    assert with_nothing.paths == [] and not list(tmp_path.iterdir())
