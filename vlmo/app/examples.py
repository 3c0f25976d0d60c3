"""Pictures to begin with, where no folder of images was given."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {"red": "#d33", "blue": "#36c", "yellow": "#ec3", "green": "#2a5"}
GROUNDS = ("#e8d9b0", "#bfe3b4", "#cfe5f5")
PICTURES = (("red circle", "blue square"), ("yellow square", "green circle"), ("blue circle", "red square"))
SIDE = 320


def painted(folder: Path) -> list[str]:
    """Paints the pictures into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for ground, things in zip(GROUNDS, PICTURES, strict=True):
        path = folder / f"{' and '.join(things)}.png".replace(" ", "-")
        if not path.is_file():
            _paint(ground, things).save(path)
        paths.append(str(path))
    return paths


def _paint(ground: str, things: Sequence[str]) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    draw = ImageDraw.Draw(picture)
    for number, thing in enumerate(things):
        color, shape = thing.split()
        left = 30 + number * 150
        box = (left, 100, left + 110, 210)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, COLORS[color])
    return picture
