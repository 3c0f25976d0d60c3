"""NLVR2 -> nlvr2_{train,dev,test1}.arrow and, where annotated, the {,un}balanced_{dev,test1} parts.

The annotations have one JSON object a line; sentences about the same pair of pictures share a row.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.utils.annotations import field, inside, read_records, require_files
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.record_batches import Row

LAYOUT = """
  nlvr2/data/{train,dev,test1}.json
  nlvr2/data/{balanced/balanced,unbalanced/unbalanced}_{dev,test1}.json    (may be missing)
  images/train/<directory>/train-*-img{0,1}.png
  dev/dev-*-img{0,1}.png
  test1/test1-*-img{0,1}.png
"""
FILES = {
    "train": "train.json",
    "dev": "dev.json",
    "test1": "test1.json",
    "balanced_dev": "balanced/balanced_dev.json",
    "balanced_test1": "balanced/balanced_test1.json",
    "unbalanced_dev": "unbalanced/unbalanced_dev.json",
    "unbalanced_test1": "unbalanced/unbalanced_test1.json",
}
REQUIRED = ("train", "dev", "test1")
# in a table's metadata; vlmo/datasets/nlvr2_dataset.py reads them (and needs torch)
NUMBERS_KEY, IDENTIFIERS_KEY = "sentence_numbers", "sentence_identifiers"
SCHEMA = pa.schema(
    {
        "image_0": pa.binary(),
        "image_1": pa.binary(),
        "questions": pa.list_(pa.string()),
        "answers": pa.list_(pa.string()),
        "identifier": pa.string(),
    }
)


class Pair(NamedTuple):
    """Two pictures' files and what is said of them."""

    images: tuple[str, str]
    identifier: str
    sentences: list[str]
    labels: list[str]  # "True" or "False"
    numbers: list[int]  # of the sentences, in their identifiers
    names: list[str] | None = None  # of the sentences, where they have identifiers of their own


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the NLVR2 downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    needed = [f"nlvr2/data/{FILES[name]}" for name in REQUIRED] + ["images/train", "dev", "test1"]
    require_files(root, needed, LAYOUT)
    with Conversion(dataset_root, "nlvr2", num_workers) as conversion:
        pairs: dict[str, list[Pair]] = {}
        for name, file_name in FILES.items():
            path = os.path.join(root, "nlvr2", "data", file_name)
            if name in REQUIRED or os.path.exists(path):
                pairs[name] = list(_read_pairs(path, root, name).values())
            else:
                conversion.report.notes.append(f"no nlvr2_{name}: {path} is not there")
        write_pairs(conversion, pairs)
    return conversion.report


def write_pairs(conversion: Conversion, pairs: Mapping[str, list[Pair]]) -> None:
    """Writes the tables `nlvr2_{name}` of the pairs by name."""

    def rows() -> Iterator[tuple[str, Row]]:
        for name, of_name in pairs.items():
            for pair in of_name:
                columns = {"questions": pair.sentences, "answers": pair.labels, "identifier": pair.identifier}
                yield name, Row(columns, {"image_0": pair.images[0], "image_1": pair.images[1]})

    conversion.write({name: Table(f"nlvr2_{name}", _schema(of_name)) for name, of_name in pairs.items()}, rows)


def _schema(pairs: Iterable[Pair]) -> pa.Schema:
    """The published columns, with the sentences' numbers or identifiers where the order does not tell them."""
    pairs = list(pairs)
    numbers = {pair.identifier: pair.numbers for pair in pairs if pair.numbers != list(range(len(pair.numbers)))}
    names = {pair.identifier: pair.names for pair in pairs if pair.names}
    more = {IDENTIFIERS_KEY: json.dumps(names)} if names else {}
    return SCHEMA.with_metadata({NUMBERS_KEY: json.dumps(numbers)} | more)


def truth(record: dict[str, Any], where: str) -> str:
    """The record's label as "True" or "False"."""
    label = field(record, "label", (str, bool, int), where)
    known = {"true": "True", "1": "True", "false": "False", "0": "False"}
    if str(label).lower() not in known:
        raise VLMoError(f"{where}: 'label' must be True or False, found {label!r}")
    return known[str(label).lower()]


def _read_pairs(path: str, root: str, name: str) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    for where, record in read_records(path):
        stem, dash, number = field(record, "identifier", str, where).rpartition("-")
        if not dash or not number.isdecimal():
            raise VLMoError(f"{where}: 'identifier' must be like dev-850-0-1")
        if stem not in pairs:
            folder = (
                os.path.join("images", "train", _directory(record, where)) if name == "train" else name.split("_")[-1]
            )
            first, second = (inside(root, os.path.join(folder, f"{stem}-img{side}.png"), where) for side in (0, 1))
            pairs[stem] = Pair((first, second), stem, [], [], [])
        pairs[stem].sentences.append(field(record, "sentence", str, where))
        pairs[stem].labels.append(truth(record, where))
        pairs[stem].numbers.append(int(number))
    return pairs


def _directory(record: dict[str, Any], where: str) -> str:
    return str(field(record, "directory", (int, str), where))
