"""Re-ranking against one pair at a time."""

from contextlib import nullcontext
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from vlmo.evaluation import reranking, retrieval
from vlmo.evaluation.reranking import RerankBy, candidates, cosines, match_scores, pair_numbers, reranked, rows_of_pairs
from vlmo.evaluation.retrieval import Encoded, best_ranks

IMAGES, TEXTS_EACH = 5, 3


class Matcher:
    """Stands for the model: the log-odds of a pair are read from a table by the numbers in it."""

    device = torch.device("cpu")

    def __init__(self, odds: torch.Tensor, no_match: float = 0.0) -> None:
        self.odds, self.no_match = odds, no_match
        self.pairs: list[tuple[int, int]] = []

    def infer(self, batch):
        self.pairs += list(zip(batch["image"].tolist(), batch["text"].tolist(), strict=True))
        return {"cls_feats": self.odds[batch["text"], batch["image"]]}

    def itm_score(self, odds):
        return torch.stack([odds.new_full(odds.shape, self.no_match), self.no_match + odds], dim=1)


def loader_of(images, texts):
    pairs = {"image": torch.from_numpy(images), "text": torch.from_numpy(texts), "raw_index": torch.arange(len(images))}
    return [{name: values[start : start + 4] for name, values in pairs.items()} for start in range(0, len(images), 4)]


@pytest.fixture
def sides():
    """Images whose numbers have gaps (one could not be read), and texts of all of them."""
    draw = torch.Generator().manual_seed(3)
    number = torch.tensor([0, 1, 2, 4])
    images = Encoded(F.normalize(torch.randn(4, 3, generator=draw)), number, number)
    owner = torch.arange(IMAGES).repeat_interleave(TEXTS_EACH)
    texts = Encoded(F.normalize(torch.randn(15, 3, generator=draw)), torch.arange(15), owner)
    return images, texts


def one_by_one(queries, items, odds, k):
    """odds: (queries, items)."""
    ranks = []
    for query, owner, row in zip(queries.features, queries.owner, odds, strict=True):
        scores = (items.features @ query).tolist()
        order = sorted(range(len(scores)), key=lambda item: -scores[item])
        first = sorted(order[:k], key=lambda item: -row[item])
        own = [place for place, item in enumerate(first + order[k:]) if items.owner[item] == owner]
        ranks.append(own[0] if own else torch.iinfo(torch.int64).max)
    return ranks


@pytest.mark.parametrize("by", get_args(RerankBy))
@pytest.mark.parametrize("k", [1, 2, 3, 40])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_ranks_of_the_ordered_candidates(sides, monkeypatch, k, chunk, by):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    monkeypatch.setattr(reranking, "PAIRS_AT_ONCE", chunk)
    images, texts = sides
    odds = torch.randn(15, IMAGES, generator=torch.Generator().manual_seed(1))
    model = Matcher(odds, no_match=0.5)
    ranks = best_ranks(texts, images), best_ranks(images, texts)
    image_ranks, text_ranks = reranked(model, images, texts, ranks, k, loader_of, by=by)
    scores = odds[:, images.number]
    if by == "published":
        scores = scores + texts.features @ images.features.t()
    assert image_ranks.tolist() == one_by_one(texts, images, scores, k)
    assert text_ranks.tolist() == one_by_one(images, texts, scores.t(), k)
    assert len(set(model.pairs)) == len(model.pairs)  # each once, although both sides may want it
    assert model.pairs == sorted(model.pairs)  # by image
    assert 3 not in {image for image, _ in model.pairs}


def test_the_cosine_decides_between_pairs_that_match_alike_as_published(sides):
    images, texts = sides
    ranks = best_ranks(texts, images), best_ranks(images, texts)
    alike = Matcher(torch.full((15, IMAGES), 0.5))
    as_published = reranked(alike, images, texts, ranks, 3, loader_of, by="published")
    assert all(torch.equal(after, before) for before, after in zip(ranks, as_published, strict=True))


def test_a_pair_as_one_number():
    images, texts = torch.tensor([0, 2, 1, -1]), torch.tensor([4, 0, 4, 3])
    numbers = pair_numbers(images, texts, num_texts=5)
    assert numbers.tolist() == [4, 10, 9, -1]
    for found, expected in zip(rows_of_pairs(numbers[:3], 5), (images, texts), strict=True):
        assert torch.equal(found, expected[:3])


def test_cosines_of_pairs(sides, monkeypatch):
    monkeypatch.setattr(reranking, "PAIRS_AT_ONCE", 2)
    images, texts = sides
    image_rows, text_rows = torch.tensor([3, 0, 0]), torch.tensor([14, 2, 0])
    expected = (images.features @ texts.features.t())[image_rows, text_rows]
    assert torch.allclose(cosines(images, texts, image_rows, text_rows), expected)
    assert not len(cosines(images, texts, image_rows[:0], text_rows[:0]))


def test_where_all_match_alike_nothing_is_found(sides):
    images, texts = sides
    ranks = best_ranks(texts, images), best_ranks(images, texts)
    found = reranked(Matcher(torch.full((15, IMAGES), 0.5)), images, texts, ranks, 3, loader_of, by="match")
    for before, after in zip(ranks, found, strict=True):
        assert after.min() >= 0 and not (after[before >= 3] < 3).any()
        assert (after >= torch.minimum(before, torch.tensor(0))).all()
    assert found[0][:3].tolist() == [2 if rank < 3 else rank for rank in ranks[0][:3].tolist()]


def test_candidates_are_the_first(sides):
    images, texts = sides
    scores = texts.features @ images.features.t()
    found = candidates(texts, images, 2)
    assert torch.equal(found[:, :2], scores.topk(2).indices)
    assert (found[:, 2:] == -1).all()
    assert candidates(texts, images, 99).sort().values.tolist() == [[0, 1, 2, 3]] * 15


def test_what_ties_with_the_last_candidate_is_one_too():
    owner = torch.arange(6)
    query = Encoded(torch.eye(3)[:1], owner[:1], owner[:1])
    items = Encoded(
        torch.tensor([[0.3, 1, 0], [0.5, 0, 0], [0.3 + 2e-7, 0, 0], [0.9, 0, 0], [0.2, 0, 0], [0.3, 0, 1]]),
        owner,
        owner,
    )
    assert candidates(query, items, 3)[0].sort().values.tolist() == [-1, 0, 1, 2, 3, 5]
    assert candidates(query, items, 2)[0].tolist() == [3, 1, -1, -1]
    alike = items._replace(features=torch.ones(6, 3))
    assert (candidates(query, alike, 2) >= 0).sum() == 4


@pytest.mark.parametrize("by", get_args(RerankBy))
def test_scores_are_those_of_the_head(by):
    model = tiny.model("task_mlm_itm_itc_base")
    batch = tiny.batch()
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
    loader = [
        part | {"raw_index": numbers} for part, numbers in zip(parts, torch.tensor([3, 0, 1]).split(2), strict=True)
    ]
    entered = []
    scores = match_scores(model, loader, 4, lambda: entered.append(1) or nullcontext(), by)
    logits = model.itm_score(model.infer(batch)["cls_feats"])
    if by == "match":
        assert torch.allclose(scores[[3, 0, 1]].sigmoid(), logits.softmax(dim=1)[:, 1], atol=1e-5)
    else:
        assert torch.allclose(scores[[3, 0, 1]], logits[:, 1], atol=1e-5)
    assert scores[2] == 0  # another process's
    assert len(entered) == 2
