"""Work in chunks that any number of processes share, kept on the disk as they are done, so that it can go on later.

Chunk c is the work of process c modulo their number. What a chunk gives does not depend on who computes it: results are
the same to the last bit for any number of processes.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vlmo.distributed.collectives import rank, sum_over_processes, world_size
from vlmo.files import atomic_write

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """What every item of some work gives under one name.

    Attributes:
        shape: of one row.
        starts: (items + 1,) where each item's rows begin; None: one row an item.
    """

    shape: tuple[int, ...] = ()
    starts: np.ndarray | None = None

    def place(self, start: int, stop: int) -> slice:
        """Gives the rows of items [start, stop)."""
        return slice(start, stop) if self.starts is None else slice(int(self.starts[start]), int(self.starts[stop]))


class Store:
    """Keeps the results of chunks in a folder; without one, keeps nothing.

    Args:
        folder: for one checkpoint and one set of data: what is in it is taken for done.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Gives what was kept under a name; None if there is nothing (a damaged file is nothing, with a warning)."""
        if self.folder is None or not (path := self.folder / f"{name}.npz").is_file():
            return None
        try:
            with np.load(path) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        except Exception as error:  # numpy and zipfile raise many kinds; nothing is lost: it is computed again
            log.warning(f"{path}: cannot be read ({error}); computing it again")
            return None

    def write(self, name: str, results: Mapping[str, Tensor]) -> None:
        """Keeps results; the file appears whole or not at all."""
        if self.folder is not None:
            with atomic_write(self.folder / f"{name}.npz") as file:
                arrays: dict[str, Any] = {key: value.numpy() for key, value in results.items()}
                np.savez(file, **arrays)


def in_chunks(
    what: str,
    total: int,
    size: int,
    outputs: Mapping[str, Output],
    compute: Callable[[int, int, Any], Mapping[str, Tensor]],
    prepare: Callable[[int, int], Any] = lambda start, stop: None,
    store: Store | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Computes rows for items 0 .. total-1, `size` items at a time, and gives those of all processes to each.

    Args:
        what: is done, for the progress bar and the files.
        outputs: what `compute` gives, by name.
        compute: (start, stop, prepared) -> the rows of items [start, stop) by name, on the CPU.
        prepare: (start, stop) -> what `compute` needs of the disk; the next chunk's is read while one is computed.
        store: where finished chunks are kept, and found again.

    Returns:
        (rows, *shape) of `dtype` on the CPU, by name.
    """
    store = store or Store(None)
    results = {
        name: torch.zeros(total if out.starts is None else int(out.starts[-1]), *out.shape, dtype=dtype)
        for name, out in outputs.items()
    }
    own = range(rank() * size, total, world_size() * size)
    missing = []
    for start in own:
        kept = store.read(_file(what, start))
        if kept is None or set(kept) != set(outputs):
            missing.append(start)
        else:
            _fill(results, outputs, start, min(start + size, total), kept)
    with ThreadPoolExecutor(1) as reader, tqdm(total=len(own), desc=what, disable=_quiet(missing)) as progress:
        progress.update(len(own) - len(missing))
        ahead = [reader.submit(prepare, start, min(start + size, total)) for start in missing[:1]]
        for number, start in enumerate(missing):
            prepared = ahead.pop().result()
            for after in missing[number + 1 : number + 2]:
                ahead.append(reader.submit(prepare, after, min(after + size, total)))
            found = compute(start, min(start + size, total), prepared)
            store.write(_file(what, start), found)
            _fill(results, outputs, start, min(start + size, total), found)
            progress.update()
    return {name: sum_over_processes(values) for name, values in results.items()}


def _fill(
    results: Mapping[str, Tensor], outputs: Mapping[str, Output], start: int, stop: int, rows: Mapping[str, Tensor]
) -> None:
    for name, output in outputs.items():
        results[name][output.place(start, stop)] = rows[name].to(results[name].dtype)


def _file(what: str, start: int) -> str:
    return f"{what.replace(' ', '_')}_{start:07d}"


def _quiet(missing: list[int]) -> bool | None:
    """Shows a bar in one process, on a terminal, and where there is something to wait for."""
    return True if rank() or len(missing) < 2 else None
