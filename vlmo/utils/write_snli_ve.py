"""SNLI-VE -> snli_ve_{train,dev,test}.arrow.

The annotations have one JSON object a line; the premises are images of Flickr30K, the hypotheses about one share a row.
Pairs without a gold label ("-": the annotators did not agree) are left out and counted.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.utils.annotations import field, inside, read_records, require_files
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.record_batches import Row, Skipped

LAYOUT = """
  snli_ve_{train,dev,test}.jsonl
  flickr30k-images/*.jpg
"""
SPLITS = ("train", "dev", "test")
LABELS = ("entailment", "neutral", "contradiction")  # as in vlmo/tasks/snli_ve.py (which needs torch)
UNDECIDED = "-"
SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "hypotheses": pa.list_(pa.string()),
        "labels": pa.list_(pa.string()),
        "pair_ids": pa.list_(pa.string()),
        "image_id": pa.string(),
        "split": pa.string(),
    }
)


class Premise(NamedTuple):
    """An image, and what is said of it."""

    path: str
    hypotheses: list[str]
    labels: list[str]
    pairs: list[str]


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the SNLI-VE downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    require_files(root, [*(f"snli_ve_{split}.jsonl" for split in SPLITS), "flickr30k-images"], LAYOUT)
    premises: dict[str, dict[str, Premise]] = {}
    undecided: list[Skipped] = []
    for split in SPLITS:
        premises[split] = _read_premises(root, split, undecided)

    def rows() -> Iterator[tuple[str, Row | Skipped]]:
        yield from (("train", skipped) for skipped in undecided)
        for split in SPLITS:
            for image, premise in premises[split].items():
                columns = {"hypotheses": premise.hypotheses, "labels": premise.labels, "pair_ids": premise.pairs}
                yield split, Row(columns | {"image_id": image, "split": split}, {"image": premise.path})

    with Conversion(dataset_root, "snli_ve", num_workers) as conversion:
        conversion.write({split: Table(f"snli_ve_{split}", SCHEMA) for split in SPLITS}, rows)
    return conversion.report


def _read_premises(root: str, split: str, undecided: list[Skipped]) -> dict[str, Premise]:
    """The images of a split by their names; pairs without a gold label are appended to `undecided`."""
    premises: dict[str, Premise] = {}
    for where, record in read_records(os.path.join(root, f"snli_ve_{split}.jsonl")):
        pair, label = field(record, "pairID", str, where), field(record, "gold_label", str, where)
        if label == UNDECIDED:
            undecided.append(Skipped(f"{where}: {pair}", "no gold label"))
            continue
        if label not in LABELS:
            raise VLMoError(f"{where}: 'gold_label' must be {', '.join(LABELS)} or {UNDECIDED!r}, found {label!r}")
        image = str(field(record, "Flickr30K_ID", (str, int), where))
        if image not in premises:
            path = inside(root, os.path.join("flickr30k-images", f"{image}.jpg"), where)
            premises[image] = Premise(path, [], [], [])
        premises[image].hypotheses.append(field(record, "sentence2", str, where))
        premises[image].labels.append(label)
        premises[image].pairs.append(pair)
    return premises
