"""Whole runs on tiny tables, with a size even smaller than tiny."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tables, tiny
from vlmo.modules.multiway_transformer import ARCHITECTURES
from vlmo.training.runner import run

MICRO = "vlmo_micro_patch16"  # its checkpoints have 4 MB instead of 64


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from a second thread, and wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Folder with the tables of all sets that the runs use, and a vocabulary."""
    root = tmp_path_factory.mktemp("data")
    for write in (tables.write_coco, tables.write_f30k, tables.write_wikibk, tables.write_vqa, tables.write_nlvr2):
        write(root)
    tables.write_vocabulary(root)
    return root


@pytest.fixture(scope="session")
def micro():
    """The size, under its name for `model_arch`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            ARCHITECTURES, MICRO, dict(embed_dim=48, depth=3, num_heads=3, vl_start=2, layer_scale=1.0, init_std=0.1)
        )
        yield MICRO


class Run:
    """One run: what it returned and what it wrote."""

    def __init__(
        self,
        log_dir: Path,
        *named: str,
        callbacks: Sequence[Any] = (),
        more_loggers: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        self.log_dir = log_dir
        self.config = tiny.config(*named, log_dir=str(log_dir), **options)
        self.metrics = run(self.config, callbacks=callbacks, loggers=more_loggers)

    @property
    def folder(self) -> Path:
        """The newest version."""
        return max(self.log_dir.glob("*/version_*"), key=lambda path: int(path.name.removeprefix("version_")))

    @property
    def rows(self) -> list[dict[str, float]]:
        """What was logged, line by line, without what was not."""
        with (self.folder / "metrics.csv").open() as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def logged(self, tag: str) -> dict[int, float]:
        """Step -> value."""
        return {int(row["step"]): row[tag] for row in self.rows if tag in row}

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def go(data, micro, tmp_path_factory):
    """Makes a run of a few steps on the tiny tables."""

    def made(*named: str, log_dir: Path | None = None, **options: Any) -> Run:
        defaults = {"model_arch": micro, "data_root": str(data), "tokenizer": str(data / "vocab.txt")}
        defaults |= {"max_steps": 3, "max_epoch": 100, "warmup_steps": 1, "log_every_n_steps": 1, "vqav2_label_size": 3}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return Run(log_dir or tmp_path_factory.mktemp("result"), *named, **(defaults | options))
        finally:
            torch.set_num_threads(threads)

    return made
