"""Retrieval evaluation: its time over that of the encoders alone, and beside the published way's.

python -m benchmarks.evaluate task_finetune_irtr_f30k_base per_gpu_batchsize=32 num_gpus=0 [option=value ...]

Encodes random pictures and, for each, captions of real lengths, then ranks all with all. The published way pads texts
to `max_text_len`, keeps every score at once and looks at one query after another; it is measured on a part of the data.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.reference import Reference
from vlmo.batch import FIELDS
from vlmo.datamodules.collate import Collator
from vlmo.evaluation import retrieval
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.training.environment import choose_environment

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Data:
    """Batches of the two sides, as the data module's retrieval loaders give them; made anew in each pass."""

    def __init__(self, settings: Settings, images: int, captions: int, lengths: Any) -> None:
        self.settings, self.images, self.captions = settings, images, captions
        draw = np.random.default_rng(0)
        self.texts = [
            draw.integers(workload.FIRST_WORD, settings.vocab_size, draw.choice(lengths)).tolist()
            for _ in range(images * captions)
        ]

    def _numbers(self, count: int) -> Iterator[list[int]]:
        size = self.settings.per_gpu_batchsize
        return (list(range(start, min(start + size, count))) for start in range(0, count, size))

    def image_batches(self) -> Iterator[dict[str, Any]]:
        draw, pixels = torch.Generator().manual_seed(0), self.settings.image_size
        for numbers in self._numbers(self.images):
            image = torch.rand(len(numbers), 3, pixels, pixels, generator=draw) * 2 - 1
            yield {"image": image, **_indices(numbers, 1), "skipped": []}

    def text_batches(self) -> Iterator[dict[str, Any]]:
        collate = Collator(FIELDS, self.settings.max_text_len, 8)
        for numbers in self._numbers(len(self.texts)):
            texts = collate([{"text_ids": self.texts[number]} for number in numbers])
            yield texts | _indices(numbers, self.captions)


def _indices(numbers: list[int], per_image: int) -> dict[str, Tensor]:
    number = torch.tensor(numbers)
    return {"raw_index": number, "img_index": number // per_image}


class Watch:
    """Adds up the seconds spent in a function, the device waited for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = now()
        result = self.function(*args, **kwargs)
        self.seconds += now() - start
        return result


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def here(model: VLMo, data: Data, autocast: retrieval.Autocast) -> tuple[float, float]:
    """Seconds of the evaluation, and of the encoders within it."""
    model.infer_image, model.infer_text = image, text = Watch(model.infer_image), Watch(model.infer_text)  # type: ignore[method-assign]
    start = now()
    images = retrieval.encode(model, data.image_batches(), "image", autocast)
    texts = retrieval.encode(model, data.text_batches(), "text", autocast)
    retrieval.recalls(retrieval.best_ranks(texts, images), retrieval.best_ranks(images, texts))
    seconds = now() - start
    model.infer_image, model.infer_text = image.function, text.function  # type: ignore[method-assign]
    return seconds, image.seconds + text.seconds


@torch.no_grad()
def published(model: VLMo, data: Data, autocast: retrieval.Autocast) -> float:
    """Seconds of the evaluation."""
    reference, start = Reference(model), now()
    texts, owners, images = [], [], []
    for batch in data.text_batches():
        padded = reference.padded(retrieval.to_device(batch, model.device))
        with autocast():
            texts.append(model.itc_text_proj(reference.text(padded["text_ids"], padded["text_masks"], False)[0][:, 0]))
        owners.append(batch["img_index"])
    for batch in data.image_batches():
        with autocast():
            images.append(model.itc_image_proj(reference.image(batch["image"].to(model.device), False)[0][:, 0]))
    scores, owner = torch.cat(images).float() @ torch.cat(texts).float().t(), torch.cat(owners).to(model.device)
    for side, dim in ((scores, 1), (scores.t(), 1)):
        for k in retrieval.RECALL_AT:
            top = side.topk(min(k, side.shape[1]), dim=dim).indices
            for query, row in enumerate(top):
                found = owner[row] == query if side is scores else row == owner[query]
                bool(found.any())
    return now() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--published-images", type=int, default=100, help="for the published way; 0 leaves it out")
    options = parser.parse_intermixed_args()
    settings = Settings.from_config(config := workload.parse(options.config))
    environment = choose_environment(settings)
    device = torch.device("cuda" if environment.accelerator == "gpu" else "cpu")
    model = VLMo(config).to(device).eval()
    if settings.compile:
        model.transformer.compile_steps()
    lengths, source = workload.text_lengths(settings, options.texts)
    dtype = DTYPES.get(environment.precision)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    place = "GPU" if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{settings.model_arch}, {settings.image_size} px, precision {environment.precision}, {place}; texts: {source}"
    )
    here(model, Data(settings, settings.per_gpu_batchsize, 1, lengths), autocast)  # warm-up
    total, encoders = here(model, Data(settings, options.images, options.captions, lengths), autocast)
    print(f"{options.images} images x {options.images * options.captions} captions: {total:.1f} s, ", end="")
    print(f"of which encoders {encoders:.1f} s: {total / encoders:.3f} times as long as they take", flush=True)
    if options.published_images:
        part = Data(settings, options.published_images, options.captions, lengths)
        rounds = [(published(model, part, autocast), here(model, part, autocast)[0]) for _ in range(2)]
        old, new = (min(each) for each in zip(*rounds, strict=True))
        print(f"{options.published_images} images: published {old:.1f} s, here {new:.1f} s: {old / new:.2f} times")


if __name__ == "__main__":
    main()
