"""What is said is true of the pictures; here it is read back word by word."""

import random
import re
from collections import Counter

from vlmo.demo.questions import KINDS, questions
from vlmo.demo.scenes import COLORS, GROUNDS, PLACES, SHAPES, Scene, World
from vlmo.demo.statements import PAIRS, statement_set
from vlmo.demo.texts import NUMBERS, captions, regions, sentences

LOOK = re.compile(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


def looks(text: str) -> Counter[tuple[str, str]]:
    return Counter(LOOK.findall(text))


def test_captions_are_true_and_fit_in_sixteen_tokens() -> None:
    rng = random.Random(0)
    for scene in World(0).scenes(300):
        there = Counter((thing.color, thing.shape) for thing in scene.things)
        for text in captions(scene, rng):
            assert looks(text) and not looks(text) - there, text
            assert len(re.findall(r"\w+|[^\w\s]", text)) <= 14, text
            assert all(ground == scene.ground for ground in GROUNDS if f"on {ground}" in text), text
            for place, color, shape in re.findall(rf"({'|'.join(PLACES)}) {LOOK.pattern}", text):
                assert any((PLACES[t.place], t.color, t.shape) == (place, color, shape) for t in scene.things), text


def test_captions_tell_pictures_apart() -> None:
    rng = random.Random(0)
    first = [captions(scene, rng)[0] for scene in World(1).scenes(300)]
    same = Counter(tuple(sorted(looks(text).elements())) + tuple(text.split()[-1:]) for text in first)
    assert sum(number for number in same.values() if number == 1) > 0.8 * 300


def true_of(scene: Scene, text: str) -> bool:
    """Whether a region's phrase holds."""
    text = text.rstrip(".")
    if match := re.fullmatch(r"the shapes are on (\w+)", text):
        return scene.ground == match[1]
    if match := re.fullmatch(r"there is a (\w+) (\w+)", text):
        return scene.count(color=match[1], shape=match[2]) > 0
    if match := re.fullmatch(r"there are (\w+) shapes", text):
        return len(scene.things) == NUMBERS.index(match[1])
    if match := re.fullmatch(r"the (\w+) shape is a (\w+)", text):
        return [thing.shape for thing in scene.things if thing.color == match[1]] == [match[2]]
    if match := re.fullmatch(r"(\w+) shapes? (?:is|are) (\w+)", text):
        return scene.count(color=match[2]) == NUMBERS.index(match[1])
    if match := re.fullmatch(r"a (\w+) is (left of|right of|above|below) the (\w+)", text):
        (other,) = (thing for thing in scene.things if thing.shape == match[3])
        neighbour = scene.neighbour(other, match[2])
        return neighbour is not None and neighbour.shape == match[1]
    match = re.fullmatch(r"the (\w+) is (.+)", text)
    assert match, text
    (thing,) = (thing for thing in scene.things if thing.shape == match[1])
    return match[2] in (thing.color, PLACES[thing.place])


def test_regions_are_true() -> None:
    rng = random.Random(0)
    for scene in World(2).scenes(300):
        for text, things in regions(scene, rng):
            assert true_of(scene, text), (scene, text)
            assert things and set(things) <= set(scene.things)


def test_answers_to_questions_are_right() -> None:
    rng, kinds = random.Random(0), Counter[str]()
    for scene in World(3).scenes(400):
        asked = questions(scene, rng, number=len(KINDS))
        assert len({question.text for question in asked}) == len(asked)
        for question in asked:
            text, truth = question.text.rstrip("?"), question.truth
            kinds[" ".join(text.split()[:2])] += 1
            if match := re.fullmatch(r"what color is the (\w+)", text):
                assert true_of(scene, f"the {match[1]} is {truth}")
            elif match := re.fullmatch(r"what is the (\w+) shape", text):
                assert true_of(scene, f"the {match[1]} shape is a {truth}")
            elif text == "what are the shapes on":
                assert truth == scene.ground
            elif text == "how many shapes are there":
                assert int(truth) == len(scene.things)
            elif match := re.fullmatch(r"how many shapes are (\w+)", text):
                assert int(truth) == scene.count(color=match[1])
            else:
                match = re.fullmatch(r"is there a (\w+) (\w+)", text)
                assert match, text
                assert truth == ("yes" if scene.count(color=match[1], shape=match[2]) else "no")
    assert len(kinds) == len(KINDS) and min(kinds.values()) > 100


def test_ten_people_mostly_agree_but_not_always() -> None:
    rng = random.Random(0)
    asked = [question for scene in World(4).scenes(200) for question in questions(scene, rng, number=6)]
    right = [sum(answer == question.truth for answer in question.answers) for question in asked]
    assert {len(question.answers) for question in asked} == {10}
    assert sum(count >= 4 for count in right) > 0.99 * len(asked)  # the right answer scores 1
    assert sum(count < 10 for count in right) > 0.5 * len(asked)  # others score a little
    written = {answer for question in asked for answer in question.answers}
    assert {"two", "A circle"} <= written  # to be normalised


def test_yes_and_no_are_equally_frequent() -> None:
    rng = random.Random(0)
    asked = [question for scene in World(5).scenes(2000) for question in questions(scene, rng, number=8)]
    truths = [question.truth for question in asked if question.text.startswith("is there")]
    assert 0.44 < truths.count("yes") / len(truths) < 0.56


def test_statements_hold_of_half_the_pairs_they_are_used_with() -> None:
    world = World(6)
    for _ in range(60):
        pairs, statements = statement_set(world, number=4)
        assert len(pairs) == PAIRS and 1 <= len(statements) <= 4
        for text, truths in statements:
            assert sum(truths) == PAIRS // 2
            for pair, truth in zip(pairs, truths, strict=True):
                assert said_of_pair(pair, text.rstrip(".")) == truth, (pair, text)


def said_of_pair(pair: tuple[Scene, Scene], text: str) -> bool:
    if match := re.fullmatch(r"the (left|right) picture is on (\w+)", text):
        return pair[match[1] == "right"].ground == match[2]
    match = re.fullmatch(r"there is a (.+) in (the left picture|the right picture|both pictures|no picture)", text)
    assert match, text
    what = {"color" if word in COLORS else "shape": word for word in match[1].split() if word != "shape"}
    shown = [scene.count(**what) > 0 for scene in pair]
    return {
        "the left picture": shown[0],
        "the right picture": shown[1],
        "both pictures": all(shown),
        "no picture": not any(shown),
    }[match[2]]


def test_plain_text_is_one_text_a_line() -> None:
    lines = sentences(World(7), 100)
    assert len(lines) == 100
    assert all(line and "\n" not in line and line.endswith(".") for line in lines)
    assert len(set(lines)) > 95
