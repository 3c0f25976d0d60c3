"""What the Arrow files of a run hold, and whether a sample of their images can be decoded: for a look beforehand."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmo.datasets.base_dataset import DatasetSpec
from vlmo.datasets.checks import split_files
from vlmo.datasets.source_spec import SourceSpec
from vlmo.images import UndecodableImage, decode_image
from vlmo.sources.arrow_tables import ArrowTables, Tables
from vlmo.sources.options import SourceOptions

SAMPLED_ROWS = 16  # of each file, evenly spaced
WORTH_A_CLUSTER = 2.0  # hours


@dataclass
class DatasetStats:
    """The files of one split of a data set.

    Attributes:
        sampled: images that were decoded or not.
        seconds: that reading and decoding those took.
        undecodable: one line for each that could not.
    """

    files: int = 0
    rows: int = 0
    texts: int = 0
    sampled: int = 0
    seconds: float = 0.0
    undecodable: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.files} file{'s' * (self.files != 1)}, {self.rows:,} rows, {self.texts:,} texts"
        return text + (f"; {self.sampled} images tried" if self.sampled else "")


def scan_dataset(root: Path, spec: DatasetSpec, split: str, settings: Any) -> DatasetStats:
    """Opens each file of a split, and decodes some of its images: of each Arrow file, or of all of a source.

    Raises:
        VLMoError: if a file cannot be read.
    """
    found = DatasetStats()
    for tables in _tables(root, spec, split, settings):
        found.files += len(tables.paths)
        found.rows += tables.num_rows
        found.texts += tables.num_texts
        start = time.perf_counter()
        for problem in _decoded(tables, spec):
            found.sampled += 1
            found.undecodable += [problem] if problem else []
        found.seconds += time.perf_counter() - start
    return found


def cluster_advice(found: DatasetStats, cores: int) -> str:
    """Says so where this machine would read and decode the images of a split for hours, which a cluster shortens."""
    hours = found.rows * found.seconds / max(found.sampled, 1) / cores / 3600
    if hours < WORTH_A_CLUSTER:
        return ""
    return (
        f"to read and decode all images once takes about {hours:,.0f} hours on {cores} cores: convert or embed them "
        "with --engine ray on several machines (DATA.md)"
    )


def _tables(root: Path, spec: DatasetSpec, split: str, settings: Any) -> Iterator[Tables]:
    if isinstance(spec, SourceSpec):
        yield spec.open(split, SourceOptions.from_settings(settings))
    for path in split_files(root, spec, split):
        yield ArrowTables([path], spec.dataset.text_column)


def _decoded(tables: Tables, spec: DatasetSpec) -> Iterator[str]:
    """For each image of some rows: why it cannot be decoded, or ""."""
    number = min(SAMPLED_ROWS, tables.num_rows)
    for row in np.linspace(0, tables.num_rows - 1, number, dtype=int).tolist():
        location = tables.row(row)
        for column in spec.dataset.image_columns:
            try:
                decode_image(location.scalar(column).as_buffer())
                yield ""
            except UndecodableImage as error:
                yield f"{location.path}: row {row} ({column}): {error}"
