"""What the benchmarks work on: batches in the form of the project's collator, with texts of real lengths.

The words and the pictures are random, their number and size are not: speed depends on those alone.
"""

import argparse
import ast
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmo.batch import FIELDS
from vlmo.config import resolve
from vlmo.datamodules.collate import Collator
from vlmo.registry import TASKS
from vlmo.settings import Settings
from vlmo.text import load_tokenizer

# Tokens of a text, [CLS] and [SEP] included, with BERT's vocabulary: the middle of each twentieth of
# "books": the 50,349 sentences of four novels of Project Gutenberg (mean 27.4);
# "passages": the same novels in 6,559 passages of 150 words, as DATA.md recommends (mean 196.8, cut at 196: 190.6);
# "captions": the 35,000 captions of Flickr8k's training and validation pictures (mean 14.3).
LENGTHS = {
    "books": (8, 10, 11, 12, 13, 14, 16, 17, 19, 21, 23, 25, 27, 30, 33, 37, 41, 47, 56, 78),
    "passages": (
        *(173, 178, 181, 183, 185, 187, 189, 191, 192, 194),
        *(196, 197, 199, 202, 204, 207, 210, 214, 220, 231),
    ),
    "captions": (8, 9, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16, 17, 18, 19, 20, 24),
}
FIRST_WORD, CLS, SEP, MASK = 1000, 101, 102, 103
IGNORE_INDEX = -100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="+", help="named configs and option=value, as after `run.py with`")
    parser.add_argument(
        "--texts",
        metavar="FILE",
        help=f"lengths of texts: {', '.join(LENGTHS)} (as recorded), or a file: a .txt of one text a line, a Karpathy "
        ".json, or a zip that holds one; else books or captions, as the task reads them",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that make the batches")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The config of `words`, one update a forward pass.

    Raises:
        SystemExit: for an option without a value that Python can read.
    """
    names = [word for word in words if "=" not in word]
    updates: dict[str, Any] = {}
    for word in words:
        name, given, value = word.partition("=")
        if given:
            try:
                updates[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                updates[name] = value
    config = resolve(*names, **updates)
    return config | {"batch_size": config["per_gpu_batchsize"] * max(int(config["num_gpus"]), 1)}


def text_lengths(settings: Settings, texts: str | None) -> tuple[Sequence[int], str]:
    """Tokens a text, cut to `max_text_len`, and where they are from.

    Args:
        texts: see `--texts`.
    """
    if texts is None or texts in LENGTHS:
        kind = texts or ("books" if "textmlm" in settings.active else "captions")
        found, source = LENGTHS[kind], f"recorded of {kind}"
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
        found, source = [len(tokenizer(text)["input_ids"]) for text in read_texts(Path(texts))], Path(texts).name
    return [min(length, settings.max_text_len) for length in found], f"{source}, mean {np.mean(found):.1f} tokens"


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, or the captions of a file in Karpathy's form; either may be the first in a zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith((".txt", ".json")))
            content = archive.read(name).decode()
    else:
        name, content = path.name, path.read_text()
    if name.endswith(".json"):
        return [sentence["raw"] for image in json.loads(content)["images"] for sentence in image["sentences"]]
    return [line for line in content.splitlines() if line.strip()]


class Samples(Dataset):
    """Endless samples of a task, of those text lengths."""

    def __init__(self, settings: Settings, lengths: Sequence[int]) -> None:
        self.settings, self.lengths = settings, lengths

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw, s = np.random.default_rng(index), self.settings
        length = int(draw.choice(self.lengths))
        ids = draw.integers(FIRST_WORD, s.vocab_size, length)
        ids[0], ids[-1] = CLS, SEP
        labels, masked = np.full(length, IGNORE_INDEX), ids.copy()
        chosen = draw.choice(np.arange(1, length - 1), max(1, round(s.mlm_prob * (length - 2))), replace=False)
        labels[chosen], masked[chosen] = ids[chosen], MASK
        sample: dict[str, Any] = {"text_ids": ids, "text_ids_mlm": masked, "text_labels_mlm": labels}
        sample["image_key"] = index // 2  # two captions an image
        if "textmlm" not in s.active:
            names = ("image_0", "image_1") if "nlvr2" in s.active else ("image",)
            pixels = (3, s.image_size, s.image_size)
            sample |= {name: torch.from_numpy(draw.random(pixels, np.float32) * 2 - 1) for name in names}
        if "vqa" in s.active:
            sample |= {"vqa_labels": draw.choice(s.vqav2_label_size, 3, replace=False), "vqa_scores": [1.0, 0.6, 0.3]}
        if "nlvr2" in s.active:
            sample |= {"answers": bool(index % 2), "table_name": "nlvr2_train"}
        return sample


def batches(settings: Settings, lengths: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """Batches of `per_gpu_batchsize`, the same in every run."""
    on_gpu = torch.cuda.is_available()
    tasks = [TASKS[name](settings) for name in settings.active]
    fields = FIELDS | {name: field for task in tasks for name, field in task.fields.items()}
    finish = [task.derive for task in tasks]
    loader = DataLoader(
        Samples(settings, lengths),
        settings.per_gpu_batchsize,
        num_workers=workers,
        collate_fn=Collator(fields, settings.max_text_len, 8 if on_gpu else 1, finish),
        pin_memory=on_gpu,
    )
    return iter(loader)
