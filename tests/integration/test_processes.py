"""Runs of two processes on the CPU, by every launcher; and what becomes of a run when one of them is gone."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import run
from tests import tables

REPOSITORY = Path(run.__file__).parent
PYTHON = [sys.executable, "run.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "run.py"]
SECONDS = 60  # after which a run must have ended that lost a process


@pytest.fixture
def options(data, tmp_path):
    return {
        "data_root": data,
        "tokenizer": data / "vocab.txt",
        "model_arch": "vlmo_tiny_patch16",
        "datasets": "['coco']",
        "image_size": 32,
        "vocab_size": 64,
        "max_text_len": 16,
        "batch_size": 4,
        "per_gpu_batchsize": 2,
        "num_workers": 0,
        "precision": 32,
        "max_steps": 2,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "num_gpus": 2,
        "log_dir": tmp_path / "result",
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Starts a command of a stage-3 run; its output goes to a file. Whatever is left at the end is killed."""
    started = []

    def begin(command, options, **environment) -> subprocess.Popen:
        words = [*command, "with", "task_mlm_itm_itc_base", *(f"{name}={value}" for name, value in options.items())]
        # (a process of another launcher is not started within this one's)
        inherited = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
        output = (tmp_path / f"output{len(started)}.txt").open("w")
        process = subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        process.said = lambda path=output.name: Path(path).read_text()
        started.append(process)
        return process

    yield begin
    for process in started:
        for child in descendants(process.pid):
            child.kill()
        process.kill()


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


def losses(options) -> list[dict[str, float]]:
    """The rows that were logged."""
    (path,) = options["log_dir"].glob("*/version_*/metrics.csv")
    with path.open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    # (how fast it was is another each time)
    return [{n: v for n, v in row.items() if "/loss" in n or "/accuracy" in n} for row in rows]


def test_torchrun(start, options):
    process = start(TORCHRUN, options)
    assert process.wait(120) == 0, process.said()
    said = process.said()
    assert said.count("step 2/2  loss ") == 1 and said.count("\nresults ") == 1  # the first process speaks for all
    assert "itm/val/accuracy" in said and "sync_dist" not in said
    assert list(options["log_dir"].glob("*/version_0/checkpoints/last.ckpt"))


@pytest.mark.slow
def test_torchrun_of_other_processes_than_the_options_say(start, options):
    process = start(TORCHRUN, options | {"num_gpus": 1})
    assert process.wait(120) != 0
    assert (
        "error: num_gpus=1 num_nodes=1: that is 1 x 1 processes, but torchrun has started 2, 2 a node; give num_gpus=2 "
        "num_nodes=1, or start it with torchrun --nnodes 1 --nproc_per_node 1 (num_nodes=auto takes any --nnodes)\n"
    ) in process.said()
    assert not options["log_dir"].exists()


@pytest.mark.slow
def test_every_launcher_gives_the_same_numbers(start, options):
    meeting = {"MASTER_ADDR": "127.0.0.1"}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "vlmo", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    slurm |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    ranks = {
        "srun": (slurm, ("SLURM_PROCID", "SLURM_LOCALID")),
        "mpirun": (mpi, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    }
    found = {}
    for launcher in ("lightning", "torchrun", "srun", "mpirun"):
        given = options | {"log_dir": options["log_dir"] / launcher}
        if launcher in ranks:
            fixed, names = ranks[launcher]
            port = {"MASTER_PORT": str(free_port())}
            processes = [
                start(PYTHON, given, **(fixed | meeting | port | dict.fromkeys(names, str(rank)))) for rank in (0, 1)
            ]
        else:
            processes = [start(PYTHON if launcher == "lightning" else TORCHRUN, given)]
        for process in processes:
            assert process.wait(120) == 0, process.said()
        found[launcher] = losses(given)
    assert len(found["lightning"]) > 2
    assert all(numbers == found["lightning"] for numbers in found.values())


@pytest.mark.slow
def test_images_that_only_one_process_cannot_read(start, options, tmp_path):
    root = tmp_path / "damaged"
    root.mkdir()
    for split in ("train", "val"):
        images = [tables.png(row % 7) if row else b"damaged" for row in range(200)]
        columns = {"image": images, "caption": [["a red cat"]] * 200}
        columns |= {"image_id": [str(row) for row in range(200)], "split": [split] * 200}
        tables.write_table(root / f"coco_caption_karpathy_{split}.arrow", columns)
    shutil.copy(options["tokenizer"], root)
    options |= {"data_root": root, "per_gpu_batchsize": 1, "batch_size": 2, "max_steps": 100}
    process = start(PYTHON, options)
    assert process.wait(300) == 0, process.said()
    assert process.said().count("left out: coco_caption_karpathy_train: image row 0") == 1
    (listing,) = options["log_dir"].glob("*/version_0/unreadable_images.txt")
    assert sorted(line.split(":")[0] for line in listing.read_text().splitlines()) == ["train", "val"]


def kill_one(process, which) -> tuple[float, list[psutil.Process]]:
    """Waits until the run is on its way, kills the process that `which` picks; when, and all that there were."""
    deadline = time.monotonic() + 120
    while "step 3/" not in process.said():
        assert process.poll() is None and time.monotonic() < deadline, process.said()
        time.sleep(0.2)
    everybody = [psutil.Process(process.pid), *descendants(process.pid)]
    which(everybody).send_signal(signal.SIGKILL)
    return time.monotonic(), everybody


def ended(process, since, everybody) -> str:
    """What was said, once every process is gone; fails if that takes too long."""
    process.wait(SECONDS)
    _, alive = psutil.wait_procs(everybody[1:], timeout=max(SECONDS - (time.monotonic() - since), 0))
    assert not alive, process.said()
    return process.said()


@pytest.mark.slow
@pytest.mark.parametrize("command, killed", [(PYTHON, 1), (PYTHON, 0), (TORCHRUN, 1), (TORCHRUN, 2)])
def test_a_killed_process_ends_the_run_and_is_named(start, options, command, killed):
    process = start(command, options | {"max_steps": 100000, "max_epoch": 100000, "val_check_interval": 100000})
    since, everybody = kill_one(process, lambda processes: processes[killed])
    pid = everybody[killed].pid
    said = ended(process, since, everybody)
    assert process.returncode != 0
    if killed == 0:  # the one that Lightning was started in
        assert f"error: the process that started this one (PID {pid}) is gone" in said
    elif command is PYTHON:
        assert f"error: process 1 of this node (PID {pid}) was ended by signal SIGKILL" in said
        assert "Traceback" not in said.split("error: process 1")[1]
    else:
        assert f"Signal 9 (SIGKILL) received by PID {pid}" in said
