"""The one writer behind all converters: rows stream in, complete Arrow files come out.

A `Table` is a file to write; a row names its images and carries everything else. `Conversion` reads the images (in
`num_workers` processes, always in the order of the rows), writes record batches of bounded size into a hidden folder
beside the results, and moves the finished files to their names only when all of them are complete, so that a conversion
that fails or is killed leaves nothing that a reader would take for data.
"""

import contextlib
import glob
import json
import os
import pickle
import re
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
from tqdm import tqdm

from vlmo.errors import VLMoError
from vlmo.files import sync
from vlmo.utils.record_batches import Row, Skipped, convert_chunk, read_batches
from vlmo.utils.workers import Workers

CHUNK_ROWS = 512  # rows handed to a worker at once, and the most of a record batch
AHEAD_BYTES = 4 << 30  # of rows that wait for a worker, in files; images are among them only from compressed archives
SHARD_NUMBER = re.compile(r"\d+(?=\.arrow$)")

TaggedRows = Iterable[tuple[str, Row | Skipped]]  # each with the key of its table


@dataclass(frozen=True)
class Table:
    """A file to write, or with `shard_rows` several: then `name` contains "{shard}" and each holds that many rows."""

    name: str
    schema: pa.Schema
    shard_rows: int | None = None


@dataclass
class Report:
    """What a conversion made: rows by file name, how many images or rows were left out by reason, remarks."""

    out: str
    rows: dict[str, int] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_file: str = ""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"in {self.out}:"]
        for family, group in groupby(self.rows.items(), lambda item: SHARD_NUMBER.sub("*", item[0])):
            files = list(group)
            name = files[0][0] if len(files) == 1 else f"{family} ({len(files)} files)"
            lines.append(f"  {name:<44} {sum(count for _, count in files):>12,} rows")
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
            lines.append(f"  left out {self.skipped.total():,} ({reasons}); listed in {self.skipped_file}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class Conversion:
    """Context manager of one conversion into the folder `out`; `name` tells its files from other conversions' there.

    Leaving it without an error moves the files to their names and prints the report. Raises VLMoError when files
    cannot be written.
    """

    def __init__(self, out: str, name: str, num_workers: int | Workers = 1) -> None:
        if isinstance(num_workers, int) and num_workers < 0:
            raise VLMoError(f"num_workers={num_workers}: must be 1 (only this process) or more")
        self.out, self.name = os.path.expanduser(out), name
        self.workers = Workers(num_workers) if isinstance(num_workers, int) else num_workers
        self.report = Report(self.out, skipped_file=f"{name}_skipped.txt")
        self._shard_counts: dict[str, int] = {}
        self._other_files: list[str] = []

    def __enter__(self) -> "Conversion":
        prefix = f".{self.name}.partial-"
        try:
            os.makedirs(self.out, exist_ok=True)
            for leftover in glob.glob(os.path.join(glob.escape(self.out), prefix + "*")):  # of a killed conversion
                shutil.rmtree(leftover, ignore_errors=True)
            self.scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=self.out))
            self._skipped_list: TextIO = open(self.path(self.report.skipped_file), "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise VLMoError(f"cannot write into {self.out}: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.workers.close()
            with contextlib.suppress(OSError):  # a full disk has been noticed before
                self._skipped_list.close()
            if error is None:
                self._publish()
        except OSError as problem:
            error = problem
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
        if isinstance(error, OSError):
            raise VLMoError(f"{self.name}: {error}; nothing was written to {self.out}") from error
        if error is None:
            print(self.report)

    def path(self, file_name: str) -> str:
        """Where to write `file_name` until the conversion is complete."""
        return str(self.scratch / file_name)

    def skip(self, skipped: Skipped) -> None:
        """Counts and lists something that is left out."""
        self.report.skipped[skipped.reason] += 1
        text = f"{skipped.name}\t{skipped.reason}\n"
        self._skipped_list.write(text.encode("utf-8", "replace").decode())

    def write(self, tables: Mapping[str, Table], rows: Callable[[], TaggedRows]) -> None:
        """Writes `tables` from one stream of rows, each tagged with the key of its table.

        Every mistake in the annotations is found, and the rows are counted, before hours of work: without workers
        `rows()` is gone through once before any image is read; with workers, far ahead of them. Raises VLMoError when
        there are no rows, or all rows of a table have unreadable images.
        """
        totals: Counter[str] = Counter()
        first_problem: dict[str, Skipped] = {}
        left_out: dict[str, str] = {}  # by reason the first
        with contextlib.ExitStack() as stack:
            writers = {key: stack.enter_context(_TableWriter(self, table)) for key, table in tables.items()}
            bar = stack.enter_context(tqdm(desc=self.name, unit="row", disable=None))
            for chunk, batches, skipped in self._converted(tables, rows, bar):
                totals[chunk.key] += chunk.num_rows
                for batch in batches:
                    writers[chunk.key].write(batch)
                for each in skipped:  # complete only now: without workers the images are read while batches are taken
                    self.skip(each)
                    first_problem.setdefault(chunk.key, each)
                for each in chunk.left_out:
                    self.skip(each)
                    left_out.setdefault(each.reason, each.name)
                bar.update(chunk.num_rows)
        if not totals.total():
            raise VLMoError(f"{self.name}: nothing to convert: {self._why_nothing(left_out)}")
        for key, total in totals.items():
            if total and not writers[key].total_rows:
                name, reason = first_problem[key]
                raise VLMoError(
                    f"{tables[key].name}: none of {total:,} rows has readable images; the first: {name}: {reason}"
                )

    def _why_nothing(self, first: Mapping[str, str]) -> str:
        if not first:
            return "the annotations are empty"
        counts = ", ".join(f"{self.report.skipped[why]:,} {why} (the first: {name})" for why, name in first.items())
        return f"0 of {self.report.skipped.total():,}: {counts}"

    def copy_rows(self, source: str, target: str, start: int, stop: int) -> None:
        """Writes rows `start` to `stop` of the table `source` of this conversion once more, as the table `target`."""
        with pa.memory_map(self.path(f"{source}.arrow")) as file:
            reader = pa.ipc.open_file(file)
            with _TableWriter(self, Table(target, reader.schema)) as writer:
                first = 0
                for index in range(reader.num_record_batches):
                    batch = reader.get_batch(index)
                    low, high = max(start - first, 0), min(stop - first, batch.num_rows)
                    if low < high:
                        writer.write(batch.slice(low, high - low))
                    first += batch.num_rows

    def write_json(self, file_name: str, content: Any) -> None:
        """Writes a JSON file beside the tables."""
        with open(self.path(file_name), "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=0)
        self._other_files.append(file_name)

    def add_file(self, file_name: str, rows: int) -> None:
        """States that the Arrow file at `path(file_name)` is one of the results, and how many rows it has."""
        self.report.rows[file_name] = rows

    def set_shards(self, pattern: str, count: int) -> None:
        """States that the family of files `pattern` has `count` shards now: older ones beyond will be removed."""
        self._shard_counts[pattern] = count

    def _converted(
        self, tables: Mapping[str, Table], rows: Callable[[], TaggedRows], bar: tqdm
    ) -> Iterator[tuple["_Chunk", Iterable[pa.RecordBatch], list[Skipped]]]:
        """Every chunk with its record batches and what was left out on reading; tells `bar` the number of rows."""
        stream = iter(rows())
        head = list(islice(stream, CHUNK_ROWS + 1))
        if self.workers.parallel and len(head) > CHUNK_ROWS:
            yield from self._by_workers(tables, _chunked(tables, chain(head, stream)), bar)
            return
        bar.total = sum(isinstance(row, Row) for _, row in chain(head, stream))
        for chunk, chunk_rows in _chunked(tables, rows()):
            skipped: list[Skipped] = []
            yield chunk, read_batches(chunk_rows, tables[chunk.key].schema, skipped), skipped

    def _by_workers(
        self, tables: Mapping[str, Table], chunks: Iterable[tuple["_Chunk", list[Row]]], bar: tqdm
    ) -> Iterator[tuple["_Chunk", Iterable[pa.RecordBatch], list[Skipped]]]:
        under_way: deque[tuple[_Chunk, str, str, int]] = deque()
        waiting = total = 0  # bytes of rows in files, rows

        def calls() -> Iterator[tuple[Any, ...]]:
            nonlocal waiting, total
            for number, (chunk, rows) in enumerate(chunks):
                rows_path, path = self.path(f"{number}.rows"), self.path(f"{number}.chunk")
                with open(rows_path, "wb") as file:
                    pickle.dump(rows, file, pickle.HIGHEST_PROTOCOL)
                size = os.path.getsize(rows_path)
                under_way.append((chunk, rows_path, path, size))
                waiting, total = waiting + size, total + chunk.num_rows
                yield rows_path, tables[chunk.key].schema, path
            bar.total = total

        def is_far_ahead() -> bool:
            return waiting > AHEAD_BYTES

        for skipped in self.workers.map(convert_chunk, calls(), is_far_ahead):
            chunk, rows_path, path, size = under_way.popleft()
            os.unlink(rows_path)
            waiting -= size
            with pa.memory_map(path) as file, pa.ipc.open_stream(file) as batches:
                yield chunk, batches, skipped
            os.unlink(path)

    def _publish(self) -> None:
        """Moves the finished files to their names; shards that an earlier, longer conversion left are removed."""
        file_names = [*self.report.rows, *self._other_files]
        if self.report.skipped:
            file_names.append(self.report.skipped_file)
        else:
            Path(self.out, self.report.skipped_file).unlink(missing_ok=True)
        for file_name in file_names:
            sync(self.path(file_name))
        for file_name in file_names:
            os.replace(self.path(file_name), os.path.join(self.out, file_name))
        for pattern, count in self._shard_counts.items():
            self._remove_old_shards(pattern, count)
        with contextlib.suppress(OSError):  # not every file system has it for folders
            sync(self.out)

    def _remove_old_shards(self, pattern: str, count: int) -> None:
        expression = re.compile(re.escape(pattern).replace(re.escape("{shard}"), r"(\d+)") + r"\.arrow")
        for file_name in sorted(os.listdir(self.out)):
            match = expression.fullmatch(file_name)
            if match and int(match[1]) >= count:
                os.unlink(os.path.join(self.out, file_name))
                self.report.notes.append(f"removed {file_name} of an earlier conversion")


class _Chunk(NamedTuple):
    """Of the rows for the table `key`: how many, and the rows without images that came before the last of them."""

    key: str
    num_rows: int
    left_out: list[Skipped]


def _chunked(tables: Mapping[str, Table], rows: TaggedRows) -> Iterator[tuple[_Chunk, list[Row]]]:
    pending: dict[str, list[Row]] = {key: [] for key in tables}
    left_out: list[Skipped] = []
    for key, row in rows:
        if isinstance(row, Skipped):
            left_out.append(row)
            continue
        pending[key].append(row)
        if len(pending[key]) == CHUNK_ROWS:
            yield _Chunk(key, CHUNK_ROWS, left_out), pending[key]
            pending[key], left_out = [], []
    for key, chunk in pending.items():
        if chunk or left_out:
            yield _Chunk(key, len(chunk), left_out), chunk
            left_out = []


class _TableWriter:
    """Writes record batches to one file, or to the next shard whenever one is full."""

    def __init__(self, conversion: Conversion, table: Table) -> None:
        self._conversion, self._table = conversion, table
        self._shard = 0
        self.total_rows = 0
        self._open()

    def _open(self) -> None:
        self._file_name = self._table.name.format(shard=self._shard) + ".arrow"
        self._rows = 0
        self._writer = pa.ipc.new_file(self._conversion.path(self._file_name), self._table.schema)
        self._conversion.add_file(self._file_name, 0)  # in the order of opening

    def __enter__(self) -> "_TableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._table.shard_rows:
            self._conversion.set_shards(self._table.name, self._shard + 1)

    def _close(self) -> None:
        self._writer.close()
        self._conversion.add_file(self._file_name, self._rows)

    def write(self, batch: pa.RecordBatch) -> None:
        while batch.num_rows:
            if self._rows == self._table.shard_rows:
                self._close()
                self._shard += 1
                self._open()
            room = self._table.shard_rows - self._rows if self._table.shard_rows else batch.num_rows
            part = batch.slice(0, room)
            self._writer.write_batch(part)
            self._rows += part.num_rows
            self.total_rows += part.num_rows
            batch = batch.slice(part.num_rows)
