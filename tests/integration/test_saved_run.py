"""Which run a resume goes on from, and what it takes over of it."""

import json
import shutil

import pytest
import torch

from vlmo.checkpoints import files
from vlmo.errors import VLMoError
from vlmo.training.checkpointing.saved_run import fingerprint

TEXT = "task_textmlm_base"
RESUMED = {"resume_during_training": True, "warmup_steps": 0}


@pytest.fixture(scope="module")
def starts(go, tmp_path_factory):
    """Two files of one name with different weights."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("from")
        shutil.copy(go(TEXT, seed=seed, max_steps=1).last, folder / "last.ckpt")
        found.append(folder / "last.ckpt")
    return found


def groups_of(run):
    return torch.load(run.last, weights_only=True)["optimizer_states"][0]["param_groups"]


def steps_of(run):
    return sorted(run.logged("train/loss"))


def test_a_run_from_another_file_of_the_same_name_starts_anew(go, starts, tmp_path, caplog):
    for path in starts:
        run = go(TEXT, log_dir=tmp_path, load_path=str(path), max_steps=2, **RESUMED)
        assert steps_of(run) == [0, 1]
    assert str(starts[0]) in caplog.text and str(starts[1]) in caplog.text
    caplog.clear()
    first = go(TEXT, log_dir=tmp_path, load_path=str(starts[0]), max_steps=3, **RESUMED)
    assert steps_of(first) == [2]  # each goes on from its own
    assert "version_1" in caplog.text


def test_a_file_that_was_replaced_is_another_start_and_one_that_was_moved_is_not(go, starts, tmp_path, caplog):
    path = tmp_path / "start.ckpt"
    shutil.copy(starts[0], path)
    go(TEXT, log_dir=tmp_path / "runs", load_path=str(path), max_steps=1, **RESUMED)
    shutil.copy(starts[1], path)
    assert steps_of(go(TEXT, log_dir=tmp_path / "runs", load_path=str(path), max_steps=2, **RESUMED)) == [0, 1]
    assert "another then" in caplog.text
    moved = tmp_path / "elsewhere" / "start.ckpt"
    moved.parent.mkdir()
    shutil.copy(starts[1], moved)
    assert steps_of(go(TEXT, log_dir=tmp_path / "runs", load_path=str(moved), max_steps=3, **RESUMED)) == [2]


def test_checkpoints_that_do_not_tell_are_compared_by_the_path(go, starts, tmp_path, caplog):
    run = go(TEXT, log_dir=tmp_path, load_path=str(starts[0]), max_steps=1, **RESUMED)
    for path in (run.folder / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        content["vlmo_resume"].pop("start")
        torch.save(content, path)
    assert steps_of(go(TEXT, log_dir=tmp_path, load_path=str(starts[0]), max_steps=2, **RESUMED)) == [1]


def test_what_was_asked_for_by_name_is_gone_on_from_with_a_warning(go, starts, tmp_path, caplog):
    run = go(TEXT, log_dir=tmp_path, load_path=str(starts[0]), max_steps=1)
    again = go(TEXT, log_dir=tmp_path, load_path=str(starts[1]), max_steps=2, resume_from=str(run.last))
    assert steps_of(again) == [1]
    assert str(starts[0]) in caplog.text and str(starts[1]) in caplog.text


def test_the_weights_of_a_file_have_a_fingerprint(starts):
    one, other = (files.read(path).tensors for path in starts)
    assert fingerprint(one) == fingerprint(dict(reversed(one.items()))) != fingerprint(other)
    assert fingerprint(None) == "" != fingerprint({"a": torch.zeros(0), "b": torch.ones((), dtype=torch.bfloat16)})


def test_options_of_the_optimizer_are_taken_over_and_named(go, tmp_path, caplog):
    go(TEXT, log_dir=tmp_path, max_steps=2, learning_rate=2e-4, **RESUMED)
    changed = {"learning_rate": 1e-5, "weight_decay": 0.5, "adamw_betas": [0.8, 0.9]}
    run = go(TEXT, log_dir=tmp_path, max_steps=4, decay_power=1, **changed, **RESUMED)
    decayed, spared = groups_of(run)[:2]
    assert [group["initial_lr"] for group in (decayed, spared)] == [1e-5, 1e-5]
    assert (decayed["weight_decay"], spared["weight_decay"], tuple(decayed["betas"])) == (0.5, 0, (0.8, 0.9))
    tag = next(name for row in run.rows for name in row if name.startswith("lr-"))
    assert list(run.logged(tag).values()) == pytest.approx([5e-6, 2.5e-6])  # also in the first step
    said = json.loads((run.folder / "settings.json").read_text())
    assert {name: said[name] for name in changed} == changed
    assert all(name in caplog.text for name in changed) and "0.0002" in caplog.text
    assert "max_steps=" not in caplog.text


def test_options_of_the_training_are_named(go, data, tmp_path, caplog):
    go(TEXT, log_dir=tmp_path, max_steps=1, **RESUMED)
    caplog.clear()
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    free = {"num_workers": 1, "val_check_interval": 0.5}
    go(TEXT, log_dir=tmp_path, max_steps=2, mlm_prob=0.3, data_root=str(elsewhere), **free, **RESUMED)
    (line,) = [line for line in caplog.messages if "mlm_prob" in line]
    assert "0.3" in line and "0.15" in line and str(elsewhere) in line
    assert "num_workers" not in caplog.text and "val_check_interval" not in caplog.text


@pytest.mark.parametrize("option, value", [("optim_type", "sgd"), ("layer_decay", 0.5)])
def test_the_state_of_another_optimizer_cannot_be_taken_over(go, tmp_path, option, value):
    go(TEXT, log_dir=tmp_path, max_steps=1, **RESUMED)
    with pytest.raises(VLMoError, match=f"{option}={value}.*load_path="):
        go(TEXT, log_dir=tmp_path, max_steps=2, **{option: value}, **RESUMED)
    assert len(list(tmp_path.glob("*/version_*"))) == 1


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": None, "max_epoch": 1}])
def test_a_finished_run_says_that_nothing_is_left(go, tmp_path, caplog, length):
    go(TEXT, log_dir=tmp_path, **length, **RESUMED)
    assert "nothing was left" not in caplog.text
    again = go(TEXT, log_dir=tmp_path, **length, **RESUMED)
    assert "nothing was left" in caplog.text
    assert "textmlm/val/loss" in again.metrics
