"""Numbers that a disk refuses are lost, not the run."""

import errno
import os

import pytest

from tests import tiny
from vlmo.settings import Settings
from vlmo.training.loggers import build_loggers


@pytest.fixture
def loggers(tmp_path):
    config = tiny.config("task_textmlm_base", log_dir=str(tmp_path))
    return build_loggers(Settings.from_config(config))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_both_write_to_one_folder(loggers):
    assert len({logger.log_dir for logger in loggers}) == 1


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


def test_a_new_event_file_is_begun(loggers, caplog, monkeypatch):
    tensorboard = loggers[0]
    first = tensorboard.experiment
    with monkeypatch.context() as patch:
        patch.setattr(first, "add_scalar", full)
        tensorboard.log_metrics({"loss": 1.0}, 0)
    tensorboard.log_metrics({"loss": 1.0}, 1)
    tensorboard.save()
    assert "numbers could not be logged" in caplog.text
    assert tensorboard.experiment is not first
