"""Which samples a process sees, in which order, with which seed."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class ShuffleSampler(Sampler):
    """All samples in a new random order each epoch, dealt out to the processes: yields (sample number, seed).

    Order and seed follow from `seed` and the epoch alone, so a sample is augmented and masked alike whatever the number
    of processes, of workers, and of samples a batch. Each process gets every `world`-th sample of the order, and all
    get the same number: the rest, less than one a process, is left out (other samples each epoch).
    """

    def __init__(self, length: int, seed: int, rank: int, world: int):
        """
        Args:
            length: number of samples.
            seed: of the run.
            rank, world: this process's number, and how many there are.
        """
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        epoch_seed = int(torch.randint(2**62, (), generator=generator))
        # 4 bytes a sample (600 MB for the 150 million texts of stage 2), and no Python list of that length
        order = torch.randperm(self.length, generator=generator, dtype=torch.int32)
        for part in order[self.rank : len(self) * self.world : self.world].split(8192):
            for index in part.tolist():
                yield index, epoch_seed


def even_batches(length: int, rank: int, world: int, size: int) -> list[range]:
    """The samples of `eval_sampler` in batches of `size`, on every process as many; the last of some may be empty."""
    samples = eval_sampler(length, rank, world)
    return [samples[first : first + size] for first in range(0, len(eval_sampler(length, 0, world)), size)]


def eval_sampler(length: int, rank: int, world: int) -> range:
    """Every sample exactly once over all processes, in order; so processes may differ by one sample."""
    return range(rank, length, world)
