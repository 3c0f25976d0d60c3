"""The tiny size with a small vocabulary: configs, models and batches that cost milliseconds."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from vlmo.config import resolve
from vlmo.modules import VLMo

Model = TypeVar("Model", bound=torch.nn.Module)

SMALL = {
    "model_arch": "vlmo_tiny_patch16",
    "image_size": 32,
    "vocab_size": 64,
    "max_text_len": 24,
    "vqav2_label_size": 7,
    "num_classes": 5,
    "drop_path_rate": 0.0,
    "batch_size": 4,
    "per_gpu_batchsize": 4,
    "num_workers": 0,
    "num_gpus": 0,
    "precision": 32,
}


def config(*named: str, **updates: Any) -> dict[str, Any]:
    return resolve(*named, **(SMALL | updates))


def model(*named: str, **updates: Any) -> VLMo:
    """In evaluation mode, every parameter moved off its initial value, so that none of them is without effect."""
    return perturb(VLMo(config(*named, **updates)))


def perturb(built: Model) -> Model:
    """The model in evaluation mode, every parameter moved by a random step."""
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return built.eval()


def text(lengths: Sequence[int], padded: int) -> dict[str, torch.Tensor]:
    """Fields of texts with that many tokens; every third word is masked."""
    ids = torch.zeros(len(lengths), padded, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 64, (length,), generator=torch.Generator().manual_seed(length))
        row[0], row[length - 1] = 2, 3
    mask = (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()
    masked = mask.bool() & (torch.arange(padded) % 3 == 1)
    return {
        "text_ids": ids,
        "text_masks": mask,
        "text_labels": torch.full_like(ids, -100),
        "text_ids_mlm": torch.where(masked, 4, ids),
        "text_labels_mlm": torch.where(masked, ids, -100),
    }


def batch(
    lengths: Sequence[int] = (6, 9, 12), padded: int = 16, images: Sequence[str] = ("image",), image_size: int = 32
) -> dict[str, Any]:
    """A batch for every task; NLVR2's has the images `image_0` and `image_1`."""
    draw = torch.Generator().manual_seed(0)
    size = len(lengths)
    return {
        **text(lengths, padded),
        **{name: 2 * torch.rand(size, 3, image_size, image_size, generator=draw) - 1 for name in images},
        "image_key": torch.arange(size),
        "vqa_labels": torch.tensor([[row % 7, (row + 2) % 7] for row in range(size)]),
        "vqa_scores": torch.tensor([[1.0, 0.3]] * size),
        "patch_mask": torch.arange(size * (image_size // 16) ** 2).reshape(size, -1) % 3 == 0,
        "visual_tokens": torch.arange(size * (image_size // 16) ** 2).reshape(size, -1) * 100,
        "label": torch.arange(size) % 5,
        "sample_key": torch.arange(size) + 100,
        "answers": torch.arange(size) % 2 == 0,
        "entailment": torch.arange(size) % 3,
        "table_name": ["nlvr2_dev" if row % 2 else "nlvr2_test1" for row in range(size)],
    }
