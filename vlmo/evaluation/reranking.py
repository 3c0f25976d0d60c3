"""Re-ranking: the first candidates of each query, as contrast ranks them, ordered by how well the pair matches (ITM).

Every pair is scored once, whichever query it is a candidate of: a text its images, an image its texts. Pairs are sorted
by image and dealt out in runs, so that images are read where they are needed and never travel.

The score of a pair is the published code's, the logit of "match" plus the cosine of the contrastive features; or the
log-odds of a match, which order as its probability does (`rerank_by`).
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlmo.distributed.collectives import sum_over_processes
from vlmo.evaluation import retrieval
from vlmo.evaluation.retrieval import Autocast, Encoded, num_ahead, own_chunks, to_device
from vlmo.modules import VLMo

RerankBy = Literal["published", "match"]

# Scores of pairs this close are equal, as cosines are in `retrieval.py`.
TIE = 1e-4
PAIRS_AT_ONCE = 1 << 14  # whose features are multiplied at a time

PairLoader = Callable[[np.ndarray, np.ndarray], Iterable[dict[str, Any]]]


def candidates(queries: Encoded, items: Encoded, k: int) -> Tensor:
    """Finds the rows of `items` that score highest: k of them and those that tie with the last of them, best first.

    Without the ties, rounding would choose between two equal texts. Of a model that scores all alike they are cut at k
    more.

    Returns:
        (Q, up to 2k) int64, -1 where a query has fewer candidates.
    """
    k, width = min(k, len(items.features)), min(2 * k, len(items.features))
    rows = queries.number.new_zeros(len(queries.features), width)
    for part, scores, _ in own_chunks(queries, items):
        best = scores.topk(width, dim=1)
        rows[part] = best.indices.masked_fill(best.values < best.values[:, k - 1 : k] - retrieval.TIE, -1)
    return sum_over_processes(rows)


def pair_numbers(images: Tensor, texts: Tensor, num_texts: int) -> Tensor:
    """Numbers pairs, given by their rows, so that those of an image follow one another; -1 where a row is -1."""
    return torch.where((images < 0) | (texts < 0), -1, images * num_texts + texts)


def rows_of_pairs(pairs: Tensor, num_texts: int) -> tuple[Tensor, Tensor]:
    """Gives the rows of image and text that `pair_numbers` has numbered."""
    return pairs // num_texts, pairs % num_texts


@torch.inference_mode()
def match_scores(
    model: VLMo,
    loader: Iterable[dict[str, Any]],
    num_pairs: int,
    autocast: Autocast = nullcontext,
    by: RerankBy = "published",
) -> Tensor:
    """Computes (pairs,) what ITM says of each, of all processes' pairs.

    Args:
        loader: this process's pairs, numbered by `raw_index`.
        num_pairs: of all processes.
        by: "published": the logit of a match; "match": its log-odds, which never saturate as the probability does.
    """
    scores = torch.zeros(num_pairs, device=model.device)
    for batch in loader:
        batch = to_device(batch, model.device)
        with autocast():
            pooled = model.infer(batch)["cls_feats"]
        no_match, match = model.itm_score(pooled.float()).unbind(1)  # not in half precision, whose steps make ties
        scores[batch["raw_index"]] = match if by == "published" else match - no_match
    return sum_over_processes(scores)


def cosines(images: Encoded, texts: Encoded, image_rows: Tensor, text_rows: Tensor) -> Tensor:
    """Computes (pairs,) the similarity of the features of pairs that are given by their rows."""
    parts = zip(image_rows.split(PAIRS_AT_ONCE), text_rows.split(PAIRS_AT_ONCE), strict=True)
    return torch.cat([(images.features[image] * texts.features[text]).sum(dim=1) for image, text in parts])


def reranked(
    model: VLMo,
    images: Encoded,
    texts: Encoded,
    ranks: tuple[Tensor, Tensor],
    k: int,
    pair_loader: PairLoader,
    autocast: Autocast = nullcontext,
    by: RerankBy = "published",
) -> tuple[Tensor, Tensor]:
    """Ranks each text's image and each image's best text once more, with the first k candidates in ITM's order.

    Where no own item is among them, the rank stays that of the contrast.

    Args:
        ranks: (texts,) and (images,) as `best_ranks` gives them.
        pair_loader: makes the loader of this process's share of pairs, from the numbers of their images and texts.
        by: "published": the logit of a match plus the cosine; "match": the log-odds of a match.
    """
    num_texts = len(texts.number)
    images_of_text, texts_of_image = candidates(texts, images, k), candidates(images, texts, k)
    of_texts = pair_numbers(images_of_text, _own_rows(images_of_text), num_texts)
    of_images = pair_numbers(_own_rows(texts_of_image), texts_of_image, num_texts)

    pairs = torch.cat([of_texts[of_texts >= 0], of_images[of_images >= 0]]).unique()  # in order
    image_rows, text_rows = rows_of_pairs(pairs, num_texts)
    loader = pair_loader(images.number[image_rows].cpu().numpy(), texts.number[text_rows].cpu().numpy())
    scores = match_scores(model, loader, len(pairs), autocast, by)
    if by == "published":
        scores = scores + cosines(images, texts, image_rows, text_rows)

    image_ranks = _rank_candidates(ranks[0], texts, images, images_of_text, scores[torch.searchsorted(pairs, of_texts)])
    text_ranks = _rank_candidates(ranks[1], images, texts, texts_of_image, scores[torch.searchsorted(pairs, of_images)])
    return image_ranks, text_ranks


def _own_rows(rows: Tensor) -> Tensor:
    """Gives (Q, 1), the number of each row."""
    return torch.arange(len(rows), device=rows.device)[:, None]


def _rank_candidates(ranks: Tensor, queries: Encoded, items: Encoded, rows: Tensor, scores: Tensor) -> Tensor:
    """Gives (Q,) the rank of each query's best own item among its candidates; that of the contrast where none is own.

    Args:
        ranks: (Q,) of the contrast. rows, scores: (Q, candidates) of the items, rows -1 where there is no candidate.
    """
    there = rows >= 0
    own = (queries.owner[:, None] == items.owner[rows]) & there
    return torch.where(own.any(dim=1), num_ahead(scores.masked_fill(~there, -torch.inf), own, TIE), ranks)
