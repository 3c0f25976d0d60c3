"""What a run was made of, so that two can be told apart: code, data, packages, machine."""

import hashlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import vlmo
from vlmo.settings import Settings
from vlmo.training.environment import Environment

PACKAGES = ("torch", "pytorch-lightning", "transformers", "timm", "pyarrow", "pillow", "numpy")
END = 2**20  # bytes at each end of a data file that its hash is made of
PATIENCE = 5  # seconds for git


@cache
def code() -> dict[str, str]:
    """Gives the version, the SHA-256 of the package's source, and the commit of a checkout."""
    package = Path(vlmo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    found = {"vlmo": vlmo.__version__, "sha256": digest.hexdigest()}
    if (package.parent / ".git").exists():
        commit = _git(package.parent, "rev-parse", "HEAD")
        changed = _git(package.parent, "status", "--porcelain", "--", "vlmo")
        if commit:
            found["commit"] = commit + (" with changes" if changed else "")
    return found


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment(settings: Settings, chosen: Environment) -> dict[str, str]:
    """Gives packages, machine, devices and precision, as a table shows them."""
    devices = settings.devices * settings.num_nodes
    device = torch.cuda.get_device_name() if chosen.accelerator == "gpu" else f"{torch.get_num_threads()} threads"
    found = {
        "runs on": f"{chosen.accelerator} x {devices} ({device})",
        "precision": str(chosen.precision),
        "strategy": str(chosen.strategy),
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def data_files(opened: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Gives split, name, size and hash of every file; of what is not on a disk the name alone.

    The hash is the SHA-256 of the size and of the first and the last MiB: a whole data set would take hours to read.

    Args:
        opened: files by split.
    """
    rows = []
    for split, paths in opened.items():
        for path in map(str, paths):
            row: dict[str, Any] = {"split": split, "file": path}
            if Path(path).is_file():
                row |= {"bytes": Path(path).stat().st_size, "sha256_of_ends": _hash_of_ends(Path(path))}
            rows.append(row)
    return rows


def _hash_of_ends(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\0".encode())
    with path.open("rb") as file:
        digest.update(file.read(END))
        file.seek(max(size - END, 0))
        digest.update(file.read(END))
    return digest.hexdigest()


def memory() -> dict[str, int]:
    """Gives the peak of this process in bytes: of the machine's memory, and of its GPU's."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found
