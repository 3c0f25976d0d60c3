"""Retrieval: encode images and texts apart, rank by the product of their contrastive features, count recalls."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlmo.distributed import gather_own_first
from vlmo.metrics import recall_at_k
from vlmo.modules import VLMo

RECALL_AT = (1, 5, 10)
CHUNK = 1024  # queries ranked at a time: no full matrix of scores exists


@torch.inference_mode()
def encode(
    model: VLMo,
    loader: Iterable[dict[str, Any]],
    side: str,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Contrastive features of the L/V-FFN branch of all samples of `loader`.

    Args:
        side: "image" or "text".
        autocast: makes the context of the run's precision.

    Returns:
        features (N, D) float32 on the model's device, and the number of the image that each belongs to (N,); of all
        processes, in the order of these numbers.
    """
    features = [torch.empty(0, model.transformer.embed_dim, device=model.device)]
    owners = [torch.empty(0, dtype=torch.long, device=model.device)]
    for batch in loader:
        if "img_index" not in batch:  # every image of the batch was unreadable
            continue
        batch = {k: v.to(model.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with autocast():
            infer = model.infer_image if side == "image" else model.infer_text
            encoded = infer(batch, vl_branch=False)
        features.append(encoded["cls_feats"].float())
        owners.append(batch["img_index"])
    all_features = gather_own_first(torch.cat(features))
    all_owners = gather_own_first(torch.cat(owners)[:, None])[:, 0]
    order = all_owners.argsort(stable=True)
    return all_features[order], all_owners[order]


def best_ranks(queries: Tensor, items: Tensor, query_owner: Tensor, item_owner: Tensor) -> Tensor:
    """For each query, how many items of other owners score at least as high as its best own item.

    Ties count against the query, so that a model whose features are all alike, or nan, recalls nothing.

    Args:
        queries: (Q, D). items: (N, D). query_owner, item_owner: (Q,), (N,) numbers of the images they belong to.

    Returns:
        (Q,) int64; beyond every recall where a query has no item of its own.
    """
    ranks = []
    for query, owner in zip(queries.split(CHUNK), query_owner.split(CHUNK), strict=True):
        scores = query @ items.t()
        own = owner[:, None] == item_owner[None, :]
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        rank = (~(scores < best) & ~own).sum(dim=1)
        ranks.append(rank.masked_fill(~own.any(dim=1), torch.iinfo(torch.int64).max))
    return torch.cat(ranks)


def recalls(images: Tensor, image_owner: Tensor, texts: Tensor, text_owner: Tensor) -> dict[str, float]:
    """Text-to-image (ir) and image-to-text (tr) recall at 1, 5 and 10.

    An image's texts are all right answers; a text has one right image.
    """
    image_ranks = best_ranks(texts, images, text_owner, image_owner)  # text queries, images found
    text_ranks = best_ranks(images, texts, image_owner, text_owner)
    found = {f"ir_r{k}": recall_at_k(image_ranks, k) for k in RECALL_AT}
    found |= {f"tr_r{k}": recall_at_k(text_ranks, k) for k in RECALL_AT}
    return {name: float(value) for name, value in found.items()}
