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

from vlmo.distributed.collectives import sum_over_processes
from vlmo.evaluation import retrieval
from vlmo.evaluation.retrieval import Autocast, Encoded, num_ahead, own_chunks, to_device
from vlmo.modules import VLMo

# Log-odds this close are equal, as cosines are in `retrieval.py`.
TIE = 1e-4

PairLoader = Callable[[np.ndarray, np.ndarray], Iterable[dict[str, Any]]]


def candidates(queries: Encoded, items: Encoded, k: int) -> Tensor:
    """Places in `items` of the k that score highest, and of those that tie with the last of them, best first.

    Without the ties, rounding would choose between two equal texts. Of a model that scores all alike they are cut at k
    more.

    Returns:
        (Q, up to 2k) int64, -1 where a query has fewer candidates.
    """
    k, width = min(k, len(items.features)), min(2 * k, len(items.features))
    places = queries.number.new_zeros(len(queries.features), width)
    for part, scores, _ in own_chunks(queries, items):
        best = scores.topk(width, dim=1)
        places[part] = best.indices.masked_fill(best.values < best.values[:, k - 1 : k] - retrieval.TIE, -1)
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
        ranks: (texts,) and (images,) as `best_ranks` gives them.
        pair_loader: makes the loader of this process's share of pairs, from the numbers of their images and texts.
    """
    sides = (texts, images), (images, texts)
    found = [candidates(queries, items, k) for queries, items in sides]
    # a pair as one number, the image first: sorted by it, pairs of the same image follow one another
    num_texts = len(texts.number)
    rows = [torch.arange(len(places), device=places.device)[:, None] for places in found]
    codes = [found[0] * num_texts + rows[0], rows[1] * num_texts + found[1]]
    pairs = torch.cat([code[places >= 0] for code, places in zip(codes, found, strict=True)]).unique()
    image_numbers, text_numbers = (
        side.number[place].cpu().numpy() for side, place in ((images, pairs // num_texts), (texts, pairs % num_texts))
    )
    scores = match_scores(model, pair_loader(image_numbers, text_numbers), len(pairs), autocast)
    image_ranks, text_ranks = (
        _reranked(rank, scores[torch.searchsorted(pairs, code).clamp(max=len(pairs) - 1)], places, queries, items)
        for rank, code, places, (queries, items) in zip(ranks, codes, found, sides, strict=True)
    )
    return image_ranks, text_ranks


def _reranked(ranks: Tensor, scores: Tensor, places: Tensor, queries: Encoded, items: Encoded) -> Tensor:
    """(Q,) from the ranks of the contrast (Q,), and the candidates' scores and places (Q, candidates)."""
    there = places >= 0
    own = (queries.owner[:, None] == items.owner[places]) & there
    return torch.where(own.any(dim=1), num_ahead(scores.masked_fill(~there, -torch.inf), own, TIE), ranks)
