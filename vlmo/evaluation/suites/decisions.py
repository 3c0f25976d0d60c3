"""Choices of a classifier among named answers: what it makes of images with a text, and what there is to see of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlmo.distributed.wire_format import from_bytes
from vlmo.errors import VLMoError
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.pictures import Picture
from vlmo.evaluation.suites.base import Confusion, Example, Result
from vlmo.modules.attention import first_positions
from vlmo.modules.model import Encode

EXAMPLES = 12  # of the best and of the worst, in the report
MOST_CLASSES = 30  # in a matrix of confusion: those that are confused most


class Decisions(NamedTuple):
    """What was chosen for N items.

    Attributes:
        truth, chosen: (N,) numbers of classes.
        sure: (N,) confidence of the choice, in [0, 1]; nan where an image cannot be decoded.
        right: (N,) how right the choice is, in [0, 1].
    """

    truth: Tensor
    chosen: Tensor
    sure: Tensor
    right: Tensor


def require_head(scorer: Scorer, head: str, suite: str) -> None:
    """Raises VLMoError if the model lacks a head."""
    if not hasattr(scorer.model, head):
        trained = ", ".join(task.name for task in scorer.model.tasks)
        raise VLMoError(f"suite {suite}: needs a checkpoint with {head}; this one was trained for {trained}")


@torch.inference_mode()
def classify(scorer: Scorer, head: str, pixels: Sequence[Tensor], rows: Sequence[int], texts: Sequence[str]) -> Tensor:
    """Gives (P, classes) logits of texts, each with its image, or with several that the head reads together.

    Args:
        pixels: one tensor (N, 3, size, size) of bytes for each image of an item.
        rows: (P,) which of the N each text has.
    """
    ids = scorer.token_ids(texts)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # little padding
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    for start in range(0, len(order), scorer.batch_size):
        own = order[start : start + scorer.batch_size]
        text, mask = scorer.padded([ids[number] for number in own])
        at = [rows[number] for number in own]
        requests = [
            Encode(from_bytes(images[at].to(scorer.device)), text, mask, first_positions(text), token_type=place)
            for place, images in enumerate(pixels, start=1)
        ]
        pooled = [scorer.model.pooler(hidden) for hidden, _ in scorer.model.encode(requests)]
        logits = scorer.model.heads[head](torch.cat(pooled, dim=1)).double().cpu()
        for number, row in zip(own, logits, strict=True):
            found[number] = row
    return torch.stack(found) if found else torch.empty(0, 1, dtype=torch.float64)


def confusion(names: Sequence[str], truth: Tensor, chosen: Tensor) -> Confusion:
    """Counts what was taken for what, among the classes that are confused most; all of them if they are few."""
    wrong = truth != chosen
    errors = sum(each[wrong].bincount(minlength=len(names)) for each in (truth, chosen))
    assert isinstance(errors, Tensor)
    kept = errors.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
    place = torch.full((len(names),), -1).index_put_((kept,), torch.arange(len(kept)))
    rows, columns = place[truth], place[chosen]
    cells = (rows * len(kept) + columns)[(rows >= 0) & (columns >= 0)]
    counts = cells.bincount(minlength=len(kept) ** 2).view(len(kept), len(kept))
    return Confusion([names[number] for number in kept.tolist()], counts, len(names))


def add_decisions(
    result: Result,
    name: str,
    classes: Sequence[str],
    made: Decisions,
    show: Callable[[int], tuple[list[Picture], list[str]]],
) -> None:
    """Adds calibration, confusion, and as examples the choices that the model is surest of, right ones and wrong ones.

    Args:
        name: of these decisions, such as a score or a part of the data.
        show: gives the images and the lines of an item.
    """
    known = ~made.sure.isnan()
    result.calibration[name] = made.sure[known], made.right[known]
    result.confusion[name] = confusion(classes, made.truth[known], made.chosen[known])
    order = made.sure.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    order = order[known[order]]
    for kept, numbers in ((result.worst, order[made.right[order] == 0]), (result.best, order[made.right[order] == 1])):
        for number in numbers[:EXAMPLES].tolist():
            pictures, lines = show(number)
            kept.append(Example(pictures, lines, float(made.sure[number]), name))
