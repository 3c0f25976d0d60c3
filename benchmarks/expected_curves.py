"""Curves to compare a run with: mean and band over seeds, at the tiny size on the demo's world.

python -m benchmarks.expected_curves [--out result/expected] [--seeds 1 2 3] [--recipes demo_stage1 ...]

Writes docs/results/expected/<recipe>.csv and .json, which `python -m vlmo.doctor compare RUN` reads. A run that is done
is not repeated: a stopped benchmark goes on where it was.

demo_stage1, demo_stage2, demo_stage3: `python -m vlmo.demo`, of stage 3 the first steps alone (its schedule is the
whole one's). coco: the COCO-only recipe from nothing; the demo's world stands in for COCO.
"""

import argparse
import csv
import json
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer

from vlmo.config import resolve
from vlmo.demo.prepare import Prepared, prepare
from vlmo.demo.raw_layout import Sizes
from vlmo.demo.run_demo import STAGES, Stage, _updates, newest_checkpoint
from vlmo.training.learning.compare import COMPARED, read_curves
from vlmo.training.runner import run

EVERY = 10  # steps between two points
SMOOTH = 2  # points to either side that a deviation is taken over
WIDE, LEAST = 4.0, 0.03  # half the band: deviations, and at least this share of the mean


@dataclass(frozen=True)
class Recipe:
    """A stage as the demo trains it, and how many of its steps are run."""

    stage: Stage
    steps: int


COCO = Stage("coco", "task_mlm_itm_itc_base", 150, 1.5e-3, options={"datasets": ["coco"], "same_image": "mask"})
RECIPES = {f"demo_{stage.name}": Recipe(stage, min(stage.steps, 150)) for stage in STAGES[:3]}
RECIPES["coco"] = Recipe(COCO, COCO.steps)


class StopAt(Callback):
    """Ends a training early, without a last validation."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


def train(name: str, world: Prepared, out: Path, seed: int) -> dict[str, Any]:
    """Trains a recipe unless it is done; gives its options. What it starts from must be done."""
    recipe, folder = RECIPES[name], out / f"seed{seed}"
    stage, done = recipe.stage, folder / f"{name}.json"
    starts = {stage.start: newest_checkpoint(folder, stage.start)} if stage.start else {}
    updates = _updates(stage, world, folder, seed, False, starts) | {"log_every_n_steps": EVERY, "num_workers": 0}
    updates |= {"learning_checks": True, "val_check_interval": stage.steps}
    if not done.exists():
        run(resolve(stage.task, **updates), callbacks=[StopAt(recipe.steps)])
        done.write_text("{}")
    return resolve(stage.task, **updates)


def band(runs: Sequence[Mapping[str, Mapping[int, float]]]) -> list[dict[str, Any]]:
    """Gives the rows of the CSV: of each metric and step that all runs have, mean and band."""
    rows = []
    for metric in sorted(set.intersection(*(set(each) for each in runs))):
        steps = sorted(set.intersection(*(set(each[metric]) for each in runs)))
        values = np.array([[each[metric][step] for step in steps] for each in runs])
        mean, variance = values.mean(0), values.var(0, ddof=1)
        for i, step in enumerate(steps):
            deviation = np.sqrt(variance[max(i - SMOOTH, 0) : i + SMOOTH + 1].mean())
            half = max(WIDE * deviation, LEAST * abs(mean[i]))
            numbers = {"mean": mean[i], "low": mean[i] - half, "high": mean[i] + half}
            rows.append({"metric": metric, "step": step} | {key: f"{value:.5g}" for key, value in numbers.items()})
    return rows


def write(name: str, seeds: Sequence[int], config: Mapping[str, Any], out: Path, results: Path) -> None:
    """Writes the band of a recipe and the options that it is for."""
    curves = []
    for seed in seeds:
        folders = (out / f"seed{seed}").glob(f"{RECIPES[name].stage.name}_seed*/version_*")
        curves.append(read_curves(max(folders, key=lambda path: path.stat().st_mtime) / "metrics.csv"))
    results.mkdir(parents=True, exist_ok=True)
    with (results / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["metric", "step", "mean", "low", "high"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(band(curves))
    options = {key: config[key] for key in COMPARED} | {"from_nothing": not config["load_path"]}
    about = {"recipe": name, "seeds": list(seeds), "options": options}
    (results / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("result/expected"), help="folder for data and runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results/expected"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    options = parser.parse_args()
    torch.set_num_threads(1)  # the sizes are too small for more
    made = options.out / "world.pickle"
    if not made.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        made.write_bytes(pickle.dumps(prepare(options.out / "world", 1, Sizes())))
    world: Prepared = pickle.loads(made.read_bytes())
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    for seed in options.seeds:
        for name in options.recipes:
            configs[name] = train(name, world, options.out, seed)
    for name in options.recipes:
        write(name, options.seeds, configs[name], options.out, options.results)


if __name__ == "__main__":
    main()
