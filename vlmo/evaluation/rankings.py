"""Statistics of rankings from the ranks of the own items, a chunk of queries at a time: no matrix of scores exists.

By cosine, or with the first candidates of each query once more in the order of a score of pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmo.evaluation.chunks import Output, in_chunks
from vlmo.evaluation.pair_scores import TIES

QUERIES_AT_ONCE = 128
FEW = 20  # own items, up to which counting the strangers before each is faster than sorting them all
RECALL_AT = (1, 5, 10)
ABOVE = 1000.0  # what re-ranked candidates are lifted by, above every cosine

Owned = list[np.ndarray]  # for each query the numbers of its own items; -1 for one that is not among those ranked

MISSED = torch.iinfo(torch.int32).max  # the rank of what is not found


def ranks_of_own(scores: Tensor, own: Tensor, tie: float) -> Tensor:
    """Ranks each query's own items among all, from 0; ties between an own item and a stranger count against it.

    Args:
        scores: (Q, N); -inf or nan for what cannot be found.
        own: (Q, N) bool.
        tie: scores no further apart than this are equal.

    Returns:
        (Q, most own items of one query) int32, best first, MISSED where there are no more.
    """
    scores = scores.nan_to_num(nan=-torch.inf)
    most = int(own.sum(1).max()) if own.numel() else 0
    best = scores.masked_fill(~own, -torch.inf).topk(most, dim=1).values if most else scores[:, :0]
    strangers, least = scores.masked_fill(own, -torch.inf), (best - tie).contiguous()
    if 0 < most <= FEW:
        before = torch.stack([(strangers >= line).sum(1) for line in least.split(1, dim=1)], dim=1)
    else:
        before = scores.shape[1] - torch.searchsorted(strangers.sort(dim=1).values, least)
    ranks = before + torch.arange(most, device=scores.device)
    return ranks.masked_fill(best == -torch.inf, MISSED).int()


def recall(ranks: Tensor, k: int) -> Tensor:
    """Tells whether one of a query's own items is among the first k: (Q, M) ranks -> (Q,) 0 or 1."""
    return (ranks < k).any(dim=1).double()


def precision_at_r(ranks: Tensor, numbers: Tensor) -> Tensor:
    """R-Precision: the share of own items among the first R, R being how many a query has.

    Args:
        ranks: (Q, M) of `ranks_of_own`. numbers: (Q,) R.
    """
    return (ranks < numbers[:, None]).sum(1).double() / numbers.clamp(min=1)


def average_precision_at_r(ranks: Tensor, numbers: Tensor) -> Tensor:
    """mAP@R of one query: the precisions at the ranks of the own items within the first R, over R (arXiv 2003.08505).

    Args:
        ranks: (Q, M) of `ranks_of_own`. numbers: (Q,) R.
    """
    nth = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    precisions = (nth / (ranks.double() + 1)).masked_fill(ranks >= numbers[:, None], 0)
    return precisions.sum(1) / numbers.clamp(min=1)


class Sides(NamedTuple):
    """Features that are compared, and the order that a score of pairs gives the first candidates.

    Attributes:
        images, texts: (I, D), (T, D) of unit length; nan where an image cannot be decoded.
        texts_of_image, images_of_text: candidates (Q, K) and their scores (Q, K); None: none.
        tie: cosines no further apart are equal.
    """

    images: Tensor
    texts: Tensor
    texts_of_image: tuple[Tensor, Tensor] | None = None
    images_of_text: tuple[Tensor, Tensor] | None = None
    tie: float = TIES["cosine"]


Statistic = Callable[[Tensor, Tensor], Tensor]  # of ranks (Q, M) and numbers of own items (Q,)


def per_query(
    queries: Tensor,
    items: Tensor,
    owned: Owned,
    statistics: dict[str, Statistic],
    candidates: tuple[Tensor, Tensor] | None = None,
    tie: float = TIES["cosine"],
) -> dict[str, Tensor]:
    """Computes statistics of each query's ranks: (Q,) by name, over all processes.

    Args:
        queries, items: (Q, D), (N, D); of items that are nan nothing is found.
        owned: of each query, the numbers of its own items.
        candidates: (Q, K) numbers of items and (Q, K) what they are ordered by, before all others.
    """
    items = items.double()
    unknown = items.isnan().any(1)
    items = items.nan_to_num()

    def compute(start: int, stop: int, prepared: None) -> dict[str, Tensor]:
        scores = (queries[start:stop].double() @ items.t()).masked_fill(unknown, -torch.inf)
        if candidates is not None:  # one tie serves both, those of the log-odds being wider
            rows, odds = (each[start:stop] for each in candidates)
            lifted = ABOVE + odds * (tie / TIES["itm"])
            scores.scatter_(1, rows, lifted.nan_to_num(nan=-torch.inf))
        own = torch.zeros(scores.shape, dtype=torch.bool)
        numbers = torch.tensor([len(each) for each in owned[start:stop]])
        at = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *owned[start:stop]]))
        own[torch.repeat_interleave(torch.arange(stop - start), numbers)[at >= 0], at[at >= 0]] = True
        ranks = ranks_of_own(scores, own, tie)
        return {name: statistic(ranks, numbers) for name, statistic in statistics.items()}

    outputs = {name: Output() for name in statistics}
    return in_chunks("rank", len(queries), QUERIES_AT_ONCE, outputs, compute, dtype=torch.float64)


RECALLS: dict[str, Statistic] = {f"R@{k}": lambda ranks, numbers, k=k: recall(ranks, k) for k in RECALL_AT}  # type: ignore[misc]
OF_LISTS: dict[str, Statistic] = {
    "mAP@R": average_precision_at_r,
    "R-Precision": precision_at_r,
    "R@1": lambda ranks, numbers: recall(ranks, 1),
}


def both_ways(
    sides: Sides,
    texts_of: Owned,
    images_of: Owned,
    statistics: dict[str, Statistic],
    images: np.ndarray | None = None,
    texts: np.ndarray | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Gives the statistics of both directions, "text to image" and "image to text", each (queries,) by name.

    Args:
        texts_of: of each image query. images_of: of each text query.
        images, texts: numbers of the queries (None: all); all images and texts are ranked.
    """
    image_rows = np.arange(len(sides.images)) if images is None else images
    text_rows = np.arange(len(sides.texts)) if texts is None else texts

    def some(candidates: tuple[Tensor, Tensor] | None, rows: np.ndarray) -> tuple[Tensor, Tensor] | None:
        return None if candidates is None else (candidates[0][rows], candidates[1][rows])

    return {
        "text to image": per_query(
            sides.texts[text_rows],
            sides.images,
            images_of,
            statistics,
            some(sides.images_of_text, text_rows),
            sides.tie,
        ),
        "image to text": per_query(
            sides.images[image_rows],
            sides.texts,
            texts_of,
            statistics,
            some(sides.texts_of_image, image_rows),
            sides.tie,
        ),
    }


def recall_chances(texts_of: Owned, images_of: Owned, totals: tuple[int, int] | None = None) -> dict[str, float]:
    """Gives the chance of R@k by direction: that of k items, drawn without replacement, one is the query's own.

    Args:
        totals: how many images and texts are ranked; None: those that there are lists of.
    """
    images, texts = totals or (len(texts_of), len(images_of))
    chances = {}
    for direction, lists, total in (("text to image", images_of, images), ("image to text", texts_of, texts)):
        numbers, counts = np.unique([(each >= 0).sum() for each in lists], return_counts=True)
        for k in RECALL_AT:
            missed = [np.prod([max(total - own - i, 0) / max(total - i, 1) for i in range(k)]) for own in numbers]
            chances[f"{direction} R@{k}"] = float(1 - np.average(missed, weights=counts))
    return chances


def owned_by(owner: np.ndarray, images: int) -> tuple[Owned, Owned]:
    """Gives the texts of each image, and the image of each text."""
    order = np.argsort(owner, kind="stable")
    texts_of = np.split(order, np.searchsorted(owner[order], np.arange(1, images)))
    return texts_of, [np.array([image]) for image in owner]


def rerank_sides(sides: Sides, k: int, match: Callable[[np.ndarray], Tensor]) -> Sides:
    """Has the first k candidates of each query, by cosine, ordered by `match`; every pair is matched once.

    Args:
        match: (P, 2) numbers of image and text, in order -> (P,) scores.
    """
    texts_of_image = first(sides.images, sides.texts, k)
    images_of_text = first(sides.texts, sides.images, k)
    total = len(sides.texts)
    of_images = torch.arange(len(sides.images))[:, None] * total + texts_of_image
    of_texts = images_of_text * total + torch.arange(total)[:, None]
    numbers = torch.cat([of_images.flatten(), of_texts.flatten()]).unique()
    odds = match(torch.stack([numbers // total, numbers % total], dim=1).numpy())
    return sides._replace(
        texts_of_image=(texts_of_image, odds[torch.searchsorted(numbers, of_images)]),
        images_of_text=(images_of_text, odds[torch.searchsorted(numbers, of_texts)]),
    )


def first(queries: Tensor, items: Tensor, k: int) -> Tensor:
    """Gives (Q, k) the numbers of the items with the highest cosines."""
    k = min(k, len(items))
    queries, items = queries.nan_to_num(), items.double().nan_to_num()

    def compute(start: int, stop: int, prepared: None) -> dict[str, Tensor]:
        # (rounded: of equal cosines the first is taken, whatever the size of the batches)
        scores = (queries[start:stop].double() @ items.t() / TIES["cosine"]).round()
        return {"first": scores.sort(dim=1, descending=True, stable=True).indices[:, :k]}

    outputs = {"first": Output((k,))}
    return in_chunks("candidates", len(queries), QUERIES_AT_ONCE, outputs, compute, dtype=torch.int64)["first"]
