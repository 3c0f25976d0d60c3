"""The picture at the end of the tour: every run's training curve, and what pre-training changes."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

PANELS = (
    ("stage 1: hidden patches of a picture", ("stage1",), "mim/train/loss", "squared error, normalised"),
    ("stage 2: words of a text", ("stage2",), "textmlm/train/accuracy", "masked words right"),
    ("stage 3: which text to which image", ("stage3",), "itc/train/i2t_accuracy", "ITC accuracy in the batch"),
    ("stage 3: words of a pair", ("stage3",), "mlm/train/accuracy", "masked words right"),
    ("VQA", ("vqa", "vqa_scratch"), "vqa/train/score", "score"),
    ("NLVR2", ("nlvr2", "nlvr2_scratch"), "nlvr2/train/accuracy", "accuracy"),
    ("retrieval", ("f30k", "f30k_scratch"), "irtr/train/i2t_accuracy", "accuracy in the batch"),
)
COLORS = {"pre-trained": "#1f6fb4", "from scratch": "#e07b39"}


def read_curve(out: Path, run: str, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values that the newest training run called `run` logged."""
    files = sorted(out.glob(f"{run}_seed*/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    rows: list[tuple[int, float]] = []
    for path in files:
        with path.open(newline="") as file:  # evaluations have files of their own, without training metrics
            logged = [(int(row["step"]) + 1, float(row[metric])) for row in csv.DictReader(file) if row.get(metric)]
        rows = logged or rows
    return [step for step, _ in rows], [value for _, value in rows]


def draw_curves(out: Path, runs: Sequence[str]) -> Path:
    """Writes `out/curves.png` and returns its path; panels of runs that are not in `runs` are left out."""
    panels = [panel for panel in PANELS if set(panel[1]) <= set(runs)]
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(13, 6.5), layout="constrained", squeeze=False)
    for axis, (title, names, metric, label) in zip(axes.flat, panels, strict=False):
        _panel(axis, out, title, names, metric, label)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle("VLMo on the generated world, tiny size", fontsize=14, fontweight="bold")
    path = out / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axis: Axes, out: Path, title: str, names: Sequence[str], metric: str, label: str) -> None:
    for name in names:
        kind = "from scratch" if name.endswith("_scratch") else "pre-trained"
        steps, values = read_curve(out, name, metric)
        axis.plot(steps, values, marker="o", markersize=3, color=COLORS[kind], label=kind)
    steps, values = read_curve(out, names[0], f"{metric}_chance")
    if steps:
        axis.plot(steps, values, color="grey", linestyle="--", linewidth=1, label="chance")
    axis.set_title(title, fontsize=11)
    axis.set(xlabel="step", ylabel=label, ylim=(0, None if metric.endswith("/loss") else 1.02))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(names) > 1 or steps:
        axis.legend(frameon=False)
