"""Seconds that training waits for a checkpoint: written while it waits, and in the background, side by side.

python -m benchmarks.checkpoint_wait [--named CONFIG] [--batch 2] [--checkpoints 3] [--world 1 2] [--set NAME=VALUE ...]

Real runs of stage 3 at base size on CPUs, on a few made-up pictures: one process, whose checkpoints are files, and two
with strategy=fsdp2, whose checkpoints are folders; both ways in turn. A checkpoint after every other step. Waiting is
what a step spends on having the checkpoint written and, before the optimizer's update, on the copy. Beside it the
seconds of a step while one is written and while none is, which on a CPU share its cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from tests import tables
from vlmo.config import resolve
from vlmo.training.checkpointing.checkpoints import Checkpoints
from vlmo.training.runner import run

WAYS = {"waiting": False, "in the background": True}


class Clock:
    """Adds up what some methods take, and notes when steps begin."""

    def __init__(self) -> None:
        self.waited: dict[int, float] = {}  # by step
        self.begun: list[float] = []

    def watch(self, kind: type, name: str) -> None:
        method: Callable[..., Any] = getattr(kind, name)

        def timed(callback: Any, trainer: Any, *arguments: Any) -> Any:
            start, step = time.perf_counter(), trainer.global_step
            try:
                return method(callback, trainer, *arguments)
            finally:
                self.waited[step] = self.waited.get(step, 0) + time.perf_counter() - start

        setattr(kind, name, timed)


def measure(folder: Path, named: str, options: dict[str, Any], count: int) -> dict[str, Any]:
    """Seconds of waiting for each checkpoint, and of the steps with and without one."""
    clock = Clock()
    for name in ("save", "on_before_optimizer_step"):
        clock.watch(Checkpoints, name)
    start = Checkpoints.on_train_batch_start

    def begin(callback: Any, *arguments: Any) -> None:
        clock.begun.append(time.perf_counter())
        start(callback, *arguments)

    Checkpoints.on_train_batch_start = begin  # type: ignore[method-assign]
    run(resolve(named, max_steps=2 * count + 2, log_dir=str(folder), **options))
    seconds = [after - before for before, after in zip(clock.begun, clock.begun[1:], strict=False)]
    with_one = range(2, 2 * count + 1, 2)  # (the first two are the warm-up)
    return {
        "waited": [clock.waited[step] for step in with_one],
        "step": [seconds[step] - clock.waited[step] for step in with_one],
        "other": [seconds[step + 1] for step in with_one if step + 1 < len(seconds)],
    }


def in_processes(folder: Path, arguments: argparse.Namespace, world: int, background: bool) -> dict[str, Any]:
    """`measure` in a run of so many processes, as the first of them sees it."""
    options = {
        "data_root": str(folder),
        "tokenizer": str(folder / "vocab.txt"),
        "datasets": ["coco"],
        "num_gpus": world,
        "accelerator": "cpu",
        "strategy": "fsdp2" if world > 1 else "auto",
        "num_workers": 0,
        "precision": 32,
        "batch_size": arguments.batch * world,
        "per_gpu_batchsize": arguments.batch,
        "max_epoch": 1000,
        "val_check_interval": 100000,
        "loggers": [],
        "load_path": "",
        "keep_last": 1,
        "checkpoint_every_n_steps": 2,
        "checkpoint_in_background": background,
    } | {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in arguments.set)}
    job = [str(folder), arguments.named, json.dumps(options), str(arguments.checkpoints)]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "-m", "benchmarks.checkpoint_wait"]
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([sys.executable, *launcher, "--job", *job, out], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return json.loads(Path(out, "0.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--named", default="task_mlm_itm_itc_base", help="named config")
    parser.add_argument("--batch", type=int, default=2, help="pairs a process")
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2], help="numbers of processes")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="further options, values as JSON")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        folder, named, options, count, out = arguments.job
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            found = measure(Path(runs), named, json.loads(options), int(count))
        import torch.distributed as dist

        rank = dist.get_rank() if dist.is_initialized() else 0
        Path(out, f"{rank}.json").write_text(json.dumps(found))
        return
    print(f"{'processes':<11}{'checkpoint':<20}{'training waits, s':<36}{'step meanwhile':>15}{'step without':>14}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables.write_coco(folder)
        tables.write_vocabulary(folder)
        for world in arguments.world:
            waits = {}
            for way, background in WAYS.items():
                found = in_processes(folder, arguments, world, background)
                waits[way] = mean(found["waited"])
                each = " ".join(f"{seconds:.2f}" for seconds in found["waited"])
                times = f"{mean(found['step']):>15.1f}{mean(found['other']):>14.1f}"
                print(f"{world:<11}{way:<20}{each:<24} mean {waits[way]:<6.2f}{times}", flush=True)
            print(f"{'':<11}background / waiting = {waits['in the background'] / waits['waiting']:.3f}", flush=True)


if __name__ == "__main__":
    main()
