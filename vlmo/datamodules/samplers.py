"""Which samples a process sees, in which order, with which seed."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


class ShuffleSampler(Sampler):
    """All samples in a new random order each epoch, dealt out to the processes: yields (sample number, seed).

    Order and seed follow from `seed` and the epoch alone, so a sample is augmented and masked alike whatever the number
    of processes, of workers, and of samples a batch. Each process gets every `world`-th sample of the order, and all
    get the same number: the rest, less than one a process, is left out (other samples each epoch).
    """

    batch = 1  # samples that a process takes at a time, where the order depends on it

    def __init__(self, length: int, seed: int, rank: int, world: int):
        """
        Args:
            length: number of samples.
            seed: of the run.
            rank, world: this process's number, and how many there are.
        """
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.epoch = 0
        self._seen = (0, 0, world, 1)  # see `skip`

    def skip(self, epoch: int, seen: int, world: int, batch: int) -> None:
        """Goes on in `epoch` after the first `seen` samples that all processes together were given.

        The processes, and the samples a batch, may be others than they were then: what is left is the same. Later
        epochs are whole again.

        Args:
            world, batch: numbers of processes, and of samples a process took at a time, then.
        """
        self.epoch = epoch
        self._seen = (epoch, seen, world, batch)

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
        for part in self._left(order, generator):
            for index in part[self.rank :: self.world].tolist():
                yield index, epoch_seed

    def _left(self, order: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """The parts of the epoch, without what has been seen before a resume."""
        epoch, seen, world, batch = self._seen
        seen = seen if self.epoch == epoch else 0
        if not seen or (world, batch) == (self.world, self.batch):
            for part in self._parts(order, self.world, self.batch, generator):
                yield part[seen:]
                seen = max(seen - len(part), 0)
            return
        is_left = torch.ones(self.length, dtype=torch.bool)
        then = torch.Generator()
        then.set_state(generator.get_state())
        for part in self._parts(order, world, batch, then):
            is_left[part[:seen].long()] = False
            seen = max(seen - len(part), 0)
        yield from self._parts(order[is_left[order.long()]], self.world, self.batch, generator)

    def _parts(self, order: Tensor, world: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The order (of all processes) in pieces, each a multiple of `world` long; what does not divide is left out."""
        yield from order[: len(order) // world * world].split(8192 * world)


class LengthGroupedSampler(ShuffleSampler):
    """A `ShuffleSampler` whose batches hold texts of similar length, so that little is padded.

    The random order is cut into stretches of 100 batches (of all processes together); within a stretch the samples are
    sorted by length, cut into batches, and the batches shuffled. So a batch is drawn from 100 batches' worth of random
    samples, all processes meet texts of the same length at the same step, and what an epoch leaves out stays random.
    """

    STRETCH = 100  # batches

    def __init__(
        self, length: int, seed: int, rank: int, world: int, batch: int, lengths: Callable[[np.ndarray], np.ndarray]
    ):
        """
        Args:
            length, seed, rank, world: as of `ShuffleSampler`.
            batch: samples a process takes at a time.
            lengths: the lengths of the texts with given sample numbers, in any unit; asked for a stretch at a time.
        """
        super().__init__(length, seed, rank, world)
        self.lengths = lengths
        self.batch = batch

    def _parts(self, order: Tensor, world: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        order, size = order[: len(order) // world * world], batch * world
        full = len(order) // size * size
        for stretch in order[:full].split(self.STRETCH * size):
            lengths = torch.from_numpy(self.lengths(stretch.numpy()))
            batches = stretch[lengths.argsort(stable=True)].view(-1, size)
            yield batches[torch.randperm(len(batches), generator=generator)].flatten()
        yield order[full:]


def eval_batches(length: int, batch_size: int, rank: int, world: int) -> list[range]:
    """This process's batches of an evaluation: every sample exactly once over all processes, in order.

    Batches are dealt out whole. So a batch holds the same samples, and the same padding, whatever the number of
    processes, and what is computed of it is equal to the last bit. All processes get as many, the last of some empty,
    because under FSDP every step needs all processes; at least one, because a loader without any leaves the evaluation.
    """
    starts = range(0, length, batch_size)
    batches = [range(start, min(start + batch_size, length)) for start in starts[rank::world]]
    return batches + [range(0)] * (max(-(-len(starts) // world), 1) - len(batches))
