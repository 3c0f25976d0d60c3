"""What is said about the pictures: captions, regions, questions with ten people's answers, statements, plain text."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmo.demo.world import COLORS, GROUNDS, PLACES, SHAPES, SIZES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


# --- captions: at most 14 words and marks, so that a caption fits in 16 tokens ------------------------------------------------


def phrase(thing: Thing, size: bool = False) -> str:
    """ "red circle", with its size "big red circle" """
    return " ".join(thing.look if size else thing.look[1:])


def listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five different ways of describing the picture, each of which fits few other pictures."""
    return [
        _caption_looks(scene, rng),
        _caption_places(scene, rng),
        _caption_relation(scene, rng),
        _caption_sizes(scene, rng),
        _caption_looks(scene, rng),
    ]


def _some(scene: Scene, rng: random.Random, number: int = 4) -> list[Thing]:
    return rng.sample(scene.things, min(number, len(scene.things)))


def _caption_looks(scene: Scene, rng: random.Random) -> str:
    return f"{listing([phrase(thing) for thing in _some(scene, rng)])} on {scene.ground}."


def _caption_sizes(scene: Scene, rng: random.Random) -> str:
    return listing([phrase(thing, size=True) for thing in _some(scene, rng, 3)]) + f" on {scene.ground}."


def _caption_places(scene: Scene, rng: random.Random) -> str:
    return (
        listing([f"{PLACES[thing.place]} {phrase(thing)}" for thing in _some(scene, rng, 2)]) + f" on {scene.ground}."
    )


def _caption_relation(scene: Scene, rng: random.Random) -> str:
    related = [
        (thing, relation, other)
        for thing in scene.things
        for relation in OPPOSITE
        if (other := scene.neighbour(thing, OPPOSITE[relation]))
    ]
    if not related:
        return _caption_places(scene, rng)
    thing, relation, other = rng.choice(related)
    text = f"{phrase(thing)} {relation} {phrase(other)}"
    rest = [phrase(third) for third in scene.things if third not in (thing, other)]
    return text + (f", also {listing(rest)}." if rest else f" on {scene.ground}.")


def regions(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[Thing, ...]]]:
    """Phrases for parts of the picture, each with the things that it is about."""
    parts: list[tuple[str, tuple[Thing, ...]]] = []
    for thing in scene.things:
        parts.append((f"{phrase(thing, size=True)} {PLACES[thing.place]}", (thing,)))
        for relation in ("left of", "above"):
            other = scene.neighbour(thing, OPPOSITE[relation])
            if other:
                ahead, behind, word = (
                    (thing, other, relation) if rng.random() < 0.5 else (other, thing, OPPOSITE[relation])
                )
                parts.append((f"{phrase(ahead)} {word} {phrase(behind)}", (thing, other)))
    return parts


# --- questions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """`answers`: what each of ten people said; `truth`: the right answer."""

    text: str
    truth: str
    answers: tuple[str, ...]


def questions(scene: Scene, rng: random.Random, number: int) -> list[Question]:
    """`number` questions of different kinds about the picture."""
    asked: dict[str, tuple[str, tuple[str, ...]]] = {}
    kinds = rng.sample(QUESTION_KINDS, len(QUESTION_KINDS))
    for ask in kinds:
        question = ask(scene, rng)
        if question:
            text, truth, confusions = question
            asked.setdefault(text, (truth, confusions))
    chosen = list(asked.items())[:number]
    return [Question(text, truth, _ten_people(truth, confusions, rng)) for text, (truth, confusions) in chosen]


def _ten_people(truth: str, confusions: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """Most are right, some err, and some write a number as a word or put an article."""
    answers = []
    for _ in range(10):
        answer = truth if rng.random() < 0.85 else rng.choice([one for one in confusions if one != truth])
        if rng.random() < 0.08:
            if answer.isdigit():
                answer = NUMBERS[int(answer)]
            elif answer in SHAPES:
                answer = f"A {answer}"
        answers.append(answer)
    return tuple(answers)


Asked = tuple[str, str, tuple[str, ...]]  # question, answer, answers that people may confuse it with


def _unique(scene: Scene, attribute: str, rng: random.Random) -> Thing | None:
    """A thing that its colour (shape, size) alone tells from the others."""
    found = [thing for thing in scene.things if scene.count(**{attribute: getattr(thing, attribute)}) == 1]
    return rng.choice(found) if found else None


def _ask_color(scene: Scene, rng: random.Random) -> Asked | None:
    thing = _unique(scene, "shape", rng)
    return (f"what color is the {thing.shape}?", thing.color, COLORS) if thing else None


def _ask_shape(scene: Scene, rng: random.Random) -> Asked | None:
    thing = _unique(scene, "color", rng)
    return (f"what is the {thing.color} shape?", thing.shape, SHAPES) if thing else None


def _ask_size(scene: Scene, rng: random.Random) -> Asked | None:
    thing = _unique(scene, "shape", rng)
    return (f"what size is the {thing.shape}?", thing.size, SIZES) if thing else None


def _ask_place(scene: Scene, rng: random.Random) -> Asked | None:
    thing = _unique(scene, "shape", rng)
    return (f"where is the {thing.shape}?", PLACES[thing.place], PLACES) if thing else None


def _ask_ground(scene: Scene, rng: random.Random) -> Asked:
    return "what are the shapes on?", scene.ground, GROUNDS


def _ask_number(scene: Scene, rng: random.Random) -> Asked:
    if rng.random() < 0.4:
        return "how many shapes are there?", str(len(scene.things)), ("2", "3", "4")
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return f"how many shapes are {thing.color}?", str(scene.count(color=thing.color)), ("1", "2", "3")
    return f"how many {thing.shape}s are there?", str(scene.count(shape=thing.shape)), ("1", "2", "3")


def _ask_existence(scene: Scene, rng: random.Random) -> Asked:
    """The wrong ones name a colour that is there and, half of them, a shape that is there on another thing."""
    thing = rng.choice(scene.things)
    color, shape = thing.color, thing.shape
    if rng.random() < 0.5:
        wrong = [one for one in SHAPES if not scene.count(color=color, shape=one)]
        shape = rng.choice([one for one in wrong if scene.count(shape=one) or rng.random() < 0.5] or wrong)
    truth = "yes" if scene.count(color=color, shape=shape) else "no"
    return f"is there {'an' if color == 'orange' else 'a'} {color} {shape}?", truth, ("yes", "no")


def _ask_neighbour(scene: Scene, rng: random.Random) -> Asked | None:
    thing = _unique(scene, "shape", rng)
    relations = {"left of": "beside", "right of": "beside", "above": "above", "below": "below"}
    found = [(word, other) for key, word in relations.items() if thing and (other := scene.neighbour(thing, key))]
    if not thing or not found:
        return None
    word, other = rng.choice(found)
    return f"what is {word} the {thing.shape}?", other.shape, SHAPES


def _ask_relation(scene: Scene, rng: random.Random) -> Asked | None:
    singles = [thing for thing in scene.things if scene.count(color=thing.color) == 1]
    if len(singles) < 2:
        return None
    first, second = rng.sample(singles, 2)
    if first.column != second.column:
        relation, holds = rng.choice(
            (("left of", first.column < second.column), ("right of", first.column > second.column))
        )
    else:
        relation, holds = rng.choice((("above", first.row < second.row), ("below", first.row > second.row)))
    return f"is {first.color} {relation} {second.color}?", "yes" if holds else "no", ("yes", "no")


QUESTION_KINDS: tuple[Callable[[Scene, random.Random], Asked | None], ...] = (
    _ask_color,
    _ask_shape,
    _ask_size,
    _ask_place,
    _ask_ground,
    _ask_number,
    _ask_existence,
    _ask_neighbour,
    _ask_relation,
)
