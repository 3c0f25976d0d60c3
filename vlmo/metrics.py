"""What is measured; states are summed over processes, so that values are weighted by counts."""

import torch
from torch import Tensor
from torchmetrics import Metric

IGNORE_INDEX = -100  # label of a position that does not count


class Mean(Metric):
    """Mean of values, each standing for `count` samples."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: sums over millions of samples stay exact to the digits that are printed
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor, count: Tensor | int = 1) -> None:
        """value: scalar mean over `count` samples; nothing is added where `count` is 0, whatever the value."""
        value = value.detach().double()
        if isinstance(count, int):  # (as a tensor it would have to be sent to the device)
            self.add(value * count if count else torch.zeros_like(value), count)
        else:
            self.add(torch.where(count > 0, value * count, 0.0), count)

    def add(self, total: Tensor, count: Tensor | int) -> None:
        """A sum over `count` samples: of whole numbers it is exact, in whatever batches they come."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Scalar float32; NaN if nothing was added."""
        return (self.total / self.count).float()

    def sums(self) -> Tensor:
        """(2,) float64: total and count so far, of this process alone."""
        return torch.stack([self.total, self.count])

    def restore(self, sums: Tensor, updates: int) -> None:
        """Goes on from `sums` (those of several processes add up) after as many updates (`update_count`)."""
        self.reset()
        self.total, self.count = sums.to(self.total)
        self._update_count = updates  # torchmetrics has no other way to say that there were updates


class Accuracy(Mean):
    """Share of predictions that hit the label; labels of -100 do not count."""

    def update(self, predicted: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """predicted: (N, classes) logits, or (N,) classes; labels: (N,)"""
        counted = labels != IGNORE_INDEX
        classes = predicted.argmax(-1) if predicted.ndim > labels.ndim else predicted
        self.add(((classes == labels) & counted).sum(), counted.sum())


class VQAScore(Mean):
    """VQA's soft accuracy: the score that the annotators' answers give to the predicted answer."""

    def update(self, logits: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """logits, targets: (N, answers); targets are the scores, 0 where an answer was not given."""
        scores = targets.gather(1, logits.argmax(-1, keepdim=True))
        self.add(scores.sum(dtype=torch.float64), len(scores))


def recall_at_k(ranks: Tensor, k: int) -> Tensor:
    """Share of queries whose best relevant item is among the first `k`.

    Args:
        ranks: (queries,) number of items that stand before the best relevant one.
    """
    return (ranks < k).double().mean().float()
