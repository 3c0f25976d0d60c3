"""What suites found, as a table on the console, as JSON, and as one HTML page that needs nothing else."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmo.errors import VLMoError
from vlmo.evaluation.measures import COVERAGE, Measure
from vlmo.evaluation.pair_scores import HEADS
from vlmo.evaluation.pictures import Picture
from vlmo.evaluation.suites.base import Example, Result
from vlmo.files import atomic_write
from vlmo.pages import STYLE, image_uri

BINS = 10  # of confidence
MOST_CLASSES = 30  # in the confusion matrix: those that are confused most

Row = tuple[str, str, str]  # suite, part, metric


def rows_of(results: Mapping[str, Result]) -> tuple[list[str], dict[Row, dict[str, Measure]]]:
    """Gives the columns (scores), and for each row its measures by score."""
    rows: dict[Row, dict[str, Measure]] = {}
    for suite, result in results.items():
        for each in result.measures:
            rows.setdefault((suite, each.part, each.metric), {})[each.score] = each
    present = {score for row in rows.values() for score in row}
    known = [*HEADS, *(f"{name}+itm" for name in HEADS), ""]
    return [score for score in known if score in present] + sorted(present - set(known)), rows


def table(results: Mapping[str, Result]) -> str:
    """Gives the figures in per cent, a row for each part and metric, a column for each score; chance at the end."""
    columns, rows = rows_of(results)
    header = ["suite", "part", "metric", *(column or "value" for column in columns), "chance", "n"]
    lines = [header]
    for (suite, part, metric), found in rows.items():
        one = next(iter(found.values()))
        cells = [_cell(found[column]) if column in found else "" for column in columns]
        lines.append([suite, part, metric, *cells, _percent(one.chance), f"{one.number:,}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], f"per cent; [{COVERAGE} % interval]"])


def _cell(measure: Measure) -> str:
    return f"{_percent(measure.value)} [{_percent(measure.low)}, {_percent(measure.high)}]"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def write_json(path: Path, about: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Writes settings, hashes and all figures; what is not a number is null."""
    suites = {
        name: {
            "measures": [_plain(each._asdict()) for each in result.measures],
            "files_sha256": result.files,
            "notes": result.notes,
        }
        for name, result in results.items()
    }
    text = json.dumps({**about, "suites": suites}, indent=1, ensure_ascii=False, allow_nan=False)
    with _written(path) as file:
        file.write(f"{text}\n".encode("utf-8", "backslashreplace"))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in values.items()}


def _written(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VLMoError(f"--out {path.parent}: cannot be made ({error.strerror})") from error
    return atomic_write(path)


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(path: Path, about: Mapping[str, Any], results: Mapping[str, Result], decoding: str) -> None:
    """Writes the page: figures by part, examples with images, calibration, confusion."""
    parts = [f"<h1>{html.escape(str(about['settings']['checkpoint']))}</h1>"]
    hashes = ", ".join(f"{Path(name).name} {value[:16]}" for name, value in about["checkpoint_sha256"].items())
    parts.append(f"<p><small>SHA-256 {html.escape(hashes)}; VLMo {about['vlmo_version']}</small></p>")
    for name, result in results.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += [f"<p><small>{html.escape(note)}</small></p>" for note in result.notes]
        parts.append(_figures(name, result))
        parts += [_calibration(score, *values) for score, values in result.calibration.items()]
        if result.confusion:
            parts.append(_confusion(*result.confusion))
        for title, examples in (("Worst", result.worst), ("Best", result.best)):
            if examples:
                parts.append(f"<h3>{title}</h3>")
                parts += [_examples(score, examples, decoding) for score in dict.fromkeys(e.score for e in examples)]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>VLMo</title><style>{STYLE}</style>'
    with _written(path) as file:
        file.write((page + "\n".join(parts) + "</html>\n").encode("utf-8", "backslashreplace"))


def _figures(name: str, result: Result) -> str:
    columns, rows = rows_of({name: result})
    header = "".join(f"<th>{html.escape(column or 'value')}</th>" for column in columns)
    lines = [f"<table><tr><th>part</th><th>metric</th>{header}<th>chance</th><th>n</th></tr>"]
    for (_, part, metric), found in rows.items():
        one = next(iter(found.values()))
        cells = "".join(f"<td>{_cell_html(found.get(column))}</td>" for column in columns)
        start = f"<tr><td>{html.escape(part)}</td><td>{html.escape(metric)}</td>"
        lines.append(f"{start}{cells}<td>{_percent(one.chance)}</td><td>{one.number:,}</td></tr>")
    return "".join([*lines, "</table>"])


def _cell_html(measure: Measure | None) -> str:
    if measure is None:
        return ""
    interval = f"{_percent(measure.low)} to {_percent(measure.high)}"
    return f"{_percent(measure.value)} <small>{interval}</small>"


def _examples(score: str, examples: Sequence[Example], decoding: str) -> str:
    figures = []
    for example in (each for each in examples if each.score == score):
        images = "".join(f'<img alt="" src="{thumbnail(picture, decoding)}">' for picture in example.pictures)
        lines = "<br>".join(map(html.escape, example.lines))
        figures.append(f"<figure>{images}<figcaption>{lines}</figcaption></figure>")
    return f"<h4>by {html.escape(score)}</h4><div class=examples>{''.join(figures)}</div>"


def thumbnail(picture: Picture, decoding: str = "correct") -> str:
    """Gives a small copy as a data URI; "" if the image cannot be decoded."""
    image = picture.load(decoding)
    return "" if image is None else image_uri(image)


def calibration_bins(confidence: Tensor, right: Tensor) -> tuple[list[tuple[float, float, int]], float]:
    """Gives, of each bin of confidence that has items, the mean confidence, the share that is right and their number.

    And the expected calibration error: the mean distance of the two, weighted by the numbers (arXiv 1706.04599).
    """
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    bins = []
    for number in range(BINS):
        own = place == number
        if own.any():
            bins.append((float(confidence[own].mean()), float(right[own].double().mean()), int(own.sum())))
    error = sum(abs(sure - share) * number for sure, share, number in bins) / max(len(confidence), 1)
    return bins, error


def _calibration(score: str, confidence: Tensor, right: Tensor) -> str:
    bins, error = calibration_bins(confidence, right)
    size = 220
    bars = []
    for sure, share, number in bins:
        place = f'x="{sure * size - 6:.1f}" y="{size - share * size:.1f}" width="12" height="{share * size:.1f}"'
        title = f"sure {sure:.2f}, right {share:.2f}, {number:,} items"
        bars.append(f"<rect class=bar {place}><title>{title}</title></rect>")
    line = f'<line class=line x1="0" y1="{size}" x2="{size}" y2="0"/>'
    caption = f"how sure {html.escape(score)} is (across), how often it is right (up): error {100 * error:.1f} %"
    plot = f'<svg width="{size}" height="{size}">{line}{"".join(bars)}</svg>'
    return f"<figure class=plot>{plot}<figcaption>{caption}</figcaption></figure>"


def _confusion(names: Sequence[str], counts: Tensor) -> str:
    """Shows the classes that are confused most."""
    wrong = counts.clone().fill_diagonal_(0)
    order = (wrong.sum(0) + wrong.sum(1)).argsort(descending=True)[:MOST_CLASSES].sort().values
    shown = counts[order][:, order]
    labels = [html.escape(names[index]) for index in order.tolist()]
    rows = [f"<tr><th></th>{''.join(f'<th>{label}</th>' for label in labels)}</tr>"]
    most = max(int(torch.max(shown)), 1)
    for label, row in zip(labels, shown.tolist(), strict=True):
        cells = "".join(f'<td style="background:rgba(74,126,187,{value / most:.2f})">{value}</td>' for value in row)
        rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    few = f"; the {len(labels)} of {len(names)} classes confused most" if len(labels) < len(names) else ""
    what = f"rows: the truth{few}"
    return f"<h3>Confusion</h3><p><small>{what}</small></p><table class=confusion>{''.join(rows)}</table>"
