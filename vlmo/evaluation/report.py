"""What suites found, as a table on the console, as JSON, and as one HTML page that needs nothing else."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmo.errors import VLMoError
from vlmo.evaluation.measures import COVERAGE, Measure
from vlmo.evaluation.pair_scores import HEADS, OF_FEATURES, OF_PAIRS
from vlmo.evaluation.pictures import Picture
from vlmo.evaluation.suites.base import Confusion, Example, Result
from vlmo.files import atomic_write
from vlmo.pages import STYLE, image_uri

BINS = 10  # of confidence

Row = tuple[str, str, str]  # suite, part, metric


def rows_of(results: Mapping[str, Result]) -> tuple[list[str], dict[Row, dict[str, Measure]]]:
    """Gives the columns (scores), and for each row its measures by score."""
    rows: dict[Row, dict[str, Measure]] = {}
    for suite, result in results.items():
        for each in result.measures:
            rows.setdefault((suite, each.part, each.metric), {})[each.score] = each
    present = {score for row in rows.values() for score in row}
    known = [*HEADS, *(f"{name}+{by}" for by in OF_PAIRS for name in OF_FEATURES), ""]
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
            "calibration": {key: _plain_calibration(*values) for key, values in result.calibration.items()},
            "confusion": {
                key: {"names": each.names, "counts": each.counts.tolist(), "classes": each.classes}
                for key, each in result.confusion.items()
            },
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


def _plain_calibration(confidence: Tensor, right: Tensor) -> dict[str, Any]:
    bins, error = calibration_bins(confidence, right)
    columns = ("confidence", "right", "number")
    return {"ece": error, "bins": [dict(zip(columns, each, strict=True)) for each in bins]}


def _written(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VLMoError(f"--out {path.parent}: cannot be made ({error.strerror})") from error
    return atomic_write(path)


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE_STYLE = (
    STYLE
    + """
h1 { font-size: 1.4em } h2 { border-bottom: 2px solid #4a7ebb }
.wide { overflow-x: auto } .wide td, .wide th { white-space: nowrap }
.row { display: flex; flex-wrap: wrap; gap: 1em 2em; align-items: flex-start }
.example { width: 15em } .example img { min-width: 0 }
.example .pictures { display: flex; gap: 4px; align-items: flex-start }
.plot { width: 19em } .plot svg { width: 100%; font-size: 11px }
.number { fill: #cfdcee } .line { fill: none } .quiet { color: #666 }
.confusion td, .confusion th { text-align: center } .confusion th:first-child { text-align: right }
a { color: #2f5f9e; margin-right: 1em }
@media (prefers-color-scheme: dark) { a { color: #8ab4e8 } .quiet { color: #999 } .number { fill: #34425a } }
"""
)


def write_report(path: Path, about: Mapping[str, Any], results: Mapping[str, Result], decoding: str) -> None:
    """Writes the page: figures by part, examples with images, calibration, confusion."""
    parts = [f"<h1>{html.escape(str(about['settings']['checkpoint']))}</h1>"]
    hashes = ", ".join(f"{Path(name).name} {value[:16]}" for name, value in about["checkpoint_sha256"].items())
    parts.append(f"<p class=quiet>SHA-256 {html.escape(hashes)}; VLMo {about['vlmo_version']}</p>")
    parts.append(f"<p>{''.join(f'<a href=#{html.escape(name)}>{html.escape(name)}</a>' for name in results)}</p>")
    for name, result in results.items():
        parts.append(f"<h2 id={html.escape(name)}>{html.escape(name)}</h2>")
        parts += [f"<p class=quiet>{html.escape(note)}</p>" for note in result.notes]
        parts.append(_figures(name, result))
        if result.calibration:
            plots = (_calibration(key, *values) for key, values in result.calibration.items())
            parts.append(f"<h3>Calibration</h3><div class=row>{''.join(plots)}</div>")
        if result.confusion:
            parts.append("<h3>Confusion</h3><p class=quiet>rows: the truth; columns: what was chosen</p>")
            parts += [_confusion(key, each) for key, each in result.confusion.items()]
        for title, examples in (("Worst", result.worst), ("Best", result.best)):
            if examples:
                parts.append(f"<h3>{title} examples</h3>")
                parts += [_examples(score, examples, decoding) for score in dict.fromkeys(e.score for e in examples)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    page = f'<!doctype html><html lang="en">{head}<title>VLMo</title><style>{PAGE_STYLE}</style>'
    with _written(path) as file:
        file.write((page + "\n".join(parts) + "</html>\n").encode("utf-8", "backslashreplace"))


def _figures(name: str, result: Result) -> str:
    columns, rows = rows_of({name: result})
    header = "".join(f"<th>{html.escape(column or 'value')}</th>" for column in columns)
    lines = [f"<table class=figures><tr><th>part</th><th>metric</th>{header}<th>chance</th><th>n</th></tr>"]
    for (_, part, metric), found in rows.items():
        one = next(iter(found.values()))
        cells = "".join(f"<td>{_cell_html(found.get(column))}</td>" for column in columns)
        start = f"<tr><td>{html.escape(part)}</td><td>{html.escape(metric)}</td>"
        lines.append(f"{start}{cells}<td>{_percent(one.chance)}</td><td>{one.number:,}</td></tr>")
    caption = f"<p class=quiet>per cent; small: {COVERAGE} % interval by bootstrap</p>"
    return f"<div class=wide>{''.join(lines)}</table></div>{caption}"


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
        figures.append(
            f"<figure class=example><div class=pictures>{images}</div><figcaption>{lines}</figcaption></figure>"
        )
    return f"<h4>{html.escape(score)}</h4><div class=row>{''.join(figures)}</div>"


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


def _calibration(name: str, confidence: Tensor, right: Tensor) -> str:
    """Draws the reliability diagram: of each bin how often it is right, and in pale how many items it has."""
    bins, error = calibration_bins(confidence, right)
    side, left, most = 200, 52, max((number for *_, number in bins), default=1)
    width, marks = side / BINS, []
    for sure, share, number in bins:
        x = left + width * min(int(sure * BINS), BINS - 1)
        title = f"<title>sure {sure:.2f}, right {share:.2f}, {number:,} items</title>"
        for kind, height, inset in (("number", number / most, 0.5), ("bar", share, 4)):
            place = f'x="{x + inset:.1f}" y="{10 + side * (1 - height):.1f}"'
            size = f'width="{width - 2 * inset:.1f}" height="{side * height:.1f}"'
            marks.append(f"<rect class={kind} {place} {size}>{title}</rect>")
    frame = f'<path class=line d="M{left} {10 + side}L{left + side} 10M{left} 10V{10 + side}H{left + side}"/>'
    ticks = "".join(
        f'<text x="{left + side * at:.0f}" y="{side + 25}" text-anchor="middle">{at:g}</text>'
        f'<text x="{left - 5}" y="{14 + side * (1 - at):.0f}" text-anchor="end">{at:g}</text>'
        for at in (0, 0.5, 1)
    )
    names = (
        f'<text x="{left + side / 2}" y="{side + 40}" text-anchor="middle">confidence</text>'
        f'<text x="12" y="{10 + side / 2}" text-anchor="middle" transform="rotate(-90 12 {10 + side / 2})">right</text>'
    )
    plot = f'<svg viewBox="0 0 {left + side + 20} {side + 48}" role="img">{"".join(marks)}{frame}{ticks}{names}</svg>'
    caption = f"{html.escape(name)}: expected calibration error {100 * error:.1f} %, {len(confidence):,} items"
    return f"<figure class=plot>{plot}<figcaption>{caption}; pale: how many have that confidence</figcaption></figure>"


def _confusion(name: str, confusion: Confusion) -> str:
    labels = [html.escape(each) for each in confusion.names]
    rows = [f"<tr><th></th>{''.join(f'<th>{label}</th>' for label in labels)}</tr>"]
    most = max(int(confusion.counts.max()) if confusion.counts.numel() else 0, 1)
    for label, row in zip(labels, confusion.counts.tolist(), strict=True):
        shades = [f"background:rgba(74,126,187,{value / most:.2f})" for value in row]
        shades = [shade + ";color:#fff" * (value > most / 2) for shade, value in zip(shades, row, strict=True)]
        cells = "".join(f'<td style="{shade}">{value}</td>' for shade, value in zip(shades, row, strict=True))
        rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    few = f", the {len(labels)} of {confusion.classes:,} classes confused most"
    what = html.escape(name) + (few if len(labels) < confusion.classes else "")
    return f"<h4>{what}</h4><div class=wide><table class=confusion>{''.join(rows)}</table></div>"
