"""The planner's memory beside what real steps take on this machine's CPU.

python -m benchmarks.plan [CONFIG ...] [--batch 2 4 8] [--set option=value ...]

Each run is a process of its own: Lightning's Trainer, the model, its optimizer, some steps of random weights on a batch
with texts of the greatest length. Measured is what the system says: the largest resident set, beyond that after a run
of the tiny size, by which time all modules, threads and kernels are loaded. Every tensor, whoever made it, is in it, as
are the buffers of oneDNN and the allocator's waste, of which the planner knows nothing. glibc keeps freed memory for
later by default, so that a resident set would tell the past: the processes run with MALLOC_MMAP_THRESHOLD_=65536, by
which all of 64 KiB and more goes back at once, and one arena (MALLOC_ARENA_MAX=1). Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
from sacred.arg_parser import get_config_updates
from torch.utils.data import DataLoader

from vlmo.config import resolve
from vlmo.modules import VLMo
from vlmo.planning import memory_of
from vlmo.planning.step import synthetic_batch
from vlmo.settings import Settings
from vlmo.training.callbacks.skipping import NonFinite

CONFIGS = ("task_textmlm_base", "task_mlm_itm_itc_base", "task_finetune_vqa_base_image480")
STEPS = 2  # the optimizer has its state from the first on
ON_CPU = {"num_gpus": 0, "num_nodes": 1, "precision": 32, "load_path": ""}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def train(settings: Settings) -> None:
    """Takes a few steps."""
    model = VLMo(settings)
    batch = synthetic_batch(model, settings.training_batch)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=settings.accumulated_batches,
        callbacks=[NonFinite(settings.max_nonfinite)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader([batch] * STEPS * settings.accumulated_batches, batch_size=None))


def measure(config: dict[str, Any]) -> int:
    """Bytes that a run takes at its peak, of this process."""
    train(Settings.from_config(config | {"model_arch": "vlmo_tiny_patch16"}))
    before = psutil.Process().memory_info().rss
    RESET_PEAK.write_text("5")
    train(Settings.from_config(config))
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 - before


def measure_alone(config: dict[str, Any]) -> int:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", "--measure", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALLOCATOR)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", default=list(CONFIGS), help="named configs")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4, 8], help="samples a pass and step")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="further options")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    updates, _ = get_config_updates(options.set)
    print(f"{'':<36}{'batch':>6}{'predicted MB':>14}{'measured MB':>13}{'ratio':>7}")
    for name in options.config:
        for batch in options.batch:
            config = resolve(name, **(ON_CPU | {"per_gpu_batchsize": batch, "batch_size": batch} | updates))
            predicted, measured = memory_of(Settings.from_config(config)).total, measure_alone(config)
            row = f"{name:<36}{batch:>6}{predicted / 1e6:>14,.0f}{measured / 1e6:>13,.0f}"
            print(f"{row}{predicted / measured:>7.3f}", flush=True)


if __name__ == "__main__":
    main()
