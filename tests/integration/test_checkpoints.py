"""When checkpoints are written and which are kept."""

import pytest
import torch

from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.training.checkpointing import checkpoints, files

TEXT = "task_textmlm_base"
SMALL = {"batch_size": 2, "per_gpu_batchsize": 2}  # 5 steps an epoch


def test_every_so_many_steps_and_after_each_validation(go):
    run = go(TEXT, checkpoint_every_n_steps=2, max_steps=9, **SMALL)
    steps = [2, 4, 5, 6, 8]
    assert run.checkpoints == sorted([f"epoch={step // 6}-step={step}.ckpt" for step in steps] + ["last.ckpt"])


def test_every_so_many_minutes(go, monkeypatch):
    clock, step = iter(range(0, 10000, 25)), VLMo.training_step
    now = [0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def training_step(model, batch, batch_idx):
        now[0] = next(clock)  # seconds
        return step(model, batch, batch_idx)

    monkeypatch.setattr(VLMo, "training_step", training_step)
    run = go(TEXT, checkpoint_every_n_minutes=1, max_steps=5, val_check_interval=100, **SMALL)
    assert run.checkpoints == ["epoch=0-step=4.ckpt", "last.ckpt"]


def test_the_newest_are_kept(go, tmp_path):
    options = {"keep_last": 2, "checkpoint_every_n_steps": 1, "log_dir": tmp_path, "resume_during_training": True}
    first = go(TEXT, max_steps=4, **options, **SMALL)
    assert first.checkpoints == ["epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt", "last.ckpt"]
    first.last.unlink()  # as if killed: what is gone on from is the checkpoint of step 3
    second = go(TEXT, max_steps=5, **options, **SMALL)
    old = first.log_dir / first.folder.parent.name / "version_0" / "checkpoints"
    assert second.checkpoints == ["epoch=0-step=4.ckpt", "epoch=0-step=5.ckpt", "last.ckpt"]
    assert list(old.iterdir()) == []


def test_nothing_is_removed_of_what_was_gone_on_from_elsewhere(go, tmp_path):
    first = go(TEXT, log_dir=tmp_path / "one", max_steps=3, checkpoint_every_n_steps=1, **SMALL)
    before = first.checkpoints
    start = first.folder / "checkpoints" / "epoch=0-step=1.ckpt"
    options = {"keep_last": 1, "checkpoint_every_n_steps": 1, "max_steps": 5}
    second = go(TEXT, log_dir=tmp_path / "other", resume_from=str(start), **options, **SMALL)
    assert second.checkpoints == ["epoch=0-step=5.ckpt", "last.ckpt"]
    assert first.checkpoints == before


def test_last_is_the_newest_under_a_second_name(go):
    run = go(TEXT, max_steps=5, **SMALL)
    assert run.checkpoints == ["epoch=0-step=5.ckpt", "last.ckpt"]
    assert run.last.samefile(run.folder / "checkpoints" / "epoch=0-step=5.ckpt")


def test_without_hard_links_it_is_a_symbolic_one(go, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(files.os, "link", refused)
    run = go(TEXT, max_steps=5, **SMALL)
    assert run.last.is_symlink() and run.last.resolve().name == "epoch=0-step=5.ckpt"


def test_checkpoints_without_the_place_cannot_be_gone_on_from(go, tmp_path):
    run = go(TEXT, max_steps=1, **SMALL)
    content = torch.load(run.last, weights_only=True)
    del content["vlmo_resume"]
    torch.save(content, tmp_path / "older.ckpt")
    with pytest.raises(VLMoError, match="is of an older version; start from it with load_path=FILE"):
        go(TEXT, resume_from=str(tmp_path / "older.ckpt"), **SMALL)
