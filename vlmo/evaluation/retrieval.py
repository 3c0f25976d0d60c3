"""Retrieval: encode images and texts apart, rank by the product of their contrastive features, count recalls."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmo.distributed.collectives import all_gather_rows, rank, sum_over_processes, world_size
from vlmo.modules import VLMo

log = logging.getLogger(__name__)

RECALL_AT = (1, 5, 10)
CHUNK = 256  # queries ranked at a time: no full matrix of scores exists
# Cosines this close are equal: rounding moves them by up to some 4e-7 with the size of the batch and the length that
# texts are padded to. So the same text twice is a tie in every run.
TIE = 1e-6

Autocast = Callable[[], AbstractContextManager[Any]]  # makes the context of the run's precision


def recall_at_k(ranks: Tensor, k: int) -> Tensor:
    """Gives the share of queries whose best relevant item is among the first `k`.

    Args:
        ranks: (queries,) number of items that stand before the best relevant one.
    """
    return (ranks < k).double().mean().float()


class Encoded(NamedTuple):
    """One side, images or texts, of all processes, in the order of their numbers."""

    features: Tensor  # (N, D) float32, unit length
    number: Tensor  # (N,) of the image or text in the data
    owner: Tensor  # (N,) number of the image that each belongs to
    skipped: int = 0  # images that cannot be decoded


@torch.inference_mode()
def encode(model: VLMo, loader: Iterable[dict[str, Any]], side: str, autocast: Autocast = nullcontext) -> Encoded:
    """Contrastive features of the L/V-FFN branch of all samples of `loader`, on the model's device.

    Args:
        side: "image" or "text".
    """
    features = [torch.empty(0, model.transformer.embed_dim, device=model.device)]
    numbers = [torch.empty(0, 2, dtype=torch.long, device=model.device)]
    skipped = 0
    for batch in loader:
        skipped += len(batch["skipped"])
        if "raw_index" not in batch:  # every image of the batch was unreadable
            continue
        batch = to_device(batch, model.device)
        with autocast():
            if side == "image":
                encoded = model.image_features(batch["image"])
            else:
                encoded = model.text_features(batch["text_ids"], batch["text_masks"])
        features.append(encoded.float())
        numbers.append(torch.stack([batch["raw_index"], batch["img_index"]], dim=1))
    all_features = all_gather_rows(torch.cat(features))
    number, owner = all_gather_rows(torch.cat(numbers)).unbind(1)
    skipped = int(sum_over_processes(torch.tensor(skipped, device=model.device)))
    if skipped and rank() == 0:
        log.warning(f"{skipped} images cannot be decoded: their texts count as not found")
    order = number.argsort()
    return Encoded(all_features[order], number[order], owner[order], skipped)


def pair_batches(images: Encoded, texts: Encoded, batches: Iterable[Sequence[int]]) -> Iterator[dict[str, Tensor]]:
    """Gives features of pairs, "image" and "text" (B, D) each: each text with its image.

    Texts whose image cannot be decoded are left out.

    Args:
        batches: places of the texts, those of this process.
    """
    image_of_text = torch.searchsorted(images.owner, texts.owner).clamp(max=len(images.owner) - 1)
    known = images.owner[image_of_text] == texts.owner if len(images.owner) else texts.owner < 0
    for batch in batches:
        part = torch.tensor(batch, dtype=torch.long, device=known.device)
        part = part[known[part]]
        if len(part):
            yield {"image": images.features[image_of_text[part]], "text": texts.features[part]}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors there."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def own_chunks(queries: Encoded, items: Encoded) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """This process's share of the queries: which, their scores (C, N), and which items are their own (C, N).

    Chunks are the same whatever the number of processes, so that scores are equal to the last bit.
    """
    for start in range(rank() * CHUNK, len(queries.features), world_size() * CHUNK):
        part = slice(start, start + CHUNK)
        own = queries.owner[part, None] == items.owner[None, :]
        yield part, queries.features[part] @ items.features.t(), own


def num_ahead(scores: Tensor, own: Tensor, tie: float) -> Tensor:
    """For each query, how many strangers score at least as high as the best own item.

    Ties count against the query, so that a model whose features are all alike, or nan, recalls nothing.

    Args:
        scores: (Q, N). own: (Q, N) bool. tie: scores no further apart than this are equal.

    Returns:
        (Q,) int64; beyond every recall where a query has no item of its own.
    """
    best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (~(scores < best - tie) & ~own).sum(dim=1)
    return ahead.masked_fill(~own.any(dim=1), torch.iinfo(torch.int64).max)


def best_ranks(queries: Encoded, items: Encoded) -> Tensor:
    """(Q,) the rank of each query's best own item, from 0; see `num_ahead`."""
    ranks = torch.zeros_like(queries.number)
    for part, scores, own in own_chunks(queries, items):
        ranks[part] = num_ahead(scores, own, TIE)
    return sum_over_processes(ranks)


def recalls(image_ranks: Tensor, text_ranks: Tensor) -> dict[str, float]:
    """Text-to-image (ir) and image-to-text (tr) recall at 1, 5 and 10.

    An image's texts are all right answers; a text has one right image.

    Args:
        image_ranks: (texts,) of each text's image. text_ranks: (images,) of each image's best text.
    """
    found = {f"ir_r{k}": recall_at_k(image_ranks, k) for k in RECALL_AT}
    found |= {f"tr_r{k}": recall_at_k(text_ranks, k) for k in RECALL_AT}
    return {name: float(value) for name, value in found.items()}
