"""Whether a checkpoint is whole: its hashes, its names and shapes, and that all of its numbers are finite."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vlmo.checkpoints.card import file_sha256
from vlmo.checkpoints.files import CONFIG_FILE, read, read_json
from vlmo.checkpoints.loading import vlmo_names
from vlmo.checkpoints.pretrained import HASHES, infer_metadata
from vlmo.errors import VLMoError
from vlmo.modules.model import VLMoModel
from vlmo.registry import TASKS

SHOWN = 5  # names of a list


def verify(path: str | Path, sha256: str | None = None) -> tuple[list[str], list[str]]:
    """Looks at all of a checkpoint; returns what is right and what is wrong, a line each.

    Args:
        sha256: what a file's hash must be; a folder's are in its config.json.

    Raises:
        VLMoError: if it cannot be read, or is no model of VLMo.
    """
    path = Path(path).expanduser()
    right, wrong = _hashes(path, sha256)
    source = read(path)
    metadata = infer_metadata(source)
    tensors, left = vlmo_names(source)
    right.append(f"is readable: {len(tensors)} tensors, {metadata.options['model_arch']}")
    bad = [name for name, each in tensors.items() if each.is_floating_point() and not each.isfinite().all()]
    if bad:
        wrong.append(f"nan or inf in {_some(bad)}; the training diverged, or the file is damaged")
    else:
        right.append("all weights are finite")
    unknown = [name for name in metadata.tasks if name not in TASKS]
    if source.kind != "vlmo" or unknown:
        right.append("names were not compared: " + (f"unknown task {unknown[0]}" if unknown else f"{source.kind} file"))
        return right, wrong
    options = {name: value for name, value in metadata.options.items() if name != "loss_names"}
    with torch.device("meta"):
        expected = VLMoModel.build(metadata.tasks, options).state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        wrong.append(f"lacks {_some(missing)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        right.append(f"holds more than its tasks need: {_some(extra)}")
    shapes = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if shapes:
        wrong.append(f"other shapes than expected: {_some(sorted(shapes))}")
    if not missing and not shapes:
        right.append(f"has all that {', '.join(metadata.tasks) or 'its tasks'} need")
    return right, wrong


def _hashes(path: Path, sha256: str | None) -> tuple[list[str], list[str]]:
    expected: dict[Path, str] = {}
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        expected = {path / name: value for name, value in read_json(path / CONFIG_FILE).get(HASHES, {}).items()}
    if sha256 is not None:
        if not path.is_file():
            raise VLMoError(f"--sha256: is for a file; {path} is none")
        expected = {path: sha256.lower()}
    right: list[str] = []
    wrong: list[str] = []
    for file, value in expected.items():
        found = file_sha256(file) if file.is_file() else "that of no file"
        same = found == value
        (right if same else wrong).append(
            f"{file.name}: SHA-256 {found}{'' if same else f', not {value}: copy it again'}"
        )
    if not expected and path.is_file():
        right.append(f"{path.name}: SHA-256 {file_sha256(path)}, to be compared by eye (or give --sha256)")
    return right, wrong


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
