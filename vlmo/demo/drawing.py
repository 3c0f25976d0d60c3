"""Paints a scene: stickers (white rim, soft shadow, a little shine) on a ground that is lit from the top left."""

import math
import random
from functools import cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from vlmo.demo.scenes import PICTURE_SIZE, QUARTER, Scene, Thing

ZOOM = 4  # everything is drawn this much larger and reduced, which smooths the edges
RADIUS = 12.5  # pixels from the middle of a thing to its rim
Color = tuple[int, int, int]

COLOR = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (255, 214, 10),
    "green": (20, 120, 50),
    "blue": (29, 78, 216),
    "purple": (123, 44, 191),
    "pink": (255, 121, 180),
    "black": (30, 30, 36),
}
# ground: lit corner, far corner, colour of the marks
GROUND = {
    "sand": ((250, 233, 200), (214, 178, 122), (200, 164, 110)),
    "grass": ((190, 226, 140), (104, 160, 74), (80, 138, 60)),
    "snow": ((252, 253, 255), (202, 212, 228), (196, 206, 222)),
    "water": ((176, 228, 240), (84, 158, 196), (214, 242, 250)),
}


def picture(scene: Scene) -> Image.Image:
    """The scene as an RGB image of PICTURE_SIZE x PICTURE_SIZE pixels."""
    image = _ground(scene.ground, scene.painting).copy()
    for thing in scene.things:
        sticker = _sticker(thing.shape, thing.color, thing.tilt)
        image.paste(sticker, (thing.column * QUARTER + thing.dx, thing.row * QUARTER + thing.dy), sticker)
    return image


def box(thing: Thing) -> tuple[int, int, int, int]:
    """x, y, width, height of a thing in pixels, its rim included, its shadow not."""
    opaque = _sticker(thing.shape, thing.color, thing.tilt).getchannel("A").point(lambda alpha: 255 * (alpha > 150))
    left, top, right, bottom = opaque.getbbox() or (0, 0, QUARTER, QUARTER)
    x, y = thing.column * QUARTER + thing.dx, thing.row * QUARTER + thing.dy
    left, top = max(0, x + left), max(0, y + top)
    return left, top, min(PICTURE_SIZE, x + right) - left, min(PICTURE_SIZE, y + bottom) - top


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corner points around (0, 0), y downwards; shapes are scaled to look equally large."""
    if shape == "heart":
        points = []
        for step in range(60):
            t = 2 * math.pi * step / 60
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((math.sin(t) ** 3 * radius * 1.1, (-y - 2.5) * radius * 1.1 / 15))
        return points
    if shape == "star":
        radii = [radius * (1.15 if corner % 2 == 0 else 0.5) for corner in range(10)]
        return _spokes(radii, start=-90)
    corners, scale, start = {
        "circle": (72, 0.95, 0),
        "square": (4, 1.2, 45),
        "triangle": (3, 1.2, -90),
        "diamond": (4, 1.12, 0),
    }[shape]
    points = _spokes([radius * scale] * corners, start)
    squeeze, drop = {"diamond": (0.72, 0.0), "triangle": (1.0, 0.2)}.get(shape, (1.0, 0.0))
    return [(x * squeeze, y + radius * drop) for x, y in points]


def _spokes(radii: list[float], start: float) -> list[tuple[float, float]]:
    angles = [math.radians(start + 360 * index / len(radii)) for index in range(len(radii))]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


@cache
def _sticker(shape: str, color: str, tilt: int) -> Image.Image:
    """A quarter-sized RGBA image with the thing in its middle."""
    side = QUARTER * ZOOM
    outline = [(x + side / 2, y + side / 2) for x, y in _outline(shape, RADIUS * ZOOM)]
    body = Image.new("L", (side, side), 0)
    ImageDraw.Draw(body).polygon(outline, fill=255)
    body = body.rotate(tilt, Image.Resampling.BICUBIC)
    rim = body.filter(ImageFilter.MaxFilter(2 * ZOOM + 1))
    shadow = ImageChops.offset(rim, ZOOM, ZOOM).filter(ImageFilter.GaussianBlur(1.2 * ZOOM)).point(lambda a: a * 0.45)

    plain = Image.new("RGB", (side, side), COLOR[color])
    dark, light = plain.point(lambda c: c * 0.82), plain.point(lambda c: c + (255 - c) * 0.16)
    sticker = Image.new("RGBA", (side, side), (20, 20, 40, 0))
    sticker.putalpha(shadow)
    white = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    white.putalpha(rim)
    fill = Image.composite(dark, light, _towards_bottom_right(side)).convert("RGBA")
    fill.putalpha(body)
    sticker = Image.alpha_composite(Image.alpha_composite(sticker, white), fill)
    return sticker.resize((QUARTER, QUARTER), Image.Resampling.LANCZOS)


def _towards_bottom_right(side: int) -> Image.Image:
    """A mask that rises from 0 (top left) to 255 (bottom right)."""
    down = Image.linear_gradient("L").resize((side, side))
    return Image.blend(down, down.transpose(Image.Transpose.TRANSPOSE), 0.4)


@cache
def _ground(ground: str, painting: int) -> Image.Image:
    side = PICTURE_SIZE * ZOOM
    light, dark, mark = GROUND[ground]
    down = Image.linear_gradient("L").resize((side, side))
    image = Image.composite(Image.new("RGB", (side, side), dark), Image.new("RGB", (side, side), light), down)
    right = down.transpose(Image.Transpose.TRANSPOSE).point(lambda a: a * 0.45)
    image = Image.composite(Image.new("RGB", (side, side), (255, 120, 170)), image, right)
    draw = ImageDraw.Draw(image)
    rng = random.Random(f"{ground} {painting}")
    for _ in range(60 if ground == "grass" else 40):
        x, y = rng.uniform(0, side), rng.uniform(0, side)
        if ground == "grass":  # tufts
            draw.line([(x - 5, y - 10), (x, y), (x + 5, y - 10)], fill=mark, width=3)
        elif ground == "water":  # ripples
            draw.arc([x - 12, y - 5, x + 12, y + 5], 20, 160, fill=mark, width=3)
        else:  # grains and flakes
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=mark)
    return image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
