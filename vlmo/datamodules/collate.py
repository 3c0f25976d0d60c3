"""From samples to a batch, which is final then: each field is put together as it is declared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from vlmo.batch import IMAGE, IMAGES, Batch, Field
from vlmo.datasets.base_dataset import Skipped
from vlmo.distributed.wire_format import as_pixels
from vlmo.errors import VLMoError


class Collator:
    """Makes a batch of samples: the fields that they have, as `fields` declares them.

    Beside them the batch has `text_masks` (1 where `text_ids` has a token), what `finish` adds, and
        images_are_bytes: True, where all are: they stay uint8
        skipped: list with a line for each sample that is left out because its image cannot be decoded
        skipped_targets: list of their targets, each a dict of plain values

    If no sample is left, only the last two are there.
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        max_text_len: int,
        text_multiple: int = 1,
        finish: Sequence[Callable[[Batch], dict[str, Tensor]]] = (),
    ):
        """
        Args:
            fields: all that samples can have, by name (`vlmo.batch.FIELDS`, and those of data set and tasks).
            max_text_len: tokens; texts are not padded beyond.
            text_multiple: texts are padded to the longest of the batch, rounded up to a multiple of this.
            finish: each is called with the batch, and returns fields to add (`Task.derive`).
        """
        self.fields, self.max_text_len, self.text_multiple, self.finish = fields, max_text_len, text_multiple, finish

    def __call__(self, samples: Sequence[dict[str, Any] | Skipped]) -> Batch:
        kept = [sample for sample in samples if not isinstance(sample, Skipped)]
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        batch = {name: self._collate(name, [sample[name] for sample in kept]) for name in kept[0]} if kept else {}
        for name in [name for name in batch if name.endswith("text_ids")]:
            lengths = torch.tensor([len(sample[name]) for sample in kept])
            masks = (torch.arange(batch[name].shape[1]) < lengths[:, None]).long()
            batch[name.removesuffix("ids") + "masks"] = masks
        if kept:
            images = [name for name in batch if name.rpartition(".")[2] in IMAGES]
            as_bytes = [name for name in images if batch[name].dtype == torch.uint8]
            if as_bytes and as_bytes == images:
                batch["images_are_bytes"] = True
            elif as_bytes:  # (data sets of one's own may give pixels)
                batch |= {name: as_pixels(batch[name]) for name in as_bytes}
            for derive in self.finish:
                batch |= derive(cast(Batch, batch))
        batch |= {"skipped": [sample.reason for sample in skipped]}
        batch |= {"skipped_targets": [sample.targets for sample in skipped]}
        return cast(Batch, batch)

    def _collate(self, name: str, values: list[Any]) -> Any:
        if name not in self.fields:
            raise VLMoError(
                f"{name}: samples have this field, which is not declared; add it to the data set's `fields`"
            )
        field = self.fields[name]
        if field.dtype is None:
            return values
        if not field.shape:
            return torch.tensor(values, dtype=field.dtype)
        rows = [torch.as_tensor(value) for value in values]
        if field == IMAGE and any(row.dtype == torch.uint8 for row in rows):  # as bytes
            if name.rpartition(".")[2] in IMAGES and all(row.dtype == torch.uint8 for row in rows):
                return default_collate(rows)
            rows = [as_pixels(row) for row in rows]
        rows = [row.to(field.dtype) for row in rows]
        if field.padding is None:
            return default_collate(rows)  # in a worker it stacks into shared memory right away
        length = max(map(len, rows))
        if field.shape[0] == "T":
            length = min(-(-length // self.text_multiple) * self.text_multiple, self.max_text_len)
        padded = torch.full((len(rows), length, *rows[0].shape[1:]), field.padding, dtype=field.dtype)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded
