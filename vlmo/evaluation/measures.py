"""Figures with what one needs to judge them: chance, and an interval by bootstrap."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

RESAMPLES = 1000
COVERAGE = 95  # per cent of the resamples lie within the interval


class Measure(NamedTuple):
    """One figure.

    Attributes:
        part: of the data, such as a kind of question; "" for all.
        metric: its name.
        score: by which score of pairs; "" where there is no choice.
        value: a share in [0, 1].
        low, high: ends of the interval, equal to the value where there is none.
        chance: what guessing gives; nan where that is not known.
        number: of items.
    """

    part: str
    metric: str
    score: str
    value: float
    low: float
    high: float
    chance: float
    number: int


def mean_of(values: Tensor, metric: str, score: str = "", part: str = "", chance: float = float("nan")) -> Measure:
    """Makes the measure that is a mean over items.

    Args:
        values: (N,) of the items, in [0, 1].
    """
    found = values.double().numpy()
    mean = float(found.mean()) if len(found) else float("nan")
    return Measure(part, metric, score, mean, *interval(found), chance, len(found))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Gives the ends of the percentile interval of the mean of (N,) values, from resamples of the items.

    Where each is 0 or 1, the resamples' means are drawn as what they are: binomial.
    """
    if not len(values):
        return float("nan"), float("nan")
    return _percentiles(_resampled_means(values, np.random.default_rng(0)))


def macro_mean(
    values: Tensor, groups: list[str], metric: str, score: str, part: str = "", chance: float = float("nan")
) -> Measure:
    """Makes the measure that is the mean of the groups' means; resamples are drawn within each group."""
    found, names = values.double().numpy(), np.array(groups)
    parts = [found[names == name] for name in dict.fromkeys(groups)]
    draw = np.random.default_rng(0)
    low, high = _percentiles(np.mean([_resampled_means(each, draw) for each in parts], axis=0))
    return Measure(part, metric, score, float(np.mean([each.mean() for each in parts])), low, high, chance, len(found))


def _resampled_means(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    number = len(values)
    if np.isin(values, (0.0, 1.0)).all():
        return draw.binomial(number, values.mean(), RESAMPLES) / number
    return np.array([values[draw.integers(number, size=number)].mean() for _ in range(RESAMPLES)])


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    rest = (100 - COVERAGE) / 2
    low, high = np.percentile(means, [rest, 100 - rest])
    return float(low), float(high)
