"""`python -m vlmo.doctor compare RUN`: a run's curves over those that its recipe is expected to have.

The expected ones are CSV files (metric, step, mean, low, high), each with a JSON file of the options that it is for;
`python -m benchmarks.expected_curves` makes them.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmo.errors import VLMoError

EXPECTED = Path(__file__).parents[3] / "docs" / "results" / "expected"
COMPARED = ("loss_names", "datasets", "model_arch", "image_size", "batch_size", "learning_rate", "max_steps")
LEFT_OUT = ("_chance", "_epoch", "same_image_pairs", "false_negatives", "logit_scale")  # ends of log tags
IN_A_ROW = 3  # points outside of the band that are no accident

Curves = dict[str, dict[int, float]]  # by log tag, values by step


def read_curves(path: Path) -> Curves:
    """Reads what was measured in training from a run's metrics.csv; the first step is number 1.

    Raises:
        VLMoError: if there is no such file, or none of training.
    """
    curves: Curves = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for tag, value in row.items():
                    if value and (tag == "train/loss" or "/train/" in tag) and not tag.endswith(LEFT_OUT):
                        curves.setdefault(tag, {})[int(row["step"]) + 1] = float(value)
    except (OSError, ValueError, KeyError) as error:
        raise VLMoError(f"{path}: is not the metrics.csv of a run ({error})") from error
    if not curves:
        raise VLMoError(f"{path}: has no curve of training; give the folder of a training run")
    return curves


@dataclass(frozen=True)
class Expected:
    """The band of a recipe: by log tag, its steps, and the mean, the least and the greatest value at each."""

    name: str
    options: Mapping[str, Any]
    seeds: Sequence[int]
    bands: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]

    @classmethod
    def read(cls, path: Path) -> "Expected":
        """Reads a CSV file and the JSON file beside it. Raises VLMoError if they are none of the kind."""
        try:
            about = json.loads(path.with_suffix(".json").read_text())
            rows: dict[str, list[list[float]]] = {}
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    numbers = [float(row[key]) for key in ("step", "mean", "low", "high")]
                    rows.setdefault(row["metric"], []).append(numbers)
            bands: Any = {metric: tuple(np.array(numbers).T) for metric, numbers in rows.items()}
            return cls(about["recipe"], about["options"], about["seeds"], bands)
        except (OSError, ValueError, KeyError) as error:
            raise VLMoError(f"{path}: has no expected curves ({error})") from error


@dataclass(frozen=True)
class Judged:
    """A curve beside its band.

    Attributes:
        left: the step at which it leaves the band for IN_A_ROW points or more (of fewer points: for all); None: never.
    """

    metric: str
    steps: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    left: int | None

    @classmethod
    def of(cls, metric: str, curve: Mapping[int, float], band: tuple[np.ndarray, ...]) -> "Judged":
        """Compares at the steps of the curve that lie within those of the band."""
        at = band[0]
        steps = np.array([step for step in sorted(curve) if at[0] <= step <= at[-1]], int)
        values = np.array([curve[int(step)] for step in steps], float)
        mean, low, high = (np.interp(steps, at, each) for each in band[1:])
        outside = ~((values >= low) & (values <= high))  # (what is no number is outside)
        wanted = min(IN_A_ROW, len(outside))
        first = (i for i in range(len(outside) - wanted + 1) if outside[i : i + wanted].all())
        start = next(first, None) if wanted else None
        return cls(metric, steps, values, mean, low, high, None if start is None else int(steps[start]))

    def __str__(self) -> str:
        if not len(self.steps):
            return f"{self.metric:<26}  has no point in the expected steps"
        end = f"at step {self.steps[-1]:,}: {self.values[-1]:.3g}, expected {self.low[-1]:.3g} to {self.high[-1]:.3g}"
        if self.left is None:
            return f"{self.metric:<26}  within the band; {end}"
        i = int(np.flatnonzero(self.steps == self.left)[0])
        side = "above" if self.values[i] > self.high[i] else "below"
        return f"{self.metric:<26}  LEAVES the band from step {self.left:,} ({side}); {end}"


def choose(settings: Mapping[str, Any], folder: Path = EXPECTED) -> Expected:
    """Gives the expected curves of the recipe that is most like a run's.

    Raises:
        VLMoError: if there are none of the same losses.
    """
    active = _active(settings.get("loss_names", {}))
    found = [Expected.read(path) for path in sorted(folder.glob("*.csv"))]
    same = [each for each in found if _active(each.options["loss_names"]) == active]
    if not same:
        there = ", ".join(each.name for each in found) or "none"
        raise VLMoError(
            f"no expected curves for losses {', '.join(sorted(active))} in {folder} (there are {there}); give a file "
            "of benchmarks.expected_curves with --expected FILE.csv"
        )
    return min(same, key=lambda each: len(differences(settings, each)))


def bands_of(settings: Mapping[str, Any], folder: Path = EXPECTED) -> dict[str, list[tuple[float, float, float]]]:
    """Gives step, lower and upper end by log tag, of the recipe whose options a run has; none if there is none."""
    found = (Expected.read(path) for path in sorted(folder.glob("*.csv")))
    own = next((each for each in found if not differences(settings, each)), None)
    bands = own.bands.items() if own else ()
    return {
        tag: list(zip(step.tolist(), low.tolist(), high.tolist(), strict=True)) for tag, (step, _, low, high) in bands
    }


def _active(loss_names: Mapping[str, float]) -> set[str]:
    return {name for name, weight in loss_names.items() if weight}


def differences(settings: Mapping[str, Any], expected: Expected) -> list[str]:
    """Lists what of a run's options is not as the curves are for."""
    here = dict(settings) | {"from_nothing": not settings.get("load_path")}
    here["loss_names"], options = _active(here.get("loss_names", {})), dict(expected.options)
    options["loss_names"] = _active(options["loss_names"])
    return [
        f"{name}={_plain(here.get(name))} (expected {_plain(value)})"
        for name, value in options.items()
        if _plain(here.get(name)) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set) else value


def compare(run: Path, expected: Path | None = None) -> tuple[Expected, list[Judged], list[str]]:
    """Lays a run over the curves expected of it.

    Args:
        run: its folder, or its metrics.csv.
        expected: CSV file; None: that of the recipe most like it.

    Returns:
        them, each curve judged, and the options in which they differ.

    Raises:
        VLMoError: if there is nothing to compare.
    """
    file = run / "metrics.csv" if run.is_dir() else run
    curves = read_curves(file)
    try:
        settings = json.loads(file.with_name("settings.json").read_text())
    except (OSError, ValueError) as error:
        if expected is None:
            raise VLMoError(f"{file.with_name('settings.json')}: cannot be read ({error}); give --expected") from error
        settings = {}
    chosen = Expected.read(expected) if expected else choose(settings)
    judged = [Judged.of(metric, curves[metric], band) for metric, band in chosen.bands.items() if metric in curves]
    if not judged:
        raise VLMoError(f"{file}: has none of the curves that are expected of {chosen.name}")
    return chosen, judged, differences(settings, chosen) if settings else []


def draw(judged: Sequence[Judged], title: str, path: Path) -> None:
    """Writes a picture of the curves over their bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(judged), 4)
    rows = -(-len(judged) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.8 * rows), layout="constrained", squeeze=False)
    for axis, each in zip(axes.flat, judged, strict=False):
        axis.fill_between(each.steps, each.low, each.high, color="#1f6fb4", alpha=0.2, label="expected")
        axis.plot(each.steps, each.mean, color="#1f6fb4", linewidth=1)
        axis.plot(each.steps, each.values, color="#e07b39", label="this run")
        if each.left is not None:
            axis.axvline(each.left, color="#c0392b", linestyle=":", label=f"left at {each.left}")
        axis.set_title(each.metric, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    for axis in axes.flat[len(judged) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(run: Path, expected: Path | None = None, picture: Path | None = None) -> int:
    """Prints what `compare` finds and draws it; gives the exit status, 1 where a curve leaves its band."""
    chosen, judged, other = compare(run, expected)
    print(f"{run}, beside {chosen.name} (mean and band of seeds {', '.join(map(str, chosen.seeds))})")
    for line in other:
        print(f"  other options: {line}")
    for each in judged:
        print(f"  {each}")
    picture = picture or (run if run.is_dir() else run.parent) / "compared.png"
    draw(judged, f"{run.name} beside {chosen.name}", picture)
    left = [each for each in judged if each.left is not None]
    print(f"{len(left)} of {len(judged)} curves leave their band; picture: {picture}")
    return 1 if left else 0
