"""The order of an epoch where reading here and there is expensive: shuffled by pieces, and within windows of them."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

PIECES = 8  # of a window, at least


class WindowedOrder:
    """Draws the order of the samples of several parts together.

    A part that is cut into pieces is read piece by piece in a random order, and its samples are shuffled within windows
    of consecutive pieces: so a window's worth of data is in use at a time, read from one end of each piece to the
    other. The other parts are shuffled as a whole. The parts are mixed at random, as if all had been shuffled together.
    """

    def __init__(self, parts: Sequence[np.ndarray], window: int) -> None:
        """
        Args:
            parts: of each, where its pieces begin, and its length at the end; [0, length] is shuffled as a whole.
            window: samples.
        """
        self.parts, self.window = parts, window

    @property
    def fingerprint(self) -> int:
        """Another number for another order."""
        return zlib.crc32(repr([self.window, [part.tolist() for part in self.parts]]).encode())

    def __call__(self, generator: Generator) -> Tensor:
        """(samples,) int32 sample numbers of an epoch."""
        firsts = np.cumsum([0] + [int(part[-1]) for part in self.parts])
        orders = [self.of_part(number, generator) + int(first) for number, first in enumerate(firsts[:-1])]
        return orders[0] if len(orders) == 1 else mixed(orders, generator)

    def of_part(self, number: int, generator: Generator) -> Tensor:
        """(samples of the part,) int32, numbered from 0."""
        starts = self.parts[number]
        length = int(starts[-1])
        if len(starts) <= 2:
            return torch.randperm(length, generator=generator, dtype=torch.int32)
        pieces = torch.randperm(len(starts) - 1, generator=generator).numpy()
        sizes = np.diff(starts)[pieces]
        # each sample's place in its piece, and where that piece begins
        places = np.arange(length) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        samples = torch.from_numpy((np.repeat(starts[:-1][pieces], sizes) + places).astype(np.int32))
        for window in samples.split(self.window):
            window.copy_(window[torch.randperm(len(window), generator=generator)])
        return samples


def mixed(orders: Sequence[Tensor], generator: Generator) -> Tensor:
    """Mixes orders at random; the samples of each stay in theirs."""
    # which order each sample is of: equally likely in every way
    of = torch.repeat_interleave(torch.tensor([len(order) for order in orders]))
    of = of[torch.randperm(len(of), generator=generator)]
    samples = torch.empty(len(of), dtype=torch.int64 if any(o.dtype == torch.int64 for o in orders) else torch.int32)
    for number, order in enumerate(orders):
        samples[of == number] = order.to(samples.dtype)
    return samples
