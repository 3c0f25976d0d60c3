"""A few pictures with captions and questions, as a folder of one's own: what the tutorials are tried with.

python -m vlmo.demo.pictures FOLDER [--number N] [--seed N]
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmo.demo.drawing import picture
from vlmo.demo.prepare import train_vocabulary
from vlmo.demo.questions import questions
from vlmo.demo.scenes import World
from vlmo.demo.texts import captions

ZOOM = 4


def write_pictures(folder: Path, number: int = 20, seed: int = 0) -> None:
    """Writes photos/*.jpg, captions.jsonl, questions.jsonl, and vocab.txt with the words of these texts."""
    world, rng = World(seed), random.Random(seed)
    described, asked = [], []
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    for count in range(1, number + 1):
        scene = world.scene()
        name = f"photos/{count:02d}.jpg"
        image = picture(scene)
        image.resize((ZOOM * image.width, ZOOM * image.height)).save(folder / name)
        described.append({"image": name, "caption": captions(scene, rng)[:2]})
        asked += [
            {"image": name, "question": each.text, "answers": each.truth} for each in questions(scene, rng, number=3)
        ]
    for file, records in (("captions.jsonl", described), ("questions.jsonl", asked)):
        (folder / file).write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [text for each in described for text in each["caption"]] + [each["question"] for each in asked]
    train_vocabulary(texts, folder / "vocab.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlmo.demo.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--number", type=int, default=20, help="of pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_pictures(options.folder, options.number, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
