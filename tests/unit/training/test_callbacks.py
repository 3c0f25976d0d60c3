"""What is counted and written around the steps."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from vlmo.errors import VLMoError
from vlmo.modules.objectives import ObjectiveOutput
from vlmo.training.callbacks import UnreadableImages, VQAPredictions


@pytest.fixture
def trainer(tmp_path):
    """Of a run over 1,000 samples."""
    loader = SimpleNamespace(dataset=range(1000))
    loaders = dict.fromkeys(("train_dataloader", "val_dataloaders", "test_dataloaders"), loader)
    return SimpleNamespace(log_dir=str(tmp_path / "run"), loggers=[None], **loaders)


def skipped(number, first=0):
    return {"skipped": [f"coco: image row {first + row}" for row in range(number)]}


def test_few_unreadable_images_are_counted_and_listed(trainer, tmp_path, caplog):
    callback = UnreadableImages()
    callback.setup(trainer, None, "fit")
    callback.on_train_epoch_start(trainer, None)
    for first in (0, 4):
        callback.on_train_batch_end(trainer, None, None, skipped(4, first), 0)
    callback.on_train_batch_end(trainer, None, None, {"skipped": []}, 0)
    named = [record.message for record in caplog.records if "left out: coco" in record.message]
    assert len(named) == 5  # the others would fill the screen
    with caplog.at_level(logging.WARNING):
        callback.on_train_epoch_end(trainer, None)
    assert "train: 8 samples left out, their images cannot be decoded" in caplog.text
    assert len((tmp_path / "run" / "unreadable_images.txt").read_text().splitlines()) == 8


def test_more_than_one_in_a_hundred_stop_the_run(trainer):
    callback = UnreadableImages()
    callback.on_train_batch_end(trainer, None, None, skipped(10), 0)
    with pytest.raises(VLMoError, match=r"11 of 1000 train samples .* more than 1%: .* make its Arrow files anew"):
        callback.on_train_batch_end(trainer, None, None, skipped(1), 1)


def test_each_pass_and_phase_counts_anew(trainer):
    callback = UnreadableImages()
    for _ in range(3):
        callback.on_train_epoch_start(trainer, None)
        callback.on_train_batch_end(trainer, None, None, skipped(9), 0)
        callback.on_validation_epoch_start(trainer, None)
        callback.on_validation_batch_end(trainer, None, None, skipped(9), 0)
    callback.on_test_batch_end(trainer, None, None, skipped(9), 0)


def test_without_a_run_folder_nothing_is_written(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer.log_dir, trainer.loggers = str(tmp_path), []  # as Lightning's is with fast_dev_run
    callback = UnreadableImages()
    callback.setup(trainer, None, "fit")
    callback.on_train_batch_end(trainer, None, None, skipped(2), 0)
    assert list(tmp_path.iterdir()) == []


def test_predicted_answers(trainer, tmp_path):
    path = tmp_path / "new" / "vqa_submit_best.json"
    callback = VQAPredictions(path, ["no", "yes"])
    for questions, best in (([30, 10], [1, 0]), ([20], [1])):
        logits = 9.0 * torch.nn.functional.one_hot(torch.tensor(best), 3)
        logits[:, 2] = 20  # an output for which there is no answer
        outputs = {"vqa": ObjectiveOutput(torch.zeros(()), {"logits": logits})}
        callback.on_test_batch_end(trainer, None, outputs, {"qid": torch.tensor(questions)}, 0)
    callback.on_test_batch_end(trainer, None, {}, {"skipped": ["one"]}, 2)
    callback.on_test_epoch_end(trainer, None)
    assert json.loads(path.read_text()) == [
        {"question_id": 10, "answer": "no"},
        {"question_id": 20, "answer": "yes"},
        {"question_id": 30, "answer": "yes"},
    ]
    assert [file.name for file in path.parent.iterdir()] == ["vqa_submit_best.json"]
