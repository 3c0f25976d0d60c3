"""Several data sets as one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vlmo.datasets import BaseDataset, ImageView, MaskedImages, Skipped, TextView


class ConcatDataset(Dataset):
    """Data sets one after the other, samples and images numbered through.

    (torch's own takes no (number, seed) keys and knows nothing of images.)
    """

    def __init__(self, datasets: Sequence[BaseDataset | ImageView | MaskedImages | TextView]):
        self.datasets: Sequence[Any] = datasets
        self._starts = np.cumsum([0] + [len(dataset) for dataset in datasets])
        tables = [(d.dataset if isinstance(d, ImageView | TextView) else d).tables for d in datasets]
        self._image_starts = np.cumsum([0] + [table.num_rows for table in tables])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: Any) -> dict[str, Any] | Skipped:
        index, *seed = key if isinstance(key, tuple) else (key,)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        local = int(index - self._starts[part])
        sample = self.datasets[part][(local, *seed) if seed else local]
        if isinstance(sample, Skipped):
            return sample
        numbers = {"raw_index": index, "img_index": sample["img_index"] + int(self._image_starts[part])}
        return sample | {name: number for name, number in numbers.items() if name in sample}

    def text_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Bytes of the texts of the samples number `indices` (N,), int64 (N,)."""
        sizes = np.zeros(len(indices), np.int64)
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        for part, dataset in enumerate(self.datasets):
            mine = parts == part
            sizes[mine] = dataset.tables.text_sizes(indices[mine] - self._starts[part])
        return sizes
