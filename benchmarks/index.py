"""What the index over captions and lines of text costs: time to open, memory of the main process and of a worker.

python -m benchmarks.index [--scale 1.0] [--repeat 3] [--root FOLDER]

The tables are generated, with images of a few bytes: stage 3 has 10 million captions over 4.1 million rows in 41 files,
stage 2 has 150 million lines in 50 files; --scale makes less of both. The plain loader works as published ones do: it
holds the texts as a list and a sample's place in a dict. It is given a tenth of the lines, since it needs more memory
than most machines have; its figures are multiplied by ten.

Every measurement is a process of its own, plain and vlmo in turn. "opened" is the memory of the main process alone
that opening takes, "resident" all that it has (torch included). A worker is then forked, opens the files and goes
through the index (the places of every tenth caption, the sizes of every line): "worker" is by how much its memory
grows. With --root the tables are kept and found again.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.processes import in_process, own_memory, resident
from vlmo.sources.arrow_tables import ArrowTables, open_table

CAPTIONS = {"rows": 4_100_000, "texts": 10_000_000, "files": 41, "batch_rows": 512}
LINES = {"rows": 150_000_000, "texts": 150_000_000, "files": 50, "batch_rows": 65_536}
WORDS = ["a", "the", "red", "blue", "cat", "dog", "man", "woman", "sits", "runs", "plays", "house", "river"]
STRETCH = 20_000  # texts
PLAIN_SHARE = {"captions": 1, "lines": 10}  # the plain loader is given one part in so many


def write_tables(folder: Path, rows: int, texts: int, files: int, batch_rows: int) -> None:
    """Tables as the converters write them: texts of 3 to 6 words, dealt out evenly to the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    pool = pa.array([" ".join(draw.choice(WORDS, draw.integers(3, 7))) for _ in range(10_000)])
    schema = pa.schema({"image": pa.binary(), "caption": pa.list_(pa.string()), "image_id": pa.string()})
    for number in range(files):
        unfinished = folder / f"{number:02d}.part"
        with pa.ipc.new_file(str(unfinished), schema) as writer:
            for start in range(0, rows // files, batch_rows):
                count = min(batch_rows, rows // files - start)
                ends = (np.arange(count + 1) * texts // rows).astype(np.int32)
                captions = pool.take(pa.array(draw.integers(0, len(pool), ends[-1])))
                columns = [pa.array([b"image"]).take(pa.array(np.zeros(count, np.int32)))]
                columns += [pa.ListArray.from_arrays(pa.array(ends), captions)]
                columns += [pa.array(np.arange(start, start + count)).cast(pa.string())]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        unfinished.rename(folder / f"{number:02d}.arrow")


class PlainIndex:
    """The published way."""

    def __init__(self, paths: list[Path]):
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        self.table = pa.concat_tables(tables)
        self.texts = self.table["caption"].to_pylist()
        self.places: dict[int, tuple[int, int]] = {}
        number = 0
        for row, texts in enumerate(self.texts):
            for item in range(len(texts)):
                self.places[number] = (row, item)
                number += 1


def pass_plainly(index: PlainIndex) -> None:
    """Looks every text up."""
    for number in range(len(index.places)):
        row, item = index.places[number]
        assert index.texts[row][item]


def pass_places(index: ArrowTables) -> None:
    """Finds the place of every tenth text."""
    for number in range(0, index.num_texts, 10):
        assert index.text(number).item >= 0


def pass_sizes(index: ArrowTables) -> None:
    """Finds every text's place and size, in stretches, as grouping by length does."""
    for start in range(0, index.num_texts, STRETCH):
        assert index.text_sizes(np.arange(start, min(start + STRETCH, index.num_texts))).all()


def warm_up(index: Any) -> None:
    """Has the files opened, and the first pages of the process copied."""
    if isinstance(index, ArrowTables):
        for number in np.linspace(0, index.num_texts - 1, 1000, dtype=int).tolist():
            index.text(number)
        index.text_sizes(np.arange(min(STRETCH, index.num_texts)))


def measure(kind: str, what: str, folder: Path) -> dict[str, float]:
    """Seconds, and bytes of memory, of one index of a `kind` ("plain" or "vlmo") over `what` ("captions", "lines")."""
    paths = sorted(folder.glob("*.arrow"))
    before = own_memory()
    start = time.perf_counter()
    index: Any
    walk: Callable[[Any], None]
    if kind == "plain":
        index, walk = PlainIndex(paths[: len(paths) // PLAIN_SHARE[what]]), pass_plainly
    else:
        index, walk = ArrowTables(paths, "caption"), (pass_places if what == "captions" else pass_sizes)
    seconds = time.perf_counter() - start
    opened, total = own_memory() - before, resident()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    worker = context.Process(target=grow, args=(walk, index, answers))
    worker.start()
    growth = answers.get()
    worker.join()
    texts = index.num_texts if kind == "vlmo" else len(index.places)
    return {"seconds": seconds, "opened": opened, "resident": total, "worker": growth, "texts": texts}


def grow(walk: Callable[[Any], None], index: Any, answers: multiprocessing.Queue) -> None:
    """In the worker: by how many bytes its own memory grows over a pass."""
    warm_up(index)
    before = own_memory()
    walk(index)
    answers.put(own_memory() - before)


def index_bytes(folder: Path) -> int:
    """Bytes of the index in the files: where each row's texts begin, and each text."""
    total = 0
    for path in sorted(folder.glob("*.arrow")):
        reader = open_table(path)
        for number in range(reader.num_record_batches):
            captions = reader.get_batch(number).column("caption")
            total += captions.buffers()[1].size + captions.values.buffers()[1].size
    return total


def report(what: str, folder: Path, repeat: int) -> None:
    """Prints the table of one of the two."""
    rounds: dict[str, list[dict[str, float]]] = {"plain": [], "vlmo": []}
    for _ in range(repeat):
        for kind, found in rounds.items():
            found.append(in_process("-m", "benchmarks.index", "--measure", kind, what, str(folder)))
    middle = {
        kind: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for kind, found in rounds.items()
    }
    share = PLAIN_SHARE[what]
    for name in ("seconds", "opened", "worker"):
        middle["plain"][name] *= share
    middle["plain"]["resident"] += (1 - 1 / share) * middle["plain"]["opened"]
    shared = index_bytes(folder) / 1e6
    print(f"\n{what}: {middle['vlmo']['texts']:,.0f} texts; their index in the files (shared) has {shared:,.0f} MB")
    print(f"{'loader':<10}{'open s':>10}{'opened MB':>12}{'resident MB':>13}{'worker MB':>12}")
    for kind, each in middle.items():
        print(f"{kind:<10}{each['seconds']:>10.2f}{each['opened'] / 1e6:>12,.1f}", end="")
        print(f"{each['resident'] / 1e6:>13,.0f}{each['worker'] / 1e6:>12,.1f}")
    ratio = {name: middle["plain"][name] / max(middle["vlmo"][name], 1e-9) for name in ("seconds", "opened")}
    print(f"{'ratio':<10}{ratio['seconds']:>10,.0f}{ratio['opened']:>12,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--root", type=Path, help="where the tables are, or shall be and stay")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, what, folder = options.measure
        print(json.dumps(measure(kind, what, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = options.root or Path(temporary)
        for what, size in {"captions": CAPTIONS, "lines": LINES}.items():
            folder = root / f"{what}_{options.scale}"
            if len(list(folder.glob("*.arrow"))) < size["files"]:
                print(f"making {folder}", flush=True)
                rows, texts = (int(size[name] * options.scale) for name in ("rows", "texts"))
                write_tables(folder, rows, texts, size["files"], size["batch_rows"])
            report(what, folder, options.repeat)


if __name__ == "__main__":
    main()
