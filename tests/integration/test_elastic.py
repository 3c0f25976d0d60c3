"""A job of torchrun that loses a node starts again with those that are left, and learns what it would have learnt."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import run
from benchmarks.layouts import COMMON, INVARIANT, curves, difference
from tests import tables
from tests.processes import free_port

REPOSITORY = Path(run.__file__).parent
OPTIONS = ["task_mlm_itm_itc_base", "datasets=['coco']", *COMMON, "batch_size=4", "per_gpu_batchsize=2", INVARIANT]
# how long the nodes wait for more once there are enough, and how soon one that is silent counts as lost
TIMES = "join_timeout=60,last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=4"
MARK = "VLMO_TEST_ELASTIC"  # variable of all processes of a test


@pytest.fixture
def start(tmp_path):
    """Starts a command; its output goes to a file. Fails if anything is left at the end."""
    started = []

    def begin(*words: str) -> subprocess.Popen:
        inherited = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
        environment = inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: str(tmp_path)}
        path = tmp_path / f"output{len(started)}.txt"
        with path.open("w") as output:
            process = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)
        process.said = path.read_text
        started.append(process)
        return process

    yield begin
    for process in started:
        process.poll()  # (an ended one that nobody has asked for still has a number)
    everybody = psutil.process_iter(["environ"])
    left = [process for process in everybody if (process.info["environ"] or {}).get(MARK) == str(tmp_path)]
    for process in left:
        process.kill()
    assert not left


def wait(condition, *running: subprocess.Popen) -> None:
    """Until it is true; fails if a process ends before that."""
    deadline = time.monotonic() + 300
    while not condition():
        said = "\n".join(process.said() for process in running)
        assert all(process.poll() is None for process in running) and time.monotonic() < deadline, said
        time.sleep(0.1)


@pytest.mark.slow
def test_a_node_is_lost(start, tmp_path):
    tables.write_coco(tmp_path, rows=40)
    tables.write_vocabulary(tmp_path)
    options = [*OPTIONS, "max_steps=24", f"data_root={tmp_path}", f"tokenizer={tmp_path / 'vocab.txt'}"]
    alone = start(sys.executable, "run.py", "with", *options, f"log_dir={tmp_path / 'alone'}")
    assert alone.wait(300) == 0, alone.said()

    result, port = tmp_path / "elastic", free_port()
    options += ["num_nodes=auto", "resume_during_training=True", "checkpoint_every_n_steps=5", f"log_dir={result}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    torchrun += ["--max-restarts", "3", "--monitor-interval", "0.2", "--rdzv-backend", "c10d", "--rdzv-id", "elastic"]
    torchrun += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--rdzv-conf"]

    def node(hosts: bool) -> subprocess.Popen:
        return start(*torchrun, f"is_host={int(hosts)},{TIMES}", "run.py", "with", *options)

    first, other = node(True), node(False)  # the other is lost, not the one where they meet
    wait(lambda: max(curves(result).get("train/loss", {0: 0})) >= 8, first, other)
    agent = psutil.Process(other.pid)
    lost = [agent, *agent.children(recursive=True)]
    assert len(lost) == 2
    for process in lost:
        process.send_signal(signal.SIGKILL)
    other.wait(10)
    assert first.wait(300) == 0, first.said()

    said = first.said() + other.said()
    assert "1 devices x 2 nodes" in said and "1 devices x 1 nodes" in said
    assert said.count("resumed at step") == 1
    expected, found = curves(tmp_path / "alone"), curves(result)
    assert set(found["train/loss"]) == set(expected["train/loss"]) and len(found) > 3
    assert difference(expected, found) < 1e-5
