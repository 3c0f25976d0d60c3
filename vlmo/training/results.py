"""The table at the end of a run: what was measured, by split, beside what the paper reports."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlmo.settings import Settings

# Published results in percent (arXiv 2111.02358), by objective or data set, size, and log tag; and the image size at
# which they were measured.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "vqa": {
        "base": {"vqa/test-dev/score": 76.6},
        "base_plus": {"vqa/test-dev/score": 78.5},
        "large": {"vqa/test-dev/score": 79.9},
    },
    "nlvr2": {
        "base": {"nlvr2/test/accuracy": 83.3},
        "base_plus": {"nlvr2/test/accuracy": 85.1},
        "large": {"nlvr2/test/accuracy": 86.9},
    },
    "coco": {
        "base": {"recalls/tr_r1": 74.8, "recalls/ir_r1": 57.2},
        "base_plus": {"recalls/tr_r1": 76.3, "recalls/ir_r1": 58.6},
        "large": {"recalls/tr_r1": 78.2, "recalls/ir_r1": 60.6},
    },
    "f30k": {
        "base": {"recalls/tr_r1": 92.3, "recalls/ir_r1": 79.3},
        "base_plus": {"recalls/tr_r1": 93.2, "recalls/ir_r1": 81.8},
        "large": {"recalls/tr_r1": 95.3, "recalls/ir_r1": 84.5},
    },
}
PUBLISHED_AT = {"vqa": 480, "nlvr2": 384, "coco": 384, "f30k": 384}
SIDES = {"tr": "image to text", "ir": "text to image"}


class Row(NamedTuple):
    """One number; in the table they stand in this order."""

    split: str
    place: tuple[Any, ...]  # among those of the split
    what: str
    tag: str
    share: bool  # shown in percent


def published(settings: Settings) -> dict[str, float]:
    """By log tag, the results that a run with these settings can be compared with, in percent."""
    size = settings.model_arch.removeprefix("vlmo_").removesuffix("_patch16")
    recall = settings.datasets if "irtr" in settings.active and len(settings.datasets) == 1 else ()
    keys = [*settings.active, *recall]
    found: dict[str, float] = {}
    for key in keys:
        if PUBLISHED_AT.get(key) == settings.image_size:
            found |= PUBLISHED[key].get(size, {})
    return found


def results(settings: Settings, metrics: Mapping[str, float]) -> str:
    """The table; `metrics` by log tag, from which the numbers of training and the doubled ones are left out."""
    expected = published(settings)
    rows = sorted(row for tag in {*metrics, *expected} if (row := _row(tag)))
    lines = ["", f"{'results':<66}{'here':>10}{'published':>12}"]
    for row in rows:
        here = "(server)" if row.tag not in metrics else f"{metrics[row.tag]:.4f}"
        if row.share and row.tag in metrics:
            here = f"{100 * metrics[row.tag]:.2f} %"
        paper = f"{expected[row.tag]:.1f} %" if row.tag in expected else ""
        lines.append(f"  {row.split:<10}{row.what:<30}{row.tag:<24}{here:>10}{paper:>12}".rstrip())
    if expected:
        task = "fine-tuned on " + " and ".join(settings.datasets)
        lines.append(f"  published: {settings.model_arch}, {task} at {settings.image_size} px (arXiv 2111.02358)")
    return "\n".join(lines)


def _row(tag: str) -> Row | None:
    """How a log tag is shown; None if it is not."""
    if match := re.fullmatch(r"recalls/(val_)?(rerank_)?(tr|ir)_r(\d+)", tag):
        val, again, side, k = match.groups()
        what = f"{SIDES[side]}, recall@{k}" + (", ITM" if again else "")
        return Row("val" if val else "test", (0, bool(again), side == "ir", int(k)), what, tag, True)
    if match := re.fullmatch(r"recalls/(val|test)_avg", tag):
        return Row(match[1], (1,), "mean of the six recalls", tag, True)
    if match := re.fullmatch(r"(\w+)/(val|dev|test|test-dev)/(\w+)", tag):
        objective, split, key = match.groups()
        if not key.endswith("_epoch"):
            return Row(split, (2, objective, key), f"{objective} {key.replace('_', ' ')}", tag, key != "loss")
    if match := re.fullmatch(r"(val|test)/the_metric", tag):
        return Row(match[1], (3,), "all headline numbers together", tag, False)
    return None
