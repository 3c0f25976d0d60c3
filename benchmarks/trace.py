"""How many files of the package a reader has to follow: those that one step enters, and those of one evaluation.

python -m benchmarks.trace [step|recall] [--list]

The tiny model on a CPU, one process, loader in the same process, everything logged at every step. `step` follows the
second training batch of stage 3, from the end of the first to its own end (the next batch is made meanwhile). `recall`
follows a whole `test_only=True get_recall_metric=True`, and counts the images decoded and the texts tokenised.
"""

import argparse
import logging
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from pytorch_lightning import Callback

import vlmo
from tests import tables, tiny
from vlmo.training.runner import execute, prepare, run

PACKAGE = str(Path(vlmo.__file__).parent)


class Trace:
    """Files of the package by the number of times that they are entered, changes of file, and calls by function."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.functions: Counter[str] = Counter()
        self.inside: dict[str, set[str]] = defaultdict(set)
        self.changes = 0
        self._last = ""

    def enter(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE) and frame.f_code.co_name != "<module>":
            self.files[file] += 1
            self.functions[frame.f_code.co_name] += 1
            self.inside[file].add(frame.f_code.co_name)
            self.changes += file != self._last
            self._last = file

    @contextmanager
    def follow(self) -> Iterator[None]:
        sys.setprofile(self.enter)
        try:
            yield
        finally:
            sys.setprofile(None)


class SecondBatch(Callback):
    """Follows the second batch."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        sys.setprofile(self.trace.enter if batch_idx == 0 else None)


def options(folder: Path) -> dict[str, Any]:
    return {
        "data_root": str(folder),
        "tokenizer": str(folder / "vocab.txt"),
        "log_dir": str(folder / "result"),
        "datasets": ["coco"],
        "log_every_n_steps": 1,
        "max_steps": 3,
        "max_epoch": 10,
        "warmup_steps": 1,
        "batch_size": 2,
        "per_gpu_batchsize": 2,
    }


def trace_step(folder: Path) -> Trace:
    trace = Trace()
    run(tiny.config("task_mlm_itm_itc_base", **options(folder)), callbacks=[SecondBatch(trace)])
    return trace


class _NoReport(Callback):
    def __init__(self, *_: Any) -> None: ...

    def end(self, *_: Any) -> None: ...


def trace_recall(folder: Path) -> Trace:
    import torch

    name = "task_finetune_irtr_coco_base_image384"
    file = folder / "model.pt"
    torch.save(tiny.model(name, **options(folder)).state_dict(), file)
    config = tiny.config(name, **options(folder), load_path=str(file), test_only=True, get_recall_metric=True)
    trace = Trace()
    # (what comes after the evaluation, its report, is no part of it)
    with patch("vlmo.training.runner.RunRecord", _NoReport), trace.follow():
        execute(prepare(config))
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("step", "recall"), default="step")
    parser.add_argument("--list", action="store_true", help="name the files")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables.write_coco(folder)
        tables.write_vocabulary(folder)
        trace = (trace_step if arguments.what == "step" else trace_recall)(folder)
    print(f"\n{arguments.what}: {len(trace.files)} files, {trace.changes} changes of file")
    if arguments.what == "recall":
        print(f"images decoded {trace.functions['decode_image']}, texts tokenised {trace.functions['tokenize']}")
    if arguments.list:
        for file, count in sorted(trace.files.items()):
            print(f"{count:6} {str(Path(file).relative_to(PACKAGE)):<40} {', '.join(sorted(trace.inside[file]))}")


if __name__ == "__main__":
    main()
