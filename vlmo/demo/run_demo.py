"""The tour: what is run, in which order, and the table at its end.

Every run goes the way of `run.py`: a named config with updates, resolved and handed to the runner.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.demo.prepare import Prepared, prepare
from vlmo.demo.raw_layout import Sizes
from vlmo.modules.model import VLMoModel
from vlmo.pages import markup
from vlmo.training.run_report.commands import command_line
from vlmo.training.run_report.comparison import write_comparison
from vlmo.training.run_report.history import History
from vlmo.training.run_report.page import sample_pictures
from vlmo.training.run_report.samples import sample_predictions
from vlmo.training.runner import run

# As `vlmo_tiny_patch16` sees the world. No random crops or flips: left and right mean something here.
COMMON: dict[str, Any] = {
    "model_arch": "vlmo_tiny_patch16",
    "image_size": 32,  # a quarter of a picture is one patch
    "max_text_len": 16,  # the longest caption
    "train_transform_keys": ["square_transform"],
    "drop_path_rate": 0.0,
    "precision": 32,
    "num_gpus": 0,
    "num_workers": 1,
    "lr_mult": 10,
    "max_epoch": 1000,
    "batch_size": 64,
    "per_gpu_batchsize": 64,
    "learning_checks": True,
}


@dataclass(frozen=True)
class Stage:
    """One training run: its named config, steps and learning rate, the run that it starts from, and other options."""

    name: str
    task: str
    steps: int
    learning_rate: float
    start: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


# One of the four patches is hidden. They say little of each other, and stage 2 freezes the attention: more steps, or a
# higher rate, teach the attention to look at what the later tasks do not need.
IMAGES = {"datasets": ["coco", "vg", "sbu", "gcc"], "mim_mask_ratio": 0.25}
STAGES = (
    Stage("stage1", "task_mim_base", 100, 3e-4, options=IMAGES),
    Stage("stage2", "task_textmlm_base", 250, 1.5e-3, "stage1"),
    Stage("stage3", "task_mlm_itm_itc_base", 550, 1.5e-3, "stage2"),
    Stage("vqa", "task_finetune_vqa_base_image480", 1000, 5e-4, "stage3"),
    Stage("vqa_scratch", "task_finetune_vqa_base_image480", 1000, 5e-4),
    Stage("nlvr2", "task_finetune_nlvr2_base", 450, 5e-4, "stage3"),
    Stage("nlvr2_scratch", "task_finetune_nlvr2_base", 450, 5e-4),
    Stage("f30k", "task_finetune_irtr_f30k_base", 120, 5e-4, "stage3"),
    Stage("f30k_scratch", "task_finetune_irtr_f30k_base", 120, 5e-4),
)
QUICK_STEPS = 3


def tour(out: Path, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Runs everything below `out` and prints as it goes; returns the measured numbers of each evaluation."""
    start = time.monotonic()
    # the loader's process has a core of its own: threads that share one wait for each other at every operation
    torch.set_num_threads(max((os.cpu_count() or 1) - 1, 1))
    heading("the world: pictures, captions, questions, statements and text, in the official raw layouts")
    world = prepare(out / "world", seed, Sizes.quick() if quick else Sizes())
    print(f"converted to Arrow files in {world.data_root}; vocabulary of {world.vocabulary_size} words", flush=True)
    checkpoints: dict[str, Path] = {}
    measured: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        heading(f"{stage.name}: training" + (f", from {stage.start}" if stage.start else ", from nothing"))
        updates = _updates(stage, world, out, seed, quick, checkpoints)
        call(stage.task, updates)
        checkpoints[stage.name] = newest_checkpoint(out, stage.name)
        if stage.name in ("stage1", "stage2", "stage3"):
            continue
        heading(f"{stage.name}: evaluation on held-out pictures")
        updates |= {"load_path": str(checkpoints[stage.name]), "test_only": True}
        measured[stage.name] = call(stage.task, updates)
        if "vqa" in stage.name:
            measured[stage.name]["vqa/accuracy"] = answer_accuracy(out, world.withheld)
    print(results := table(measured, world, quick))
    from vlmo.demo.curves import draw_curves  # matplotlib takes a second: only when there is something to draw

    picture = draw_curves(out, [stage.name for stage in STAGES])
    page = write_page(out, {stage.name: checkpoints[stage.name] for stage in STAGES}, results)
    minutes = (time.monotonic() - start) / 60
    print(f"logs and checkpoints: {out}; curves: {picture}; {minutes:.1f} minutes in all\nreport: {page}", flush=True)
    return measured


def heading(text: str) -> None:
    print(f"\n=== {text} " + "=" * max(100 - len(text), 4), flush=True)


def _updates(
    stage: Stage, world: Prepared, out: Path, seed: int, quick: bool, checkpoints: Mapping[str, Path]
) -> dict[str, Any]:
    steps = QUICK_STEPS if quick else stage.steps
    size = 8 if quick else COMMON["batch_size"]
    return COMMON | {
        "exp_name": stage.name,
        "seed": seed,
        "data_root": str(world.data_root),
        "tokenizer": str(world.vocabulary),
        "vocab_size": world.vocabulary_size,
        "vqav2_label_size": len(world.answers),
        "log_dir": str(out),
        "load_path": str(checkpoints[stage.start]) if stage.start else "",
        "learning_rate": stage.learning_rate,
        "max_steps": steps,
        "warmup_steps": 0.1,
        "val_check_interval": steps,
        "log_every_n_steps": max(steps // 20, 1),
        "batch_size": size,
        "per_gpu_batchsize": size,
        **stage.options,
    }


def call(task: str, updates: dict[str, Any]) -> dict[str, float]:
    """Prints the command line and does what it does."""
    own = resolve(task)
    changed = {name: value for name, value in updates.items() if own[name] != value}
    print("$ " + command_line(task, changed), flush=True)
    return run(resolve(task, **updates))


def newest_checkpoint(out: Path, name: str) -> Path:
    """`last.ckpt` of the newest run called `name`."""
    return max(out.glob(f"{name}_seed*/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)


def answer_accuracy(out: Path, withheld: Mapping[int, str]) -> float:
    """Share of right answers in the file for the VQA server, by the answers that the test questions came without."""
    rows = json.loads((out / "vqa_submit_last.json").read_text())
    return sum(row["answer"] == withheld[row["question_id"]] for row in rows) / len(rows)


def write_page(out: Path, checkpoints: Mapping[str, Path], results: str) -> Path:
    """Writes `out/report.html`: the runs beside each other, and held-out pictures that questions are asked of."""
    answering = checkpoints["vqa"]
    runs = {name: History.read(path.parent.parent) for name, path in checkpoints.items()}
    data = MTDataModule(runs["vqa"].settings)
    data.setup("validate")
    model = VLMoModel.from_pretrained(answering)
    samples = sample_predictions(model, data, ["val"], attention=True)
    intro = "<p>Beside each picture, where the words of the question look in it, in the last layer.</p>"
    more = [f"<pre>{markup(results.strip())}</pre>", intro, *sample_pictures(samples)]
    write_comparison(list(runs.values()), out / "report.html", "VLMo on the generated world, tiny size", more)
    return out / "report.html"


def table(measured: Mapping[str, Mapping[str, float]], world: Prepared, quick: bool) -> str:
    """Each result beside chance (for VQA: the most frequent answer) and beside the run without pre-training."""
    majority = Counter(world.withheld.values()).most_common(1)[0][1] / len(world.withheld)
    pictures = Sizes.quick().f30k_val if quick else Sizes().f30k_val
    rows: Sequence[tuple[str, str, str, float]] = (
        ("VQA, right answers", "vqa", "vqa/accuracy", majority),
        ("NLVR2, accuracy", "nlvr2", "nlvr2/test/accuracy", 0.5),
        ("text to image, recall@1", "f30k", "recalls/ir_r1", 1 / pictures),
        ("image to text, recall@1", "f30k", "recalls/tr_r1", 1 / pictures),
    )
    lines = ["", f"{'on held-out pictures':<28}{'chance':>10}{'from scratch':>16}{'pre-trained':>15}"]
    for title, task, metric, chance in rows:
        scratch, result = (measured[name][metric] for name in (f"{task}_scratch", task))
        lines.append(f"{title:<28}{chance:>10.1%}{scratch:>16.1%}{result:>15.1%}")
    return "\n".join([*lines, ""])
