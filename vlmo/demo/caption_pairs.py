"""Right and wrong captions of the demo's world, in the layout of the suite `caption_pairs`: what does a model compose?

python -m vlmo.demo.caption_pairs --data ROOT [--number N] [--seed N]
python -m vlmo.evaluate CKPT --suite caption_pairs --data ROOT

The wrong caption has the same words in another order (swap_color, swap_relation), or one word replaced
(replace_color, replace_relation).
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vlmo.demo.drawing import picture
from vlmo.demo.scenes import COLORS, Scene, Thing, World
from vlmo.demo.texts import OPPOSITE, phrase, relations

Pair = tuple[str, str]  # right, wrong


def _two(scene: Scene, rng: random.Random) -> tuple[Thing, Thing] | None:
    """Gives two things of different colour and shape, in an order that says nothing."""
    pairs = [(a, b) for a in scene.things for b in scene.things if a.color != b.color and a.shape != b.shape]
    return rng.choice(pairs) if pairs else None


def _said(one: tuple[str, str], other: tuple[str, str], scene: Scene) -> str:
    return f"{' '.join(one)} and {' '.join(other)} on {scene.ground}."


def swap_color(scene: Scene, rng: random.Random) -> Pair | None:
    """ "red circle and blue star", "blue circle and red star" """
    two = _two(scene, rng)
    if two is None:
        return None
    one, other = two
    wrong = ((other.color, one.shape), (one.color, other.shape))
    if any(scene.count(color=color, shape=shape) for color, shape in wrong):
        return None  # (one of them may be true of a third thing)
    return _said(one.look, other.look, scene), _said(*wrong, scene)


def replace_color(scene: Scene, rng: random.Random) -> Pair | None:
    """ "red circle and blue star", "green circle and blue star" """
    two = _two(scene, rng)
    if two is None:
        return None
    one, other = two
    others = [color for color in COLORS if not scene.count(color=color)]
    if not others:
        return None
    return _said(one.look, other.look, scene), _said((rng.choice(others), one.shape), other.look, scene)


def _related(scene: Scene, rng: random.Random) -> tuple[Thing, str, Thing] | None:
    """Gives a relation that its opposite makes wrong: the two things look different and are alone in their looks."""
    found = [
        (one, relation, other)
        for one, relation, other in relations(scene)
        if one.look != other.look and all(scene.count(color=t.color, shape=t.shape) == 1 for t in (one, other))
    ]
    return rng.choice(found) if found else None


def swap_relation(scene: Scene, rng: random.Random) -> Pair | None:
    """ "red circle above blue star", "blue star above red circle" """
    related = _related(scene, rng)
    if related is None:
        return None
    one, relation, other = related
    texts = [f"{phrase(a)} {relation} {phrase(b)} on {scene.ground}." for a, b in ((one, other), (other, one))]
    return texts[0], texts[1]


def replace_relation(scene: Scene, rng: random.Random) -> Pair | None:
    """ "red circle above blue star", "red circle below blue star" """
    related = _related(scene, rng)
    if related is None:
        return None
    one, relation, other = related
    texts = [f"{phrase(one)} {each} {phrase(other)} on {scene.ground}." for each in (relation, OPPOSITE[relation])]
    return texts[0], texts[1]


KINDS: dict[str, Callable[[Scene, random.Random], Pair | None]] = {
    "swap_color": swap_color,
    "swap_relation": swap_relation,
    "replace_color": replace_color,
    "replace_relation": replace_relation,
}


def pairs_of(kind: str, number: int, seed: int) -> Iterator[tuple[Scene, Pair]]:
    """Draws new pictures, each with a right and a wrong caption."""
    world = World(seed)
    while number:
        scene = world.scene()
        pair = KINDS[kind](scene, world.rng)
        if pair is not None:
            number -= 1
            yield scene, pair


def write(root: Path, number: int, seed: int) -> None:
    """Writes `number` pairs of each kind below `root`/caption_pairs."""
    folder = root / "caption_pairs"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for shift, kind in enumerate(KINDS):
        records = {}
        for row, (scene, (right, wrong)) in enumerate(pairs_of(kind, number, seed + shift)):
            name = f"{kind}_{row:04d}.png"
            picture(scene).save(folder / "images" / name)
            records[str(row)] = {"filename": name, "caption": right, "negative_caption": wrong}
        (folder / f"{kind}.json").write_text(json.dumps(records, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vlmo.demo.caption_pairs", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that the suites' data lie in")
    parser.add_argument("--number", type=int, default=300, help="of pairs of each kind")
    parser.add_argument("--seed", type=int, default=1001, help="another than the demo's: other pictures")
    options = parser.parse_args()
    write(options.data, options.number, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
