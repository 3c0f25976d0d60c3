"""A checkpoint that is written while training goes on."""

import errno
import os
import threading

import pytest
import torch

from vlmo.training.checkpointing import atomic_io
from vlmo.training.checkpointing.atomic_io import AtomicCheckpointIO


def state(value):
    weight = torch.full((3,), value)
    optimizer = {"state": {0: {"exp_avg": weight.clone()}}, "param_groups": [{"lr": value}]}
    return {"state_dict": {"weight": weight}, "optimizer_states": [optimizer], "sums": torch.full((), value)}


@pytest.fixture
def held(monkeypatch):
    """A disk that takes nothing until told to."""
    go_on, save = threading.Event(), atomic_io._save

    def slow(checkpoint, file):
        assert go_on.wait(10)
        save(checkpoint, file)

    monkeypatch.setattr(atomic_io, "_save", slow)
    return go_on


def test_the_file_holds_the_state_of_when_it_was_asked_for(tmp_path, held):
    written = []
    io, given = AtomicCheckpointIO(written=written.append), state(1.0)
    io.save_checkpoint(given, tmp_path / "a.ckpt")
    given["sums"].fill_(9)  # what a step adds to
    assert io.copied.wait(10)
    given["state_dict"]["weight"].fill_(9)  # the step of the optimizer
    given["optimizer_states"][0]["state"][0]["exp_avg"].fill_(9)
    assert not (tmp_path / "a.ckpt").exists() and written == []
    held.set()
    io.wait()
    found, expected = io.load_checkpoint(tmp_path / "a.ckpt"), state(1.0)
    assert torch.equal(found["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(3))
    assert found["sums"] == 1 and written == [tmp_path / "a.ckpt"]


def test_one_at_a_time(tmp_path, held):
    io = AtomicCheckpointIO()
    io.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
    threading.Timer(0.05, held.set).start()
    io.save_checkpoint(state(2.0), tmp_path / "b.ckpt")  # waits for the first
    assert (tmp_path / "a.ckpt").exists()
    io.wait()
    assert io.load_checkpoint(tmp_path / "b.ckpt")["sums"] == 2


def test_what_cannot_be_written_is_known_afterwards_and_any_other_error_is_raised(tmp_path, monkeypatch):
    io, error = AtomicCheckpointIO(written=lambda _: pytest.fail("there is none")), OSError(errno.ENOSPC, "full")

    def refuse(checkpoint, file):
        raise error

    monkeypatch.setattr(atomic_io, "_save", refuse)
    io.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
    io.wait()
    assert "a.ckpt could not be written (full): it needs 0.00 GiB" in io.failure
    assert os.listdir(tmp_path) == []
    error = ZeroDivisionError()
    io.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
    with pytest.raises(ZeroDivisionError):
        io.wait()
    assert os.listdir(tmp_path) == []


def test_in_the_foreground_nothing_runs_beside(tmp_path):
    io, threads = AtomicCheckpointIO(background=False), threading.active_count()
    io.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").exists() and threading.active_count() == threads
