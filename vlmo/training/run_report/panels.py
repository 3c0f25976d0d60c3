"""Which curves stand in one chart, and what they are called there."""

import re
from collections.abc import Iterable, Mapping, Sequence

from vlmo.pages import Chart, Line
from vlmo.training.learning.compare import bands_of
from vlmo.training.run_report.history import History
from vlmo.training.summary import SIDES, SPLITS

CHANCE = "_chance"  # end of the tag of what guessing would give, beside that of what was measured
PHASES = ("train", *SPLITS)
FIRST = ("train/loss", "loss", "learning rate", "samples per sec", "grad norm")


def panel_of(tag: str) -> tuple[str, str] | None:
    """Gives the chart of a log tag and the name of its curve there; None if it repeats another or is no measurement."""
    if tag.endswith(("_epoch", CHANCE)):
        return None
    match tag.split("/"):
        case ["recalls", name]:
            found = re.fullmatch(r"(val_)?(rerank_)?(tr|ir)_r(\d+)", name)
            if not found:
                return "mean recall", name.removesuffix("_avg")
            split, reranked, side, k = found.groups()
            return f"recall, {SIDES[side]}{', ITM' if reranked else ''}", f"{'val' if split else 'test'} @{k}"
        case [phase, name] if phase in PHASES:
            return name.replace("_", " "), phase
        case [task, phase, key] if phase in PHASES:
            return f"{task} {key.replace('_', ' ')}", phase
        case ["train", what, part]:
            return what.replace("_", " "), part
    if tag.startswith("lr-"):
        return "learning rate", tag.removeprefix("lr-")
    return tag.replace("_", " "), ""


def charts_of(history: History) -> list[Chart]:
    """Gives the charts of one run: training and validation together, with what chance gives and what is expected."""
    panels: dict[str, list[Line]] = {}
    levels: dict[str, dict[str, float]] = {}
    bands: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    expected = bands_of(history.settings)
    for tag, curve in history.curves.items():
        if not (place := panel_of(tag)):
            continue
        title, name = place
        panels.setdefault(title, []).append(Line(name or title, curve))
        if chance := history.curves.get(tag + CHANCE):
            levels.setdefault(title, {})["chance"] = chance[-1][1]
        if tag in expected:
            bands.setdefault(title, {})["expected"] = expected[tag]
    return [
        Chart(title, _by_name(panels[title]), levels.get(title, {}), bands.get(title, {})) for title in _ordered(panels)
    ]


def charts_together(histories: Mapping[str, History]) -> list[Chart]:
    """Gives a chart for each number that any of several runs logged more than once, a curve a run.

    Args:
        histories: by the name that each has in the charts.
    """
    tags = dict.fromkeys(tag for history in histories.values() for tag in history.curves if panel_of(tag))
    tags = {tag: None for tag in tags if not re.match("lr-.*/pg(?!1$)", tag)}  # (the other groups have the same form)
    panels: dict[str, list[Line]] = {}
    levels: dict[str, dict[str, float]] = {}
    for tag in tags:
        title, name = panel_of(tag) or ("", "")
        lines = [Line(label, each.curves[tag]) for label, each in histories.items() if tag in each.curves]
        title = f"{title}, {name}" if name else title
        panels.setdefault(title, []).extend(lines)
        for history in histories.values():
            if chance := history.curves.get(tag + CHANCE):
                levels.setdefault(title, {})["chance"] = chance[-1][1]
    return [Chart(title, panels[title], levels.get(title, {})) for title in _ordered(panels)]


def _by_name(lines: Sequence[Line]) -> list[Line]:
    """Training first."""
    return sorted(lines, key=lambda line: (line.name != "train", line.name))


def _ordered(titles: Iterable[str]) -> list[str]:
    def place(title: str) -> float:
        subject = title.partition(", ")[0]
        return FIRST.index(subject) if subject in FIRST else len(FIRST) - 2.5

    return sorted(titles, key=lambda title: (place(title), title))
