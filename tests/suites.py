"""Tiny data of every suite in its official layout, and a checkpoint to measure, made on the spot."""

import io
import json
import tarfile
from pathlib import Path

import torch

from tests import tables, tiny
from tests.tables import WORDS, picture
from vlmo.inference import Predictor
from vlmo.modules.model import VLMoModel

CAPTIONS = [
    "the red cat runs",
    "a blue dog",
    "the dog runs on the table",
    "two cat jumping",
    "what is left",
    "a cat is on the right",
]
VOCABULARY = list(dict.fromkeys(tables.VOCABULARY))


def model(*, tasks: str = "task_mlm_itm_itc_base"):
    """A tiny model with the tables' vocabulary, every parameter moved off its start."""
    torch.manual_seed(0)
    built = tiny.model(tasks)
    built.vocabulary = VOCABULARY
    return built


def checkpoint(folder: Path) -> Path:
    """A folder of `save_pretrained`, with the heads of all suites."""
    options = {name: tiny.SMALL[name] for name in ("model_arch", "image_size", "vocab_size", "max_text_len")}
    torch.manual_seed(0)
    built = VLMoModel(tasks=("itc", "itm", "mlm", "vqa", "nlvr2"), vqav2_label_size=3, **options)
    tiny.perturb(built)
    built.vocabulary = VOCABULARY
    built.save_pretrained(folder)
    return folder


def predictor() -> Predictor:
    return Predictor(model(), device="cpu", batch_size=4)


def write_images(folder: Path, names: list[str], size: tuple[int, int] = (40, 30)) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, size).save(path)


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_caption_pairs(root: Path, number: int = 5) -> None:
    """Two kinds, some images shared."""
    folder = root / "caption_pairs"
    write_images(folder / "images", [f"{row}.png" for row in range(number)])
    for kind, shift in (("swap_att", 1), ("replace_rel", 2)):
        records = {
            str(row): {
                "filename": f"{row}.png",
                "caption": CAPTIONS[row % 6],
                "negative_caption": CAPTIONS[(row + shift) % 6],
            }
            for row in range(number)
        }
        write_json(folder / f"{kind}.json", records)


def write_winoground(root: Path, number: int = 4) -> None:
    folder = root / "winoground"
    write_images(folder / "images", [f"ex_{row}_img_{side}.png" for row in range(number) for side in (0, 1)])
    lines = [
        json.dumps(
            {
                "id": row,
                "image_0": f"ex_{row}_img_0",
                "image_1": f"ex_{row}_img_1",
                "caption_0": CAPTIONS[row % 6],
                "caption_1": CAPTIONS[(row + 1) % 6],
                "collapsed_tag": "Object" if row % 2 else "Relation",
            }
        )
        for row in range(number)
    ]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


def write_retrieval(root: Path, rows: int = 7, texts: int = 3) -> None:
    """COCO's and Flickr30K's test tables; every text is another."""
    for stem in ("coco_caption_karpathy_test", "f30k_caption_karpathy_test"):
        captions = [
            [f"{WORDS[2 + (row + text) % 8]} cat {'abcdefg'[row % 7]} {'xyz'[text]}" for text in range(texts)]
            for row in range(rows)
        ]
        columns = {
            "image": [tables.png(row) for row in range(rows)],
            "caption": captions,
            "image_id": [f"COCO_val2014_{row + 1:012d}.jpg" for row in range(rows)],
            "split": ["test"] * rows,
        }
        tables.write_table(root / f"{stem}.arrow", columns)


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    """Files of samples by extension, in the order of CLIP_benchmark's own export."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for extension, content in files.items():
                member = tarfile.TarInfo(f"s{number:07d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_wds(root: Path, number: int = 12, classes: int = 6) -> None:
    """A set to classify, with two splits, and one to retrieve from, in CLIP_benchmark's format."""
    folder = root / "wds_classes"
    for split, shift in (("train", 0), ("test", 3)):
        samples = [{"png": tables.png(row + shift), "cls": str(row % classes).encode()} for row in range(number)]
        for shard in range(2):
            write_tar(folder / split / f"{shard}.tar", samples[shard::2])
        (folder / split / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text(
        "\n".join(["red cat", "blue dog", "table", "left", "right", "two"][:classes])
    )
    (folder / "zeroshot_classification_templates.txt").write_text("the {c}.\na {c} on the table\n")
    folder = root / "wds_captions"
    texts = ["\n".join(f"{CAPTIONS[row]} {letter} {'abcde'[row]}" for letter in "xy") for row in range(5)]
    write_tar(folder / "test/0.tar", [{"png": tables.png(row), "txt": texts[row].encode()} for row in range(5)])
    (folder / "test/nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval")
