"""A run that goes on from any of its checkpoints ends as the run that was never interrupted, to the last bit."""

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

import run
from tests import tiny
from vlmo.modules import VLMo

STAGE3 = "task_mlm_itm_itc_base"
# 31 pairs, 7 passes an epoch, 4 steps (the last of a single pass); dropout, negatives and masking all draw
OPTIONS = {"datasets": ["coco", "f30k"], "drop_path_rate": 0.2, "batch_size": 8, "max_steps": 9}
CLOCK = ("train/", "validate/")  # what Lightning's throughput counter logs


def content(run):
    """All that training has made: weights, optimizer, schedule, random states, sums."""
    return content_of(torch.load(run.last, weights_only=True))


def content_of(saved):
    return {name: saved[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "vlmo_resume")}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def log_of(run, since):
    """What was logged from a step on, without what depends on the clock."""
    rows = [row for row in run.rows if row["step"] >= since]
    rows = [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]
    return [row for row in rows if set(row) - {"step", "epoch"}]


VALIDATED = {
    "each epoch": {},
    # in the middle of what is accumulated, and over the epochs' ends
    "every 3 passes": {"val_check_interval": 3, "num_workers": 2},
    "twice an epoch": {"val_check_interval": 0.5, "batch_size": 4, "max_epoch": 2, "max_steps": None},
}


def goes_on_from(picked, go, folder, options):
    through = go(STAGE3, log_dir=folder / "through", checkpoint_every_n_steps=1, **options)
    expected = content(through)
    checkpoints = sorted((through.folder / "checkpoints").glob("epoch*"))
    assert len(checkpoints) >= 8
    for path in checkpoints[picked]:
        resumed = go(STAGE3, log_dir=folder / path.stem, resume_from=str(path), **options)
        found = content(resumed)
        assert [name for name in expected if not same(expected[name], found[name])] == [], path
        step = torch.load(path, weights_only=True)["global_step"]
        assert log_of(resumed, step) == log_of(through, step), path


def test_from_the_middle_and_the_end_of_an_epoch(go, tmp_path):
    goes_on_from(slice(1, 4, 2), go, tmp_path, OPTIONS | VALIDATED["every 3 passes"])


@pytest.mark.slow
@pytest.mark.parametrize("validated", VALIDATED)
def test_from_every_checkpoint(go, tmp_path, validated):
    goes_on_from(slice(None), go, tmp_path, OPTIONS | VALIDATED[validated])


# --- another split of the batch ---------------------------------------------------------------------------------------


@pytest.fixture
def samples(monkeypatch):
    """The numbers of the samples that were trained on, by epoch."""
    seen = {}
    step = VLMo.training_step

    def watched(self, batch, batch_idx):
        seen.setdefault(self.current_epoch, []).extend(batch["raw_index"].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(VLMo, "training_step", watched)
    return seen


def test_with_other_workers_and_passes_each_sample_is_seen_once(go, tmp_path, samples, caplog):
    options = OPTIONS | {"val_check_interval": 100}
    first = go(STAGE3, log_dir=tmp_path / "first", **options | {"max_steps": 2})
    assert len(samples[0]) == 16
    with caplog.at_level(logging.WARNING):
        go(
            STAGE3,
            log_dir=tmp_path / "then",
            resume_from=str(first.last),
            num_workers=1,
            per_gpu_batchsize=2,
            **options,
        )
    assert "another split of the batch (1 x 2 x 4 for 1 x 4 x 2 processes x samples x passes)" in caplog.text
    for epoch in (0, 1):
        assert Counter(samples[epoch]).most_common(1)[0][1] == 1
    assert len(samples[0]) == 30  # of 31; the last fills no batch
    caplog.clear()
    go(STAGE3, log_dir=tmp_path / "same", resume_from=str(first.last), num_workers=1, **options)
    assert "another split" not in caplog.text


def test_with_other_data_the_epoch_begins_anew(go, tmp_path, samples, caplog):
    first = go(STAGE3, log_dir=tmp_path / "first", **OPTIONS | {"max_steps": 2})
    samples.clear()
    with caplog.at_level(logging.WARNING):
        options = OPTIONS | {"datasets": ["coco"], "max_steps": 4}
        go(STAGE3, log_dir=tmp_path / "then", resume_from=str(first.last), **options)
    assert "training data in another order (samples 16 for 31): epoch 0 starts over" in caplog.text
    assert Counter(samples[0]).most_common(1)[0][1] == 1


# --- killed -----------------------------------------------------------------------------------------------------------


class Killed:
    """A run in a process of its own, killed and begun again as often as asked."""

    def __init__(self, go, folder, options):
        self.go, self.folder, self.options = go, folder, options
        self.listing = folder / "samples.jsonl"

    def _run(self):
        os.dup2(os.open(self.folder / "console.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        step = VLMo.training_step
        with self.listing.open("a", buffering=1) as listing:

            def watched(model, batch, batch_idx):
                place = [model.current_epoch, batch_idx, batch["raw_index"].tolist()]
                listing.write(json.dumps(place) + "\n")
                return step(model, batch, batch_idx)

            VLMo.training_step = watched
            self.go(STAGE3, log_dir=self.folder / "killed", resume_during_training=True, **self.options)

    def attempt(self, seconds):
        """Kills the run so long after its first step; returns whether there was anything left to kill."""
        process = multiprocessing.get_context("fork").Process(target=self._run)
        before = self.listing.stat().st_size if self.listing.exists() else 0
        process.start()
        while process.is_alive() and (not self.listing.exists() or self.listing.stat().st_size == before):
            time.sleep(0.01)
        process.join(seconds)
        alive = process.is_alive()
        if alive:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert alive or process.exitcode == 0, (self.folder / "console.txt").read_text()[-2000:]
        return alive

    def samples(self):
        """By epoch and pass, as last trained on."""
        return {(epoch, number): found for epoch, number, found in map(json.loads, self.listing.open())}


def killed_runs_end_alike(go, folder, kills, longest, options):
    through = go(STAGE3, log_dir=folder / "through", **options)
    killed = Killed(go, folder, options)
    draw = random.Random(0)
    done = sum(killed.attempt(draw.uniform(0, longest)) for _ in range(kills))
    assert done == kills, "the run is too short to be killed so often"
    assert not killed.attempt(600)
    last = max((folder / "killed").glob("*/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    expected, found = content(through), torch.load(last, weights_only=True)
    assert [name for name in expected if not same(expected[name], found[name])] == []
    passes = killed.samples()
    epochs = {epoch for epoch, _ in passes}
    for epoch in epochs:
        counts = Counter(number for (e, _), numbers in passes.items() if e == epoch for number in numbers)
        assert set(counts.values()) == {1}
    assert len(passes) == 7 * (max(epochs)) + sum(epoch == max(epochs) for epoch, _ in passes)


def test_killed_twice(go, tmp_path):
    options = OPTIONS | {"max_steps": 24, "num_workers": 2, "checkpoint_every_n_steps": 2}
    killed_runs_end_alike(go, tmp_path, 2, 0.5, options)


@pytest.mark.slow
def test_killed_twenty_times(go, tmp_path):
    options = OPTIONS | {"max_steps": 400, "num_workers": 2, "checkpoint_every_n_steps": 3, "keep_last": 3}
    killed_runs_end_alike(go, tmp_path, 20, 2.0, options | {"val_check_interval": 11})


class Processes:
    """A run of two processes, each begun by Lightning, as one group."""

    def __init__(self, folder, data, **options):
        self.folder, self.listing = folder, folder / "samples"
        folder.mkdir()
        options = {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "log_dir": str(folder), **options}
        options |= {"num_gpus": 2, "accelerator": "cpu", "per_gpu_batchsize": 2, "max_epoch": 100, "warmup_steps": 1}
        (folder / "config.json").write_text(json.dumps(tiny.config(STAGE3, **options)))

    def start(self, *more):
        script = Path(__file__).with_name("watched_run.py")
        command = [sys.executable, script, self.folder / "config.json", self.listing, *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(run.__file__).parent)}
        with (self.folder / "console.txt").open("a") as console:
            streams = {"stdout": console, "stderr": console}
            words = list(map(str, command))
            self.process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)
        return self

    def wait_for(self, passes):
        """Until the first process has begun so many."""
        listing = Path(f"{self.listing}.0")
        while not listing.exists() or len(listing.read_text().splitlines()) < passes:
            assert self.process.poll() is None, self.console
            time.sleep(0.02)

    @property
    def console(self):
        return (self.folder / "console.txt").read_text()

    def end(self, status=0):
        assert self.process.wait(300) == status, self.console[-3000:]
        return self

    @property
    def last(self):
        return max(self.folder.glob("*/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)

    def samples(self):
        """By epoch: each number that any process has trained on, the passes taken again counted once."""
        passes = {}
        for rank in (0, 1):
            for epoch, number, found in map(json.loads, Path(f"{self.listing}.{rank}").read_text().splitlines()):
                passes[epoch, number, rank] = found
        return {e: [n for (epoch, *_), found in passes.items() if epoch == e for n in found] for e, *_ in passes}


@pytest.mark.slow
def test_two_processes_killed(data, tmp_path):
    options = OPTIONS | {"max_steps": 24, "num_workers": 1, "checkpoint_every_n_steps": 2}
    through = Processes(tmp_path / "through", data, **options).start().end()
    killed = Processes(tmp_path / "killed", data, resume_during_training=True, **options).start()
    killed.wait_for(27)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    killed.start().end()
    assert "resumed at step" in killed.console
    expected, found = content(through), content(killed)
    assert [name for name in expected if not same(expected[name], found[name])] == []
    for numbers in killed.samples().values():
        assert set(Counter(numbers).values()) == {1}


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(data, tmp_path, go, samples):
    two = Processes(tmp_path / "two", data, **OPTIONS | {"max_steps": 2}).start().end()
    go(STAGE3, model_arch="vlmo_tiny_patch16", resume_from=str(two.last), **OPTIONS | {"max_steps": 6})
    assert set(Counter(two.samples()[0] + samples[0]).values()) == {1}
    assert len(two.samples()[0] + samples[0]) >= 28


@pytest.mark.slow
def test_two_processes_of_which_one_is_told_to_stop_or_has_no_number(data, tmp_path):
    """What one meets, both do: stop after the same batch, skip the same step."""
    options = OPTIONS | {"max_steps": 24, "resume_during_training": True}
    expected = Processes(tmp_path / "through", data, **options).start(1, 3).end()
    for rank in (0, 1):
        told = Processes(tmp_path / f"told {rank}", data, **options).start(1, 3)
        told.wait_for(20)
        processes = [told.process, *psutil.Process(told.process.pid).children()]
        os.kill(processes[rank].pid, signal.SIGTERM)
        told.end(128 + signal.SIGTERM)
        assert told.console.count("stopped by SIGTERM at step") == 1
        told.start(1, 3).end()
        assert told.console.count("is inf or NaN, the step is skipped") == 2
        assert same(content(told), content(expected))
