"""What a test run writes of its predictions."""

import json
import logging
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from vlmo.tasks.base import TaskOutput
from vlmo.tasks.nlvr2 import NLVR2
from vlmo.tasks.vqa import VQA
from vlmo.training.callbacks.predictions import Predictions


def outputs_of(name, best, classes):
    return {name: TaskOutput(torch.zeros(()), {"logits": 9.0 * F.one_hot(torch.tensor(best), classes)})}


def module_of(task):
    """What the callback needs of the module, and what it logs."""
    logged = {}
    return SimpleNamespace(tasks=[task], log=logged.__setitem__), logged


def test_every_question_has_an_answer(tmp_path, caplog):
    path = tmp_path / "new" / "vqa_submit_best.json"
    callback = Predictions(path.parent, "best", ["no", "yes"])
    module, _ = module_of(VQA())
    for questions, best in (([30, 10], [1, 0]), ([20], [1])):
        outputs = outputs_of("vqa", best, 3)
        outputs["vqa"].outputs["logits"][:, 2] = 20  # an output for which there is no answer
        batch = {"qid": torch.tensor(questions), "skipped_targets": []}
        callback.on_test_batch_end(None, module, outputs, batch, 0)
    callback.on_test_batch_end(None, module, {}, {"skipped_targets": [{"qid": 15}]}, 2)
    with caplog.at_level(logging.WARNING):
        callback.on_test_epoch_end(None, module)
    assert json.loads(path.read_text()) == [
        {"question_id": 10, "answer": "no"},
        {"question_id": 15, "answer": ""},
        {"question_id": 20, "answer": "yes"},
        {"question_id": 30, "answer": "yes"},
    ]
    assert "1 of 4 answers are empty" in caplog.text
    assert callback.written == list(path.parent.iterdir()) == [path]


def test_without_names_of_the_answers_there_is_no_file(tmp_path):
    callback = Predictions(tmp_path, "best", None)
    module, _ = module_of(VQA())
    batch = {"qid": torch.tensor([1]), "skipped_targets": [{"qid": 15}]}
    callback.on_test_batch_end(None, module, outputs_of("vqa", [1], 3), batch, 0)
    callback.on_test_epoch_end(None, module)
    assert callback.written == list(tmp_path.iterdir()) == []


def test_statements_about_pairs(tmp_path, caplog):
    callback = Predictions(tmp_path, "best of all", None)
    module, logged = module_of(NLVR2())
    batch = {
        "table_name": ["nlvr2_dev", "nlvr2_dev", "nlvr2_test1"],
        "identifier": ["dev-1-0-0", "dev-1-0-1", "test1-4-0-0"],
        "sentence": ["a", "b", "c"],
        "answers": torch.tensor([True, False, True]),
    }
    lost = {"table_name": "nlvr2_test1", "identifier": "test1-4-1-0", "sentence": "c", "answers": True}
    callback.on_test_batch_end(None, module, outputs_of("nlvr2", [1, 1, 1], 2), batch | {"skipped_targets": [lost]}, 0)
    with caplog.at_level(logging.WARNING):
        callback.on_test_epoch_end(None, module)
    assert logged == {"nlvr2/dev/consistency": 0.5, "nlvr2/test/consistency": 1}
    assert (tmp_path / "nlvr2_dev_best of all.csv").read_text() == "dev-1-0-0,true\ndev-1-0-1,true\n"
    assert (tmp_path / "nlvr2_test1_best of all.csv").read_text() == "test1-4-0-0,true\ntest1-4-1-0,\n"
    assert "1 of 2 predictions are empty" in caplog.text
    assert len(callback.written) == 2


def test_files_of_another_checkpoint_of_that_name_are_not_replaced_silently(tmp_path, caplog):
    for label in (0, 1):
        callback = Predictions(tmp_path, "last", ["no", "yes"])
        module, _ = module_of(VQA())
        batch = {"qid": torch.tensor([1]), "skipped_targets": []}
        callback.on_test_batch_end(None, module, outputs_of("vqa", [label], 2), batch, 0)
        assert "replaced" not in caplog.text
        callback.on_test_epoch_end(None, module)
    assert "vqa_submit_last.json" in caplog.text and "replaced" in caplog.text
