"""From samples to a batch: one table says how each field is put together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from vlmo.datasets import Skipped

IGNORE_INDEX = -100  # label of positions that are not predicted


class Collator:
    """Makes a batch of samples, text padded to the longest: to a multiple of 8, but not beyond `max_text_len`.

    Fields of the batch, as far as the samples have them:
        image, image_0, image_1: float (B, 3, S, S)
        patch_mask: bool (B, patches)
        text_ids, text_ids_mlm, text_masks, text_labels (-100), text_labels_mlm (-100 where not masked): int64 (B, T)
        raw_index, img_index, cap_index, qid: int64 (B,)
        vqa_labels (padded with -1): int64 (B, K), vqa_scores (padded with 0): float (B, K)
        answers, answered: bool (B,)
        text, table_name, identifier: list of B strings; vqa_answer: list of B lists of strings
        skipped: list with a line for each sample that is left out because its image cannot be decoded
        skipped_targets: list of their targets, each a dict of plain values

    B is the number of samples that are left; if there are none, only the last two fields are there.
    """

    def __init__(self, pad_id: int, max_text_len: int):
        self.pad_id = pad_id
        self.max_text_len = max_text_len

    def __call__(self, samples: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
        kept = [sample for sample in samples if not isinstance(sample, Skipped)]
        batch = {name: self._field(name, [sample[name] for sample in kept]) for name in kept[0]} if kept else {}
        if "text_ids" in batch:
            lengths = torch.tensor([len(sample["text_ids"]) for sample in kept])
            batch["text_masks"] = (torch.arange(batch["text_ids"].shape[1]) < lengths[:, None]).long()
        if "text_ids_mlm" in batch:
            batch["text_labels"] = torch.full_like(batch["text_ids"], IGNORE_INDEX)
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        targets = [sample.targets for sample in skipped]
        return batch | {"skipped": [sample.reason for sample in skipped], "skipped_targets": targets}

    def _field(self, name: str, values: list[Any]) -> Any:
        match name:
            case "image" | "image_0" | "image_1" | "patch_mask":
                return default_collate(values)  # in a worker it stacks into shared memory right away
            case "text_ids" | "text_ids_mlm":
                return self._pad_text(values, self.pad_id)
            case "text_labels_mlm":
                return self._pad_text(values, IGNORE_INDEX)
            case "vqa_labels":
                return _pad(values, -1, max(map(len, values)), torch.int64)
            case "vqa_scores":
                return _pad(values, 0, max(map(len, values)), torch.float32)
            case "raw_index" | "img_index" | "cap_index" | "qid":
                return torch.tensor(values)
            case "answers" | "answered":
                return torch.tensor(values, dtype=torch.bool)
            case _:
                return values

    def _pad_text(self, values: list[Any], padding: int) -> Tensor:
        longest = max(map(len, values))
        return _pad(values, padding, min(-(-longest // 8) * 8, self.max_text_len), torch.int64)


def _pad(rows: list[Any], padding: int, length: int, dtype: torch.dtype) -> Tensor:
    """(B, length)"""
    padded = torch.full((len(rows), length), padding, dtype=dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.as_tensor(values, dtype=dtype)
    return padded
