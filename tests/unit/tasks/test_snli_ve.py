"""SNLI-VE: its loss and metrics, and what a test run writes."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from vlmo.tasks.base import TaskOutput
from vlmo.tasks.snli_ve import LABELS, SNLIVE, entail

NAMED = "task_finetune_snli_ve_base_image384"


def set_logits(model, rows):
    """Has the classifier give these logits for the samples in order."""
    model.snli_ve_classifier = torch.nn.Module()
    model.snli_ve_classifier.forward = lambda _: torch.tensor(rows)


def test_cross_entropy_and_accuracy_by_hand():
    model = tiny.model(NAMED)
    set_logits(model, [[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 1.5]])
    output = model(tiny.batch() | {"entailment": torch.tensor([0, 1, 2])})["snli_ve"]
    losses = [
        -math.log(math.e**2 / (math.e**2 + math.e + 1)),
        -math.log(1 / (2 + math.e**3)),
        -math.log(math.e**1.5 / (math.e**1.5 + math.e + 1)),
    ]
    assert output.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-6)
    measured = {name: (int(total), int(count)) for name, (total, count) in output.measured.items() if name != "loss"}
    assert measured == {"accuracy": (2, 3), "entailment": (1, 1), "neutral": (0, 1), "contradiction": (1, 1)}
    assert output.measured["loss"][1] == 3
    model.train()
    assert set(model(tiny.batch())["snli_ve"].measured) == {"loss", "accuracy"}


def test_it_reads_the_pair_through_the_joint_encoder():
    model, batch = tiny.model(NAMED), tiny.batch()
    output = model(batch)["snli_ve"]
    expected = model.snli_ve_classifier(model.infer(batch)["cls_feats"])
    assert torch.allclose(output.outputs["logits"], expected, atol=1e-6)


def test_every_pair_is_in_the_file(tmp_path):
    task = SNLIVE()
    output = TaskOutput(torch.zeros(()), {"logits": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])})
    batch = {"pair_id": ["7.jpg#1", "7.jpg#0"], "skipped_targets": [{"pair_id": "8.jpg#0", "entailment": 0}]}
    files = task.write_predictions(task.predictions(batch, output, None), tmp_path, "best")
    assert files.paths == [tmp_path / "snli_ve_test_best.json"]
    expected = {"7.jpg#0": "contradiction", "7.jpg#1": "neutral", "8.jpg#0": ""}
    assert json.loads(files.paths[0].read_text()) == expected
    assert "1 of 3 labels are empty" in files.warnings[0]


def test_probabilities_have_the_names_of_the_labels():
    predictor = SimpleNamespace(compute=lambda function, **columns: torch.tensor([[0.0, math.log(2), 0.0]]))
    (row,) = entail(predictor, ["a.jpg"], ["a dog runs"])
    assert list(row) == list(LABELS)
    assert row["neutral"] == pytest.approx(0.5) and row["entailment"] == pytest.approx(0.25)
