"""Image-text matching with hard negatives: one true pair against two that the contrast finds hard to tell from true."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmo.batch import FIELDS
from vlmo.distributed.collectives import all_gather_rows, pick_pairs
from vlmo.distributed.wire_format import from_bytes
from vlmo.modules.attention import first_positions
from vlmo.modules.model import Encode, Hidden
from vlmo.modules.random import fold_in, to_uniform
from vlmo.registry import TASKS
from vlmo.settings.option import OptionGroup, option
from vlmo.tasks.base import Step, Task, TaskOutput, Use, accuracy, entropy, mean, mean_cross_entropy


class ITMHead(nn.Module):
    """Match or no match."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, 2): logits of no match, match"""
        return self.fc(x)


def draw_negatives(logits: Tensor, generator: torch.Generator | None = None, uniforms: Tensor | None = None) -> Tensor:
    """Draws one hard negative a row, by the softmax of its similarities with the own pair (the diagonal) left out.

    Args:
        logits: (B, N), the B own rows of the similarities to all N pairs, own pairs first; -inf is not drawn.
        generator: of the logits' device; None for the global one.
        uniforms: (B, N) random numbers in (0, 1) to draw by; None: they come from the generator.

    Returns:
        (B,) column numbers.
    """
    # -inf before the softmax, not 0 after it: a dominant own pair would leave no weight to draw by
    weights = logits.detach().float().clone().fill_diagonal_(-torch.inf).softmax(dim=1)
    # as `torch.multinomial` draws, which waits for the device to look at the weights first
    exponential = torch.empty_like(weights).exponential_(generator=generator) if uniforms is None else -uniforms.log()
    return (weights / exponential).argmax(dim=1)


def same_chunk(size: int, chunk_size: int, device: torch.device) -> Tensor:
    """Tells which pairs are of the same forward pass, (size, size) bool; one alone in its own may look at all."""
    chunk = torch.arange(size, device=device) // chunk_size
    same = chunk[:, None] == chunk
    return same | (same.sum(1, keepdim=True) < 2)


def leave_out(logits: Tensor, same_image: Tensor) -> Tensor:
    """Sets the logits (B, N) of pairs with the row's own image to -inf, except in rows that would have no other left.

    (A negative of the own image teaches what is wrong; but ITM's batch has three entries for each pair.)
    """
    others = logits.masked_fill(same_image, -torch.inf)
    left = others.isfinite() & ~torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    return torch.where(left.any(1, keepdim=True), others, logits)


def match(predictor: Any, image: Any, text: Any) -> list[float]:
    """Gives the probability that an image and a text belong together (in training one pair of three does)."""

    def logits(model: Any, batch: Any) -> Tensor:
        hidden = model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
        return model.itm_score(model.pooler(hidden))

    return predictor.compute(logits, image=image, text=text).softmax(-1)[:, 1].tolist()


class ITMOptions(OptionGroup):
    """Matching"""

    negatives: Literal["global", "local"] = option(
        "global", "negatives come from all pairs that are contrasted, or from those of the same pass (local)"
    )


@TASKS.register("itm")
class ITM(Task):
    """Each pair three times: as it is, its text with another image, its image with another text."""

    name = "itm"
    stage = 3
    provides = "matching"
    requires = "contrast"
    spans_processes = True
    paths = ("pair", "pooler")
    fields = {name: FIELDS[name] for name in ("image", "text_ids", "text_masks")}
    Options = ITMOptions
    uses = (Use("match", match, "itm_score", "matching", ("image", "text"), "match"),)

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {"itm_score": ITMHead(width)}

    @classmethod
    def check(cls, settings: Any) -> list[str]:
        if settings.test_only or settings.pairs_per_pass >= 2 or settings.layout_invariant:
            return []
        return [
            "per_gpu_batchsize=1: matching needs a second pair to draw a negative from; set per_gpu_batchsize=2 or more"
        ]

    def prepare(self, step: Step) -> dict[str, Tensor]:
        """Gives `negative_image`, `negative_text_ids`, `negative_text_masks`; nothing where a single pair is all."""
        similarities = step.provided["contrast"].outputs
        if similarities["i2t_logits"].shape[1] < 2:
            return {}
        size = len(step.batch["image"])
        rows = [similarities[f"{direction}_logits"][:size] for direction in ("t2i", "i2t")]
        if self.options.negatives == "local":
            near = same_chunk(size, self.options.per_gpu_batchsize, rows[0].device)
            rows = [each[:, :size].masked_fill(~near, -torch.inf) for each in rows]
        if "same_image" in similarities:
            same = similarities["same_image"][:size, : rows[0].shape[1]]
            rows = [leave_out(each, same) for each in rows]
        draw: torch.Generator | None = None
        uniforms: list[Tensor | None] = [None, None]
        if step.keys is not None:  # a number for each two pairs, wherever they are
            keys = step.keys.to(rows[0].device)
            everyone = all_gather_rows(keys[:, None], shapes=[(each.samples, 1) for each in step.sizes])[:, 0]
            uniforms = [to_uniform(fold_in(fold_in(keys, use)[:, None], everyone)) for use in (0, 1)]
        if not step.training:  # an evaluation draws alike whichever process meets the batch, and whenever
            draw = torch.Generator(rows[0].device).manual_seed(int(step.batch["text_ids"].sum()))
        other_image, other_text = (draw_negatives(each, draw, by) for each, by in zip(rows, uniforms, strict=True))
        image, ids, masks = pick_pairs(
            step.batch["image"],
            step.batch["text_ids"],
            step.batch["text_masks"],
            other_image,
            other_text,
            [(size.samples, size.text_len) for size in step.sizes],
            self.options.vocab_size,
            as_bytes=all(size.images_are_bytes for size in step.sizes),
        )
        return {"negative_image": image, "negative_text_ids": ids, "negative_text_masks": masks}

    def requests(self, step: Step) -> list[Encode]:
        batch: Mapping[str, Any] = step.batch
        image, ids, masks = batch["image"], batch["text_ids"], batch["text_masks"]
        other: Mapping[str, Tensor] = batch
        if "negative_image" not in batch:
            other = self.prepare(step) if step.provided else {}
        if not other:  # a single pair has no negative
            if len(step.sizes) == 1 or not step.provided:
                return []
            # the other processes wait for a gradient from here, if only of nothing
            image, ids, masks = image[:0], ids[:0], masks[:0]
            other = {"negative_image": image, "negative_text_ids": ids, "negative_text_masks": masks}
        positions = first_positions(ids)
        negative = other["negative_image"]
        if negative.dtype == torch.uint8:  # as it came from the other processes
            negative = from_bytes(negative).to(image.dtype)
        return [
            Encode(image, ids, masks, positions),
            Encode(negative, ids, masks, positions),
            Encode(image, other["negative_text_ids"], other["negative_text_masks"], positions),
        ]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        hidden = torch.cat([each for each, _ in encoded])
        logits = step.heads["itm_score"](step.heads["pooler"](hidden))
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(logits) // 3] = 1
        loss = mean_cross_entropy(logits.float(), labels)
        measured = {"loss": mean(loss, len(labels)), "accuracy": accuracy(logits, labels)}
        return TaskOutput(loss, {"logits": logits, "labels": labels}, measured)

    def chance(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """One pair of three is true."""
        return {"loss": entropy(torch.tensor([1 / 3, 2 / 3])), "accuracy": 2 / 3}
