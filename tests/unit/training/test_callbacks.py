"""What is counted and written around the steps."""

import logging
from types import SimpleNamespace

import pytest

from vlmo.errors import VLMoError
from vlmo.training.callbacks.skipping import UnreadableImages


@pytest.fixture
def trainer(tmp_path):
    """Of a run over 1,000 samples."""
    loader = SimpleNamespace(dataset=range(1000))
    loaders = dict.fromkeys(("train_dataloader", "val_dataloaders", "test_dataloaders"), loader)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(default_root_dir=str(tmp_path / "run"), fast_dev_run=0, strategy=strategy, **loaders)


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
        callback.on_train_epoch_end(trainer, SimpleNamespace(device="cpu"))
    assert "train: 8 samples left out, their images cannot be decoded" in caplog.text
    assert len((tmp_path / "run" / "unreadable_images.txt").read_text().splitlines()) == 8


def test_more_than_one_in_a_hundred_stop_the_run(trainer):
    callback = UnreadableImages()
    callback.on_train_batch_end(trainer, None, None, skipped(10), 0)
    with pytest.raises(VLMoError, match=r"11 of 1000 train samples .* more than 1%: .* re-create its Arrow files"):
        callback.on_train_batch_end(trainer, None, None, skipped(1), 1)


def test_each_pass_and_phase_counts_anew(trainer):
    callback = UnreadableImages()
    for _ in range(3):
        callback.on_train_epoch_start(trainer, None)
        callback.on_train_batch_end(trainer, None, None, skipped(9), 0)
        callback.on_validation_epoch_start(trainer, None)
        callback.on_validation_batch_end(trainer, None, None, skipped(9), 0)
    callback.on_test_batch_end(trainer, None, None, skipped(9), 0)


def test_a_trial_writes_nothing(trainer, tmp_path):
    trainer.fast_dev_run = 1
    callback = UnreadableImages()
    callback.setup(trainer, None, "fit")
    callback.on_train_batch_end(trainer, None, None, skipped(2), 0)
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_is_judged_as_a_whole(trainer):
    callback = UnreadableImages()
    module = SimpleNamespace(device="cpu")
    callback.on_test_batch_end(trainer, None, None, skipped(10), 0)
    callback.on_test_epoch_end(trainer, module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmo.training.callbacks.skipping.sum_over_processes", lambda failed: failed + 1)
        with pytest.raises(VLMoError, match="11 of 1000 test samples"):
            callback.on_test_epoch_end(trainer, module)
