"""SNLI-VE and GQA of the demo's world, small, in the layouts in which the real ones are published (DATA.md).

python -m vlmo.demo.downstream --data ROOT [--pictures N] [--seed N]
python -m vlmo.utils.convert snli_ve ROOT/snli_ve ROOT/arrow
python -m vlmo.utils.convert gqa ROOT/gqa ROOT/arrow

ROOT/vocab.txt is a vocabulary for both. N pictures are for training, a tenth as many for val (dev), a fifth for testdev
(test).
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlmo.demo.drawing import picture
from vlmo.demo.prepare import train_vocabulary
from vlmo.demo.scenes import COLORS, GROUNDS, SHAPES, Scene, World
from vlmo.demo.texts import OPPOSITE, amount, phrase, verb

OF_EACH_LABEL = 2  # hypotheses about a picture
UNSEEN = ("is old", "is for sale", "was made by a child", "has no name")  # what no picture tells of a thing
ANSWERS = {"color": COLORS, "shape": SHAPES, "ground": GROUNDS}  # by global group


# --- SNLI-VE ----------------------------------------------------------------------------------------------------------


def hypothesis(scene: Scene, label: str, rng: random.Random) -> str:
    """Says something that the picture entails, leaves open (which the words alone tell), or contradicts."""
    thing, right = rng.choice(scene.things), label == "entailment"
    if label == "neutral":
        return f"the {phrase(thing)} {rng.choice(UNSEEN)}."
    kind = rng.choice(("existence", "ground", "number"))
    if kind == "ground":
        others = [ground for ground in GROUNDS if ground != scene.ground]
        return f"the shapes are on {scene.ground if right else rng.choice(others)}."
    if kind == "number":
        number = scene.count(color=thing.color)
        number = number if right else rng.choice([other for other in range(4) if other != number])
        return f"{amount(number, 'shape')} {verb(number)} {thing.color}."
    shape = thing.shape if right else rng.choice([s for s in SHAPES if not scene.count(color=thing.color, shape=s)])
    return f"there is a {thing.color} {shape}."


def write_snli_ve(root: Path, splits: dict[str, list[Scene]], rng: random.Random) -> list[str]:
    """Writes the official files below `root`; returns the hypotheses of training."""
    folder = root / "flickr30k-images"
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    number = 0
    for split, scenes in splits.items():
        lines = []
        for scene in scenes:
            number += 1
            picture(scene).save(folder / f"{number}.jpg", quality=92, subsampling=0)
            for label in ("entailment", "neutral", "contradiction"):
                for which in range(OF_EACH_LABEL):
                    line = {"Flickr30K_ID": str(number), "pairID": f"{number}.jpg#{which}r1{label[0]}"}
                    lines.append(line | {"gold_label": label, "sentence2": hypothesis(scene, label, rng)})
        (root / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        texts += [line["sentence2"] for line in lines if split == "train"]
    return texts


# --- GQA --------------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A question with its answer, types and global group, and what is then asked of the same, in the unbalanced set."""

    question: str
    answer: str
    structural: str
    semantic: str
    group: str | None
    options: tuple[str, ...] = ("yes", "no")
    entailed: tuple["Asked", ...] = ()


def questions(scene: Scene, rng: random.Random) -> Iterator[Asked]:
    """Yields one question of each kind that the picture lends itself to."""
    yield Asked("what are the shapes on?", scene.ground, "query", "global", "ground", GROUNDS)
    shapes = [thing for thing in scene.things if scene.count(shape=thing.shape) == 1]
    if shapes:
        thing = rng.choice(shapes)
        other = rng.choice([color for color in COLORS if color != thing.color])
        pair = tuple(rng.sample((thing.color, other), 2))
        verify = Asked(f"is the {thing.shape} {thing.color}?", "yes", "verify", "attr", None)
        choose = Asked(f"is the {thing.shape} {pair[0]} or {pair[1]}?", thing.color, "choose", "attr", "color", pair)
        which = f"what color is the {thing.shape}?"
        yield Asked(which, thing.color, "query", "attr", "color", COLORS, (verify, choose))
        yield choose
        asked = rng.choice((thing.color, other))
        answer = "yes" if asked == thing.color else "no"
        yield Asked(f"is the {thing.shape} {asked}?", answer, "verify", "attr", None)
    colors = [thing for thing in scene.things if scene.count(color=thing.color) == 1]
    if colors:
        thing = rng.choice(colors)
        there = Asked(f"is there a {phrase(thing)}?", "yes", "verify", "obj", None)
        yield Asked(f"what is the {thing.color} shape?", thing.shape, "query", "obj", "shape", SHAPES, (there,))
        absent = rng.choice([shape for shape in SHAPES if shape != thing.shape])
        shape = rng.choice((thing.shape, absent))
        answer = "yes" if shape == thing.shape else "no"
        yield Asked(f"is there a {thing.color} {shape}?", answer, "verify", "obj", None)
    if len(shapes) > 1:
        one, two = rng.sample(shapes, 2)
        same = "yes" if one.color == two.color else "no"
        yield Asked(f"do the {one.shape} and the {two.shape} have the same color?", same, "compare", "attr", None)
    for thing in shapes[:1]:
        for relation in OPPOSITE:
            if neighbour := scene.neighbour(thing, relation):
                text = f"what is {relation} the {thing.shape}?"
                yield Asked(text, neighbour.shape, "query", "rel", "shape", SHAPES)
                break
    present = sorted({thing.shape for thing in scene.things})
    two_present = len(present) > 1 and rng.random() < 0.5
    first, second = rng.sample(present if two_present else SHAPES, 2)
    each = tuple(Asked(f"is there a {shape}?", "yes", "verify", "obj", None) for shape in (first, second))
    both = all(scene.count(shape=shape) for shape in (first, second))
    text = f"are there both a {first} and a {second}?"
    yield Asked(text, "yes" if both else "no", "logical", "obj", None, entailed=each if both else ())


def write_gqa(root: Path, splits: dict[str, list[Scene]], rng: random.Random) -> list[str]:
    """Writes the official files below `root`, those of the unbalanced questions and choices for testdev alone.

    Returns:
        the questions of training.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    image = number = 0
    for split, scenes in splits.items():
        records: dict[str, dict[str, Any]] = {}
        choices: dict[str, dict[str, list[str]]] = {}
        for scene in scenes:
            image += 1
            picture(scene).save(root / "images" / f"n{image}.jpg", quality=92, subsampling=0)
            for asked in questions(scene, rng):
                ids = [f"{number + place:08d}" for place in range(1 + len(asked.entailed))]
                number += len(ids)
                for name, each in zip(ids, (asked, *asked.entailed), strict=True):
                    entailed = ids if each is asked else [name]
                    records[name] = _record(f"n{image}", name, each, each is asked, entailed)
                    valid = ANSWERS.get(each.group or "", each.options)
                    choices[name] = {"valid": list(valid), "plausible": list(each.options)}
        balanced = {name: record for name, record in records.items() if record["isBalanced"]}
        (root / f"{split}_balanced_questions.json").write_text(json.dumps(balanced))
        if split == "train":
            texts += [record["question"] for record in balanced.values()]
        if split == "testdev":
            (root / f"{split}_all_questions.json").write_text(json.dumps(records))
            (root / f"{split}_choices.json").write_text(json.dumps(choices))
    return texts


def _record(image: str, name: str, asked: Asked, balanced: bool, entailed: list[str]) -> dict[str, Any]:
    return {
        "imageId": image,
        "question": asked.question,
        "answer": asked.answer,
        "fullAnswer": f"{asked.answer}.",
        "isBalanced": balanced,
        "groups": {"global": asked.group, "local": None},
        "types": {"structural": asked.structural, "semantic": asked.semantic, "detailed": asked.semantic},
        "entailed": entailed,
        "equivalent": [name],
    }


def write(root: Path, pictures: int, seed: int) -> None:
    """Writes `root`/snli_ve, `root`/gqa and `root`/vocab.txt."""
    texts = []
    for write_set, names in ((write_snli_ve, ("train", "dev", "test")), (write_gqa, ("train", "val", "testdev"))):
        world = World(seed)
        sizes = (pictures, max(pictures // 10, 1), max(pictures // 5, 1))
        scenes = {name: world.scenes(size) for name, size in zip(names, sizes, strict=True)}
        texts += write_set(root / write_set.__name__.removeprefix("write_"), scenes, world.rng)
    train_vocabulary(texts, root / "vocab.txt")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vlmo.demo.downstream", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder for the raw data")
    parser.add_argument("--pictures", type=int, default=1500, help="to train on")
    parser.add_argument("--seed", type=int, default=2001, help="of the pictures")
    options = parser.parse_args()
    write(options.data, options.pictures, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
