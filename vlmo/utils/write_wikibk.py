"""Plain text, one text a line -> wikibk_train_{0..}.arrow, one for each file, and wikibk_val_0.arrow.

Any number of files, such as English Wikipedia and BookCorpus in pieces.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
from tqdm import tqdm

from vlmo.errors import VLMoError
from vlmo.utils.arrow_writer import Conversion, Report
from vlmo.utils.record_batches import make_batch

LAYOUT = """
  wikibk.0.txt, wikibk.1.txt, ...    (any *.txt: one text a line)
  wikibk.val.txt                     (optional: files with "val" as a part of their name are for validation)
"""
SCHEMA = pa.schema(
    {"image": pa.string(), "caption": pa.list_(pa.string()), "source": pa.string(), "split": pa.string()}
)
BATCH_ROWS = 65_536
BATCH_CHARACTERS = 8 << 20
LONG_LINE = 2000  # characters, twice what makes 196 tokens
MAX_LINE_BYTES = 1 << 20  # a longer line is cut at a blank; training uses the first 196 tokens of each piece
VALIDATION_NAME = re.compile(r"(^|[._-])(val|valid|validation|dev)([._-]|$)")


class Task(NamedTuple):
    """A text file to write as a table, without the lines at the positions `held_out`."""

    source: str
    target: str
    split: str
    held_out: frozenset[int] = frozenset()


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1, val_share: float = 0.001) -> Report:
    """Converts the text files in `root` into tables in `dataset_root`; a worker takes a file at a time.

    Empty lines are left out. Raises VLMoError when there are no texts.

    Args:
        val_share: where no file is meant for validation, this share of the lines (at least one), evenly spaced over
            all files, is taken out of training for it.
    """
    if not 0 < val_share < 1:
        raise VLMoError(f"val_share={val_share}: must be above 0 and below 1")
    train, val = _text_files(root)
    with Conversion(dataset_root, "wikibk", num_workers) as conversion:
        counts = list(tqdm(_counts(conversion, train), desc="counting lines", total=len(train), disable=None))
        held_out = [frozenset[int]()] * len(train) if val else _spaced(counts, val_share)
        tasks = [
            Task(path, conversion.path(f"wikibk_train_{number}.arrow"), "train", positions)
            for number, (path, positions) in enumerate(zip(train, held_out, strict=True))
        ]
        tasks += [Task(path, conversion.path(f"wikibk_val_{number}.arrow"), "val") for number, path in enumerate(val)]
        val_texts: list[str] = []
        written = tqdm(_written(conversion, tasks), desc="writing files", total=len(tasks), disable=None)
        for task, (rows, texts) in zip(tasks, written, strict=True):
            conversion.add_file(os.path.basename(task.target), rows)
            val_texts += texts
        if not val:
            rows = _write_texts(val_texts, conversion.path("wikibk_val_0.arrow"), "val")
            conversion.add_file("wikibk_val_0.arrow", rows)
        conversion.set_shards("wikibk_train_{shard}", len(train))
        conversion.set_shards("wikibk_val_{shard}", max(len(val), 1))
    return conversion.report


def _text_files(root: str) -> tuple[list[str], list[str]]:
    """Training and validation files, "wikibk.2.txt" before "wikibk.10.txt"."""
    if not os.path.isdir(root):
        raise VLMoError(f"{root} is not a folder. Expected there:{LAYOUT.rstrip()}")
    names = [name for name in os.listdir(root) if name.endswith(".txt") and not name.startswith("._")]
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    paths = {name: os.path.join(root, name) for name in names}
    val = [paths[name] for name in names if VALIDATION_NAME.search(name)]
    train = [paths[name] for name in names if not VALIDATION_NAME.search(name)]
    if not train:
        raise VLMoError(f"no text files to train on in {root}. Expected there:{LAYOUT.rstrip()}")
    return train, val


def _counts(conversion: Conversion, paths: list[str]) -> Iterator[int]:
    """The number of texts of each file; empty lines go into the report."""
    total = total_empty = total_long = 0
    for texts, empty, long in conversion.workers.map(_count_texts, ((path,) for path in paths)):
        total, total_empty, total_long = total + texts, total_empty + empty, total_long + long
        yield texts
    if total_long > total / 100:
        conversion.report.notes.append(
            f"{total_long:,} of {total:,} lines have over {LONG_LINE:,} characters, of which training uses the first "
            "196 tokens: split documents into passages of about 150 words"
        )
    if total_empty:
        conversion.report.notes.append(f"{total_empty:,} empty lines left out")


def _count_texts(path: str) -> tuple[int, int, int]:
    """Numbers of texts, of empty lines, and of texts that are much longer than what training uses."""
    texts = empty = long = 0
    for text in _lines(path):
        if text:
            texts += 1
            long += len(text) > LONG_LINE
        else:
            empty += 1
    return texts, empty, long


def _spaced(counts: list[int], share: float) -> list[frozenset[int]]:
    """For each file the positions of its texts that are held out: evenly spaced over all files."""
    total = sum(counts)
    if total < 2:
        raise VLMoError(f"the text files have {total} texts: at least 2 are needed")
    number = max(1, round(total * share))
    positions = [int((index + 0.5) * total / number) for index in range(number)]
    held_out, first = [], 0
    for count in counts:
        low, high = bisect_left(positions, first), bisect_left(positions, first + count)
        held_out.append(frozenset(position - first for position in positions[low:high]))
        first += count
    return held_out


def _written(conversion: Conversion, tasks: list[Task]) -> Iterator[tuple[int, list[str]]]:
    return conversion.workers.map(_write_file, ((task,) for task in tasks))


def _write_file(task: Task) -> tuple[int, list[str]]:
    """Writes a table and returns its number of rows and the texts held out."""
    held_out: list[str] = []

    def kept() -> Iterator[str]:
        for position, text in enumerate(filter(None, _lines(task.source))):
            if position in task.held_out:
                held_out.append(text)
            else:
                yield text

    return _write_texts(kept(), task.target, task.split), held_out


def _write_texts(texts: Iterable[str], target: str, split: str) -> int:
    rows = 0
    with pa.ipc.new_file(target, SCHEMA) as writer:
        for captions in _bounded(texts):
            number = len(captions)
            columns: dict[str, list] = {"image": ["None"] * number, "caption": captions}
            columns |= {"source": ["wikibk"] * number, "split": [split] * number}
            writer.write_batch(make_batch(columns, SCHEMA))
            rows += number
    return rows


def _bounded(texts: Iterable[str]) -> Iterator[list[list[str]]]:
    """Captions of one text each, in groups that make record batches of bounded size."""
    group: list[list[str]] = []
    size = 0
    for text in texts:
        group.append([text])
        size += len(text)
        if len(group) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _lines(path: str) -> Iterator[str]:
    """Lines without surrounding blanks, "" for empty ones; bytes that are no UTF-8 become U+FFFD."""
    rest = b""
    with open(path, "rb") as file:
        while piece := rest + file.readline(MAX_LINE_BYTES - len(rest)):
            rest = b""
            if len(piece) == MAX_LINE_BYTES and not piece.endswith(b"\n"):
                cut = piece.rfind(b" ") + 1
                if cut:
                    piece, rest = piece[:cut], piece[cut:]
            yield piece.decode("utf-8", "replace").strip()
