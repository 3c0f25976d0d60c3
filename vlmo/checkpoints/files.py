"""Checkpoint files: what tensors a file holds, and whose they are.

A file may come from `torch.save`, Lightning, DeepSpeed or safetensors; a folder from `save_pretrained`. Only tensors,
and what this project says of them (`metadata.py`), are taken out: unpickling never runs code that the file names.
"""

import errno
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from vlmo.checkpoints.metadata import METADATA_KEY, Metadata, vocabulary_hash
from vlmo.errors import VLMoError

DEEPSPEED_WEIGHTS = "checkpoint/mp_rank_00_model_states.pt"  # in the folders that Lightning writes with ZeRO 1 and 2
# of a folder
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILE, VOCABULARY_FILE = "config.json", "vocab.txt"

# A run that averages its weights (`ema_decay`) saves the averages as the weights, and beside them, under TRAINED, the
# weights that the optimizer goes on from. For Lightning it is the other way round: the averages are under AVERAGES.
TRAINED, AVERAGES = "vlmo_trained_weights", "vlmo_averages"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, or of the files of a folder.

    Attributes:
        kind: "vlmo", "stage1" (VLMo's vision part alone), "beit", or "foreign" for any other model.
        container: where in the file they were: "plain", "state_dict", "module", "model" or "safetensors".
        tensors: by name, without DeepSpeed's leading "module.". They may be mapped from the file: copy, do not write.
        metadata: None for files that are not this project's.
    """

    path: Path
    kind: str
    container: str
    tensors: dict[str, Tensor]
    metadata: Metadata | None = None


def read(path: str | Path, trained: bool = False) -> Checkpoint:
    """The tensors of a checkpoint file, or of a folder of `save_pretrained` or of a sharded run.

    They are mapped from the disk where the format allows.

    Args:
        trained: of a run that averages its weights, those that the optimizer goes on from, not the averages.

    Raises:
        VLMoError: if there is no such file, or it is no checkpoint, is damaged, or holds no named tensors; or if it
            does not hold the weights that are asked for.
    """
    path = Path(path).expanduser()
    if trained and path.is_dir():
        raise VLMoError(f"{path}: is a folder, which holds one set of weights; the two of ema_decay are in a file")
    if (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file():
        return _read_folder(path)
    if path.is_dir():
        from vlmo.checkpoints import sharded  # (late: torch.distributed.checkpoint takes most of a second to import)

        if sharded.is_sharded(path):
            return _read_sharded(path)
    if (path / DEEPSPEED_WEIGHTS).is_file():
        path = path / DEEPSPEED_WEIGHTS
    if path.is_dir():
        files = [p for level in ("*", "*/*") for p in sorted(path.glob(level)) if p.suffix in (".pt", ".pth", ".ckpt")]
        inside = f"the file in it, such as {files[0]}" if files else "a checkpoint file"
        raise VLMoError(f"{path}: is a folder; give {inside} with load_path=FILE")
    if not path.is_file():
        raise VLMoError(f"{path}: no such file; check load_path")
    content, container = read_content(path)
    own = content.get(TRAINED) if trained and isinstance(content, Mapping) else {}
    if own is None or not isinstance(own, Mapping):
        raise VLMoError(f"{path}: has no averaged weights; its weights are those of the optimizer")
    metadata = _folder_metadata(path.parent) if path.name == WEIGHTS_FILE else None
    if isinstance(content, Mapping):
        if METADATA_KEY in content and not isinstance(content[METADATA_KEY], Tensor):
            metadata = Metadata.from_dict(content[METADATA_KEY], path)
        for key in ("state_dict", "module", "model"):
            if isinstance(content.get(key), Mapping):
                content, container = content[key], key
                break
    else:
        content = {}
    tensors = {
        name.removeprefix("module."): value
        for name, value in {**content, **own}.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    }
    if not tensors:
        raise VLMoError(f"{path}: has no named tensors, so it is not a checkpoint; give another load_path")
    return Checkpoint(path, recognise(tensors), container, tensors, metadata)


def to_train(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Gives what a run goes on from, of what its file holds: the weights of the optimizer as its weights."""
    if TRAINED not in checkpoint:
        return checkpoint
    trained, saved = checkpoint[TRAINED], checkpoint["state_dict"]
    changed = {"state_dict": saved | trained, AVERAGES: {name: saved[name] for name in trained}}
    return {name: value for name, value in checkpoint.items() if name != TRAINED} | changed


def _read_folder(folder: Path) -> Checkpoint:
    """Weights in one file, or in several that an index lists."""
    names: dict[str, Any] = {}
    if not (folder / WEIGHTS_FILE).is_file():
        names = read_json(folder / INDEX_FILE).get("weight_map") or {}
    files = sorted(set(names.values())) or [WEIGHTS_FILE]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / str(file)).is_file():
            raise VLMoError(f"{folder}: lacks {file}, which {INDEX_FILE} lists; copy or download it again")
        tensors |= read(folder / str(file)).tensors
    if names.keys() - tensors.keys():
        raise VLMoError(f"{folder}: holds not all that {INDEX_FILE} lists; copy or download it again")
    return Checkpoint(folder, recognise(tensors), "safetensors", tensors, _folder_metadata(folder))


def _read_sharded(folder: Path) -> Checkpoint:
    from vlmo.checkpoints.sharded import WEIGHTS, read_rest, read_whole, weights

    content = read_rest(folder).get(METADATA_KEY)
    tensors = weights(read_whole(folder, WEIGHTS))
    metadata = Metadata.from_dict(content, folder) if content else None
    return Checkpoint(folder, recognise(tensors), "state_dict", tensors, metadata)


def _folder_metadata(folder: Path) -> Metadata | None:
    """What config.json and vocab.txt say; None beside the weights of another project."""
    content = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if "vlmo_version" not in content:
        return None
    vocabulary = None
    if (folder / VOCABULARY_FILE).is_file():
        vocabulary = (folder / VOCABULARY_FILE).read_bytes().decode(errors="replace").removesuffix("\n").split("\n")
    if vocabulary and content.get("vocabulary_sha256") not in (None, vocabulary_hash(vocabulary)):
        raise VLMoError(f"{folder / VOCABULARY_FILE}: is not the vocabulary that {CONFIG_FILE} names; copy it again")
    return Metadata.from_dict(content | {"vocabulary": vocabulary}, folder / CONFIG_FILE)


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object; an empty one where the file holds something else. Raises VLMoError if it is not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VLMoError(f"{path}: is not JSON ({error}); copy or download it again") from error
    return content if isinstance(content, dict) else {}


def read_content(path: Path) -> tuple[Any, str]:
    """Reads what the file holds, and says "safetensors" or "plain". Raises VLMoError if it is damaged."""
    try:
        with path.open("rb") as file:
            start = file.read(10)
        if start[8:9] == b"{":  # after the 8 bytes of the header's length
            return safetensors.torch.load_file(path), "safetensors"
        if start.startswith(b"PK\x03\x04"):
            return _load_zip(path), "plain"
        if start.startswith(b"\x80\x02\x8a\x0a"):  # before torch 1.6
            return torch.load(path, map_location="cpu", weights_only=True), "plain"
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if is_refused(error):
            assert isinstance(error, OSError)
            raise VLMoError(f"{path}: cannot be read ({error.strerror}); the file itself may be whole") from error
        raise VLMoError(
            f"{path}: cannot be read, it is truncated, damaged or no checkpoint ({path.stat().st_size:,} bytes: "
            f"{_reason(error)}); copy or download it again, or give another load_path"
        ) from error
    raise VLMoError(f"{path}: is not a file of torch or safetensors, it starts with {start!r}; give another load_path")


def is_refused(error: BaseException | None) -> bool:
    """Whether it is the system that does not open a file: the limit of open files, permissions."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM)


def _reason(error: Exception) -> str:
    """The first line of the cause, without torch's advice to run the file's code."""
    lines = [line.strip() for line in str(error).splitlines() if not re.search("weights_only|torch.load", line)]
    return next(filter(None, lines), type(error).__name__)


def _load_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        # torch itself does not look at the checksums; a writer may leave them all 0
        bad = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    if bad is not None:
        raise ValueError(f"wrong checksum of {bad}")
    stand_ins: list[Any] = [
        (_IgnoredDict if name.lower().endswith("dict") else _Ignored, name)
        for name in get_unsafe_globals_in_checkpoint(path)
    ]
    with safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_pickled_module(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a network that `torch.save` pickled whole, by the names they had in its state dict.

    Stand-ins take the place of the classes that the file names: neither their packages nor their code is needed.

    Raises:
        VLMoError: if there is no such file, or it holds no network.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise VLMoError(f"{path}: no such file")
    try:
        with safe_globals([(_Module, name) for name in get_unsafe_globals_in_checkpoint(path)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = dict(_named_tensors(content))
    except Exception as error:  # a damaged file can raise anything
        raise VLMoError(f"{path}: cannot be read as a pickled network ({_reason(error)}); download it again") from error
    if not tensors:
        raise VLMoError(f"{path}: holds no pickled network; give another file")
    return tensors


class _Module:
    """Stands in for the classes of a pickled network: holds what they held, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


def _named_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    content = vars(module) if isinstance(module, _Module) else {}
    for name, tensor in (content.get("_parameters", {}) | content.get("_buffers", {})).items():
        if isinstance(tensor, Tensor):
            yield prefix + name, tensor.detach()
    for name, child in content.get("_modules", {}).items():
        yield from _named_tensors(child, f"{prefix}{name}.")


class _Ignored(list):
    """Stands in for every class and function of a file that is not about tensors: is filled, does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


class _IgnoredDict:
    """The same for subclasses of dict (told by their name): the unpickler fills nothing but an OrderedDict."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def recognise(names: Iterable[str]) -> str:
    """By the names alone, so that stage 2 can start from a BEiT file and from a stage-2 file."""
    names = list(names)
    matches = [re.match(r"transformer\.blocks\.\d+\.mlp_(text|imag|vl)\.", name) for name in names]
    experts = {match[1] for match in matches if match}
    if experts:
        texts = any(name.startswith("text_embeddings.") for name in names)
        return "stage1" if experts == {"imag"} and not texts else "vlmo"
    if any(re.match(r"blocks\.\d+\.attn\.q_bias$", name) for name in names):
        return "beit"
    return "foreign"
