"""Your own statements about pairs of images, in JSONL, CSV or TSV -> nlvr2_{train,dev,test1}.arrow.

A record is {"image_0": path below root, "image_1": path, "sentence": text, "label": true | false, "split": "train" |
"val" | "test", "identifier": text}, the last two optional; val becomes dev and test becomes test1. `identifier` names
the statement, and its prediction.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vlmo.errors import VLMoError
from vlmo.utils.arrow_writer import Conversion, Report
from vlmo.utils.own_data import annotation_file, image_file, parse_records, share_out, single_text, split_of
from vlmo.utils.write_nlvr2 import Pair, truth, write_pairs

TABLES = {"train": "train", "val": "dev", "test": "test1"}


@dataclass
class _Pair:
    identifier: str
    split: str | None
    sentences: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)  # identifiers as they are given


def make_arrow(
    root: str,
    dataset_root: str,
    *,
    annotations: str | None = None,
    val_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    skip_missing: bool = False,
    num_workers: int = 1,
) -> Report:
    """Converts statements about pairs of images below `root` into NLVR2's tables in `dataset_root`.

    Raises VLMoError that lists the records that are not as they should be.

    Args:
        annotations: the list of records; pairs.jsonl, .csv or .tsv in `root` if None.
        val_share, test_share: shares of the pairs without a split that are held out.
        skip_missing: leave out pairs with an image that does not exist, instead of refusing the list.
    """
    path = annotation_file(root, annotations, "pairs")
    pairs: dict[tuple[str, str], _Pair] = {}
    parse_records(path, partial(_add, pairs, {}, root, skip_missing))
    splits = share_out({key: pair.split for key, pair in pairs.items()}, val_share, test_share, seed, path)
    tables: dict[str, list[Pair]] = {table_name: [] for table_name in TABLES.values()}
    for images, pair in pairs.items():
        numbers = list(range(len(pair.sentences)))
        names = [f"{pair.identifier}-{number}" if name is None else name for number, name in enumerate(pair.names)]
        written = Pair(
            images, pair.identifier, pair.sentences, pair.labels, numbers, names if any(pair.names) else None
        )
        tables[TABLES[splits[images]]].append(written)
    with Conversion(dataset_root, "nlvr2", num_workers) as conversion:
        write_pairs(conversion, tables)
    return conversion.report


def _add(
    pairs: dict[tuple[str, str], _Pair],
    places: dict[str, str],
    root: str,
    skip_missing: bool,
    where: str,
    record: dict[str, Any],
) -> None:
    first, second = (image_file(root, record, key, where, skip_missing) for key in ("image_0", "image_1"))
    split = split_of(record, where)
    name = str(record["identifier"]) if "identifier" in record else None
    if name is not None and places.setdefault(name, where) != where:
        raise VLMoError(f"{where}: 'identifier' {name!r} is that of {places[name]} too; give each statement its own")
    pair = pairs.setdefault((first, second), _Pair(name or f"pair-{len(pairs)}", split))
    if pair.split != split:
        raise VLMoError(f"{where}: {first} and {second} are in the splits {pair.split!r} and {split!r}")
    sentence, label = single_text(record, "sentence", where), truth(record, where)
    pair.sentences.append(sentence)
    pair.labels.append(label)
    pair.names.append(name)
