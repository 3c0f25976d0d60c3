"""Statements about pairs of pictures, in the manner of NLVR2: each is true of half the pairs it is used with."""

import random
from collections.abc import Callable, Iterator

from vlmo.demo.texts import NUMBERS
from vlmo.demo.world import COLORS, GROUNDS, SHAPES, Scene, World

PAIRS = 4  # in a set; every statement of the set is used with each of them

Pair = tuple[Scene, Scene]
Holds = Callable[[Scene, Scene], bool]


def statement_set(world: World, number: int) -> tuple[list[Pair], list[tuple[str, list[bool]]]]:
    """PAIRS pairs of new pictures, and up to `number` statements with whether they hold of each pair.

    Only statements that hold of exactly half the pairs are used: the sentence alone says nothing about the answer.
    """
    rng = world.rng
    colors, shapes = tuple(rng.sample(COLORS, 3)), tuple(rng.sample(SHAPES, 3))  # few, so that pictures share things
    pairs = [(world.scene(colors, shapes), world.scene(colors, shapes)) for _ in range(PAIRS)]
    by_kind: dict[str, list[tuple[str, list[bool]]]] = {}
    for kind, text, holds in _candidates(colors, shapes):
        truths = [holds(left, right) for left, right in pairs]
        if sum(truths) == PAIRS // 2:
            by_kind.setdefault(kind, []).append((text, truths))
    kinds = rng.sample(sorted(by_kind), len(by_kind))
    return pairs, [rng.choice(by_kind[kind]) for kind in kinds[:number]]


def _candidates(colors: tuple[str, ...], shapes: tuple[str, ...]) -> Iterator[tuple[str, str, Holds]]:
    """Kind, text and truth of everything that can be said about pairs of pictures with these colours and shapes."""
    for color in colors:
        for shape in shapes:
            yield from _existence(f"{'an' if color == 'orange' else 'a'} {color} {shape}", color=color, shape=shape)
        for number in (1, 2):
            shown = f"{NUMBERS[number]} {color} shape{'s' if number > 1 else ''}"
            yield from _amount(shown, number, color=color)
    for shape in shapes:
        yield from _existence(f"a {shape}", shape=shape)
    for ground in GROUNDS:
        yield "ground", f"both pictures are on {ground}.", lambda a, b, g=ground: a.ground == b.ground == g
        yield "ground", f"one picture is on {ground}.", lambda a, b, g=ground: (a.ground == g) != (b.ground == g)
    for side, other, sign in (("left", "right", 1), ("right", "left", -1)):
        text = f"the {side} picture has more shapes than the {other} one."
        yield "more", text, lambda a, b, s=sign: s * (len(a.things) - len(b.things)) > 0


def _existence(shown: str, **what: str) -> Iterator[tuple[str, str, Holds]]:
    kind = "-".join(what)
    yield f"left {kind}", f"the left picture shows {shown}.", lambda a, b: a.count(**what) > 0
    yield f"right {kind}", f"the right picture shows {shown}.", lambda a, b: b.count(**what) > 0
    yield f"both {kind}", f"both pictures show {shown}.", lambda a, b: a.count(**what) > 0 and b.count(**what) > 0
    yield f"no {kind}", f"no picture shows {shown}.", lambda a, b: not (a.count(**what) or b.count(**what))


def _amount(shown: str, number: int, **what: str) -> Iterator[tuple[str, str, Holds]]:
    yield "left amount", f"the left picture shows {shown}.", lambda a, b: a.count(**what) == number
    yield "right amount", f"the right picture shows {shown}.", lambda a, b: b.count(**what) == number
