"""Data as the model sees them: samples before and after augmentation, tokens, what is masked, hard negatives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmo.batch import IGNORE_INDEX
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets.base_dataset import BaseDataset, Skipped
from vlmo.datasets.masked_images import MaskedImages
from vlmo.distributed.wire_format import to_bytes
from vlmo.errors import InputError
from vlmo.images import UndecodableImage, decode_image
from vlmo.inference import Predictor
from vlmo.settings import PATCH_SIZE, Settings
from vlmo.tasks.itm import draw_negatives

LOOKED_AT = 20_000  # texts that a search looks at in one go
OPENED = 500  # samples that a filter opens in one go
FOUND = 100  # numbers that it gives at most
MOST_PAIRS = 64  # of a batch whose negatives are drawn
FILTERS = ("all", "cannot be read", "text is cut", "image is smaller than the model's")
SPLITS = ("train", "val", "test")


@dataclass
class Sample:
    """One sample, as it lies in the data and as it enters a batch.

    Attributes:
        before, after: images as they are decoded, and as the model gets them; hidden patches are grey.
        tokens: (token, what becomes of it) each: "", "masked", "another" or "kept".
        facts: name and value, for people.
        problem: why it cannot be read; "" if it can.
    """

    before: list[Image.Image] = field(default_factory=list)
    after: list[Image.Image] = field(default_factory=list)
    text: str = ""
    tokens: list[tuple[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class Browser:
    """The data sets of a config, split by split."""

    def __init__(self, settings: Settings) -> None:
        """Opens what there is.

        Raises:
            VLMoError: with a line for each problem that a run would meet.
        """
        self.settings = settings
        self.data = MTDataModule(settings)
        self.data.setup("test" if settings.test_only else "fit")
        self.sets = {
            f"{name}, {split}": each for split in SPLITS for name, each in self.data.opened(split).items() if len(each)
        }

    @property
    def names(self) -> list[str]:
        return list(self.sets)

    def size(self, name: str) -> int:
        return len(self.sets[name])

    def sample(self, name: str, number: int, seed: int = 0) -> Sample:
        """Gives a sample; `seed` is that of its augmentation and masking, another in each epoch.

        Raises:
            InputError: if there is no such sample.
        """
        dataset = self.sets[name]
        if not 0 <= number < len(dataset):
            raise InputError(f"{name} has {len(dataset):,} samples, numbered from 0: there is no number {number:,}.")
        location, columns = _place(dataset, number)
        found = Sample(facts={"number": number, "file": str(location.path), "row": location.row})
        self._before(found, location, columns)
        if isinstance(dataset, BaseDataset):
            found.text = dataset.text(location)
            full = len(dataset.tokenizer(found.text)["input_ids"])
            found.facts |= {"tokens": full, "text is cut": full > dataset.max_text_len}
            found.facts |= {name: value for name, value in dataset.targets(location).items() if value not in ([], None)}
        item = dataset[number, seed]
        if isinstance(item, Skipped):
            found.problem = item.reason
            return found
        found.after = [_as_picture(item[each], item.get("patch_mask")) for each in columns if each in item]
        if not found.after and "image" in item:
            found.after = [_as_picture(item["image"], item.get("patch_mask"))]
        if "patch_mask" in item:
            found.facts["hidden patches"] = f"{int(np.sum(item['patch_mask']))} of {len(item['patch_mask'])}"
        if "text_ids" in item:
            found.tokens = self._tokens(item, dataset.tokenizer)
        return found

    def _before(self, found: Sample, location: Any, columns: Sequence[str]) -> None:
        for column in columns:
            try:
                data = location.scalar(column).as_buffer()
                image = decode_image(data, self.settings.image_decoding)
                found.before.append(image)
                found.facts[f"{column}, pixels"] = f"{image.width} x {image.height}"
                found.facts[f"{column}, bytes"] = data.size if hasattr(data, "size") else len(data)
            except UndecodableImage as error:
                found.problem = f"{column}: {error}"

    @staticmethod
    def _tokens(item: dict[str, Any], tokenizer: Any) -> list[tuple[str, str]]:
        """What became of each token in masked language modelling."""
        ids = list(item["text_ids"])
        shown = list(item.get("text_ids_mlm", ids))
        labels = list(item.get("text_labels_mlm", [IGNORE_INDEX] * len(ids)))
        rows = []
        for own, seen, label in zip(ids, shown, labels, strict=True):
            token = tokenizer.convert_ids_to_tokens(int(own))
            if label == IGNORE_INDEX:
                rows.append((token, ""))
            elif seen == tokenizer.mask_token_id:
                rows.append((token, "masked"))
            elif seen == own:
                rows.append((token, "kept"))
            else:
                rows.append((f"{token} → {tokenizer.convert_ids_to_tokens(int(seen))}", "another"))
        return rows

    # --- looking for samples -----------------------------------------------------------------------------------------

    def find(self, name: str, words: str = "", kept: str = "all", start: int = 0) -> tuple[list[int], int]:
        """Looks for samples from number `start` on: whose text has all the words, and that a filter keeps.

        Returns:
            their numbers, at most FOUND, and where the next search goes on; that is the size at the end of the data.
        """
        dataset = self.sets[name]
        if kept not in FILTERS:
            raise InputError(f"{kept!r}: is none of {', '.join(FILTERS)}")
        found: list[int] = []
        wanted = words.lower().split()
        opened, number = 0, start
        while number < len(dataset) and number - start < LOOKED_AT and opened < OPENED and len(found) < FOUND:
            if not wanted or all(word in _text(dataset, number).lower() for word in wanted):
                opened += kept != "all"
                if self._keeps(kept, dataset, number):
                    found.append(number)
            number += 1
        return found, number

    def _keeps(self, kept: str, dataset: Any, number: int) -> bool:
        if kept == "all":
            return True
        if kept == "text is cut":
            return (
                isinstance(dataset, BaseDataset)
                and len(dataset.tokenizer(_text(dataset, number))["input_ids"]) > dataset.max_text_len
            )
        sizes = list(_sizes(*_place(dataset, number)))
        if kept == "cannot be read":
            return None in sizes
        return any(size is not None and min(size) < self.settings.image_size for size in sizes)

    # --- hard negatives ----------------------------------------------------------------------------------------------

    def negatives(self, name: str, start: int, size: int, predictor: Predictor | None) -> list[dict[str, Any]]:
        """Draws for each pair of a batch the image and the text that matching (ITM) would set against it.

        Args:
            start: number of the first of `size` samples in a row; those that cannot be read are left out.
            predictor: whose contrast the draw is by.

        Returns:
            {"image", "text", "other image", "other text", "chance of image", "chance of text"} each.

        Raises:
            InputError: without a contrast, or with fewer than two pairs.
        """
        contrast = next((t for t in predictor.model.tasks if t.provides == "contrast"), None) if predictor else None
        if predictor is None or contrast is None:
            raise InputError("Hard negatives are drawn by a contrast: start the page with a --checkpoint that has one.")
        size = min(size, MOST_PAIRS)
        dataset = self.sets[name]
        numbers = range(start, min(start + size, len(dataset)))
        samples = [self.sample(name, number) for number in numbers]
        pairs = [each for each in samples if not each.problem and len(each.before) == 1 and each.text]
        if len(pairs) < 2:
            raise InputError("There are fewer than two pairs of an image and a text here: pick other samples.")
        with torch.inference_mode():
            images = predictor.embed_images([each.before[0] for each in pairs]).to(predictor.device)
            texts = predictor.embed_texts([each.text for each in pairs]).to(predictor.device)
            logits = contrast.scores(predictor.model.heads, images, texts)
        rows = []
        sides = {"text": logits, "image": logits.t()}
        drawn = {
            side: draw_negatives(each, torch.Generator(each.device).manual_seed(0)) for side, each in sides.items()
        }
        chances = {side: each.float().clone().fill_diagonal_(-torch.inf).softmax(1) for side, each in sides.items()}
        for number, pair in enumerate(pairs):
            image, text = (int(drawn[side][number]) for side in ("image", "text"))
            rows.append(
                {
                    "image": pair.before[0],
                    "text": pair.text,
                    "other image": pairs[image].before[0],
                    "other text": pairs[text].text,
                    "chance of image": float(chances["image"][number, image]),
                    "chance of text": float(chances["text"][number, text]),
                }
            )
        return rows


def _place(dataset: Any, number: int) -> tuple[Any, list[str]]:
    """The row of a sample, and the columns of its images."""
    if isinstance(dataset, MaskedImages):
        row, column = divmod(number, len(dataset.image_columns))
        return dataset.tables.row(row), [dataset.image_columns[column]]
    return dataset.tables.text(number), [each for each in dataset.image_columns if each in dataset.wanted]


def _text(dataset: Any, number: int) -> str:
    return dataset.text(dataset.tables.text(number)) if isinstance(dataset, BaseDataset) else ""


def _sizes(location: Any, columns: Sequence[str]) -> Iterator[tuple[int, int] | None]:
    for column in columns:
        try:
            yield decode_image(location.scalar(column).as_buffer()).size
        except UndecodableImage:
            yield None


def _as_picture(values: torch.Tensor, hidden: Any = None) -> Image.Image:
    """What the model gets, in [-1, 1], (3, S, S), as a picture; patches that are hidden from it are grey."""
    levels = values if values.dtype == torch.uint8 else to_bytes(values)
    pixels = levels.permute(1, 2, 0).numpy().copy()
    if hidden is not None:
        window = pixels.shape[0] // PATCH_SIZE
        grey = np.asarray(hidden, bool).reshape(window, window).repeat(PATCH_SIZE, 0).repeat(PATCH_SIZE, 1)
        pixels[grey] = 128
    return Image.fromarray(pixels)
