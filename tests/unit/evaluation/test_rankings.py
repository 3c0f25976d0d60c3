"""Statistics of rankings against the package eccv-caption, against full lists, and against `retrieval.py`."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlmo.evaluation import rankings
from vlmo.evaluation.measures import interval, macro_mean, mean_of
from vlmo.evaluation.rankings import (
    MISSED,
    OF_LISTS,
    RECALLS,
    Sides,
    average_precision_at_r,
    both_ways,
    owned_by,
    per_query,
    precision_at_r,
    ranks_of_own,
    recall,
    recall_chances,
    rerank_sides,
)
from vlmo.evaluation.retrieval import Encoded, best_ranks, recalls

IMAGES, TEXTS = 30, 90


def sides(seed=0, width=6):
    draw = torch.Generator().manual_seed(seed)
    images, texts = (F.normalize(torch.randn(number, width, generator=draw), dim=1) for number in (IMAGES, TEXTS))
    owner = torch.randint(IMAGES, (TEXTS,), generator=draw).sort().values.numpy()
    owner[:IMAGES] = np.arange(IMAGES)  # none without a text
    return Sides(images, texts), np.sort(owner)


def some_truth(seed=0):
    """For each image some texts, for each text some images, as ECCV Caption has beyond the pairs."""
    draw = np.random.default_rng(seed)
    fits = draw.random((IMAGES, TEXTS)) < 0.1
    fits[np.arange(TEXTS) % IMAGES, np.arange(TEXTS)] = True
    return [np.flatnonzero(row) for row in fits], [np.flatnonzero(column) for column in fits.T]


def lists(queries, items):
    return {
        q: (queries[q].double() @ items.double().t()).argsort(descending=True).tolist() for q in range(len(queries))
    }


@pytest.mark.parametrize("few", [0, 20])
@pytest.mark.parametrize("seed", range(3))
def test_the_figures_of_eccv_caption(seed, few, monkeypatch):
    """Its own code is the oracle."""
    monkeypatch.setattr(rankings, "FEW", few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("eccv_caption._metrics")
    found, _ = sides(seed)
    texts_of, images_of = some_truth(seed)
    ours = both_ways(found, texts_of, images_of, {**OF_LISTS, **RECALLS})
    for direction, queries, items, owned in (
        ("image to text", found.images, found.texts, texts_of),
        ("text to image", found.texts, found.images, images_of),
    ):
        ranked, truth = lists(queries, items), {number: own.tolist() for number, own in enumerate(owned)}
        expected = theirs.compute_eccv_metrics(ranked, truth)
        for name, their_name in (("mAP@R", "map_at_r"), ("R-Precision", "rprecision"), ("R@1", "r1")):
            assert float(ours[direction][name].mean()) == pytest.approx(expected[f"eccv_{their_name}"], abs=1e-9)
        for k in (1, 5, 10):
            assert float(ours[direction][f"R@{k}"].mean()) == pytest.approx(theirs.compute_r_at_k(ranked, truth, k))


def test_worked_out_by_hand():
    """Own items at ranks 0, 2 and 5 of three: R@1 1, R-Precision 2/3, mAP@R (1/1 + 2/3)/3."""
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    own = torch.tensor([[True, False, True, False, False, True]])
    ranks, number = ranks_of_own(scores, own, 1e-6), torch.tensor([3])
    assert ranks.tolist() == [[0, 2, 5]]
    assert float(recall(ranks, 1)) == 1
    assert float(precision_at_r(ranks, number)) == pytest.approx(2 / 3)
    assert float(average_precision_at_r(ranks, number)) == pytest.approx((1 + 2 / 3) / 3)


def test_ties_count_against_the_query():
    own = torch.tensor([[True, False, False]])
    assert ranks_of_own(torch.tensor([[0.5, 0.5 + 2e-7, 0.3]]), own, 1e-6).tolist() == [[1]]
    assert ranks_of_own(torch.zeros(1, 3), own, 1e-6).tolist() == [[2]]
    assert ranks_of_own(torch.full((1, 3), torch.nan), own, 1e-6).tolist() == [[MISSED]]


@pytest.mark.parametrize("chunk", [7, 1000])
def test_recalls_are_those_of_test_runs(monkeypatch, chunk):
    monkeypatch.setattr(rankings, "QUERIES_AT_ONCE", chunk)
    found, owner = sides()
    texts_of, images_of = owned_by(owner, IMAGES)
    ours = both_ways(found, texts_of, images_of, RECALLS)
    images = Encoded(found.images, torch.arange(IMAGES), torch.arange(IMAGES))
    texts = Encoded(found.texts, torch.arange(TEXTS), torch.from_numpy(owner))
    expected = recalls(best_ranks(texts, images), best_ranks(images, texts))
    for k in (1, 5, 10):
        assert float(ours["text to image"][f"R@{k}"].mean()) == pytest.approx(expected[f"ir_r{k}"], abs=1e-6)
        assert float(ours["image to text"][f"R@{k}"].mean()) == pytest.approx(expected[f"tr_r{k}"], abs=1e-6)


def test_what_cannot_be_decoded_is_not_found():
    found, owner = sides()
    found.images[3] = torch.nan
    texts_of, images_of = owned_by(owner, IMAGES)
    ours = both_ways(found, texts_of, images_of, RECALLS)
    assert ours["image to text"]["R@10"][3] == 0
    assert (ours["text to image"]["R@10"][torch.from_numpy(owner == 3)] == 0).all()


def test_reranking_orders_the_first_candidates_alone():
    found, owner = sides()
    texts_of, images_of = owned_by(owner, IMAGES)
    asked = []

    def match(pairs):
        asked.append(pairs)
        return torch.from_numpy((owner[pairs[:, 1]] == pairs[:, 0]).astype(float))  # it knows

    ranked = both_ways(rerank_sides(found, 5, match), texts_of, images_of, RECALLS)
    plain = both_ways(found, texts_of, images_of, RECALLS)
    for direction in plain:  # whatever was among the first five is now the first; the rest stays
        assert torch.equal(ranked[direction]["R@1"], plain[direction]["R@5"])
        assert torch.equal(ranked[direction]["R@10"], plain[direction]["R@10"])
    (pairs,) = asked
    assert (
        len(np.unique(pairs, axis=0)) == len(pairs)
        and (np.lexsort((pairs[:, 1], pairs[:, 0])) == np.arange(len(pairs))).all()
    )


def test_chance_is_what_features_of_nothing_give():
    draw = torch.Generator().manual_seed(1)
    texts_of, images_of = some_truth()
    chances = recall_chances(texts_of, images_of)
    means = []
    for _ in range(60):
        features = F.normalize(torch.randn(IMAGES + TEXTS, 64, generator=draw), dim=1)
        means.append(per_query(features[:IMAGES], features[IMAGES:], texts_of, RECALLS)["R@5"].mean())
    assert chances["image to text R@5"] == pytest.approx(float(torch.stack(means).mean()), abs=0.03)
    assert recall_chances([np.arange(1)] * 4, [np.arange(1)] * 4)["text to image R@1"] == 0.25


def test_intervals():
    values = torch.tensor([1.0] * 30 + [0.0] * 70)
    made = mean_of(values, "accuracy")
    assert made.value == pytest.approx(0.3) and made.low == pytest.approx(0.21, abs=0.02)
    assert made.high == pytest.approx(0.39, abs=0.02)
    low, high = interval(np.linspace(0, 1, 100))
    assert low == pytest.approx(0.445, abs=0.015) and high == pytest.approx(0.555, abs=0.015)
    macro = macro_mean(torch.tensor([1.0, 1, 1, 0]), ["a", "a", "a", "b"], "accuracy", "")
    assert macro.value == 0.5
    assert mean_of(torch.ones(5), "accuracy")[4:6] == (1, 1)
