"""One training, dealt out to processes and passes in many ways: how far apart are its curves?

python -m benchmarks.layouts [--steps 200] [--tasks stage3 vqa stage2] [--plot FILE.png] [--json FILE]

Runs `run.py` with `layout_invariant=True` (tiny size, fp32, dropout and stochastic depth on, small generated tables)
with 1, 2 and 4 processes of this CPU and 2, 4 and 8 samples a pass at one batch size; and one run of two processes that
is killed (SIGKILL) half way and goes on with three, and with one. Prints, for each, the largest relative difference of
any logged loss from the run of one process, and beside it that of two ordinary runs, whose curves depend on the layout.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import tables

TASKS = {
    "stage3": ("task_mlm_itm_itc_base", "datasets=['coco']"),
    "vqa": ("task_finetune_vqa_base_image480", "vqav2_label_size=3"),
    "stage2": ("task_textmlm_base",),
}
COMMON = ["model_arch=vlmo_tiny_patch16", "image_size=32", "vocab_size=64", "max_text_len=16", "num_workers=0"]
COMMON += ["precision=32", "accelerator=cpu", "log_every_n_steps=1", "loggers=['csv']", "max_epoch=None"]
COMMON += ["batch_size=32", "learning_rate=1e-4", "drop_path_rate=0.1"]
INVARIANT = "layout_invariant=True"
Curves = dict[str, dict[int, float]]  # losses by log tag and step


def command(task: str, folder: Path, steps: int, processes: int, passes: int, *more: str) -> list[str]:
    """What a run is started with."""
    sizes = [f"num_gpus={processes}", f"per_gpu_batchsize={passes}", f"max_steps={steps}"]
    places = [f"data_root={folder / 'data'}", f"tokenizer={folder / 'data' / 'vocab.txt'}"]
    return [sys.executable, "run.py", "with", *TASKS[task], *COMMON, *places, *sizes, *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def trained(log_dir: Path, words: list[str]) -> Curves:
    """Runs it; the losses that its folder has in the end."""
    done = subprocess.run([*words, f"log_dir={log_dir}"], capture_output=True, text=True, env=environment())
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return curves(log_dir)


def curves(log_dir: Path) -> Curves:
    """The losses of all versions of the one run in the folder."""
    found: Curves = {}
    for path in sorted(log_dir.glob("*/version_*/metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                for tag, value in row.items():
                    if value and tag.endswith("/loss"):
                        found.setdefault(tag, {})[int(row["step"])] = float(value)
    return found


def killed(log_dir: Path, words: list[str], step: int) -> None:
    """Starts the run and kills all its processes as soon as it has logged that step."""
    process = subprocess.Popen(
        [*words, f"log_dir={log_dir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    while process.poll() is None and max(curves(log_dir).get("train/loss", {0: 0})) < step:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def difference(one: Curves, other: Curves) -> float:
    """The largest relative difference of any loss at any step that both have."""
    pairs = [(one[tag][step], other[tag][step]) for tag in one for step in one[tag] if step in other.get(tag, {})]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def compare(task: str, folder: Path, steps: int) -> tuple[dict[str, float], dict[str, Curves]]:
    """The differences from the run of one process, by layout; and the curves."""
    found: dict[str, Curves] = {}
    for processes in (1, 2, 4):
        for passes in (2, 4, 8):
            words = command(task, folder, steps, processes, passes, INVARIANT)
            found[f"{processes} x {passes}"] = trained(folder / task / f"{processes}x{passes}", words)
    half = steps // 2
    options = (INVARIANT, f"checkpoint_every_n_steps={max(half // 2, 1)}", "resume_during_training=True")
    killed(folder / task / "killed", command(task, folder, steps, 2, 4, *options), half)
    for processes in (3, 1):
        again = folder / task / f"on_{processes}"
        shutil.copytree(folder / task / "killed", again, symlinks=True)
        words = command(task, folder, steps, processes, 4, *options)
        found[f"2 x 4, killed, then {processes} x 4"] = trained(again, words)
    for processes in (1, 2):
        words = command(task, folder, steps, processes, 4)
        found[f"ordinary, {processes} x 4"] = trained(folder / task / f"ordinary_{processes}", words)
    first = found["1 x 2"]
    differences = {name: difference(first, each) for name, each in found.items() if "ordinary" not in name}
    differences["ordinary: 2 x 4 from 1 x 4"] = difference(found["ordinary, 1 x 4"], found["ordinary, 2 x 4"])
    return differences, found


def plot(path: Path, found: dict[str, dict[str, Curves]]) -> None:
    """The curves of what is minimised on top of each other, beside those of ordinary runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(4.5 * len(found), 6), squeeze=False, sharex=True)
    for column, (task, runs) in zip(axes.T, found.items(), strict=True):
        for axis, ordinary in zip(column, (False, True), strict=True):
            for name, each in runs.items():
                if ("ordinary" in name) == ordinary:
                    steps, values = zip(*sorted(each["train/loss"].items()), strict=True)
                    axis.plot(steps, values, linewidth=1, alpha=0.8, label=name)
            axis.set_title(f"{task}, {'as published' if ordinary else 'layout_invariant'}", fontsize=10)
            axis.legend(fontsize=6, ncol=2)
            axis.grid(alpha=0.3)
        column[-1].set_xlabel("optimizer step")
    for row in axes:
        row[0].set_ylabel("train/loss")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = folder / "data"
        data.mkdir()
        tables.write_coco(data, rows=40)
        tables.write_vqa(data, rows=40)
        tables.write_wikibk(data, shards=20)
        tables.write_vocabulary(data)
        all_found, figures = {}, {}
        for task in options.tasks:
            figures[task], all_found[task] = compare(task, folder, options.steps)
            print(f"{task}, {options.steps} steps: largest relative difference of any logged loss from 1 x 2")
            for name, value in figures[task].items():
                print(f"  {name:<32} {value:.1e}", flush=True)
        if options.plot:
            plot(options.plot, all_found)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
