"""What the converters of one's own data share: their annotation files, splits and tables."""

import os
import random
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from vlmo.errors import VLMoError
from vlmo.utils.annotations import field, inside, listed, raise_problems, read_records
from vlmo.utils.arrow_writer import Table
from vlmo.utils.karpathy import CAPTION_SCHEMA
from vlmo.utils.write_conceptual_caption import SHARD_ROWS

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
MAX_PROBLEMS = 1000  # after which reading on is of no use

Parsed = TypeVar("Parsed")
Key = TypeVar("Key", bound=Hashable)


def annotation_file(root: str, given: str | None, stem: str) -> str:
    """The file given (relative to `root`, or to the working directory), else `root`/`stem` with a known extension."""
    if given is not None:
        given = os.path.expanduser(given)
        found = next(filter(os.path.isfile, (os.path.join(root, given), given)), None)
        if found is None:
            raise VLMoError(f"annotation file {given} found neither in {root} nor in the working directory")
        return found
    candidates = [os.path.join(root, f"{stem}.{extension}") for extension in ("jsonl", "csv", "tsv")]
    found = next(filter(os.path.isfile, candidates), None)
    if found is None:
        raise VLMoError(f"none of {', '.join(candidates)} exists: name the annotation file with annotations=")
    return found


def parse_records(path: str, parse: Callable[[str, dict[str, Any]], Parsed]) -> list[Parsed]:
    """`parse(where, record)` of every record; one VLMoError lists what was wrong with which lines."""
    parsed: list[Parsed] = []
    problems: list[str] = []
    for where, record in read_records(path):
        try:
            parsed.append(parse(where, record))
        except VLMoError as error:
            problems.append(str(error))
        if len(problems) == MAX_PROBLEMS:
            break
    raise_problems(problems)
    if not parsed:
        raise VLMoError(f"{path}: has no records")
    return parsed


def image_file(root: str, record: dict[str, Any], key: str, where: str, skip_missing: bool) -> str:
    """The image that the record names, inside `root`; with `skip_missing` the writer counts it if it is not there."""
    path = inside(root, field(record, key, str, where), where)
    if not skip_missing and not os.path.isfile(path):
        raise VLMoError(f"{where}: {path} does not exist (skip_missing leaves such records out)")
    return path


def texts(record: dict[str, Any], key: str, where: str) -> list[str]:
    """`record[key]`, or `record[key + "s"]`: a text or a list of texts; blank ones do not count."""
    key = key if key in record or f"{key}s" not in record else f"{key}s"
    value = field(record, key, (str, list), where)
    values = read_list(value, key, where) if isinstance(value, str) else value
    if not all(isinstance(each, str) for each in values):
        raise VLMoError(f"{where}: {key!r} must be a text or a list of texts")
    found = [each.strip() for each in values if each.strip()]
    if not found:
        raise VLMoError(f"{where}: {key!r} is empty")
    return found


def read_list(value: str, key: str, where: str, numbers: bool = False) -> list[Any]:
    """The texts of a table's cell: those that it lists (with `numbers`, [2, 2] is a list too), else itself."""
    try:
        found = listed(value)
    except VLMoError as error:
        raise VLMoError(f"{where}: {key!r}: {error}") from error
    kinds = (str, int) if numbers and value.lstrip().startswith("[") else str
    is_list = found is not None and all(isinstance(each, kinds) for each in found)
    return [str(each) for each in found or ()] if is_list else [value]


def single_text(record: dict[str, Any], key: str, where: str) -> str:
    """`record[key]`, one text: a list of them would be taken for one."""
    text = field(record, key, str, where)
    if read_list(text, key, where) != [text]:
        raise VLMoError(f"{where}: {key!r} is a list: give a record for each text")
    return text


def split_of(record: dict[str, Any], where: str) -> str | None:
    """The record's split (train, val, test), None if it has none."""
    if "split" not in record:
        return None
    split = field(record, "split", str, where).strip().lower()
    if split not in SPLITS:
        raise VLMoError(f"{where}: unknown split {split!r}; known: {', '.join(SPLITS)}")
    return SPLITS[split]


def share_out(
    splits: Mapping[Key, str | None], val_share: float, test_share: float, seed: int, where: str
) -> dict[Key, str]:
    """A split for every key: its own, or for those without one, seeded shares (at least one each) of val and test.

    Raises VLMoError when nothing is left to train on, or nothing is there to validate on though `val_share` is not 0.
    """
    if not (0 <= val_share < 1 and 0 <= test_share < 1 and val_share + test_share < 1):
        raise VLMoError(f"val_share={val_share}, test_share={test_share}: must be 0 or more and below 1 together")
    given = {key: split for key, split in splits.items() if split is not None}
    free = [key for key in splits if key not in given]
    random.Random(seed).shuffle(free)
    num_val, num_test = (max(1, round(len(free) * share)) if share and free else 0 for share in (val_share, test_share))
    drawn = {key: "val" for key in free[:num_val]} | {key: "test" for key in free[num_val : num_val + num_test]}
    result = {key: given.get(key) or drawn.get(key, "train") for key in splits}
    if "train" not in result.values():
        raise VLMoError(f"{where}: nothing is left to train on (of {len(splits)} in all)")
    if val_share and "val" not in result.values():
        raise VLMoError(
            f"{where}: all records have a split, but none is 'val': leave out 'split' so that val_share of them is "
            "held out, or set val_share=0"
        )
    return result


def check_name(name: str) -> None:
    """Raises VLMoError unless `name` can be the first word of a table's file name."""
    if not re.fullmatch(r"\w[\w-]*", name):
        raise VLMoError(f"name={name!r}: may have letters, digits, _ and - only")


def caption_tables(name: str, splits: Iterable[str]) -> dict[str, Table]:
    """The tables, by split, that are read as `name` in `datasets`; `splits` are those that have rows.

    gcc and sbu have their own files' names, everything else coco's with another first word (and its four splits, some
    of them empty).
    """
    check_name(name)
    patterns = {"gcc": "conceptual_caption_{split}_{{shard}}", "sbu": "sbu_{{shard}}"}
    pattern = patterns.get(name, f"{name}_caption_karpathy_{{split}}")
    every = {"gcc": ("train", "val"), "sbu": ("train",)}.get(name, ("train", "restval", "val", "test"))
    missing = set(splits) - set(every)
    if missing:
        raise VLMoError(f"{name} has no {', '.join(sorted(missing))} split: choose another name or set its share to 0")
    shard_rows = SHARD_ROWS if name in patterns else None
    return {split: Table(pattern.format(split=split), CAPTION_SCHEMA, shard_rows) for split in every}
