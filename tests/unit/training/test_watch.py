"""A run ends as a whole, also where its processes wait for one another without end."""

import multiprocessing
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from vlmo.errors import VLMoError
from vlmo.training.callbacks.process_watchdog import ProcessWatchdog

FORK = multiprocessing.get_context("fork")


def trainer(*children):
    launcher = SimpleNamespace(procs=list(children))
    return SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))


def watchdog():
    return ProcessWatchdog(interval=0.05, patience=1.0)


@pytest.fixture(autouse=True)
def single(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def command():
    """Starts a process that does what the shell is told."""
    started = []

    def begin(script):
        started.append(subprocess.Popen(["sh", "-c", script]))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_with(connection):
    """A first process whose child is started here, and that then waits without end."""
    child = subprocess.Popen(["sleep", "100"])
    connection.send(child.pid)
    watchdog().setup(trainer(child), None, "fit")
    time.sleep(100)


def test_the_first_process_ends_when_another_is_killed(capfd):
    here, there = FORK.Pipe()
    first = FORK.Process(target=wait_with, args=(there,))
    first.start()
    pid = here.recv()
    os.kill(pid, signal.SIGKILL)
    first.join(20)
    assert first.exitcode == 1
    assert f"error: process 1 of this node (PID {pid}) was ended by signal SIGKILL (often" in capfd.readouterr().err


def wait_for(parent):
    os.environ["LOCAL_RANK"] = "1"
    callback = watchdog()
    callback.parent = parent
    callback.setup(trainer(), None, "fit")
    time.sleep(100)


def test_the_others_end_when_the_first_is_gone(capfd):
    other = FORK.Process(target=wait_for, args=(os.getpid() + 1,))  # as if it had been started by another process
    other.start()
    other.join(20)
    assert other.exitcode == 1
    assert "is gone, and with it the run" in capfd.readouterr().err


def test_an_exchange_that_failed_is_explained_by_the_process_that_is_gone(command):
    error = RuntimeError("Connection closed by peer")
    failed, killed, running = command("exit 1"), command("kill -9 $$"), command("sleep 100")
    failed.wait(30)
    killed.wait(30)
    reason = watchdog().explain(error, trainer(running, failed, killed))
    assert isinstance(reason, VLMoError)
    # whom a signal ended came first: the other failed for lack of it
    assert str(reason).startswith(f"process 3 of this node (PID {killed.pid}) was ended by signal SIGKILL")
    reason = watchdog().explain(error, trainer(running, failed))
    assert f"process 2 of this node (PID {failed.pid}) failed with exit status 1" in str(reason)


def test_other_errors_stay_what_they_are(command):
    error = RuntimeError("shapes do not match")
    assert watchdog().explain(error, trainer()) is error
    assert watchdog().explain(error, trainer(command("sleep 100"))) is error
