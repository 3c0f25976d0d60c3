"""What each stage of pre-training is worth: small runs from nothing, every one a line of run.py.

python -m benchmarks.stages [--out result/stages] [--seeds 1 2 3] [--rows none 3 1+3 ...] [--quick]
python -m benchmarks.stages --flickr8k flickr8k_128px_trainval.zip       pairs of photos and captions
python -m benchmarks.stages --nlvr1 nlvr1_traindev.zip                   people's statements about drawings
python -m benchmarks.stages --emoji FOLDER                               emoji (`stages_emoji.py` says how to get them)

A row is a way of pre-training; each is measured by fine-tuning from it (VQA) and by retrieval without fine-tuning.
Rows share what they have in common: 1+2+3 starts from the stage 2 of 1+2. Runs that are done are not
repeated, so a stopped benchmark goes on where it was, and --rows can be extended. Tables, curves and plots go to
--results, with whatever is done so far.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import stages_report, stages_worlds
from benchmarks.stages_worlds import World
from vlmo.demo.run_demo import call, heading, newest_checkpoint

QUICK_STEPS = 2


@dataclass(frozen=True)
class Run:
    """One call of run.py: from which other run it starts, and what it changes."""

    kind: str  # names the recipe: task, steps, learning rate (`stages_worlds.py`)
    start: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


ITC_ONLY = {"loss_names": {"itm": 0, "mlm": 0}}
SHARED = {"shared_ffn": True}
# the contrast sees the whole batch in both; the negatives of matching come from 8 pairs, as on one of eight devices
LOCAL = {"contrast_cache": True, "per_gpu_batchsize": 8, "negatives": "local"}

PRETRAINING = {
    "1": Run("stage1"),
    "2": Run("stage2"),
    "1+2": Run("stage2", "1"),
    "3": Run("stage3"),
    "2+3": Run("stage3", "2"),
    "1+3": Run("stage3", "1"),
    "1+2+3": Run("stage3", "1+2"),
    "3 itc": Run("stage3", options=ITC_ONLY),
    "3 shared": Run("stage3", options=SHARED),
    "3 local": Run("stage3", options=LOCAL),
    "3 mask": Run("stage3", options={"same_image": "mask"}),
    "3 positive": Run("stage3", options={"same_image": "positive"}),
}
ROWS = {
    "none": "no pre-training",
    "3": "stage 3",
    "2+3": "stages 2, 3",
    "1+3": "stages 1, 3",
    "1+2+3": "stages 1, 2, 3",
    "3 itc": "stage 3, ITC only",
    "3 shared": "stage 3, shared feed-forward instead of experts",
    "3 local": "stage 3, hard negatives of 8 pairs instead of all 64",
    "3 mask": "stage 3, other captions of an image left out (same_image=mask)",
    "3 positive": "stage 3, other captions of an image as positives (same_image=positive)",
}


def plan(world: World, rows: list[str]) -> dict[str, Run]:
    """Every run that the rows need, each after what it starts from."""
    runs: dict[str, Run] = {}

    def add(name: str) -> None:
        run = PRETRAINING[name]
        if run.start and run.start not in runs:
            add(run.start)
        runs[name] = run

    for row in rows:
        if row != "none":
            add(row)
        start = None if row == "none" else row
        kept = SHARED if row == "3 shared" else {}
        for kind in world.measured_by:
            if world.recipes[kind].steps or start:  # what is not trained needs a start
                runs[f"{row} {kind}"] = Run(kind, start, kept)
    return runs


def do(run: Run, name: str, world: World, folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Trains and evaluates, or only evaluates where the recipe has no steps; `folder` holds the runs of the seed."""
    recipe = world.recipes[run.kind]
    exp_name = name.replace(" ", "_").replace("+", "")
    updates = world.options | {"seed": seed, "exp_name": exp_name, "log_dir": str(folder)} | recipe.options
    if run.start:
        updates["load_path"] = str(newest_checkpoint(folder, run.start.replace(" ", "_").replace("+", "")))
    if recipe.steps:
        steps = QUICK_STEPS if quick else recipe.steps
        updates |= {"max_steps": steps, "val_check_interval": steps, "log_every_n_steps": max(steps // 20, 1)}
        updates |= {"learning_rate": recipe.learning_rate, "warmup_steps": 0.1}
    else:
        updates["test_only"] = True
    return call(recipe.task, updates | run.options)


def run_all(world: World, runs: dict[str, Run], out: Path, seed: int, quick: bool) -> None:
    """Does what is not done yet; each run leaves `done/<name>.json`."""
    folder = out / f"seed{seed}"
    (folder / "done").mkdir(parents=True, exist_ok=True)
    for name, run in runs.items():
        done = folder / "done" / f"{name}.json"
        if done.exists():
            continue
        heading(f"{world.name}, seed {seed}: {name}" + (f", from {run.start}" if run.start else ""))
        start = time.monotonic()
        measured = do(run, name, world, folder, seed, quick)
        done.write_text(json.dumps({"seconds": time.monotonic() - start} | measured, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("result/stages"), help="folder for data, runs and checkpoints")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder for tables, CSV and plots")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    parser.add_argument("--quick", action="store_true", help="two steps of everything: does it run?")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables of what is done")
    parser.add_argument("--flickr8k", type=Path, metavar="ZIP")
    parser.add_argument("--nlvr1", type=Path, metavar="ZIP")
    parser.add_argument("--emoji", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the sizes are too small for more
    world = stages_worlds.make(options.out, options.flickr8k, options.nlvr1, options.emoji, options.quick)
    rows = options.rows or [row for row in ROWS if row in world.rows]
    out = options.out / world.name
    for seed in options.seeds:
        if not options.report:
            run_all(world, plan(world, rows), out, seed, options.quick)
        stages_report.write(world, ROWS, out, options.results)


if __name__ == "__main__":
    main()
