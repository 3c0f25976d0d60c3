"""A folder of images to be searched: the features of each are computed once, and kept on disk."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmo.errors import InputError
from vlmo.files import atomic_write
from vlmo.inference import Predictor
from vlmo.inference.io import image_files

log = logging.getLogger(__name__)

BATCH = 8  # images that are embedded before somebody else has a turn
WRITTEN = 256  # images that are embedded before what is known is written


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
        self._known: dict[str, np.ndarray] | None = None
        self._refused: set[str] = set()

    def refresh(self) -> Iterator[tuple[int, int]]:
        """Looks for new and changed images and embeds them; yields how many of how many are done, every few images.

        Whoever stops in between keeps what is embedded, and several may go on in turns.
        """
        known = self._known = self._read() if self._known is None else self._known
        states = {state: path for path in image_files(str(self.folder)) if (state := _state(path))}
        new = [state for state in states if state not in known and state not in self._refused]
        written = len(known)
        try:
            for start in range(0, len(new), BATCH):
                yield start, len(new)
                batch = [state for state in new[start : start + BATCH] if state not in known]
                self._embed(batch, [states[state] for state in batch], known)
                if len(known) - written >= WRITTEN:
                    self._write(known)
                    written = len(known)
        finally:
            if len(known) > written:
                self._write(known)
        present = [state for state in states if state in known]
        self.files = [states[state] for state in present]
        self._features = torch.from_numpy(np.stack([known[each] for each in present])) if present else torch.empty(0)

    def _embed(self, states: Sequence[str], paths: Sequence[str], known: dict[str, np.ndarray]) -> None:
        """Adds features to those that are known; where an image of several cannot be read, one by one."""
        try:
            known.update(zip(states, self.predictor.embed_images(paths).numpy(), strict=True))
        except InputError as error:
            if len(paths) > 1:
                for state, path in zip(states, paths, strict=True):
                    self._embed([state], [path], known)
                return
            self._refused.update(states)
            self.unreadable[paths[0]] = str(error)
            log.warning(f"left out of the search: {error}")

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
        states, features = zip(*list(known.items()), strict=True)  # (at once: somebody else may be adding to them)
        try:
            with atomic_write(self.cache, by_several=True) as file:
                np.savez(file, states=np.array(states), features=np.stack(features))
        except OSError as error:
            log.warning(f"{self.cache}: cannot be written ({error.strerror or error}); the features are not kept")


def _state(path: str) -> str:
    """A file as it is now: path, size and time of change; "" if it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{os.path.abspath(path)}|{found.st_size}|{found.st_mtime_ns}"
