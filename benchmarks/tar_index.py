"""What the index over tars costs: to make, to open at 10 million samples, and in the memory of a worker.

python -m benchmarks.tar_index [--samples 10000000] [--tars 1000] [--repeat 3]

Opening is measured on generated indices of sparse files, which have the sizes of tars and no content: in a process of
its own each time, the index is opened, and a forked worker looks up the place of every tenth caption and its image.
"mapped" is what all processes share, "opened" what the main process has of its own for it, "worker" by how much a
worker's own memory grows. Making is measured on real tars with small images, beside Python's `tarfile` on the same.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.processes import in_process, own_memory
from tests.source_files import write_tar
from vlmo.registry import SOURCES
from vlmo.sources.index import Contents, write_index
from vlmo.sources.indexing import index_file
from vlmo.sources.options import SourceOptions
from vlmo.sources.storage import identities
from vlmo.sources.tables import SourceTables

OPTIONS = SourceOptions()
SAMPLE_BLOCKS = 100  # of 512 bytes: an image of some 50 KB and its text
MADE = 20_000  # samples of the real tars


def write_indices(folder: Path, samples: int, tars: int) -> list[str]:
    """Indices as of tars with as many samples each, and files for them that take no room."""
    files = []
    for number in range(tars):
        rows = samples // tars
        path = folder / f"{number:05d}.tar"
        path.touch()
        os.truncate(path, rows * SAMPLE_BLOCKS * 512)
        first = np.arange(rows, dtype=np.uint32) * SAMPLE_BLOCKS + 1
        arrays = {"image_block": first, "image_size": np.full(rows, 48_000, np.uint32)}
        arrays |= {"text_block": first + 95, "text_size": np.full(rows, 60, np.uint32)}
        arrays["text_kind"] = np.ones(rows, np.uint8)
        contents = Contents(rows, rows, rows, arrays=arrays)
        write_index(Path(f"{path}.index"), identities([str(path)], OPTIONS)[0], contents)
        files.append(str(path))
    return files


def measure(folder: Path) -> dict[str, float]:
    """Seconds and bytes of opening all tars of a folder."""
    files = sorted(map(str, folder.glob("*.tar")))
    before, start = own_memory(), time.perf_counter()
    tables = SourceTables(SOURCES["tar"], files, OPTIONS)
    seconds = time.perf_counter() - start
    opened = own_memory() - before
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    worker = context.Process(target=grow, args=(tables, answers))
    worker.start()
    growth = answers.get()
    worker.join()
    mapped = sum(os.path.getsize(path) for path in tables.indices)
    return {"texts": tables.num_texts, "seconds": seconds, "mapped": mapped, "opened": opened, "worker": growth}


def grow(tables: SourceTables, answers: multiprocessing.Queue) -> None:
    """In the worker: by how many bytes its own memory grows over a pass."""

    def look(number: int) -> None:
        location = tables.text(number)
        place = tables.arrays(location.table)
        assert place["image_size"][location.row] and place["text_block"][location.row]

    for number in range(0, 1000):
        look(number)
    before = own_memory()
    for number in range(0, tables.num_texts, 10):
        look(number)
    answers.put(own_memory() - before)


def make(folder: Path) -> tuple[float, float, float]:
    """Samples a second: of the index, of the first tar read in tarfile's way, and bytes a sample of the index."""
    data = os.urandom(3000)
    for shard in range(2):
        files = [
            (f"{n:06d}.{kind}", data if kind == "jpg" else b"a cat on a sofa")
            for n in range(MADE // 2)
            for kind in ("jpg", "txt")
        ]
        write_tar(folder / f"{shard}.tar", files)
    paths = sorted(map(str, folder.glob("*.tar")))
    start = time.process_time()
    for path, identity in zip(paths, identities(paths, OPTIONS), strict=True):
        assert not index_file(SOURCES["tar"].index, OPTIONS, path, identity)
    middle = time.process_time()
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith("txt"):
                    tar.extractfile(member).read()
    end = time.process_time()
    size = sum(path.stat().st_size for path in folder.glob("*.index"))
    return MADE / (middle - start), MADE / (end - middle), size / MADE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure))))
        return
    with tempfile.TemporaryDirectory() as folder:
        mine, plain, size = make(Path(folder))
        print(f"making: {mine:,.0f} samples/s ({size:.1f} bytes each); reading with tarfile: {plain:,.0f} samples/s")
    with tempfile.TemporaryDirectory() as folder:
        write_indices(Path(folder), options.samples, options.tars)
        found = [in_process("-m", "benchmarks.tar_index", "--measure", folder) for _ in range(options.repeat)]
    middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
    print(f"{middle['texts']:,.0f} samples in {options.tars:,} tars: opened in {middle['seconds']:.2f} s")
    for name in ("mapped", "opened", "worker"):
        print(f"{name:<8}{middle[name] / 1e6:>8.1f} MB")


if __name__ == "__main__":
    main()
