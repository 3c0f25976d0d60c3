"""Ranks and recalls against the full matrix of scores."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from vlmo.evaluation import retrieval
from vlmo.evaluation.retrieval import Encoded, best_ranks, encode, num_ahead, recalls


def brute_force_ranks(queries, items, query_owner, item_owner):
    """One query, one item at a time: how many strangers score at least as high as the best relative."""
    ranks = []
    for query, owner in zip(queries, query_owner, strict=True):
        scores = [float(query @ item) for item in items]
        own = [score for score, other in zip(scores, item_owner, strict=True) if other == owner]
        strangers = [score for score, other in zip(scores, item_owner, strict=True) if other != owner]
        ranks.append(sum(score >= max(own) for score in strangers))
    return ranks


def world(images=7, texts_each=3, levels=None, seed=0):
    """Features of images and of their captions in a mixed order; coarse `levels` make ties."""
    draw = torch.Generator().manual_seed(seed)
    image_owner = torch.randperm(images, generator=draw)
    text_owner = torch.arange(images).repeat_interleave(texts_each)
    text_owner = text_owner[torch.randperm(len(text_owner), generator=draw)]
    features = [torch.randn(len(owner), 4, generator=draw) for owner in (image_owner, text_owner)]
    if levels:
        features = [(feature * levels).round() / levels for feature in features]
    return features[0], image_owner, features[1], text_owner


def side(features, owner):
    return Encoded(features, torch.arange(len(owner)), owner)


def sides(**options):
    images, image_owner, texts, text_owner = world(**options)
    return side(images, image_owner), side(texts, text_owner)


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_ranks_of_the_full_matrix(monkeypatch, levels, chunk):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    for seed in range(3):
        images, texts = sides(levels=levels, seed=seed)
        for queries, items in ((texts, images), (images, texts)):
            expected = brute_force_ranks(queries.features, items.features, queries.owner, items.owner)
            assert best_ranks(queries, items).tolist() == expected


def test_scores_that_only_rounding_tells_apart_are_equal():
    scores = torch.tensor(
        [[0.5, 0.5 + 2e-7, 0.3], [0.5, 0.5 - 2e-7, 0.3], [0.5, 0.5 + 2e-6, 0.3], [0.5, 0.5 - 2e-6, 0]]
    )
    own = torch.tensor([[True, False, False]] * 4)
    assert num_ahead(scores, own, retrieval.TIE).tolist() == [1, 1, 1, 0]


def both(images, texts):
    return recalls(best_ranks(texts, images), best_ranks(images, texts))


def test_recalls_of_the_full_matrix():
    images, texts = sides(images=12, texts_each=2)
    found = both(images, texts)
    image_ranks = brute_force_ranks(texts.features, images.features, texts.owner, images.owner)
    text_ranks = brute_force_ranks(images.features, texts.features, images.owner, texts.owner)
    for k in (1, 5, 10):
        assert found[f"ir_r{k}"] == pytest.approx(sum(rank < k for rank in image_ranks) / 24)
        assert found[f"tr_r{k}"] == pytest.approx(sum(rank < k for rank in text_ranks) / 12)
    assert len(found) == 6


def test_perfect_features_find_everything():
    images, owner = torch.eye(12), torch.arange(12)
    assert set(both(side(images, owner), side(images.repeat(3, 1), owner.repeat(3))).values()) == {1.0}


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_features_that_are_all_alike_find_nothing(value):
    _, image_owner, _, text_owner = world(images=12)
    images, texts = side(torch.full((12, 4), value), image_owner), side(torch.full((36, 4), value), text_owner)
    assert set(both(images, texts).values()) == {0.0}


def test_any_caption_of_the_image_will_do():
    images, texts = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.9], [0.0, 0.8]])
    assert best_ranks(side(images, torch.arange(2)), side(texts, torch.tensor([0, 0, 1, 1]))).tolist() == [0, 1]


def test_texts_whose_image_could_not_be_read_are_not_found():
    images, texts = side(torch.eye(3)[:2], torch.arange(2)), side(torch.eye(3), torch.arange(3))
    ranks = best_ranks(texts, images)
    assert ranks[:2].tolist() == [0, 0]
    assert ranks[2] >= 10  # also where there are fewer images than that
    assert [both(images, texts)[f"ir_r{k}"] for k in (1, 5, 10)] == pytest.approx([2 / 3] * 3)


@pytest.mark.parametrize("side", ["image", "text"])
def test_features_are_those_of_the_dual_encoder(side, caplog):
    model = tiny.model("task_finetune_irtr_coco_base_image384")
    batch = tiny.batch() | {"raw_index": torch.tensor([9, 8, 10]), "img_index": torch.tensor([4, 4, 7]), "skipped": []}
    first = {name: value[:2] for name, value in batch.items()}
    last = {name: value[2:] for name, value in batch.items()}
    loader = [first, {"skipped": ["one that cannot be read"]}, last]
    entered = []

    def autocast():
        entered.append(1)
        return nullcontext()

    features, number, owner, skipped = encode(model, loader, side, autocast)
    infer = model.infer_image if side == "image" else model.infer_text
    assert torch.allclose(features, infer(batch)["cls_feats"][[1, 0, 2]], atol=1e-5)  # in the order of the numbers
    assert torch.allclose(features, F.normalize(features), atol=1e-6)
    assert (number.tolist(), owner.tolist()) == ([8, 9, 10], [4, 4, 7])
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert (len(entered), skipped) == (2, 1)
    assert "1 images cannot be decoded: their texts count as not found" in caplog.text
