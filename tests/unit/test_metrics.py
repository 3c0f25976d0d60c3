"""Means are weighted by the samples behind them."""

import math

import pytest
import torch

from vlmo.metrics import Accuracy, Mean, VQAScore, recall_at_k

NAN = torch.tensor(math.nan)


def test_mean_is_weighted_by_counts():
    mean = Mean()
    mean.update(torch.tensor(1.0), 30)
    mean.update(torch.tensor(4.0), torch.tensor(10))
    assert mean.compute().item() == pytest.approx(1.75)
    mean.reset()
    mean.update(torch.tensor(2.0))
    assert mean.compute().item() == 2


def test_mean_over_nothing():
    mean = Mean()
    mean.update(NAN, 0)  # the mean over no sample is nan and must not spoil the rest
    mean.update(torch.tensor(3.0), 2)
    assert mean.compute().item() == 3
    mean.reset()
    mean.update(NAN, 0)
    assert math.isnan(mean.compute())


def test_mean_of_millions_keeps_its_digits():
    mean = Mean()
    for _ in range(1000):
        mean.update(torch.tensor(1.0), 100_000)
    mean.update(torch.tensor(2.0), 1)
    assert mean.total.item() - 1e8 == 2


def test_a_call_gives_the_value_of_the_batch_and_keeps_the_sum():
    mean = Mean()
    assert mean(torch.tensor(1.0), 1) == 1
    assert mean(torch.tensor(5.0), 3) == 5
    assert mean.compute() == 4


def test_gradients_are_let_go():
    loss = (torch.ones(2, requires_grad=True) * 3).mean()
    mean = Mean()
    mean.update(loss, 2)
    assert not mean.total.requires_grad


def test_accuracy_leaves_out_unlabelled_positions():
    accuracy = Accuracy()
    logits = torch.eye(3)[[0, 1, 2, 0, 0]]  # predicts 0, 1, 2, 0, 0
    accuracy.update(logits, torch.tensor([0, 1, 1, -100, -100]))
    assert accuracy.compute().item() == pytest.approx(2 / 3)
    accuracy.update(logits[:1], torch.tensor([-100]))
    accuracy.update(logits[:0], torch.zeros(0, dtype=torch.long))
    assert accuracy.compute().item() == pytest.approx(2 / 3)
    accuracy.update(logits[:1], torch.tensor([0]))
    assert accuracy.compute().item() == pytest.approx(3 / 4)


def test_vqa_score_is_that_of_the_predicted_answer():
    score = VQAScore()
    targets = torch.tensor([[0.3, 1.0, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.0]])
    logits = torch.tensor([[5.0, 1.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    score.update(logits, targets)
    assert score.compute().item() == pytest.approx(1.3 / 3)
    score.update(logits[1:2], targets[1:2])
    assert score.compute().item() == pytest.approx(2.3 / 4)


def test_recall():
    ranks = torch.tensor([0, 0, 1, 4, 5, 10])
    assert [recall_at_k(ranks, k).item() for k in (1, 5, 10)] == pytest.approx([2 / 6, 4 / 6, 5 / 6])
