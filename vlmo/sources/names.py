"""What the name of a source says: "tar:/data/{00000..00331}.tar@val" is a kind, where its files lie, and splits."""

import itertools
import re
from typing import NamedTuple

SPLITS = ("train", "val", "test")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class SourceName(NamedTuple):
    """A name taken apart."""

    kind: str
    location: str
    splits: tuple[str, ...]


def parse(name: str) -> SourceName:
    """Takes a name apart; without "@train", "@val" or "@test" at its end it is for training."""
    kind, _, location = name.partition(":")
    splits: list[str] = []
    while (parts := location.rpartition("@"))[2] in SPLITS and parts[1]:
        location = parts[0]
        splits.insert(0, parts[2])
    return SourceName(kind, location, tuple(dict.fromkeys(splits)) or ("train",))


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of {00000..00331} and {a,b}: the names in order, leading zeros kept."""
    pieces: list[list[str]] = []
    end = 0
    for match in BRACES.finditer(pattern):
        pieces += [[pattern[end : match.start()]], _choices(*match.groups())]
        end = match.end()
    return ["".join(choice) for choice in itertools.product(*pieces, [pattern[end:]])]


def _choices(first: str | None, last: str | None, listed: str | None) -> list[str]:
    if first is None or last is None:
        return (listed or "").split(",")
    width = len(first) if first.startswith("0") else 1
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
