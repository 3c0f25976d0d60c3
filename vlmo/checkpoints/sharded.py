"""Checkpoints in a folder, as sharded runs write them: each process its part of every tensor, in a file of its own.

    .metadata, __{rank}_0.distcp    weights and state of the optimizer, by torch.distributed.checkpoint
    rest.pt                         Lightning's checkpoint without them

Any number of processes reads them, each what it needs of each tensor. The key of a tensor is its place in Lightning's
checkpoint: `state_dict/{name}`, `optimizer_states/{optimizer}/state/{number}/{entry}`.
"""

import copy
import enum
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from vlmo.errors import VLMoError

METADATA, REST = ".metadata", "rest.pt"
SEPARATOR = "/"  # no name has it
WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"  # of Lightning's checkpoint


def is_sharded(path: Path) -> bool:
    """Whether it is such a folder, whole or not."""
    return any((path / name).is_file() for name in (METADATA, REST))


# --- what is in which file -------------------------------------------------------------------------------------------


def take_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Gives Lightning's checkpoint without weights and the state of the optimizer, and those by key."""
    tensors: dict[str, Tensor] = {}
    return {
        name: _without_tensors(value, name, tensors) if name in (WEIGHTS, OPTIMIZERS) else value
        for name, value in checkpoint.items()
    }, tensors


def _without_tensors(tree: Any, place: str, found: dict[str, Tensor]) -> Any:
    if isinstance(tree, Mapping):
        others = {name: value for name, value in tree.items() if not isinstance(value, Tensor)}
        found |= {f"{place}{SEPARATOR}{name}": tree[name] for name in tree if name not in others}
        return {name: _without_tensors(value, f"{place}{SEPARATOR}{name}", found) for name, value in others.items()}
    if isinstance(tree, list):
        return [_without_tensors(value, f"{place}{SEPARATOR}{i}", found) for i, value in enumerate(tree)]
    return tree


def put_together(rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `take_apart`."""
    checkpoint = copy.deepcopy(dict(rest))
    for key, tensor in tensors.items():
        *place, name = key.split(SEPARATOR)
        inner: Any = checkpoint
        for part in place:
            inner = inner[part] if isinstance(inner, dict) and part in inner else inner[int(part)]
        inner[name] = tensor
    return checkpoint


# --- reading ---------------------------------------------------------------------------------------------------------


def read_rest(folder: Path) -> dict[str, Any]:
    """Lightning's checkpoint without the tensors. Raises VLMoError if the file is damaged or missing."""
    try:
        return torch.load(folder / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise _damaged(folder, error) from error


def listing(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and type of every tensor by key, all of which are there as far as the sizes of the files tell.

    Raises:
        VLMoError: if a file is damaged or missing.
    """
    try:
        metadata = _Reader(folder).read_metadata()
        stored = metadata.state_dict_metadata.items()
        found = {key: (each.size, each.properties.dtype) for key, each in stored if _is_tensor(each)}  # type: ignore
        needed: dict[str, int] = {}
        for part in metadata.storage_data.values():
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
        for name, size in needed.items():
            if Path(name).name != name:
                raise ValueError(f"{name} is not in it")
            if (folder / name).stat().st_size < size:
                raise ValueError(f"{name} is truncated")
        return found
    except Exception as error:  # likewise
        raise _damaged(folder, error) from error


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors, by key, from the files; a DTensor takes the part of this process.

    Raises:
        VLMoError: if a file is damaged or missing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        try:
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # (which is no Exception)
            raise _damaged(folder, error) from error


def read_whole(folder: Path, kind: str = "") -> dict[str, Tensor]:
    """All tensors by key, or those of a kind, whole and in this process's memory. Raises VLMoError as `read_into`."""
    sizes = {key: each for key, each in listing(folder).items() if key.startswith(kind)}
    tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in sizes.items()}
    read_into(folder, tensors)
    return tensors


def weights(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the model, by their names in it."""
    start = WEIGHTS + SEPARATOR
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def _is_tensor(stored: Any) -> bool:
    return isinstance(stored, TensorStorageMetadata)


def _damaged(folder: Path, error: BaseException) -> VLMoError:
    why = (str(error) or type(error).__name__).strip().splitlines()[-1]
    return VLMoError(f"{folder}: cannot be read, a file of it is missing, truncated or damaged ({why}); copy it again")


class _Reader(dcp.FileSystemReader):
    """torch's, but that unpickling `.metadata` runs no code that it names: it may name the format's classes alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{METADATA} is none of torch.distributed.checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"Path", "PosixPath", "WindowsPath"},
        "pathlib._local": {"Path", "PosixPath", "WindowsPath"},  # of Python 3.13
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self.CLASSES.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # by which an enum may be pickled
            return _member
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which is not of the format")


def _member(kind: Any, name: str) -> enum.Enum:
    """Gives a member of an enum; in place of `getattr`, which gives anything."""
    if isinstance(kind, enum.EnumMeta):
        return kind[name]
    raise pickle.UnpicklingError(f"{METADATA} asks {kind!r} for {name}, which is not of the format")
