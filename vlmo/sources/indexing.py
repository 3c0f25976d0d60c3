"""The indices of the files of a source: found beside them or in the cache, fetched with them, or made."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmo.errors import VLMoError
from vlmo.files import atomic_write
from vlmo.sources.index import Contents, places, read_header, write_index
from vlmo.sources.options import SourceOptions
from vlmo.sources.storage import identities, is_remote, is_same

Indexer = Callable[[str, Mapping[str, Any], SourceOptions], Contents]  # `Format.index`
FoundIndex = tuple[Path, dict[str, Any]]  # where it is, and its header


def open_indices(index: Indexer, files: Sequence[str], options: SourceOptions) -> list[FoundIndex]:
    """The index of each file; those that lack one are made, by one of the processes of this machine.

    Raises:
        VLMoError: with a line for each file that cannot be indexed.
    """
    found = dict(zip(files, identities(files, options), strict=True))
    if len(known := find_indices(found, options)) < len(found):
        with _one_at_a_time(files):
            known = find_indices(found, options)
            missing = {path: identity for path, identity in found.items() if path not in known}
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                results = pool.map(partial(index_file, index, options), missing, missing.values())
                show_problems(results, len(missing))
        known = find_indices(found, options)
    return [known[path] for path in files]


def find_indices(files: Mapping[str, Mapping[str, Any]], options: SourceOptions) -> dict[str, FoundIndex]:
    """The indices there are of files (path -> identity), each of its file as it is now."""
    known = {}
    for path, identity in files.items():
        for place in _places(path, options):
            header = read_header(place)
            if header and is_same(header["of"], identity):
                known[path] = (place, header)
                break
    return known


def show_problems(results: Iterable[str], number: int) -> None:
    """Awaits what `index_file` gives for so many files, with a bar. Raises VLMoError with the problems."""
    bar = tqdm(results, "indexing", number, unit=" files", disable=None if number else True)
    if problems := [problem for problem in bar if problem]:
        raise VLMoError("\n".join(problems))


def index_file(index: Indexer, options: SourceOptions, path: str, identity: Mapping[str, Any]) -> str:
    """Makes the index of a file, unless there is one by now; returns what is wrong with it, or ""."""
    try:
        if not find_indices({path: identity}, options) and not _published(path, identity, options):
            contents = index(path, identity, options)
            _write_somewhere(_places(path, options), identity, contents)
    except VLMoError as error:
        return str(error)
    return ""


def _published(path: str, identity: Mapping[str, Any], options: SourceOptions) -> bool:
    """Whether the index lies beside a remote file; it is copied into the cache."""
    if not is_remote(path):
        return False
    from vlmo.sources.remote import Remote

    place = _places(path, options)[0]
    content = Remote(options).published_index(path, places(path, _columns(options), True, options.cache)[0].name)
    if content is None:
        return False
    with atomic_write(place) as file:
        file.write(content)
    return bool(find_indices({path: identity}, options))


def _write_somewhere(chosen: Sequence[Path], identity: Mapping[str, Any], contents: Contents) -> None:
    """Beside the file where that is allowed, else in the cache."""
    for place in chosen:
        try:
            return write_index(place, identity, contents)
        except OSError as error:
            problem = f"{place}: cannot be written ({error.strerror}); give data_cache=FOLDER on a disk with room"
    raise VLMoError(problem)


def _places(path: str, options: SourceOptions) -> list[Path]:
    return places(path, _columns(options), not is_remote(path), options.cache)


def _columns(options: SourceOptions) -> tuple[str, str]:
    return options.image_column, options.text_column


@contextmanager
def _one_at_a_time(files: Sequence[str]) -> Iterator[None]:
    """Lets one process of this machine and user in; the others wait, and find what it has made."""
    name = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"vlmo-index-{os.getuid()}-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
