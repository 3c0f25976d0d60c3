"""The training loader on the same pairs as Arrow, as tars and as Parquet, on a disk and behind a server.

python -m benchmarks.load_sources [--images 10000] [--seconds 10] [--repeat 3] [--samples 100000]

Three tables. First the work: processor time of an image from Arrow, tars, Parquet and webdataset's own loader, a batch
of each in turn in one process, which makes the same of an image (crop, augmentations, tokens, masks). Then the waiting:
images a second of one loader process from Arrow and from a loopback server that answers 20 ms late, measured after the
first 10 seconds, in turn; the cache holds four windows.
On Linux the loader process has the first core for itself, whatever it reads; the server and the process that takes the
batches share the last. Last the memory of a process that takes 100,000 samples of small images from that server.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from benchmarks.load_data import BATCH, SIZE, TEXT_LEN, endless, write_data
from benchmarks.processes import in_process, own_memory
from tests.servers import FileServer
from tests.source_files import write_tar
from tests.tables import encoded, picture
from vlmo.config import resolve
from vlmo.datamodules.collate import Collator
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets.base_dataset import BaseDataset
from vlmo.images import decode_image

LATENCY = 0.02  # seconds
WARM_UP = 10.0  # seconds: by then the cache is full
SHARD = 250  # samples of a tar or Parquet file
WINDOW = 1024
CLOCK = time.process_time
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def write_forms(root: Path, images: int) -> None:
    """128 photos again and again, in COCO's files, tars, and Parquet."""
    write_data(root, 128, (640, 480), None)
    (root / "samples.tar").unlink()  # (of `load_data` alone)
    table = pa.ipc.open_file(str(root / "coco_caption_karpathy_train.arrow")).read_all()
    table = pa.concat_tables([table] * -(-images // 128)).slice(0, images)
    write_files(root, table)


def write_files(root: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(root / "coco_caption_karpathy_train.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=512)
    for shard, start in enumerate(range(0, table.num_rows, SHARD)):
        part = table.slice(start, SHARD)
        rows = enumerate(zip(part["image"].to_pylist(), part["caption"].to_pylist(), strict=True), start)
        files = [
            (f"{number:07d}.{kind}", content)
            for number, (image, captions) in rows
            for kind, content in (("jpg", image), ("txt", captions[0].encode()))
        ]
        write_tar(root / f"{shard:05d}.tar", files)
        pq.write_table(part, root / f"{shard:05d}.parquet", row_group_size=100, compression="none")


def open_loader(kind: str, root: Path, url: str = "", workers: int = 0, **more: Any) -> tuple[MTDataModule, DataLoader]:
    """The project's training loader on a form of the data."""
    last = len(list(root.glob("*.tar"))) - 1
    form, place = kind.split(" ")[-1], url if kind.startswith("http") else root
    datasets = ["coco"] if form == "arrow" else [f"{form}:{place}/{{00000..{last:05d}}}.{form}"]
    options = {"data_root": str(root), "tokenizer": str(root / "vocab.txt"), "datasets": datasets, "num_gpus": 0}
    options |= {"per_gpu_batchsize": BATCH, "num_workers": workers, "max_text_len": TEXT_LEN, "image_size": SIZE}
    options |= {"batch_size": BATCH, "shuffle_window": WINDOW, "data_cache": str(root / "cache")}
    module = MTDataModule(resolve("task_mlm_itm_itc_base", **options | more))
    module.setup("fit")
    return module, module.train_dataloader()


def webdataset_loader(root: Path, module: MTDataModule) -> Iterator[Any]:
    """webdataset's pipeline with this project's work on each sample."""
    import webdataset

    part: BaseDataset = module.train_dataset.datasets[0]
    fields = ("text_ids_mlm", "text_labels_mlm")
    draw = torch.Generator()

    def make(sample: dict[str, Any]) -> dict[str, Any]:
        ids = part.text_ids(sample["txt"].decode())
        seed = int(torch.randint(2**31, (), generator=draw))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image = part.transform(decode_image(sample["jpg"]))
        masked = dict(zip(fields, part.masker(ids, np.random.default_rng(seed)), strict=True))
        return {"image": image, "text": sample["txt"].decode(), "text_ids": ids, **masked}

    files = sorted(map(str, root.glob("*.tar")))
    finish = [task.derive for task in module.tasks]
    collator = Collator(module.fields, TEXT_LEN, 1, finish)

    def collate(samples: list[dict[str, Any]]) -> Any:
        return collator([{name: each[name] for name in each if name[:2] != "__"} for each in samples])

    while True:
        pipeline = webdataset.WebDataset(files, shardshuffle=len(files)).shuffle(WINDOW).map(make)
        yield from DataLoader(pipeline, BATCH, collate_fn=collate, drop_last=True)


def compare_work(root: Path, rounds: int) -> None:
    """Prints processor time by loader; a batch of each in turn."""
    torch.set_num_threads(1)
    modules = {kind: open_loader(kind, root) for kind in ("arrow", "tar", "parquet")}
    sources = {kind: endless(loader) for kind, (_, loader) in modules.items()}
    try:
        import webdataset  # noqa: F401

        sources["webdataset"] = webdataset_loader(root, modules["tar"][0])
    except ImportError:
        print("webdataset is not installed")
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(rounds + 2):
        for name, source in sources.items():
            start = CLOCK()
            batch = next(source)
            assert batch["image"].shape == (BATCH, 3, SIZE, SIZE)
            if number >= 2:
                seconds[name].append(CLOCK() - start)
    print(f"{'one process':<14}{'images/s':>10}{'of arrow':>10}   (processor time, median of {rounds} rounds)")
    for name, times in seconds.items():
        ratio = statistics.median(old / new for old, new in zip(seconds["arrow"], times, strict=True))
        print(f"{name:<14}{BATCH / statistics.median(times):>10.0f}{ratio:>10.2f}", flush=True)


def use_core(place: int) -> None:
    """Keeps this thread, and what it starts from here on, on the first core (0) or the last (-1)."""
    if hasattr(os, "sched_setaffinity"):  # (Linux)
        os.sched_setaffinity(0, {CORES[place]})


def rate(kind: str, root: Path, url: str, seconds: float) -> float:
    """Images a second of a loader with one process, after the first seconds."""
    use_core(0)
    sizes = [path.stat().st_size for path in root.glob("*.tar")]
    source = endless(open_loader(kind, root, url, 1, data_cache_gb=4 * WINDOW * max(sizes) / SHARD / 1e9)[1])
    next(source)  # (starts the loader process)
    use_core(-1)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        next(source)
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        count += len(next(source)["image"])
    return count / (now - start)


def memory(root: Path, url: str, samples: int) -> list[float]:
    """The process's own bytes after each tenth of so many samples."""
    source = endless(open_loader("http tar", root, url, image_size=32, data_cache_gb=0.05)[1])
    found = []
    for number in range(samples // BATCH):
        next(source)
        if number % max(samples // BATCH // 10, 1) == 0:
            found.append(own_memory())
    return found


def serve(root: Path) -> None:
    use_core(-1)
    server = FileServer(root)
    server.delay = LATENCY
    print(server.url, flush=True)
    sys.stdin.read()  # until the other end is gone


def report(options: argparse.Namespace) -> None:
    """Prints the three tables."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_forms(root, options.images)
        compare_work(root, options.rounds)
        me = ["-m", "benchmarks.load_sources"]
        with subprocess.Popen([sys.executable, *me, "--serve", folder], stdin=-1, stdout=-1, text=True) as server:
            url = server.stdout.readline().strip()  # type: ignore[union-attr]
            found: dict[str, list[float]] = {kind: [] for kind in ("arrow", "http tar", "http parquet")}
            for _ in range(options.repeat):
                for kind, rates in found.items():
                    rates.append(in_process(*me, "--rate", kind, folder, url, str(options.seconds)))
            heads = f"{'one worker':<14}{'images/s':>10}{'of arrow':>10}"
            print(f"\n{heads}   (on a core of its own, median of {options.repeat} times)")
            for kind, rates in found.items():
                ratio = statistics.median(new / old for old, new in zip(found["arrow"], rates, strict=True))
                print(f"{kind:<14}{statistics.median(rates):>10.0f}{ratio:>10.2f}", flush=True)
            small = root / "small"
            small.mkdir()
            (small / "vocab.txt").write_text((root / "vocab.txt").read_text())
            images = [encoded(picture(number, (32, 32)), "JPEG") for number in range(100)] * (options.samples // 200)
            for split in ("val", "train"):
                table = pa.table({"image": images, "caption": [["a cat"]] * len(images)})
                write_files(small, table if split == "train" else table.slice(0, 1))
                (small / "coco_caption_karpathy_train.arrow").rename(small / f"coco_caption_karpathy_{split}.arrow")
            bytes_ = in_process(*me, "--memory", str(small), f"{url}/small", str(options.samples))
            print(f"\n{options.samples:,} samples of a server: MB of the process's own, at each tenth:")
            print(" ".join(f"{each / 1e6:.0f}" for each in bytes_))
            server.stdin.close()  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # (so many that what is timed lies within an epoch: at its start the first window is waited for)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rate", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve))
    elif options.rate:
        kind, folder, url, seconds = options.rate
        print(json.dumps(rate(kind, Path(folder), url, float(seconds))))
    elif options.memory:
        folder, url, samples = options.memory
        print(json.dumps(memory(Path(folder), url, int(samples))))
    else:
        report(options)


if __name__ == "__main__":
    main()
