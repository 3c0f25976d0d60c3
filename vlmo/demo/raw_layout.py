"""Writes the world to disk in the layouts in which the real data sets are published (DATA.md)."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmo.demo.drawing import box, picture
from vlmo.demo.questions import questions
from vlmo.demo.scenes import PICTURE_SIZE, Scene, Thing, World
from vlmo.demo.statements import statement_set
from vlmo.demo.texts import captions, regions, sentences

REGIONS = 4  # described in a picture of vg
JPEG = {"format": "JPEG", "quality": 92, "subsampling": 0}


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is: pictures, or as the comment says."""

    coco: int = 1500  # training, for captions and questions alike
    coco_val: int = 300  # each of Karpathy's val and test
    vg: int = 1200
    web: int = 500  # each of gcc and sbu
    f30k: int = 1200
    f30k_val: int = 300  # each of val and test
    vqa_test: int = 300
    questions: int = 7  # a picture
    nlvr2: int = 500  # sets of four pairs
    nlvr2_val: int = 100  # sets, each of dev and test1
    statements: int = 4  # a set
    text: int = 12000  # lines

    @classmethod
    def quick(cls) -> "Sizes":
        return cls(60, 40, 40, 10, 40, 20, 20, 7, 12, 6, 4, 200)


def write_raw(root: Path, seed: int, sizes: Sizes) -> dict[int, str]:
    """Writes all eight data sets below `root`, a folder each, as they are named in `datasets=[...]`.

    Returns:
        the right answers to the questions about VQA's test pictures, by question id: nothing on disk tells them.
    """
    world = World(seed)
    train, restval = world.scenes(sizes.coco), world.scenes(sizes.coco_val // 3)
    val, test = world.scenes(sizes.coco_val), world.scenes(sizes.coco_val)
    _write_coco(root / "coco", {"train": train, "restval": restval, "val": val, "test": test}, world.rng)
    _write_f30k(root / "f30k", world, sizes)
    _write_vg(root / "vg", world, sizes.vg)
    _write_web(root / "gcc", world, {"train": sizes.web, "val": sizes.web // 10 + 1})
    _write_web(root / "sbu", world, {"": sizes.web})
    # as the real ones do, the questions are about COCO's pictures; those of val and test are in no training set
    answers = _write_vqa(root / "vqa", train, val + test, world.scenes(sizes.vqa_test), sizes.questions, world.rng)
    _write_nlvr2(root / "nlvr2", world, sizes)
    _write_text(root / "wikibk", sentences(world, sizes.text))
    return answers


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _save(path: Path, scene: Scene, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(scene).save(path, **(options or JPEG))


def _sentences(texts: Iterable[str]) -> list[dict[str, Any]]:
    return [{"raw": text, "tokens": text.rstrip(".").replace(",", "").split()} for text in texts]


def _write_coco(root: Path, splits: dict[str, list[Scene]], rng: random.Random) -> None:
    images: list[dict[str, Any]] = []
    for split, scenes in splits.items():
        folder = "train2014" if split == "train" else "val2014"
        for scene in scenes:
            number = len(images) + 1
            name = f"COCO_{folder}_{number:012d}.jpg"
            _save(root / folder / name, scene)
            entry = {"filepath": folder, "filename": name, "split": split, "cocoid": number}
            images.append(entry | {"sentences": _sentences(captions(scene, rng))})
    _dump(root / "karpathy/dataset_coco.json", {"images": images, "dataset": "coco"})


def _write_f30k(root: Path, world: World, sizes: Sizes) -> None:
    images: list[dict[str, Any]] = []
    for split, number in (("train", sizes.f30k), ("val", sizes.f30k_val), ("test", sizes.f30k_val)):
        for scene in world.scenes(number):
            name = f"{1000 + len(images)}.jpg"
            _save(root / "flickr30k-images" / name, scene)
            texts = _sentences(captions(scene, world.rng))
            images.append({"filename": name, "split": split, "sentences": texts})
    _dump(root / "karpathy/dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def _write_vg(root: Path, world: World, number: int) -> None:
    images: list[dict[str, Any]] = []
    for index, scene in enumerate(world.scenes(number)):
        folder = "VG_100K" if index % 2 else "VG_100K_2"
        _save(root / "images" / folder / f"{index + 1}.jpg", scene)
        described: list[dict[str, Any]] = []
        for text, things in regions(scene, world.rng)[:REGIONS]:
            x, y, width, height = _around(things)
            region = {"region_id": 100 * index + len(described), "image_id": index + 1, "phrase": text}
            described.append(region | {"x": x, "y": y, "width": width, "height": height})
        images.append({"id": index + 1, "regions": described})
    _dump(root / "annotations/region_descriptions.json", images)
    for folder in ("VG_100K", "VG_100K_2"):
        (root / "images" / folder).mkdir(exist_ok=True)


def _around(things: Sequence[Thing]) -> tuple[int, int, int, int]:
    """x, y, width, height of the smallest box around all of them."""
    boxes = [box(thing) for thing in things]
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    assert 0 <= left < right <= PICTURE_SIZE and 0 <= top < bottom <= PICTURE_SIZE
    return left, top, right - left, bottom - top


def _write_web(root: Path, world: World, splits: dict[str, int]) -> None:
    """GCC has a train and a val split; SBU (split "") has none."""
    for split, number in splits.items():
        folder = f"images_{split or 'train'}"
        pairs = []
        for index, scene in enumerate(world.scenes(number)):
            name = f"{folder}/{index // 100:04d}/{index:07d}"
            _save(root / name, scene)
            pairs.append([name, world.rng.choice(captions(scene, world.rng))])
        _dump(root / (f"{split}_annot.json" if split else "annot.json"), pairs)


def _write_vqa(
    root: Path, train: list[Scene], val: list[Scene], test: list[Scene], number: int, rng: random.Random
) -> dict[int, str]:
    question_id, withheld = 0, {}
    for split, year, scenes in (("train", 2014, train), ("val", 2014, val), ("test", 2015, test)):
        asked, annotated = [], []
        for index, scene in enumerate(scenes):
            image_id = {"train": 1, "val": 500_001, "test": 900_001}[split] + index
            _save(root / f"{split}{year}/COCO_{split}{year}_{image_id:012d}.jpg", scene)
            for question in questions(scene, rng, number):
                question_id += 1
                key = {"image_id": image_id, "question_id": question_id}
                asked.append(key | {"question": question.text})
                annotated.append(key | {"multiple_choice_answer": question.truth, "answers": question.records()})
                if split == "test":
                    withheld[question_id] = question.truth
        _dump(root / f"v2_OpenEnded_mscoco_{split}{year}_questions.json", {"questions": asked})
        if split == "test":
            _dump(root / f"v2_OpenEnded_mscoco_test-dev{year}_questions.json", {"questions": asked[: len(asked) // 2]})
        else:
            _dump(root / f"v2_mscoco_{split}{year}_annotations.json", {"annotations": annotated})
    return withheld


def _write_nlvr2(root: Path, world: World, sizes: Sizes) -> None:
    for split, sets in (("train", sizes.nlvr2), ("dev", sizes.nlvr2_val), ("test1", sizes.nlvr2_val)):
        lines = []
        for number in range(sets):
            pairs, statements = statement_set(world, sizes.statements)
            folder = root / (f"images/train/{number % 10}" if split == "train" else split)
            for pair_number, pair in enumerate(pairs):
                name = f"{split}-{number}-{pair_number}"
                for side, scene in enumerate(pair):
                    _save(folder / f"{name}-img{side}.png", scene, format="PNG", compress_level=1)
                for sentence_number, (text, truths) in enumerate(statements):
                    line = {"sentence": text, "identifier": f"{name}-{sentence_number}"}
                    line |= {"label": str(truths[pair_number])}
                    lines.append(line | ({"directory": number % 10} if split == "train" else {}))
        path = root / f"nlvr2/data/{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_text(root: Path, lines: list[str], files: int = 4) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (root / f"wikibk.{number}.txt").write_text("\n".join(lines[number::files]) + "\n")
