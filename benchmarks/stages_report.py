"""What the runs of `stages.py` say: CSV files, a table, and plots of the curves."""

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.stages_worlds import World  # noqa: E402
from vlmo.evaluation.measures import interval  # noqa: E402

# title, runs, log tag, label; panels without data are left out
STARTS = ("3", "2+3", "1+3", "1+2+3")
PANELS = (
    ("stage 1: hidden patches", ("1",), "mim/train/loss", "squared error"),
    (
        "stage 3: which text to which image",
        ("3", "2+3", "1+3", "1+2+3"),
        "itc/train/i2t_accuracy",
        "accuracy in the batch",
    ),
    ("stage 3: words of a pair", STARTS, "mlm/train/accuracy", "masked words right"),
    ("stage 3, other ways", ("3", "3 itc", "3 shared", "3 local"), "itc/train/i2t_accuracy", "accuracy in the batch"),
    ("VQA", ("none vqa", "3 vqa", "2+3 vqa", "1+3 vqa", "1+2+3 vqa"), "vqa/train/score", "score"),
)
COLORS = ("#444444", "#1f6fb4", "#e07b39", "#3a9d5d", "#8e5bb5")


def write(world: World, titles: Mapping[str, str], out: Path, results: Path) -> None:
    """`stages_<world>.{csv,md,png}` and `stages_<world>_curves.csv` from the runs below `out`."""
    results.mkdir(parents=True, exist_ok=True)
    values = list(_measured(world, out))
    stem = results / f"stages_{world.name}"
    _write_csv(stem.with_suffix(".csv"), ("row", "seed", "measure", "value"), values)
    table = _table(world, titles, values)
    stem.with_suffix(".md").write_text(table)
    print(f"\n{table}", flush=True)
    curves = list(_curves(out))
    _write_csv(results / f"stages_{world.name}_curves.csv", ("run", "seed", "step", "tag", "value"), curves)
    _plot(world, curves, stem.with_suffix(".png"))


def _measured(world: World, out: Path) -> Iterator[tuple[str, int, str, float]]:
    """Row, seed, title of the measure, value."""
    for path in sorted(out.glob("seed*/done/*.json")):
        row, _, kind = path.stem.rpartition(" ")
        for title, (measured_by, tag) in world.measures.items():
            if kind == measured_by:
                yield row, int(path.parts[-3].removeprefix("seed")), title, round(json.loads(path.read_text())[tag], 5)


def _table(world: World, titles: Mapping[str, str], values: list[tuple[str, int, str, float]]) -> str:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, _, title, value in values:
        found[row, title].append(100 * value)
    lines = [" | ".join(["| pre-training", *world.measures, "seeds |"]), "|---" * (len(world.measures) + 2) + "|"]
    for row, name in titles.items():
        cells = [_cell(found[row, title]) for title in world.measures]
        seeds = max(len(found[row, title]) for title in world.measures)
        if seeds:
            lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    baselines = [f"{100 * value:.1f} ({name})" if name else "" for name, value in _in_order(world)]
    lines.append(f"| without a model | {' | '.join(baselines)} | |")
    table = "\n".join(lines) + "\n\nPer cent; mean ± standard deviation over the seeds.\n"
    return table + _differences(world, titles, values)


def _differences(world: World, titles: Mapping[str, str], values: list[tuple[str, int, str, float]]) -> str:
    """The table of what other ways of stage 3 change, seed by seed, with bootstrap intervals of the mean."""
    found = {(row, seed, title): 100 * value for row, seed, title, value in values}
    lines = []
    for row in (row for row in titles if row.startswith("3 ")):
        cells = []
        for title in world.measures:
            seeds = [seed for name, seed, measure in found if (name, measure) == (row, title)]
            pairs = [
                (found[row, seed, title], found["3", seed, title]) for seed in seeds if ("3", seed, title) in found
            ]
            cells.append(_interval([own - plain for own, plain in pairs]))
        if any(cell != "-" for cell in cells):
            lines.append(f"| {titles[row]} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = [
        " | ".join(["| change against plain stage 3", *world.measures]) + " |",
        "|---" * (len(world.measures) + 1) + "|",
    ]
    return "\n".join(["", *head, *lines]) + "\n\nPoints, mean with its 95 % bootstrap interval over the seeds.\n"


def _interval(differences: list[float]) -> str:
    if len(differences) < 3:
        return "-"
    low, high = interval(np.array(differences))
    return f"{statistics.mean(differences):+.1f} ({low:+.1f} to {high:+.1f})"


def _in_order(world: World) -> list[tuple[str, float]]:
    return [world.baselines.get(title, ("", 0.0)) for title in world.measures]


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _curves(out: Path) -> Iterator[tuple[str, int, int, str, float]]:
    """Run, seed, step, tag, value of what was logged in training."""
    tags = {tag for _, _, tag, _ in PANELS}
    for path in sorted(out.glob("seed*/done/*.json")):
        folder, seed = path.parents[1], int(path.parts[-3].removeprefix("seed"))
        name = path.stem.replace(" ", "_").replace("+", "")
        for log in sorted(folder.glob(f"{name}_seed{seed}_from_*/version_*/metrics.csv")):
            with log.open(newline="") as file:
                for row in csv.DictReader(file):
                    for tag in tags:
                        if row.get(tag):
                            yield path.stem, seed, int(row["step"]) + 1, tag, round(float(row[tag]), 5)


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _plot(world: World, curves: list[tuple[str, int, int, str, float]], path: Path) -> None:
    logged: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, _, step, tag, value in curves:
        logged[run, tag][step].append(value)
    panels = [panel for panel in PANELS if any((run, panel[2]) in logged for run in panel[1])]
    if not panels:
        return
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(13, 6.5), layout="constrained", squeeze=False)
    for axis, (title, runs, tag, label) in zip(axes.flat, panels, strict=False):
        _panel(axis, {run: logged[run, tag] for run in runs if (run, tag) in logged})
        axis.set(title=title, xlabel="step", ylabel=label)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"Stages of pre-training, {world.name}: mean and range over the seeds", fontweight="bold")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axis: Axes, runs: Mapping[str, Mapping[int, list[float]]]) -> None:
    for color, (run, points) in zip(COLORS, runs.items(), strict=False):
        steps = sorted(points)
        axis.plot(steps, [statistics.mean(points[step]) for step in steps], color=color, label=run)
        lows, highs = ([pick(points[step]) for step in steps] for pick in (min, max))
        axis.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
