"""The table of `head_to_head.py`: means with bootstrap intervals over the seeds, and the change against VLMo."""

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlmo.evaluation.measures import interval

FEWEST = 3  # seeds for an interval
TITLES = {
    "vlmo": "VLMo",
    "shared": "shared feed-forward instead of experts",
    "separate": "separate attention of text and image",
    "open_clip": "open_clip's dual encoder",
    "itc": "VLMo by ITC alone, wider",
    "mask": "VLMo, `same_image=mask`",
    "positive": "VLMo, `same_image=positive`",
    "vilt": "ViLT of transformers",
    "vlmo_pre-trained": "VLMo, pre-trained",
    "vilt_pre-trained": "ViLT, pre-trained",
}
WORLDS = {"demo": "the demo's world", "flickr8k": "Flickr8k", "emoji": "emoji, held-out concepts in an unseen style"}
KINDS = {"retrieval": "Retrieval after stage 3", "vqa": "VQA", "nlvr2": "NLVR2"}
HEAD = [
    "# Head to head",
    "",
    "Written by `python -m benchmarks.head_to_head`, whose documentation says how each figure comes about; the figures",
    "of all runs: `head_to_head.csv`. [Results](../results.md#head-to-head) says what they show and what they do not.",
    "",
]
MEASURES = {
    "ir_r1": "text to image R@1",
    "tr_r1": "image to text R@1",
    "ir_r10": "text to image R@10",
    "tr_r10": "image to text R@10",
    "accuracy": "accuracy",
}
Found = dict[tuple[str, str], dict[int, dict[str, Any]]]  # (kind, row) -> seed -> what was measured


def write(out: Path, results: Path) -> None:
    """`head_to_head.{md,csv}` of all runs below `out`."""
    tables, lines = [], []
    for folder in sorted(path for path in out.glob("*px") if path.is_dir()):
        found: Found = defaultdict(dict)
        for path in sorted(folder.glob("seed*/*.json")):
            kind, _, row = path.stem.partition("_")
            found[kind, row][int(path.parent.name.removeprefix("seed"))] = json.loads(path.read_text())
        for kind in KINDS:
            tables += _table(folder.name, kind, {row: each for (of, row), each in found.items() if of == kind})
        for (kind, row), seeds in found.items():
            for seed, each in sorted(seeds.items()):
                lines += [(folder.name, kind, row, seed, name, value) for name, value in each.items()]
    results.mkdir(parents=True, exist_ok=True)
    with (results / "head_to_head.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("world", "kind", "row", "seed", "name", "value"))
        writer.writerows((*line[:-1], round(line[-1], 6)) for line in sorted(lines, key=lambda line: line[:5]))
    (results / "head_to_head.md").write_text("\n".join([*HEAD, *tables]))
    print("\n".join(tables), flush=True)


def _table(folder: str, kind: str, rows: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
    """The lines of one world and kind; none where nothing is done."""
    reference = rows.get("vlmo")
    if not reference:
        return
    world, size, pixels = folder.split("_")
    names = [name for name in MEASURES if name in next(iter(reference.values()))]
    flops = statistics.mean(each["flops"] for each in reference.values())
    yield f"## {KINDS[kind]}, {WORLDS[world]} ({size} size, {pixels[:-2]} px)"
    yield ""
    one = next(iter(reference.values()))
    yield (
        f"{one['samples']:,.0f} samples, {one['tokens']:,.0f} text tokens; VLMo's step: {flops / 1e9:.2f} GFLOP. "
        "Per cent, with the 95 % bootstrap interval of the mean over the seeds (of three or more); in brackets the "
        "change against VLMo, seed by seed, in bold where its interval leaves out 0."
    )
    yield ""
    head = ["model", *(MEASURES[name] for name in names), "operations a step", "parameters", "learning rate", "seeds"]
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in (row for row in TITLES if row in rows):
        seeds = rows[row]
        one = next(iter(seeds.values()))
        if names[0] not in one:
            continue
        cells = [_cell(seeds, reference, name, row) for name in names]
        ratio = statistics.mean(each["flops"] for each in seeds.values()) / flops
        about = [f"{ratio:.2f}", f"{one['parameters'] / 1e3:,.0f} K", f"{one['rate']:g}", str(len(seeds))]
        yield "| " + " | ".join([TITLES[row], *cells, *about]) + " |"
    yield ""


def _cell(seeds: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]], name: str, row: str) -> str:
    values = {seed: 100 * each[name] for seed, each in seeds.items()}
    if len(values) < FEWEST:
        return f"{statistics.mean(values.values()):.1f}"
    mean, (low, high) = statistics.mean(values.values()), interval(np.array(list(values.values())))
    cell = f"{mean:.1f} ({low:.1f} to {high:.1f})"
    changes = [value - 100 * reference[seed][name] for seed, value in values.items() if seed in reference]
    if row == "vlmo" or len(changes) < FEWEST:
        return cell
    mean, (low, high) = statistics.mean(changes), interval(np.array(changes))
    change = f"{mean:+.1f}: {low:+.1f} to {high:+.1f}"
    return f"{cell} [{f'**{change}**' if low > 0 or high < 0 else change}]"
