"""Which files of a tar or folder are a sample, and what its captions are: for reading in place and for converting.

A sample is an image and its caption, in .txt or in .json: in a tar, files side by side that share a name up to the
first dot, in a folder up to the ending. Files that claim the same place in a sample are told apart by their whole
names; where that is no help the sample is left out.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from vlmo.images import SUFFIXES

IMAGE_EXTENSIONS = {suffix.removeprefix(".") for suffix in SUFFIXES}
TEXT_EXTENSIONS = {"txt", "json"}
CAPTION_NAMES = ("caption", "captions", "text", "TEXT", "txt")  # entries or columns, the first that is there
MAX_TEXT_BYTES = 1 << 20


class Member(NamedTuple):
    """A file: its name with folders, where it lies, and its content if it is a text."""

    name: str
    place: Any
    text: str = ""


@dataclass
class Sample:
    """The files that belong together.

    Attributes:
        image: where it lies; None: there is none.
        texts, places: content, and where it lies, by extension: txt, json.
        problem: why nobody can say what belongs together.
    """

    name: str
    image: Any = None
    texts: dict[str, str] = field(default_factory=dict)
    places: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def extension(path: str) -> str:
    return os.path.basename(path).partition(".")[2].rpartition(".")[2].lower()


def key(path: str) -> str:
    """The name up to the first dot, as webdataset has it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.partition(".")[0])


def stem(path: str) -> str:
    """The name without the endings that are known: a dot before them belongs to the name, as in 1.2.840.jpg."""
    folder, name = os.path.split(path)
    while extension(name) in IMAGE_EXTENSIONS | TEXT_EXTENSIONS:
        name = name.rpartition(".")[0]
    return os.path.join(folder, name)


def group_side_by_side(folder: str, members: Iterable[Member]) -> Iterable[Sample]:
    """The samples of a tar; `folder` begins their names."""
    incomplete: set[str] = set()
    for name, group in groupby(members, lambda member: key(member.name)):
        for sample in _samples(folder, name, list(group)):
            if sample.image is None or not sample.texts:
                if sample.name in incomplete and not sample.problem:
                    sample.problem = "files of a sample not side by side (tar --sort=name puts them so)"
                incomplete.add(sample.name)
            yield sample


def _samples(folder: str, name: str, members: list[Member]) -> list[Sample]:
    """One sample; if two files claim the same place in it, those of the whole names, if these make any."""
    sample = put_together(f"{folder}/{name}", members)
    if not sample.problem:
        return [sample]
    named = groupby(sorted(members, key=lambda member: stem(member.name)), lambda member: stem(member.name))
    apart = [put_together(f"{folder}/{whole}", group) for whole, group in named]
    return apart if any(each.image is not None and each.texts and not each.problem for each in apart) else [sample]


def put_together(name: str, members: Iterable[Member]) -> Sample:
    """One sample of all these files."""
    sample = Sample(name)
    for member in members:
        kind = extension(member.name)
        if kind in IMAGE_EXTENSIONS:
            sample.problem = "several images in one sample" if sample.image is not None else sample.problem
            sample.image = member.place
        elif kind in TEXT_EXTENSIONS:
            sample.problem = "several texts in one sample" if kind in sample.texts else sample.problem
            sample.texts[kind], sample.places[kind] = member.text, member.place
    return sample


def captions(texts: Mapping[str, str], column: str | None) -> tuple[list[str], str]:
    """The captions; and what there is to choose from, where they are looked for in a .json.

    Args:
        texts: by extension.
        column: the entry of the .json; None: the .txt, else the first entry there is of `CAPTION_NAMES`.
    """
    if text_file(texts, column) != "json":
        return clean(texts.get("txt")), ""
    try:
        record = json.loads(texts["json"])
    except (ValueError, RecursionError):
        return [], " (its .json is damaged)"
    if not isinstance(record, dict):
        return [], ""
    name = column or next((name for name in CAPTION_NAMES if name in record), "caption")
    return clean(record.get(name)), f" (its .json has {', '.join(record)[:200]})"


def text_file(texts: Mapping[str, Any], column: str | None) -> str:
    """The extension of the file that has the captions."""
    return "json" if "json" in texts and (column is not None or "txt" not in texts) else "txt"


def clean(value: Any) -> list[str]:
    """The texts of an entry that is one or a list of them, without blanks around and without blank ones."""
    values = value if isinstance(value, list) else [value]
    return [each.strip() for each in values if isinstance(each, str) and each.strip()]


def decode(content: bytes) -> str:
    """UTF-8; what is none becomes the replacement character."""
    return content.decode("utf-8-sig", "replace")
