"""Masked language modelling on pairs (stage 3): the tokens of the text from the rest of it and the image."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import FIELDS, IGNORE_INDEX, Batch
from vlmo.errors import InputError
from vlmo.modules.linear_cross_entropy import CHUNK, linear_cross_entropy
from vlmo.modules.model import Encode, Hidden
from vlmo.modules.transformer import BERT_NORM_EPS
from vlmo.registry import TASKS
from vlmo.tasks.base import Step, Task, TaskOutput, Use, accuracy, entropy, locate, mean, mean_cross_entropy

STAGE3_WEIGHT = 0.25


class _Transform(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=BERT_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class MLMHead(nn.Module):
    """BERT's head: transform, then a decoder that is not tied to the word embedding."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = _Transform(width)
        self.decoder = nn.Linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)"""
        return F.linear(self.transform(x), self.decoder.weight, self.bias)

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the mean cross-entropy for (N, D) and (N,) labels, and the predicted tokens, without all logits."""
        return linear_cross_entropy(self.transform(x), self.decoder.weight, self.bias, labels)


def locate_masked_tokens(labels: Tensor) -> dict[str, Tensor]:
    """Finds the masked tokens of texts.

    Args:
        labels: (B, T), IGNORE_INDEX where a token was not masked.

    Returns:
        masked_positions: (B, R) their positions, R being the most in one text; see `locate`.
        masked_kept: (M,) numbers of the B * R that are no filling.
    """
    positions, kept = locate(labels != IGNORE_INDEX)
    return {"masked_positions": positions, "masked_kept": kept}


class MaskedTokens(Task):
    """Base of the tasks that predict masked tokens."""

    primary_metrics = ("accuracy",)
    sized_by = {"mlm_score.decoder.": "vocab_size", "mlm_score.bias": "vocab_size"}
    weight: float

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {"mlm_score": MLMHead(width, self.options.vocab_size)}

    def derive(self, batch: Batch) -> dict[str, Tensor]:
        return locate_masked_tokens(batch["text_labels_mlm"])

    def num_items(self, batch: Batch) -> Tensor | int:
        return (batch["text_labels_mlm"] != IGNORE_INDEX).sum()

    def chance(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """By how often each token is masked."""
        labels = torch.cat([batch["text_labels_mlm"].flatten() for batch in batches])
        counts = labels[labels != IGNORE_INDEX].bincount()
        if not len(counts):
            return {}
        return {"loss": self.weight * entropy(counts), "accuracy": float(counts.max() / counts.sum())}

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        """Computes cross-entropy over the masked tokens; the head runs on those alone, being most of the cost.

        Outputs are "labels" and, of few tokens, "logits".
        """
        ((hidden, _),) = encoded  # (B, R, D)
        located = located_tokens(step.batch)
        kept = located["masked_kept"]
        labels = step.batch["text_labels_mlm"].gather(1, located["masked_positions"]).flatten()[kept]  # (M,)
        tokens = hidden.flatten(0, 1)[kept]  # (M, D)
        outputs, head = {"labels": labels}, step.heads["mlm_score"]
        if len(labels) > CHUNK:
            loss, predicted = head.loss(tokens, labels)
        else:
            outputs["logits"] = predicted = head(tokens)  # (M, vocabulary)
            # (a batch may have no masked token, without whole-word masking)
            loss = mean_cross_entropy(predicted.float(), labels)
        loss = self.weight * loss
        return TaskOutput(loss, outputs, {"loss": mean(loss, len(labels)), "accuracy": accuracy(predicted, labels)})


def located_tokens(batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Gives `masked_positions` and `masked_kept`, which batches that were not collated lack."""
    return batch if "masked_kept" in batch else locate_masked_tokens(batch["text_labels_mlm"])


def fill_mask(predictor: Any, text: Any, image: Any = None, top_k: int = 5) -> list[Any]:
    """Gives the likeliest tokens for each [MASK] of a text, which an image may illustrate, best first."""
    words, mask_id = predictor.vocabulary, predictor.tokenizer.mask_token_id
    counts = [predictor.token_ids(each).count(mask_id) for each in text]
    if 0 in counts:
        cut = f"its first {predictor.model.max_text_len} tokens"
        raise InputError(f"{text[counts.index(0)]!r}: has no [MASK] among {cut}")

    def logits(model: Any, batch: Any) -> Tensor:
        ids, masks = batch["text_ids"], batch["text_masks"]
        hidden = model.encode_pair(ids, masks, batch["image"]) if image else model.encode_text(ids, masks)[0]
        return model.mlm_score(hidden[:, : ids.shape[1]][ids == mask_id])[:, : len(words)]

    scores = iter(predictor.compute(logits, text=text, image=image).softmax(-1))
    return [[predictor.best(row, words, top_k) for row in islice(scores, count)] for count in counts]


@TASKS.register("mlm")
class MLM(MaskedTokens):
    """Weighted by 0.25, as published."""

    name = "mlm"
    stage = 3
    paths = ("pair",)
    fields = {name: FIELDS[name] for name in ("image", "text_ids_mlm", "text_masks", "text_labels_mlm")}
    weight = STAGE3_WEIGHT
    uses = (
        Use(
            "fill_mask",
            fill_mask,
            "mlm_score",
            "filling in masked tokens",
            ("text",),
            "masks",
            optional=("image",),
            options={"top_k": 5},
            command="fill",
        ),
    )

    def requests(self, step: Step) -> list[Encode]:
        batch = step.batch
        positions = located_tokens(batch)["masked_positions"]
        return [Encode(batch["image"], batch["text_ids_mlm"], batch["text_masks"], positions)]
