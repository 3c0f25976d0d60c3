"""The first samples that a training sees: their small fields as they are, and a few numbers of each image."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.distributed.collectives import gather_objects, world_size
from vlmo.distributed.wire_format import with_pixels

LIMIT = 2048  # samples: enough to know the words, the images' range and whether pairs belong together
THUMBNAIL = 4  # pixels a side of what is kept of an image


class Seen:
    """Collects them without waiting for the device; `fetch` moves what is new to the CPU, of all processes together.

    Attributes:
        batches: of all processes, on the CPU: small fields by name, with `thumbnail` (B, 48), and the `spread`
            (standard deviation), `lowest` and `highest` value (B,) of each sample's (first) image.
        samples: of this process's batches, those that are not fetched yet included.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        """
        Args:
            limit: samples of all processes together, each of which keeps its share.
        """
        self.limit, self.samples = limit, 0
        self.batches: list[dict[str, Tensor]] = []
        self._waiting: list[dict[str, Tensor]] = []
        self._all_complete = False

    @property
    def complete(self) -> bool:
        """Whether no more samples of this process are wanted."""
        return self.samples >= self.limit / world_size()

    def add(self, batch: Mapping[str, Any], size: int) -> None:
        """Keeps what is wanted of a batch of so many samples, on its device."""
        if self.complete or not size:
            return
        tensors = {name: value for name, value in with_pixels(batch).items() if isinstance(value, Tensor)}
        # (copies: what a worker shares holds a file open)
        kept = {name: value.detach().clone() for name, value in tensors.items() if value.ndim <= 2}
        image = next((value for value in tensors.values() if value.ndim == 4), None)
        if image is not None:
            image = image.detach().float()
            flat = image.flatten(1)
            kept |= {"spread": flat.std(1), "lowest": flat.amin(1), "highest": flat.amax(1)}
            kept["thumbnail"] = F.adaptive_avg_pool2d(image, THUMBNAIL).flatten(1)
        self._waiting.append(kept)
        self.samples += size

    def fetch(self) -> bool:
        """Waits for the device and moves what is new to the CPU; tells whether there was anything.

        All processes must call it. Once nothing more is wanted of any, nobody waits for the others.
        """
        if self._all_complete:
            return False
        own, self._waiting = [{name: value.cpu() for name, value in each.items()} for each in self._waiting], []
        found = gather_objects([(self.complete, own)])
        self._all_complete = all(complete for complete, _ in found)
        new = [batch for _, batches in found for batch in batches]
        self.batches += new
        return bool(new)

    def column(self, name: str) -> np.ndarray | None:
        """Gives a field that has one value, or always as many, a sample, over all batches; None where one lacks it."""
        if not self.batches or any(name not in batch for batch in self.batches):
            return None
        return torch.cat([batch[name] for batch in self.batches]).numpy()

    def texts(self) -> list[np.ndarray] | None:
        """Gives the token ids of each text, without padding; None without texts."""
        if not self.batches or any("text_ids" not in batch for batch in self.batches):
            return None
        return [
            ids[: int(length)].numpy()
            for batch in self.batches
            for ids, length in zip(batch["text_ids"], batch["text_masks"].sum(1), strict=True)
        ]
