"""Images a second and peak memory of the converters, by number of images and of workers, beside a plain converter.

python -m benchmarks.convert [--images 200000] [--repeat 1] [--root FOLDER] [--engine ray] [--all-only]

The images are tiny generated JPEGs with five captions each, in Karpathy's layout; a quarter, half, and all of them are
converted; with --all-only all of them, and not by the plain converter. That one works as published ones do: it reads
everything into lists, makes one table and writes it. Every conversion is a process of its own; memory is the largest
sum over it and its workers. With --root the images are kept and found again. With --engine ray, also by Ray's processes
on this machine.
"""

import argparse
import io
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.processes import watched

KINDS = 64  # different pictures
FOLDER_IMAGES = 10_000  # as file systems like it


def write_raw(root: Path, images: int) -> None:
    """Images, and a JSON file for each of the three sizes."""
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(KINDS):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "JPEG")
        pictures.append(file.getvalue())
    records = []
    for number in range(images):
        folder = f"{number // FOLDER_IMAGES:03d}"
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{number}.jpg").write_bytes(pictures[number % KINDS])
        sentences = [{"raw": f"caption {text} of the picture with the number {number}"} for text in range(5)]
        records.append({"filepath": folder, "filename": f"{number}.jpg", "split": "train", "sentences": sentences})
    for number in sizes(images):
        (root / f"{number}.json").write_text(json.dumps({"images": records[:number], "dataset": "generated"}))


def sizes(images: int) -> list[int]:
    return [images // 4, images // 2, images]


def convert_plainly(root: Path, out: Path, annotations: str) -> None:
    """The published way."""
    records = json.loads((root / annotations).read_text())["images"]
    rows = [
        [
            (root / record["filepath"] / record["filename"]).read_bytes(),
            [sentence["raw"] for sentence in record["sentences"]],
            record["filename"],
            record["split"],
        ]
        for record in records
    ]
    columns = dict(zip(("image", "caption", "image_id", "split"), map(list, zip(*rows, strict=True)), strict=True))
    table = pa.table(columns)
    out.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(str(out / "plain.arrow"), table.schema) as writer:
        writer.write_table(table)


def commands(root: Path, out: Path, number: int, engine: str, plain: bool) -> Iterator[tuple[str, list[str]]]:
    """Name and command of each converter."""
    if plain:
        yield "plain", [sys.executable, "-m", "benchmarks.convert", "--plain", str(root), str(out), f"{number}.json"]
    words = [sys.executable, "-m", "vlmo.utils.convert", "own_karpathy", str(root), str(out)]
    for workers in (1, 2):
        command = [*words, "--annotations", f"{number}.json", "--num-workers", str(workers)]
        yield f"{workers} workers", command
        if engine == "ray":
            yield f"ray, {workers}", [*command, "--engine", "ray"]


def report(root: Path, images: int, repeat: int, engine: str, all_only: bool) -> None:
    """Prints the table: medians over `repeat` rounds, in each of which everything is converted in turn."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(repeat):
        for number in [images] if all_only else sizes(images):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                for name, command in commands(root, Path(folder), number, engine, not all_only):
                    found.setdefault((name, number), []).append(watched(command))
                    shutil.rmtree(folder)
    middle = {
        key: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for key, rounds in found.items()
    }
    print(f"{'converter':<12}{'images':>10}{'seconds':>10}{'images/s':>10}{'peak MB':>10}")
    for (name, number), each in middle.items():
        print(f"{name:<12}{number:>10,}{each['seconds']:>10.1f}{number / each['seconds']:>10,.0f}", end="")
        print(f"{each['bytes'] / 1e6:>10,.0f}")
    if all_only:
        return
    small, _, large = sizes(images)
    for name in ("1 workers", "2 workers"):
        ratio = middle[name, large]["seconds"] / middle[name, small]["seconds"]
        print(f"{name}: {large / small:.0f} times the images take {ratio:.2f} times as long")
    seconds = {name: middle[name, large]["seconds"] for name in ("plain", "1 workers", "2 workers")}
    print(f"2 workers over 1: {seconds['1 workers'] / seconds['2 workers']:.2f} times as fast")
    memory = middle["plain", large]["bytes"] / middle["1 workers", large]["bytes"]
    print(f"plain over 1 worker: {memory:.1f} times the memory, {seconds['plain'] / seconds['1 workers']:.2f} the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--root", type=Path, help="where the raw images are, or shall be and stay")
    parser.add_argument("--engine", choices=("processes", "ray"), default="processes")
    parser.add_argument("--all-only", action="store_true")
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        root, out, annotations = options.plain
        convert_plainly(Path(root), Path(out), annotations)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder)
        if not all((root / f"{number}.json").is_file() for number in sizes(options.images)):
            print(f"making {options.images:,} images in {root}", flush=True)
            write_raw(root, options.images)
        report(root, options.images, options.repeat, options.engine, options.all_only)


if __name__ == "__main__":
    main()
