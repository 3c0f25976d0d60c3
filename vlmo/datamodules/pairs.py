"""Pairs of an image and a text that were chosen one by one, for matching."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vlmo.datamodules.concat import ConcatDataset


class PairView(Dataset):
    """Samples of an image and a text each; the last image is kept, for the pairs after it that have the same."""

    def __init__(self, image_view: ConcatDataset, text_view: ConcatDataset, images: np.ndarray, texts: np.ndarray):
        """
        Args:
            image_view, text_view: images and texts, each once.
            images, texts: (pairs,) their numbers in those; of images that can be decoded.
        """
        assert len(images) == len(texts)
        self.image_view, self.text_view = image_view, text_view
        self.images, self.texts = images, texts
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.images[index])
        if self._last[0] != number:
            sample = self.image_view[number]
            assert isinstance(sample, dict), "an image that could be read before"
            self._last = (number, sample["image"])
        text = self.text_view[int(self.texts[index])]
        assert isinstance(text, dict)
        return {"image": self._last[1], "text_ids": text["text_ids"], "raw_index": index}
