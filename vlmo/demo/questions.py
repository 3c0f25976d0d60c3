"""Questions about pictures in the manner of VQA v2: each with what ten people answered."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmo.demo.scenes import COLORS, GROUNDS, SHAPES, Scene, Thing
from vlmo.demo.texts import NUMBERS

Asked = tuple[str, str, Sequence[str]]  # question, answer, answers that people may confuse it with


@dataclass(frozen=True)
class Question:
    """`answers`: what each of ten people said; `truth`: the right answer."""

    text: str
    truth: str
    answers: tuple[str, ...]

    def records(self) -> list[dict[str, Any]]:
        """The answers as VQA v2's annotations list them."""
        return [
            {"answer": answer, "answer_id": number, "answer_confidence": "yes"}
            for number, answer in enumerate(self.answers, 1)
        ]


def questions(scene: Scene, rng: random.Random, number: int) -> list[Question]:
    """At most `number` questions about the picture, each of another kind."""
    asked = [question for ask in rng.sample(KINDS, len(KINDS)) if (question := ask(scene, rng))]
    return [Question(text, truth, _ten_people(truth, others, rng)) for text, truth, others in asked[:number]]


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


def _unique(scene: Scene, attribute: str, rng: random.Random) -> Thing | None:
    """A thing that its colour (or shape) alone tells from the others."""
    found = [thing for thing in scene.things if scene.count(**{attribute: getattr(thing, attribute)}) == 1]
    return rng.choice(found) if found else None


def _ask_color(scene: Scene, rng: random.Random) -> Asked | None:
    thing = _unique(scene, "shape", rng)
    return (f"what color is the {thing.shape}?", thing.color, COLORS) if thing else None


def _ask_shape(scene: Scene, rng: random.Random) -> Asked | None:
    thing = _unique(scene, "color", rng)
    return (f"what is the {thing.color} shape?", thing.shape, SHAPES) if thing else None


def _ask_ground(scene: Scene, rng: random.Random) -> Asked:
    return "what are the shapes on?", scene.ground, GROUNDS


def _ask_number(scene: Scene, rng: random.Random) -> Asked:
    if rng.random() < 0.4:
        return "how many shapes are there?", str(len(scene.things)), ("2", "3", "4")
    color = rng.choice(scene.things).color
    return f"how many shapes are {color}?", str(scene.count(color=color)), ("1", "2", "3")


def _ask_existence(scene: Scene, rng: random.Random) -> Asked:
    """Half are wrong: a colour that is there and a shape that is, half of those times, there on another thing."""
    thing = rng.choice(scene.things)
    color, shape = thing.color, thing.shape
    if rng.random() < 0.5:
        absent = [one for one in SHAPES if not scene.count(color=color, shape=one)]
        on_others = [one for one in absent if scene.count(shape=one)]
        shape = rng.choice(on_others if on_others and rng.random() < 0.5 else absent)
    truth = "yes" if scene.count(color=color, shape=shape) else "no"
    return f"is there a {color} {shape}?", truth, ("yes", "no")


KINDS: tuple[Callable[[Scene, random.Random], Asked | None], ...] = (
    _ask_color,
    _ask_shape,
    _ask_ground,
    _ask_number,
    _ask_existence,
)
