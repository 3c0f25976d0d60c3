"""Means are weighted by the items behind them."""

import math

import pytest
import torch

from vlmo.evaluation.retrieval import recall_at_k
from vlmo.tasks.base import TaskOutput, accuracy, mean
from vlmo.tasks.itc import ITC
from vlmo.tasks.vqa import soft_accuracy
from vlmo.training.metrics import Metrics, Ratio

NAN = torch.tensor(math.nan)


def value(ratio):
    total, count = ratio.sums()
    return (total / count).item()


def test_mean_is_weighted_by_counts():
    ratio = Ratio()
    ratio.update(mean(torch.tensor(1.0), 30))
    ratio.update(mean(torch.tensor(4.0), torch.tensor(10)))
    assert value(ratio) == pytest.approx(1.75)
    ratio.reset()
    ratio.update(mean(torch.tensor(2.0), 1))
    assert value(ratio) == 2


def test_mean_over_nothing():
    ratio = Ratio()
    ratio.update(mean(NAN, 0))  # the mean over no sample is nan and must not spoil the rest
    ratio.update(mean(NAN, torch.tensor(0)))
    assert math.isnan(value(ratio))
    ratio.update(mean(torch.tensor(3.0), 2))
    assert value(ratio) == 3


def test_mean_of_millions_keeps_its_digits():
    ratio = Ratio()
    for _ in range(1000):
        ratio.update(mean(torch.tensor(1.0), 100_000))
    ratio.update(mean(torch.tensor(2.0), 1))
    assert ratio.sums()[0].item() - 1e8 == 2


def test_gradients_are_let_go():
    ratio = Ratio()
    ratio.update(mean((torch.ones(2, requires_grad=True) * 3).mean(), 2))
    assert not ratio.sums().requires_grad


def test_restored_sums_go_on():
    ratio, other = Ratio(), Ratio()
    ratio.update(mean(torch.tensor(2.0), 3))
    other.restore(ratio.sums(), ratio.update_count)
    other.update(mean(torch.tensor(6.0), 1))
    assert value(other) == 3 and other.update_count == 2


def test_accuracy_leaves_out_unlabelled_positions():
    ratio = Ratio()
    logits = torch.eye(3)[[0, 1, 2, 0, 0]]  # predicts 0, 1, 2, 0, 0
    ratio.update(accuracy(logits, torch.tensor([0, 1, 1, -100, -100])))
    assert value(ratio) == pytest.approx(2 / 3)
    ratio.update(accuracy(logits[:1], torch.tensor([-100])))
    ratio.update(accuracy(logits[:0], torch.zeros(0, dtype=torch.long)))
    assert value(ratio) == pytest.approx(2 / 3)
    ratio.update(accuracy(logits[:1].argmax(-1), torch.tensor([0])))
    assert value(ratio) == pytest.approx(3 / 4)


def test_soft_accuracy_is_the_score_of_the_predicted_answer():
    ratio = Ratio()
    targets = torch.tensor([[0.3, 1.0, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.0]])
    logits = torch.tensor([[5.0, 1.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    ratio.update(soft_accuracy(logits, targets))
    assert value(ratio) == pytest.approx(1.3 / 3)
    ratio.update(soft_accuracy(logits[1:2], targets[1:2]))
    assert value(ratio) == pytest.approx(2.3 / 4)


def test_a_step_and_its_epoch_are_measured_apart():
    metrics, device = Metrics([ITC(shared_ffn=False)]), torch.device("cpu")
    for loss in (1.0, 3.0):
        metrics.update("train", {"itc": TaskOutput(torch.zeros(()), measured={"loss": mean(torch.tensor(loss), 2)})})
        assert metrics.compute_step(device) == {("itc", "loss"): loss}
    assert metrics.compute_step(device) == {}
    assert metrics.compute_epoch("train", device) == {("itc", "loss"): 2.0}
    assert metrics.compute_epoch("train", device) == metrics.compute_epoch("val", device) == {}


def test_recall():
    ranks = torch.tensor([0, 0, 1, 4, 5, 10])
    assert [recall_at_k(ranks, k).item() for k in (1, 5, 10)] == pytest.approx([2 / 6, 4 / 6, 5 / 6])
