"""Tiny Arrow tables of every data set, made on the spot."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

WORDS = ["a", "the", "red", "blue", "cat", "dog", "runs", "jump", "##ing", "##s"]
WORDS += ["on", "under", "table", "two", "what", "colour", "is", "left", "right"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz.?"]


def write_vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(VOCABULARY)) + "\n", encoding="utf-8")
    return path


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Random smooth RGB."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size)


def png(seed: int) -> bytes:
    return encoded(picture(seed))


def write_table(path: Path, columns: Mapping[str, Any], batches: Sequence[int] = ()) -> Path:
    """Columns as lists or Arrow arrays, in record batches of the given numbers of rows (one if empty)."""
    table = pa.table(dict(columns))
    with pa.ipc.new_file(str(path), table.schema) as writer:
        start = 0
        for size in [*batches, table.num_rows]:
            writer.write_table(table.slice(start, size), max_chunksize=max(size, 1))
            start += size
    return path


def captions(number: int, texts: int = 2, first: int = 0) -> list[list[str]]:
    rows = range(first, first + number)
    return [[f"a {WORDS[(row + text) % 8]} cat . {row}" for text in range(texts)] for row in rows]


def write_captions(root: Path, stem: str, rows: int = 4, texts: int = 2, first: int = 0) -> Path:
    columns = {
        "image": [png(first + row) for row in range(rows)],
        "caption": captions(rows, texts, first),
        "image_id": [f"{first + row}.jpg" for row in range(rows)],
        "split": [stem.rsplit("_", 1)[-1]] * rows,
    }
    return write_table(root / f"{stem}.arrow", columns)


def write_coco(root: Path, rows: int = 4) -> None:
    for first, split in enumerate(("train", "restval", "val", "test")):
        write_captions(root, f"coco_caption_karpathy_{split}", rows, first=max(10, rows) * first)


def write_f30k(root: Path) -> None:
    for first, split in enumerate(("train", "val", "test")):
        write_captions(root, f"f30k_caption_karpathy_{split}", rows=3, texts=5, first=10 * first)


def write_images(root: Path, rows: int = 4) -> None:
    for stem, first in (("images_train_0", 0), ("images_train_1", 10), ("images_val_0", 20)):
        columns = {
            "image": [png(first + row) for row in range(rows)],
            "image_id": [f"{first + row}.png" for row in range(rows)],
            "split": [stem.split("_")[1]] * rows,
        }
        write_table(root / f"{stem}.arrow", columns)


def write_labelled_images(root: Path, rows: int = 8, classes: int = 3) -> None:
    """Images whose colour is that of their class, nearly."""
    shades = np.random.default_rng(0).integers(0, 256, (classes, 3))
    for split, first in (("train", 0), ("val", 100)):
        images = []
        for row in range(rows):
            noise = np.random.default_rng(first + row).integers(-20, 20, (30, 40, 3))
            images.append(encoded(Image.fromarray((shades[row % classes] + noise).clip(0, 255).astype(np.uint8))))
        columns = {
            "image": images,
            "label": [row % classes for row in range(rows)],
            "image_id": [f"{split}/{row % classes}/{row}.png" for row in range(rows)],
            "split": [split] * rows,
        }
        write_table(root / f"labelled_images_{split}_0.arrow", columns)
    names = [f"class {label}" for label in range(classes)]
    (root / "labelled_images_classes.json").write_text(json.dumps(names))


def write_wikibk(root: Path, shards: int = 2) -> None:
    for stem in [*(f"wikibk_train_{shard}" for shard in range(shards)), "wikibk_val_0"]:
        texts = [[f"the dog runs . {'red ' * row}"] for row in range(5)]
        columns = {"image": ["None"] * 5, "caption": texts, "source": ["wikibk"] * 5, "split": ["train"] * 5}
        write_table(root / f"{stem}.arrow", columns)


def write_vqa(root: Path, answers: int = 3, answers_file: bool = True, rows: int = 4) -> None:
    names = [f"answer {label}" for label in range(answers)]
    for split in ("train", "trainable_val", "rest_val", "test"):
        labels: list[list[list[int]]] = [[[row % answers], [row % answers, (row + 1) % answers]] for row in range(rows)]
        if split == "test":
            labels = [[] for _ in range(rows)]
        nested = pa.list_(pa.list_(pa.int64())) if split != "test" else pa.list_(pa.null())
        columns = {
            "image": [png(row) for row in range(rows)],
            "questions": [["what is left ?", "what colour is the cat ?"]] * rows,
            "answers": [[[names[label] for label in each] for each in row] for row in labels],
            "answer_labels": pa.array(labels, nested),
            "answer_scores": [[[1.0, 0.3][: len(each)] for each in row] for row in labels],
            "image_id": list(range(rows)),
            "question_id": [[10 * row, 10 * row + 1] for row in range(rows)],
            "split": [split] * rows,
        }
        write_table(root / f"vqav2_{split}.arrow", columns)
    if answers_file:
        (root / "vqav2_answers.json").write_text(json.dumps(names))


def write_nlvr2(root: Path) -> None:
    for split in ("train", "dev", "test1"):
        columns = {
            "image_0": [png(row) for row in range(3)],
            "image_1": [png(10 + row) for row in range(3)],
            "questions": [["the left cat runs .", "a dog ."]] * 3,
            "answers": [["True", "False"]] * 3,
            "identifier": [f"{split}-{row}-0" for row in range(3)],
        }
        write_table(root / f"nlvr2_{split}.arrow", columns)
