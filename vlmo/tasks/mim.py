"""Masked image modelling (stage 1): hidden patches from those that are shown (BEiT, arXiv 2106.08254)."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field as Bounds
from torch import Tensor, nn

from vlmo.batch import FIELDS, Batch
from vlmo.checkpoints.files import read_pickled_module
from vlmo.errors import VLMoError
from vlmo.modules.attention import rows_at
from vlmo.modules.image_tokenizer import NUM_CODES, DalleEncoder
from vlmo.modules.model import Encode, Hidden
from vlmo.modules.transformer import PATCH_SIZE
from vlmo.registry import ARCHITECTURES, TASKS
from vlmo.settings.groups import PathText
from vlmo.settings.option import OptionGroup, option
from vlmo.tasks.base import Step, Task, TaskOutput, accuracy, locate, mean, mean_cross_entropy


def normalised_patches(image: Tensor, patch_size: int) -> Tensor:
    """Gives the pixels of each patch, with the patch's own mean 0 and deviation 1 (MAE, arXiv 2111.06377, section 4.1).

    Args:
        image: (B, 3, size, size).

    Returns:
        (B, patches, 3 * patch_size^2) float32
    """
    patches = rearrange(image.float(), "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
    centred = patches - patches.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centred / (variance + 1e-6).sqrt()  # a patch of a single colour has no deviation


class MIMOptions(OptionGroup):
    """Images alone (stage 1)"""

    mim_target: Literal["pixels", "dalle"] = option(
        "pixels", "what hidden patches are predicted as: their pixels, or codes of DALL-E's tokenizer"
    )
    mim_tokenizer: PathText = option(
        "", "for mim_target=dalle: its encoder.pkl (https://cdn.openai.com/dall-e/encoder.pkl), a local file"
    )
    mim_mask_ratio: Annotated[float, Bounds(gt=0, lt=1)] = option(
        0.383, "share of the patches that are hidden: 75 of 196"
    )


@cache
def load_tokenizer(path: str) -> DalleEncoder:
    """Reads the encoder of `encoder.pkl`, which is a pickled network: only its tensors are taken out.

    Raises:
        VLMoError: if it cannot be read, or holds another network.
    """
    try:
        return DalleEncoder.from_tensors(read_pickled_module(path))
    except VLMoError as error:
        raise VLMoError(f"mim_tokenizer={path}: {str(error).removeprefix(f'{path}: ')}") from error


@TASKS.register("mim")
class MIM(Task):
    """Of each hidden patch its visual token (cross-entropy), or its normalised pixels (mean squared error)."""

    name = "mim"
    stage = 1
    alone = True
    reads = frozenset({"image"})
    experts = ()
    has_text = False
    paths = ("image",)
    fields = {name: FIELDS[name] for name in ("image", "patch_mask")}
    Options = MIMOptions

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        outputs = NUM_CODES if self.options.mim_target == "dalle" else 3 * self.patch_size**2
        mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        return {"mim_mask_token": mask_token, "mim_score": nn.Linear(width, outputs)}

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return ARCHITECTURES[self.options.model_arch].get("patch_size", PATCH_SIZE)

    @classmethod
    def check(cls, settings: Any) -> list[str]:
        if settings.mim_target == "dalle" and not settings.mim_tokenizer:
            return ["mim_target=dalle: needs DALL-E's tokenizer; give its encoder.pkl with mim_tokenizer=FILE"]
        return []

    @classmethod
    def check_files(cls, settings: Any) -> list[str]:
        try:
            if settings.mim_target == "dalle":
                load_tokenizer(settings.mim_tokenizer)
        except VLMoError as error:
            return [str(error)]
        return []

    def chance(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Pixels of deviation 1, of which a mean says nothing; codes that are all as frequent."""
        return {"loss": math.log(NUM_CODES) if self.options.mim_target == "dalle" else 1.0}

    def derive(self, batch: Batch) -> dict[str, Tensor]:
        positions, kept = locate(batch["patch_mask"])
        return {"patch_positions": positions, "patch_kept": kept}

    def num_items(self, batch: Batch) -> Tensor | int:
        return batch["patch_mask"].sum()

    def requests(self, step: Step) -> list[Encode]:
        batch, positions = step.batch, self._located(step.batch)["patch_positions"]
        mask_token = step.heads["mim_mask_token"]
        return [Encode(batch["image"], positions=1 + positions, patch_mask=batch["patch_mask"], mask_token=mask_token)]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        image, mask, located = step.batch["image"], step.batch["patch_mask"], self._located(step.batch)
        positions, kept = located["patch_positions"], located["patch_kept"]
        predicted = step.heads["mim_score"](encoded[0][0].flatten(0, 1)[kept]).float()
        if self.options.mim_target == "pixels":
            pixels = rows_at(normalised_patches(image, self.patch_size), positions).flatten(0, 1)[kept]
            loss = F.mse_loss(predicted, pixels, reduction="sum") / max(predicted.numel(), 1)
            return TaskOutput(loss, {"logits": predicted, "targets": pixels}, {"loss": mean(loss, len(predicted))})
        labels = self._visual_tokens(step.batch, mask.shape[1]).gather(1, positions).flatten()[kept]
        loss = mean_cross_entropy(predicted, labels)
        measured = {"loss": mean(loss, len(labels)), "accuracy": accuracy(predicted, labels)}
        return TaskOutput(loss, {"logits": predicted, "labels": labels}, measured)

    def _located(self, batch: Batch) -> Any:
        """Gives `patch_positions` and `patch_kept`, which batches that were not collated lack."""
        return batch if "patch_kept" in batch else self.derive(batch)

    def _visual_tokens(self, batch: Any, patches: int) -> Tensor:
        """(B, patches) codes of the patches; made here, on the device, unless the batch has them."""
        if "visual_tokens" in batch:
            return batch["visual_tokens"]
        image = batch["image"]
        tokenizer = load_tokenizer(self.options.mim_tokenizer).to(image.device)
        return tokenizer.visual_tokens(image, round(patches**0.5))
