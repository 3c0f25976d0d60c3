"""A folder of images to be searched: the features of each are computed once, and kept on disk."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmo.errors import InputError
from vlmo.files import atomic_write
from vlmo.inference import Predictor
from vlmo.inference.io import image_files

log = logging.getLogger(__name__)

CHUNK = 64  # images that are embedded before what is known is written


def cache_folder() -> Path:
    """Gives where features are kept, below the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmo" / "app"


class ImageFolder:
    """The images of a folder and the folders in it, with the features of one checkpoint.

    The features lie in `CACHE/KEY.npz`; those of a file are used again while its path, size and time of change are the
    same. So another checkpoint has others, and a changed image is embedded anew.

    Attributes:
        unreadable: files that are no images, with the reason.
    """

    def __init__(self, folder: str | Path, predictor: Predictor, key: str, cache: Path) -> None:
        """
        Args:
            key: of the checkpoint.
        """
        self.folder, self.predictor = Path(folder).expanduser(), predictor
        self.cache = cache / f"{key[:32]}.npz"
        self.unreadable: dict[str, str] = {}
        self.files: list[str] = []
        self._features = torch.empty(0, 0)
        self._lock = threading.Lock()

    def refresh(self, progress: Callable[[float], Any] = lambda share: None) -> int:
        """Looks for new and changed images and embeds them; returns how many it embedded.

        Args:
            progress: is told the share that is done.
        """
        with self._lock:
            known = self._read()
            states = {state: path for path in image_files(str(self.folder)) if (state := _state(path))}
            new = [state for state in states if state not in known and states[state] not in self.unreadable]
            for start in range(0, len(new), CHUNK):
                for state in new[start : start + CHUNK]:
                    try:
                        known[state] = self.predictor.embed_images([states[state]])[0].numpy()
                    except InputError as error:
                        self.unreadable[states[state]] = str(error)
                self._write(known)
                progress(min(start + CHUNK, len(new)) / len(new))
            present = [state for state in states if state in known]
            self.files = [states[state] for state in present]
            self._features = (
                torch.from_numpy(np.stack([known[each] for each in present])) if present else torch.empty(0)
            )
            return len(new)

    def search(self, query: Tensor, number: int) -> list[tuple[str, float]]:
        """Gives the files nearest to a feature of unit length, (D,), with their cosines, best first."""
        if not self.files:
            raise InputError(f"There are no images in {self.folder}.")
        scores, places = (self._features @ query.float()).topk(min(number, len(self.files)))
        return [(self.files[place], score) for place, score in zip(places.tolist(), scores.tolist(), strict=True)]

    def _read(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self.cache, allow_pickle=False) as saved:
                return dict(zip(saved["states"].tolist(), saved["features"], strict=True))
        except FileNotFoundError:
            return {}
        except Exception as error:  # (zipfile, numpy and the system each have errors of their own for a damaged file)
            log.warning(f"{self.cache}: cannot be read ({error}); the features are computed again")
            return {}

    def _write(self, known: dict[str, np.ndarray]) -> None:
        if not known:
            return
        try:
            with atomic_write(self.cache, by_several=True) as file:
                np.savez(file, states=np.array(list(known)), features=np.stack(list(known.values())))
        except OSError as error:
            log.warning(f"{self.cache}: cannot be written ({error.strerror or error}); the features are not kept")


def _state(path: str) -> str:
    """A file as it is now: path, size and time of change; "" if it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{os.path.abspath(path)}|{found.st_size}|{found.st_mtime_ns}"
