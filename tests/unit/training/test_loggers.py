"""Numbers that a disk refuses are lost, not the run."""

import errno
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest

from tests import tiny
from vlmo.errors import VLMoError
from vlmo.registry import LOGGERS
from vlmo.settings import Settings
from vlmo.training.loggers import PACKAGES, Trackio, build_loggers, check_loggers
from vlmo.training.preparation import next_run_folder


def settings_of(tmp_path, **options):
    return Settings.from_config(tiny.config("task_textmlm_base", log_dir=str(tmp_path), **options))


@pytest.fixture
def loggers(tmp_path):
    settings = settings_of(tmp_path)
    return build_loggers(settings, next_run_folder(settings))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_both_write_to_the_folder_of_the_run(loggers, tmp_path):
    settings = settings_of(tmp_path)
    folder = next_run_folder(settings)
    assert [logger.log_dir for logger in loggers] == [str(folder)] * 2
    folder.mkdir(parents=True)
    assert next_run_folder(settings).name == "version_1"


def test_names_that_are_unknown_and_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VLMoError, match="loggers: 'wanbd' is unknown; did you mean wandb"):
        check_loggers(["csv", "wanbd"])
    for name, package in PACKAGES.items():
        with pytest.raises(VLMoError, match=f"loggers: {name} .*pip install {package}"):
            check_loggers(["csv", name])


def test_a_logger_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGERS, "own", lambda settings, folder: (settings.exp_name, folder))
    assert build_loggers(settings_of(tmp_path, loggers=["own"]), tmp_path) == [("textmlm_base", tmp_path)]


def test_trackio(monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda *args, **named: calls.append((args, named)))
    package = SimpleNamespace(init=lambda **named: calls.append(named) or run)
    monkeypatch.setitem(sys.modules, "trackio", package)
    logger = Trackio("vlmo", "run/version_0", {"seed": 1})
    assert calls == []  # nothing is begun before there is something to log
    logger.log_metrics({"loss": 2.0}, 3)
    logger.log_metrics({"loss": 1.0}, 4)
    logger.finalize("success")  # of the training: the validation after it belongs to the same run
    named = {"project": "vlmo", "name": "run/version_0", "config": {"seed": 1}}
    assert calls == [named, (({"loss": 2.0},), {"step": 3}), (({"loss": 1.0},), {"step": 4})]


def test_what_a_service_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(settings, folder):
        raise RuntimeError("no account")

    monkeypatch.setitem(LOGGERS, "own", refuse)
    with pytest.raises(VLMoError, match=r"loggers: own cannot be set up \(no account\)"):
        build_loggers(settings_of(tmp_path, loggers=["own"]), tmp_path)


def test_rows_come_when_there_is_room_again(loggers, caplog, monkeypatch):
    csv = loggers[1]
    with monkeypatch.context() as patch:
        patch.setattr(type(csv.experiment), "save", full)
        for step in range(3):
            csv.log_metrics({"loss": 1.0}, step)
            csv.save()
    assert caplog.text.count("numbers could not be logged (No space left on device)") == 1
    csv.save()
    with open(os.path.join(csv.log_dir, "metrics.csv")) as file:
        assert len(file.readlines()) == 4


def test_lightnings_private_experiment_a_new_event_file_is_begun(loggers, caplog, monkeypatch):
    tensorboard = loggers[0]
    first = tensorboard.experiment
    with monkeypatch.context() as patch:
        patch.setattr(first, "add_scalar", full)
        tensorboard.log_metrics({"loss": 1.0}, 0)
    tensorboard.log_metrics({"loss": 1.0}, 1)
    tensorboard.save()
    assert "numbers could not be logged" in caplog.text
    assert tensorboard.experiment is not first
