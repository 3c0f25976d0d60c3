"""What is assumed of Lightning's private state: each test names it, and fails where a new Lightning has changed it."""

import copy

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from vlmo.training.checkpointing.loop_state import set_logged_step, set_loops

BATCHES = 4  # an epoch


class Plain(LightningModule):
    """One weight, which is trained and validated."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorder(Callback):
    """The loops' state at the beginning of each batch, as Lightning saves it."""

    def __init__(self):
        self.states = {}
        self.steps = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.states[trainer.current_epoch, batch_idx] = copy.deepcopy(state["loops"]["fit_loop"])
        self.steps[trainer.global_step] = trainer.fit_loop.epoch_loop._batches_that_stepped


def fit(callback, **options):
    data = DataLoader(torch.ones(BATCHES, 1))
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(Plain(), data, data)
    return trainer


@pytest.fixture(scope="module")
def recorded():
    recorder = Recorder()
    fit(recorder, max_epochs=2)
    return recorder


def test_checkpoint_loops(recorded):
    """`checkpoint["loops"]["fit_loop"]` has the entries that are written, with the same counters.

    A batch that has begun counts as ready and started (in Lightning's hook that is the case), the epoch likewise.
    """
    for (epoch, batches), theirs in recorded.states.items():
        checkpoint = {"loops": {"fit_loop": {}}}
        set_loops(checkpoint, epoch, batches, epoch * BATCHES + batches, is_last_batch=False, validated=True)
        ours = checkpoint["loops"]["fit_loop"]
        assert set(ours) <= set(theirs)
        for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
            assert ours[name].keys() == theirs[name].keys(), name
            assert ours[name]["total"].keys() == theirs[name]["total"].keys(), name
        assert ours["epoch_progress"]["current"]["completed"] == theirs["epoch_progress"]["current"]["completed"]
        assert ours["epoch_progress"]["current"]["ready"] == theirs["epoch_progress"]["current"]["ready"]
        ours, theirs = (loops["epoch_loop.batch_progress"] for loops in (ours, theirs))
        for part in ("total", "current"):
            assert ours[part]["completed"] == theirs[part]["completed"], (epoch, batches, part)
            assert theirs[part]["ready"] == ours[part]["ready"] + 1, (epoch, batches, part)


def test_batches_that_stepped(recorded):
    """`_batches_that_stepped` is the step that loggers are given: that of the optimizer, between two batches."""
    assert recorded.steps == {step: step for step in range(2 * BATCHES)}


class Resumed(Callback):
    """Goes on from the middle of an epoch, with the validation to come or made."""

    def __init__(self, batches, validated):
        self.batches, self.validated = batches, validated
        self.trained, self.validations, self.first_step = [], [], None

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        set_loops(checkpoint, 0, self.batches, self.batches, is_last_batch=False, validated=self.validated)

    def on_train_start(self, trainer, pl_module):
        assert trainer.fit_loop._data_fetcher is not None
        assert trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher) in (True, False)
        set_logged_step(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.trained.append((trainer.current_epoch, batch_idx))
        if self.first_step is None:
            self.first_step = trainer.fit_loop.epoch_loop._batches_that_stepped

    def on_validation_start(self, trainer, pl_module):
        self.validations.append(trainer.global_step)


@pytest.mark.parametrize("batches, validated", [(1, True), (2, True), (2, False), (3, True)])
def test_data_fetcher_and_should_check_val_fx(tmp_path, batches, validated):
    """Lightning goes on with the batch that is asked for, and validates first where that is to come."""
    first = fit(Callback(), max_steps=batches, val_check_interval=2)
    first.save_checkpoint(tmp_path / "start.ckpt")
    callback = Resumed(batches, validated)
    data = DataLoader(torch.ones(BATCHES, 1))
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        val_check_interval=2,
    )
    trainer.fit(Plain(), data, data, ckpt_path=tmp_path / "start.ckpt")
    assert [number for _, number in callback.trained] == list(range(batches, BATCHES))
    assert callback.validations == ([] if validated else [batches]) + [step for step in (2, 4) if step > batches]
    assert callback.first_step == batches
