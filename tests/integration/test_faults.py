"""Faults while a run trains, and what it does about each (docs/resume.md)."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from tests import tables
from vlmo.checkpoints import loading as checkpoint
from vlmo.errors import Stopped, VLMoError
from vlmo.modules import VLMo
from vlmo.training.checkpointing import atomic_io as checkpoint_io
from vlmo.training.checkpointing.checkpoints import Checkpoints

TEXT = "task_textmlm_base"
OPTIONS = {"max_steps": 4, "checkpoint_every_n_steps": 1, "batch_size": 2, "per_gpu_batchsize": 2}  # 5 steps an epoch


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def through(go):
    """The run that nothing happens to."""
    return go(TEXT, **OPTIONS)


# --- killed while it saves --------------------------------------------------------------------------------------------


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_halfway(checkpoint, file):
    file.write(b"PK\x03\x04 the first half")
    file.flush()
    die()


def writing(trainer):
    return next(callback.io for callback in trainer.callbacks if isinstance(callback, Checkpoints))


PHASES = {
    "before writing": (checkpoint_io, "atomic_write", die),
    "halfway": (checkpoint_io, "_save", die_halfway),
    "before it is on the disk": (os, "fsync", die),
    "before it has its name": (Path, "replace", die),
    "before last.ckpt is it": (os, "link", die),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_while_it_saves(go, tmp_path, through, phase):
    where, name, killer = PHASES[phase]

    def run():
        step = VLMo.training_step

        def training_step(model, batch, batch_idx):
            if model.global_step == 2:  # the first two checkpoints are written well
                writing(model.trainer).wait()
                setattr(where, name, killer)
            return step(model, batch, batch_idx)

        VLMo.training_step = training_step
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        go(TEXT, log_dir=tmp_path, **OPTIONS)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    resumed = go(TEXT, log_dir=tmp_path, resume_during_training=True, **OPTIONS)
    assert min(resumed.logged("textmlm/train/loss")) == (3 if phase == "before last.ckpt is it" else 2)
    assert equal(weights(resumed.last), weights(through.last))
    assert list(tmp_path.rglob("*.part")) == []


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full for the checkpoints of the given numbers (from 1)."""

    def fill(*numbers):
        save, count = checkpoint_io._save, iter(range(1, 1000))

        def limited(checkpoint, file):
            if next(count) in numbers:
                file.write(b"as much as there is room for")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(checkpoint, file)

        monkeypatch.setattr(checkpoint_io, "_save", limited)

    return fill


def test_full_disk(go, through, full_disk, caplog):
    full_disk(2)
    run = go(TEXT, **OPTIONS)
    assert "step=2.ckpt could not be written (No space left on device): it needs 0.00 GiB, and " in caplog.text
    assert run.checkpoints == ["epoch=0-step=1.ckpt", "epoch=0-step=3.ckpt", "last.ckpt"]
    assert equal(weights(run.last), weights(through.last))


def test_full_disk_at_the_end(go, full_disk, tmp_path):
    full_disk(4)
    with pytest.raises(VLMoError, match="last.ckpt could not be written .* resume_during_training=True"):
        go(TEXT, log_dir=tmp_path, **OPTIONS)
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3  # the one before


@pytest.fixture
def small_disk(tmp_path):
    """A real one of 4 MB, which is two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or os.geteuid():
        pytest.skip("needs to mount a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_really_full(go, small_disk, caplog):
    with pytest.raises(VLMoError, match="last.ckpt could not be written .*No space left on device"):
        go(TEXT, log_dir=small_disk, **OPTIONS)
    assert "could not be written" in caplog.text
    (last,) = small_disk.rglob("last.ckpt")
    checkpoint.read(last)
    assert list(small_disk.rglob("*.part")) == []


def test_disk_without_a_byte_left(go, small_disk, through, caplog, monkeypatch):
    step, ballast = VLMo.training_step, small_disk / "ballast"

    def training_step(model, batch, batch_idx):
        writing(model.trainer).wait()
        if model.global_step == 1:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1000))
        if model.global_step == 3:
            ballast.unlink()
        return step(model, batch, batch_idx)

    monkeypatch.setattr(VLMo, "training_step", training_step)
    run = go(TEXT, log_dir=small_disk, keep_last=1, **OPTIONS)
    assert caplog.text.count("could not be written (No space left on device)") == 2
    assert equal(weights(run.last), weights(through.last))
    assert 3 in run.logged("textmlm/train/loss")


def test_log_dir_that_cannot_be_written_to(go):
    with pytest.raises(VLMoError, match="log_dir=/proc/self/result: .* cannot be written to"):
        go(TEXT, log_dir=Path("/proc/self/result"), **OPTIONS)


# --- damaged and vanished files ---------------------------------------------------------------------------------------


def test_damaged_checkpoints_are_passed_over(go, tmp_path, through, caplog):
    run = go(TEXT, log_dir=tmp_path, **OPTIONS | {"max_steps": 3})
    os.truncate(run.last, run.last.stat().st_size // 2)
    (run.folder / "checkpoints" / "epoch=0-step=2.ckpt").write_bytes(b"")
    resumed = go(TEXT, log_dir=tmp_path, resume_during_training=True, **OPTIONS)
    assert caplog.text.count("continuing from the one before it") == 2
    assert sorted(resumed.logged("textmlm/train/loss")) == [1, 2, 3]
    assert equal(weights(resumed.last), weights(through.last))


def test_damaged_checkpoint_that_was_asked_for(go, tmp_path, through):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(through.last.read_bytes()[:-1000])
    with pytest.raises(VLMoError, match="damaged.ckpt: cannot be read, it is truncated"):
        go(TEXT, resume_from=str(damaged), **OPTIONS)


@pytest.fixture
def own_data(tmp_path):
    root = tmp_path / "tables"
    root.mkdir()
    tables.write_wikibk(root)
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_table_that_vanishes(go, own_data, monkeypatch, workers):
    opened = VLMo.on_train_start

    def vanish(model):
        for path in own_data.glob("wikibk_train_*"):
            path.unlink()
        opened(model)

    monkeypatch.setattr(VLMo, "on_train_start", vanish)
    from vlmo.sources import arrow_tables

    opening = arrow_tables.open_table

    def slow(path):  # a loader process opens its files when it first reads them
        time.sleep(0.5 if multiprocessing.parent_process() else 0)
        return opening(path)

    monkeypatch.setattr(arrow_tables, "open_table", slow)
    with pytest.raises(VLMoError, match=r"^\S*wikibk_train_\d.arrow: is missing$"):
        go(TEXT, data_root=str(own_data), num_workers=workers, **OPTIONS)


def test_loader_process_that_is_killed(go, monkeypatch):
    step = VLMo.training_step

    def kill(model, batch, batch_idx):
        for child in psutil.Process().children():
            child.kill()
        return step(model, batch, batch_idx)

    monkeypatch.setattr(VLMo, "training_step", kill)
    with pytest.raises(VLMoError, match="a process that loads data has died at step .*lower num_workers, now 1"):
        go(TEXT, num_workers=1, **OPTIONS | {"max_steps": 30})


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_loader_process_that_dies_while_it_hands_over_a_batch(go, monkeypatch, error):
    def broken(connection, size):
        raise error

    def receive(model, batch, batch_idx):
        monkeypatch.setattr(Connection, "_recv", broken)
        own, other = Pipe()
        own.recv_bytes()

    monkeypatch.setattr(VLMo, "training_step", receive)
    with pytest.raises(VLMoError, match="a process that loads data has died at step 1 .*lower num_workers"):
        go(TEXT, **OPTIONS)


def test_errors_of_the_system_that_have_nothing_to_do_with_loaders_stay_what_they_are(go, monkeypatch):
    def fail(model, batch, batch_idx):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(VLMo, "training_step", fail)
    with pytest.raises(OSError, match="Input/output error"):
        go(TEXT, **OPTIONS)


def test_out_of_memory(go, monkeypatch):
    def allocate(model, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(VLMo, "training_step", allocate)
    with pytest.raises(VLMoError, match="did not suffice at step 1: lower per_gpu_batchsize .now 2; 1 takes"):
        go(TEXT, **OPTIONS)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def signalled(monkeypatch):
    """Sends this process a signal during the given passes."""

    def at(number, *passes):
        step, count = VLMo.training_step, iter(range(1000))

        def training_step(model, batch, batch_idx):
            if next(count) in passes:
                os.kill(os.getpid(), number)
            return step(model, batch, batch_idx)

        monkeypatch.setattr(VLMo, "training_step", training_step)

    yield at
    for number in (signal.SIGTERM, signal.SIGUSR1):
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop(go, tmp_path, signalled, through, number):
    options = OPTIONS | {"checkpoint_every_n_steps": None}
    signalled(number, 1)
    with pytest.raises(Stopped, match=f"stopped by {number.name} at step 2; saved .*; to continue") as stopped:
        go(TEXT, log_dir=tmp_path, **options)
    assert stopped.value.status == 128 + number
    signalled(number)
    resumed = go(TEXT, log_dir=tmp_path, resume_during_training=True, **options)
    assert sorted(resumed.logged("textmlm/train/loss")) == [2, 3]
    assert equal(weights(resumed.last), weights(through.last))


def test_told_to_stop_while_passes_are_accumulated(go, tmp_path, signalled):
    options = {"max_steps": 2, "batch_size": 4, "per_gpu_batchsize": 2}
    expected = go(TEXT, **options)
    signalled(signal.SIGTERM, 2)
    with pytest.raises(Stopped, match="at step 1"):
        go(TEXT, log_dir=tmp_path, **options)
    signalled(signal.SIGTERM)
    resumed = go(TEXT, log_dir=tmp_path, resume_during_training=True, **options)
    assert equal(weights(resumed.last), weights(expected.last))


def test_told_to_stop_during_validation(go, tmp_path, monkeypatch, through):
    validate = VLMo.validation_step

    def interrupted(model, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        validate(model, batch, batch_idx)

    options = OPTIONS | {"val_check_interval": 2}
    with monkeypatch.context() as patch:
        patch.setattr(VLMo, "validation_step", interrupted)
        with pytest.raises(Stopped, match="at step 2"):
            go(TEXT, log_dir=tmp_path, **options)
    resumed = go(TEXT, log_dir=tmp_path, resume_during_training=True, **options)
    assert sorted(resumed.logged("textmlm/val/loss")) == [1, 3]  # it is made again, from the beginning
    assert equal(weights(resumed.last), weights(through.last))


def test_second_ctrl_c_stops_at_once(go, tmp_path, monkeypatch):
    def stuck(model, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(VLMo, "training_step", stuck)
    with pytest.raises(SystemExit) as ended:
        go(TEXT, log_dir=tmp_path, **OPTIONS)
    assert ended.value.code == 1
    assert list(tmp_path.rglob("*.ckpt")) == []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # (Lightning leaves it ignored)


@pytest.mark.parametrize("resume", [True, False])
def test_slurm_job_is_queued_again(go, tmp_path, signalled, monkeypatch, caplog, resume):
    asked = tmp_path / "asked"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    signalled(signal.SIGUSR1, 1)
    with pytest.raises(Stopped):
        go(TEXT, log_dir=tmp_path / "result", resume_during_training=resume, **OPTIONS)
    assert (asked.read_text() == "requeue 17\n") if resume else not asked.exists()
    assert ("would start over" in caplog.text) is not resume


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Makes the loss of the given passes NaN, or the gradient alone."""

    def at(*passes, gradient=False):
        step, count = VLMo.training_step, iter(range(1000))

        def training_step(model, batch, batch_idx):
            loss = step(model, batch, batch_idx)
            if next(count) not in passes:
                return loss
            if not gradient:
                return loss * torch.nan
            # finite, with an infinite slope
            weight = model.transformer.norm.weight
            return loss + ((weight - weight.detach()) ** 2).sum().sqrt()

        monkeypatch.setattr(VLMo, "training_step", training_step)

    return at


@pytest.mark.parametrize("gradient", [False, True])
def test_step_without_numbers_is_skipped(go, broken, caplog, gradient):
    broken(1, gradient=gradient)
    run = go(TEXT, **OPTIONS)
    steps = [weights(run.folder / "checkpoints" / f"epoch=0-step={step}.ckpt") for step in (1, 2, 3)]
    assert equal(steps[0], steps[1]) and not equal(steps[1], steps[2])
    what = "gradient" if gradient else "loss"
    assert f"step 1, rank 0: the {what} is inf or NaN, the step is skipped; samples " in caplog.text
    (line,) = (run.folder / "nonfinite_steps.txt").read_text().splitlines()
    samples = [int(number) for number in line.rpartition("samples ")[2].split(", ")]
    assert len(samples) == 2 and all(0 <= number < 10 for number in samples)
    optimizer = torch.load(run.last, weights_only=True)["optimizer_states"][0]
    assert optimizer["state"][0]["step"] == 3
    assert optimizer["param_groups"][0]["updates"] == 3
    assert torch.load(run.last, weights_only=True)["lr_schedulers"][0]["last_epoch"] == 3


def test_the_schedule_waits_for_a_skipped_step_and_goes_on_after_a_resume(go, broken, tmp_path):
    options = OPTIONS | {"warmup_steps": 0}
    whole = go(TEXT, **options)
    rates = [group["lr"] for group in whole_groups(whole)]
    broken(1)
    run = go(TEXT, **options)
    tag = next(name for row in run.rows for name in row if name.startswith("lr-"))
    taken, skipped = whole.logged(tag), run.logged(tag)
    assert skipped[2] == taken[1] and skipped[3] == taken[2]  # the rate of the second step is used again
    assert whole_groups(run)[0]["lr"] > rates[0]
    broken()
    resumed = go(TEXT, log_dir=tmp_path, resume_from=str(run.folder / "checkpoints" / "epoch=0-step=2.ckpt"), **options)
    assert resumed.logged(tag) == {step: rate for step, rate in skipped.items() if step >= 2}


def whole_groups(run):
    return torch.load(run.last, weights_only=True)["optimizer_states"][0]["param_groups"]


def test_only_the_samples_of_the_broken_pass_are_named(go, broken):
    broken(1)
    run = go(TEXT, max_steps=1, batch_size=4, per_gpu_batchsize=2)
    (line,) = (run.folder / "nonfinite_steps.txt").read_text().splitlines()
    assert len(line.rpartition("samples ")[2].split(", ")) == 2


def test_too_many_in_a_row_stop_the_run(go, broken, tmp_path):
    broken(0, 1, 3, 4, 5)
    with pytest.raises(VLMoError, match="3 steps in a row .*max_nonfinite=3.*lower learning_rate"):
        go(TEXT, log_dir=tmp_path, max_nonfinite=3, **OPTIONS | {"max_steps": 20})
    (listing,) = tmp_path.rglob("nonfinite_steps.txt")
    assert len(listing.read_text().splitlines()) == 5
