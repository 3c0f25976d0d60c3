"""The generated world: pictures of shapes, as descriptions. `drawing.py` paints them, `texts.py` talks about them.

A picture has a ground and two or three things, at most one in each quarter. A quarter is 2 x 2 patches of the model, so
that few layers suffice to recognise a thing; which things lie where is for the model to work out.
"""

import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "yellow", "green", "blue")
GROUNDS = ("sand", "grass", "snow", "water")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # the quarters, in reading order

PICTURE_SIZE = 64  # pixels a side
QUARTER = PICTURE_SIZE // 2
JITTER = 1  # pixels by which a thing may be off the middle of its quarter


@dataclass(frozen=True)
class Thing:
    """One shape; `place` indexes PLACES, `dx`, `dy` are pixels off the middle of the quarter, `tilt` degrees."""

    shape: str
    color: str
    place: int
    dx: int = 0
    dy: int = 0
    tilt: int = 0

    @property
    def row(self) -> int:
        return self.place // 2

    @property
    def column(self) -> int:
        return self.place % 2

    @property
    def look(self) -> tuple[str, str]:
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """A picture's content: things in reading order, and which of its ground's paintings it has."""

    things: tuple[Thing, ...]
    ground: str
    painting: int = 0

    @property
    def signature(self) -> tuple:
        """What the picture shows, without what only changes pixels (jitter, tilt, painting)."""
        return self.ground, tuple((thing.place, thing.look) for thing in self.things)

    def count(self, **attributes: str) -> int:
        """How many things have all the given attributes: `count(color="red", shape="circle")`."""
        return sum(all(getattr(thing, name) == value for name, value in attributes.items()) for thing in self.things)

    def neighbour(self, thing: Thing, relation: str) -> Thing | None:
        """The thing in the next quarter; `scene.neighbour(a, "above")` is the one that is above a."""
        row = {"above": thing.row - 1, "below": thing.row + 1}.get(relation, thing.row)
        column = {"left of": thing.column - 1, "right of": thing.column + 1}.get(relation, thing.column)
        return next((other for other in self.things if (other.row, other.column) == (row, column)), None)


class World:
    """Draws pictures, none twice: whatever splits are made of them are disjoint, and test pictures new combinations."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._seen: set[tuple] = set()

    def scene(self, colors: tuple[str, ...] = COLORS, shapes: tuple[str, ...] = SHAPES) -> Scene:
        """A new picture with things of the given colours and shapes."""
        while True:
            scene = self._draw(colors, shapes)
            if scene.signature not in self._seen:
                self._seen.add(scene.signature)
                return scene

    def scenes(self, number: int) -> list[Scene]:
        return [self.scene() for _ in range(number)]

    def imagine(self) -> Scene:
        """A picture to talk about only; it may look like others."""
        return self._draw(COLORS, SHAPES)

    def _draw(self, colors: tuple[str, ...], shapes: tuple[str, ...]) -> Scene:
        rng = self.rng
        number = rng.choice((2, 3))
        things: list[Thing] = []
        for place in sorted(rng.sample(range(len(PLACES)), number)):
            color, shape = rng.choice(colors), rng.choice(shapes)
            if things and rng.random() < 0.25:  # something to count: repeat a colour or a shape
                other = rng.choice(things)
                color, shape = (other.color, shape) if rng.random() < 0.5 else (color, other.shape)
            dx, dy = rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)
            things.append(Thing(shape, color, place, dx, dy, rng.choice((-5, 0, 5))))
        return Scene(tuple(things), rng.choice(GROUNDS), rng.randrange(4))
