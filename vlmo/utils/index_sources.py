"""Indices of tars, Parquet and Hugging Face sets that are read in place: one small file beside each, made once.

Training makes what is missing itself; this makes it beforehand, with more processes. Run again after an interruption it
goes on where it was. Columns are part of an index: give image_column and text_column where training has them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vlmo.errors import VLMoError
from vlmo.registry import DATASETS, SOURCES
from vlmo.sources.indexing import find_indices, index_file, show_problems
from vlmo.sources.names import parse
from vlmo.sources.options import SourceOptions
from vlmo.sources.storage import identities
from vlmo.sources.tables import SourceTables
from vlmo.utils.workers import Workers


def make_indices(
    sources: Sequence[str],
    image_column: str = "",
    text_column: str = "",
    data_cache: str = "",
    num_workers: int = 1,
) -> None:
    """Indexes the files of sources that have no index, and prints what they hold.

    Raises:
        VLMoError: if a name is no source, or with a line for each file that cannot be indexed.
    """
    cache = Path(data_cache or SourceOptions.cache).expanduser()
    options = SourceOptions(image_column, text_column, cache)
    workers = Workers(num_workers)
    try:
        for name in sources:
            if parse(name).kind not in SOURCES:
                kinds = ", ".join(f"{kind}:" for kind in SOURCES)
                raise VLMoError(f"{name}: is not a source; sources begin with {kinds}")
            spec = DATASETS[name]
            for split in spec.splits:
                files = spec.format.files(spec.location, split, options)
                found = dict(zip(files, identities(files, options), strict=True))
                known = find_indices(found, options)
                calls = [(spec.format.index, options, path, of) for path, of in found.items() if path not in known]
                show_problems(workers.map(index_file, calls), len(calls))
                _report(name, SourceTables(spec.format, files, options), split if len(spec.splits) > 1 else "")
    finally:
        workers.close()


def _report(name: str, tables: SourceTables, split: str) -> None:
    size = sum(os.path.getsize(path) for path in tables.indices)
    print(
        f"{name}{f' ({split})' if split else ''}: {len(tables.files)} files, {tables.num_rows:,} images with "
        f"{tables.num_texts:,} captions; index of {size / 1e6:,.1f} MB"
    )
    for line in [*tables.summary(), *_downloaded(tables.files)]:
        print(f"  {line}")


def _downloaded(files: Sequence[str]) -> list[str]:
    """What img2dataset says beside its files of how many addresses gave an image: the others are in no file."""
    addresses = images = 0
    for path in files:
        try:
            stats = json.loads(Path(f"{os.path.splitext(path)[0]}_stats.json").read_text(encoding="utf-8"))
            addresses, images = addresses + int(stats["count"]), images + int(stats["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            return []
    return [f"img2dataset got an image from {images:,} of {addresses:,} addresses"] if addresses else []
