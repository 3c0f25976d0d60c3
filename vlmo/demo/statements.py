"""Statements about pairs of pictures, in the manner of NLVR2: each is true of half the pairs it is used with."""

from collections.abc import Callable, Iterator

from vlmo.demo.scenes import COLORS, GROUNDS, SHAPES, Scene, World

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
            yield from _existence(f"a {color} {shape}", color=color, shape=shape)
        yield from _existence(f"a {color} shape", color=color)
    for shape in shapes:
        yield from _existence(f"a {shape}", shape=shape)
    for ground in GROUNDS:
        yield from _ground(ground)


def _ground(ground: str) -> Iterator[tuple[str, str, Holds]]:
    yield "ground", f"the left picture is on {ground}.", lambda a, b: a.ground == ground
    yield "ground", f"the right picture is on {ground}.", lambda a, b: b.ground == ground


def _existence(shown: str, **what: str) -> Iterator[tuple[str, str, Holds]]:
    kind = "-".join(what)
    yield f"left {kind}", f"there is {shown} in the left picture.", lambda a, b: a.count(**what) > 0
    yield f"right {kind}", f"there is {shown} in the right picture.", lambda a, b: b.count(**what) > 0
    yield f"both {kind}", f"there is {shown} in both pictures.", lambda a, b: min(a.count(**what), b.count(**what)) > 0
    yield f"no {kind}", f"there is {shown} in no picture.", lambda a, b: not (a.count(**what) or b.count(**what))
