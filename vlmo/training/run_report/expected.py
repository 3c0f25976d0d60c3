"""Where curves of a recipe are expected: `docs/results/expected`, a CSV of bands and a JSON of options each."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).parents[3] / "docs" / "results" / "expected"

Band = list[tuple[float, float, float]]  # step, lower and upper end


def expected_bands(settings: Mapping[str, Any], folder: Path = EXPECTED) -> dict[str, Band]:
    """Gives by log tag the bands of the recipe whose options a run has; none if there is no such recipe."""
    for path in sorted(folder.glob("*.csv")):
        options = json.loads(path.with_suffix(".json").read_text())["options"]
        if all(_plain(_own(settings, name)) == _plain(value) for name, value in options.items()):
            bands: dict[str, Band] = {}
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    point = (float(row["step"]), float(row["low"]), float(row["high"]))
                    bands.setdefault(row["metric"], []).append(point)
            return bands
    return {}


def _own(settings: Mapping[str, Any], name: str) -> Any:
    return not settings.get("load_path") if name == "from_nothing" else settings.get(name)


def _plain(value: Any) -> Any:
    """As it is compared: what is off does not count, nor does the order of names."""
    if isinstance(value, Mapping):
        return {key: each for key, each in value.items() if each}
    return sorted(value) if isinstance(value, list | tuple) else value
