"""What is said about single pictures, and plain text: captions, phrases for regions, sentences of the same language.

Captions have at most 14 words and marks, so that with [CLS] and [SEP] they fit in 16 tokens.
"""

import random
from collections.abc import Sequence

from vlmo.demo.scenes import PLACES, Scene, Thing, World

NUMBERS = ("no", "one", "two", "three", "four")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def amount(number: int, what: str) -> str:
    """ "one star", "two stars", "two red shapes" """
    return f"{NUMBERS[number]} {what}" + ("" if number == 1 else "s")


def phrase(thing: Thing) -> str:
    """ "red circle" """
    return " ".join(thing.look)


def listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five different ways of describing the picture, each of which fits few other pictures."""
    return [
        _caption_looks(scene, rng),
        _caption_places(scene, rng),
        _caption_relation(scene, rng),
        _caption_number(scene, rng),
        _caption_looks(scene, rng),
    ]


def _some(scene: Scene, rng: random.Random, number: int = 4) -> list[Thing]:
    return rng.sample(scene.things, min(number, len(scene.things)))


def _caption_looks(scene: Scene, rng: random.Random) -> str:
    return f"{listing([phrase(thing) for thing in _some(scene, rng)])} on {scene.ground}."


def _caption_number(scene: Scene, rng: random.Random) -> str:
    return f"{amount(len(scene.things), 'shape')}: {listing([phrase(thing) for thing in _some(scene, rng)])}."


def _caption_places(scene: Scene, rng: random.Random) -> str:
    return (
        listing([f"{PLACES[thing.place]} {phrase(thing)}" for thing in _some(scene, rng, 2)]) + f" on {scene.ground}."
    )


def _caption_relation(scene: Scene, rng: random.Random) -> str:
    related = relations(scene)
    if not related:
        return _caption_places(scene, rng)
    thing, relation, other = rng.choice(related)
    text = f"{phrase(thing)} {relation} {phrase(other)}"
    rest = [phrase(third) for third in scene.things if third not in (thing, other)]
    return text + (f", also {listing(rest)}." if rest else f" on {scene.ground}.")


def relations(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """What is left of, right of, above or below what; only things in adjoining quarters are compared."""
    return [
        (thing, relation, other)
        for thing in scene.things
        for relation in OPPOSITE
        if (other := scene.neighbour(thing, OPPOSITE[relation]))
    ]


def regions(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[Thing, ...]]]:
    """Phrases for parts of the picture, each with the things that it is about."""
    parts: list[tuple[str, tuple[Thing, ...]]] = [(f"the shapes are on {scene.ground}.", scene.things)]
    for thing in scene.things:
        parts.append((f"there is a {phrase(thing)}.", (thing,)))
        same_color = tuple(other for other in scene.things if other.color == thing.color)
        same_shape = tuple(other for other in scene.things if other.shape == thing.shape)
        if len(same_color) == 1:
            parts.append((f"the {thing.color} shape is a {thing.shape}.", same_color))
        if len(same_shape) == 1:
            parts.append((f"the {thing.shape} is {thing.color}.", same_shape))
            parts.append((f"the {thing.shape} is {PLACES[thing.place]}.", same_shape))
        parts.append((f"{amount(len(same_color), 'shape')} {verb(len(same_color))} {thing.color}.", same_color))
    parts.append((f"there {verb(len(scene.things))} {amount(len(scene.things), 'shape')}.", scene.things))
    for one, relation, other in relations(scene):
        if scene.count(shape=other.shape) == 1:
            parts.append((f"a {one.shape} is {relation} the {other.shape}.", (one, other)))
    unique = {text: things for text, things in parts}
    return rng.sample(sorted(unique.items()), len(unique))


def verb(number: int) -> str:
    return "is" if number == 1 else "are"


def sentences(world: World, lines: int) -> list[str]:
    """Plain text: each line says of a picture that nobody painted what follows from what."""
    rng = world.rng
    text = []
    for _ in range(lines):
        scene = world.imagine()
        about = [one for one, _ in regions(scene, rng)]
        text.append(" ".join([rng.choice(captions(scene, rng)), *about[: rng.randint(1, 3)]]))
    return text
