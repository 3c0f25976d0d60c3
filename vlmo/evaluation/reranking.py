"""Re-ranking: the first candidates of each query, as contrast ranks them, ordered by how well the pair matches (ITM).

Every pair is scored once, whichever query it is a candidate of: a text its images, an image its texts. Pairs are sorted
by image and dealt out in runs, so that images are read where they are needed and never travel.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmo.distributed import sum_over_processes
from vlmo.evaluation.retrieval import Autocast, Encoded, num_ahead, own_chunks, to_device
from vlmo.modules import VLMo

# Log-odds this close are equal, as cosines are in `retrieval.py`.
TIE = 1e-4

PairLoader = Callable[[np.ndarray, np.ndarray], Iterable[dict[str, Any]]]


def candidates(queries: Encoded, items: Encoded, k: int) -> Tensor:
    """(Q, k) places in `items` of the k that score highest, best first; fewer if there are fewer items."""
    k = min(k, len(items.features))
    places = queries.number.new_zeros(len(queries.features), k)
    for part, scores, _ in own_chunks(queries, items):
        places[part] = scores.topk(k, dim=1).indices
    return sum_over_processes(places)


@torch.inference_mode()
def match_scores(
    model: VLMo, loader: Iterable[dict[str, Any]], num_pairs: int, autocast: Autocast = nullcontext
) -> Tensor:
    """(pairs,) log-odds of a match, of all processes: in the order of its probability, and never saturated.

    Args:
        loader: this process's pairs, numbered by `raw_index`.
        num_pairs: of all processes.
    """
    scores = torch.zeros(num_pairs, device=model.device)
    for batch in loader:
        batch = to_device(batch, model.device)
        with autocast():
            pooled = model.infer(batch)["cls_feats"]
        logits = model.itm_score(pooled.float())  # not in half precision, whose steps would make ties
        scores[batch["raw_index"]] = logits[:, 1] - logits[:, 0]
    return sum_over_processes(scores)


def reranked(
    model: VLMo,
    images: Encoded,
    texts: Encoded,
    ranks: tuple[Tensor, Tensor],
    k: int,
    pair_loader: PairLoader,
    autocast: Autocast = nullcontext,
) -> tuple[Tensor, Tensor]:
    """The ranks of each text's image and of each image's best text when ITM orders the first k candidates.

    Where no own item is among them, the rank stays that of the contrast.

    Args:
        ranks: (texts,), (images,) as `best_ranks` gives them.
        pair_loader: makes the loader of this process's share of pairs, from the numbers of their images and texts.
    """
    images_of, texts_of = candidates(texts, images, k), candidates(images, texts, k)
    text_places = torch.arange(len(texts.number), device=texts.number.device)[:, None]
    image_places = torch.arange(len(images.number), device=images.number.device)[:, None]
    # a pair as one number, the image first: sorted by it, pairs of the same image follow one another
    codes = images_of * len(texts.number) + text_places, image_places * len(texts.number) + texts_of
    pairs = torch.cat([code.flatten() for code in codes]).unique()
    image_numbers = images.number[pairs // len(texts.number)].cpu().numpy()
    text_numbers = texts.number[pairs % len(texts.number)].cpu().numpy()
    scores = match_scores(model, pair_loader(image_numbers, text_numbers), len(pairs), autocast)
    image_ranks, text_ranks = (
        _reranked(rank, scores[torch.searchsorted(pairs, code)], queries.owner[:, None] == items.owner[places])
        for rank, code, queries, items, places in zip(
            ranks, codes, (texts, images), (images, texts), (images_of, texts_of), strict=True
        )
    )
    return image_ranks, text_ranks


def _reranked(ranks: Tensor, scores: Tensor, own: Tensor) -> Tensor:
    """(Q,) from the ranks of the contrast (Q,), and for the candidates (Q, k) their scores and whether they are own."""
    return torch.where(own.any(dim=1), num_ahead(scores, own, TIE), ranks)
