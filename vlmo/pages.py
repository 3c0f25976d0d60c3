"""Pages that need nothing else: one style, and the pieces of HTML and SVG that reports are made of."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlmo.files import atomic_write

THUMBNAIL = 160  # pixels of the longer side
TINY = 64  # up to here a picture is kept as it is, in a lossless form
SHOWN_POINTS = 200  # of a line; of a longer one, evenly chosen ones and the last are drawn
WIDTH, HEIGHT = 320, 200  # of a chart
LEFT, BOTTOM, TOP, RIGHT = 52, 24, 10, 8  # its margins
COLORS = ("#1f6fb4", "#e07b39", "#2a9d5c", "#b23a76", "#7a5cc2", "#8a6d1d", "#3aa6b9", "#666666")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222;
  overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1em 0 } .scroll { overflow-x: auto }
td, th { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } .bar { fill: #4a7ebb } .line { stroke: #999 }
td, th { overflow-wrap: normal } td:nth-child(n+3) { white-space: nowrap }
.plain td, .plain th { text-align: left; vertical-align: top; min-width: 5em; white-space: normal }
.plain td:nth-child(n+2) { overflow-wrap: anywhere; min-width: 8em }
.examples { display: flex; flex-wrap: wrap; gap: 1.5em 1em } img { max-width: 100% }
figure { width: 15em; margin: 0; font-size: 13px } figure.plot { width: 320px; max-width: 100% }
.plot svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #555 }
.examples img { image-rendering: pixelated; width: 100% } .score { background: #4a7ebb; height: .5em; min-width: 1px }
.what { display: block; padding-top: .4em }
.key { white-space: nowrap; margin-right: 1em } .key b { display: inline-block; width: 1em; height: .6em }
.confusion td, .confusion th { padding: .1em .3em; font-size: 12px } small { color: #666 }
pre { background: #f4f4f4; padding: .7em; white-space: pre-wrap } .bad { color: #a12 } h2 { margin-top: 2em }
.grid { stroke: #eee }
@media (max-width: 640px) { h1 { font-size: 1.4em } }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark } body { color: #ddd; background: #17191d } td, th { border-color: #3a3d43 }
  a { color: #8ab4e8 } small { color: #999 } pre { background: #24272d } .bad { color: #f28b82 }
  svg text { fill: #aaa } .grid { stroke: #33363c }
}
"""


class Html(str):
    """Is markup already."""


def markup(value: Any) -> str:
    """Gives a value as markup: text is escaped."""
    return value if isinstance(value, Html) else html.escape(str(value))


def page(title: str, parts: Iterable[str]) -> str:
    """Gives a whole page; `parts` are markup."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    start = f'<!doctype html><html lang="en">{head}<title>{markup(title)}</title><style>{STYLE}</style>'
    return start + "\n".join([f"<h1>{markup(title)}</h1>", *parts]) + "</html>\n"


def write_page(path: Path, content: str) -> None:
    """Writes it, whole or not at all; raises OSError if it cannot be written."""
    with atomic_write(path, by_several=True) as file:
        file.write(content.encode("utf-8", "backslashreplace"))


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], plain: bool = False) -> str:
    """Gives a table, without its header if that is empty.

    Args:
        plain: of texts; else numbers follow after two columns of texts.
    """
    start = "".join(f"<th>{markup(cell)}</th>" for cell in header)
    start = f"<tr>{start}</tr>" if any(header) else ""
    lines = ["<tr>" + "".join(f"<td>{markup(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    kind = " class=plain" if plain else ""
    return f"<div class=scroll><table{kind}>{start}{''.join(lines)}</table></div>"


def image_uri(image: Image.Image, longer_side: int = THUMBNAIL) -> str:
    """Gives a small copy of an RGB image as a data URI."""
    form = "PNG" if max(image.size) <= TINY else "JPEG"
    image = image.copy()
    image.thumbnail((longer_side, longer_side))
    file = io.BytesIO()
    image.save(file, form, quality=80)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


# --- charts -----------------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One curve.

    Attributes:
        points: (step, value); what is no number is left out.
    """

    name: str
    points: Sequence[tuple[float, float]]


@dataclass
class Chart:
    """Curves over the steps in one picture.

    Attributes:
        levels: horizontal lines by name, such as what chance gives.
        bands: (step, lower, upper end) by name: where values are expected to be.
    """

    title: str
    lines: list[Line]
    levels: Mapping[str, float] = field(default_factory=dict)
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)

    def markup(self) -> str:
        """Gives the picture with its caption; a point says its step and value when pointed at."""
        lines = [
            (line.name, thinned([each for each in line.points if all(map(math.isfinite, each))])) for line in self.lines
        ]
        values = [value for _, points in lines for _, value in points]
        steps = [step for _, points in lines for step, _ in points]
        values += [*self.levels.values(), *(end for band in self.bands.values() for _, *ends in band for end in ends)]
        if not steps:
            return ""
        across = Scale(min(0, *steps), max(steps), LEFT, WIDTH - RIGHT)
        low = min(values)
        up = Scale(0 if 0 <= low < max(values) / 2 else low, max(values), HEIGHT - BOTTOM, TOP)
        drawn = [_axes(across, up)]
        for name, band in self.bands.items():
            seen = [each for each in band if across.low <= each[0] <= across.high]
            edge = [(step, low) for step, low, _ in seen] + [(step, high) for step, _, high in reversed(seen)]
            path = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in edge)
            drawn.append(
                f'<polygon points="{path}" fill="#8bc34a" opacity=".3"><title>{markup(name)}</title></polygon>'
            )
        for name, level in self.levels.items():
            drawn.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(level):.1f}" y2="{up(level):.1f}" stroke="#a12" '
                f'stroke-dasharray="4 3"><title>{markup(name)}: {level:.6g}</title></line>'
            )
        keys = []
        for number, (name, points) in enumerate(lines):
            color = COLORS[number % len(COLORS)]
            keys.append(f'<span class=key><b style="background:{color}"></b> {markup(name)}</span>')
            drawn.append(_curve(name, points, across, up, color))
        keys += [
            f'<span class=key><b style="background:#a12;height:2px"></b> {markup(each)}</span>' for each in self.levels
        ]
        keys += [f'<span class=key><b style="background:#cde3b0"></b> {markup(each)}</span>' for each in self.bands]
        picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(drawn)}</svg>'
        caption = f"<b>{markup(self.title)}</b><br>{''.join(keys)}"
        return f"<figure class=plot><figcaption>{caption}</figcaption>{picture}</figure>"


class Scale:
    """Places values between two pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if low == high:
            low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Gives three to six round values."""
        rough = (self.high - self.low) / 4
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough * 0.99)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Gives at most SHOWN_POINTS of the points, the first and the last among them."""
    if len(points) <= SHOWN_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(number * last / (SHOWN_POINTS - 1))] for number in range(SHOWN_POINTS)]


def _axes(across: Scale, up: Scale) -> str:
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class=grid />')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for value in across.ticks():
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:,.6g}</text>')
    return "".join(parts)


def _curve(name: str, points: Sequence[tuple[float, float]], across: Scale, up: Scale, color: str) -> str:
    path = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in points)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>']
    radius = 2.5 if len(points) <= 40 else 1.2
    for step, value in points:
        told = f"{markup(name)}, step {step:,.6g}: {value:.6g}"
        drawn.append(
            f'<circle cx="{across(step):.1f}" cy="{up(value):.1f}" r="{radius}" fill="{color}">'
            f"<title>{told}</title></circle>"
        )
    return "".join(drawn)


def charts(drawn: Iterable[Chart]) -> str:
    """Gives several beside each other."""
    return f"<div class=examples>{''.join(chart.markup() for chart in drawn)}</div>"
