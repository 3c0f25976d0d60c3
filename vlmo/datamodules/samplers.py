"""Which samples a process sees, in which order, with which seed."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from vlmo.datamodules.windows import WindowedOrder, mixed

EVALUATION_ORDER = 0  # seed of the order of evaluation: not the run's, so that runs can be compared
PART = 8192  # samples of a process that are made a Python list at a time


PERMUTED = 1  # tells the seeds of a data set's permutations from those of epochs


class Share(NamedTuple):
    """How many samples of a data set an epoch draws.

    The epochs go round the set without a gap: one begins where the one before ended. Each round is in another random
    order, so that every sample has been drawn before any is drawn once more.

    Attributes:
        length: samples of the set.
        number: that an epoch draws.
    """

    length: int
    number: int

    @classmethod
    def of(cls, length: int, weight: float) -> "Share":
        """Draws each sample `weight` times an epoch, on average; the number is rounded up."""
        return cls(length, ceil(length * Fraction(str(weight))))

    def draw(
        self, epoch: int, seed: Sequence[int], order: Callable[[torch.Generator], Tensor] | None = None
    ) -> list[Tensor]:
        """The samples of an epoch, int32, round by round: those of an epoch's second round have been in it before.

        Args:
            order: of a round, drawn from a generator; None: any is equally likely, and a whole round is not shuffled.
        """
        rounds, start, left = [], epoch * self.number, self.number
        while left:
            number, at = divmod(start, self.length)
            samples = torch.arange(self.length, dtype=torch.int32)
            if order or at or left < self.length:
                state = np.random.SeedSequence([*seed, number, PERMUTED]).generate_state(1, np.uint64)
                generator = torch.Generator().manual_seed(int(state[0]))
                if order:
                    samples = order(generator)[at : at + left]
                else:
                    samples = torch.randperm(self.length, generator=generator, dtype=torch.int32)[at : at + left]
            rounds.append(samples)
            start, left = start + len(samples), left - len(samples)
        return rounds


class EpochOrder(NamedTuple):
    """The random order of an epoch, that of all processes together.

    Attributes:
        samples: (drawn,) int32 sample numbers: 600 MB for the 150 million texts of stage 2. A sample that is drawn
            again in the epoch has its number plus a multiple of the number of samples.
        sample_seed: with its number, what a sample's augmentation and masking follow from.
        state: of the generator, for what else is random in the epoch.
    """

    samples: Tensor
    sample_seed: int
    state: Tensor


def epoch_order(
    length: int,
    seed: int,
    epoch: int,
    shares: Sequence[Share] = (),
    windows: WindowedOrder | None = None,
) -> EpochOrder:
    """Draws the order of an epoch, which follows from these numbers alone.

    Args:
        length: number of samples.
        seed: of the run.
        shares: of the data sets, whose lengths add up to `length`; none: every sample once.
        windows: what the order is drawn by; None: any order is equally likely.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    sample_seed = int(torch.randint(2**62, (), generator=generator))
    if not shares:
        samples = windows(generator) if windows else torch.randperm(length, generator=generator, dtype=torch.int32)
        return EpochOrder(samples, sample_seed, generator.get_state())
    drawn, first = [], 0
    for number, share in enumerate(shares):
        rounds = share.draw(epoch, [seed, number], partial(windows.of_part, number) if windows else None)
        fits = length * (len(rounds) + 1) < 2**31
        number_type = torch.int32 if fits else torch.int64
        drawn.append(torch.cat([part.to(number_type) + (first + k * length) for k, part in enumerate(rounds)]))
        first += share.length
    if windows:
        return EpochOrder(mixed(drawn, generator), sample_seed, generator.get_state())
    samples = torch.cat(drawn)
    samples = samples[torch.randperm(len(samples), generator=generator, dtype=torch.int32)]
    return EpochOrder(samples, sample_seed, generator.get_state())


class SeenSamples(NamedTuple):
    """How far an epoch had come when a run was interrupted.

    Attributes:
        epoch: its number.
        number: of samples that all processes together were given.
        world, batch: numbers of processes, and of samples a process took at a time, then.
    """

    epoch: int
    number: int
    world: int
    batch: int


class ShuffleSampler(Sampler):
    """All samples in a new random order each epoch, dealt out to the processes: yields (sample number, seed).

    With `shares`, those that they draw; a sample that an epoch draws several times has another seed each time.

    Order and seed follow from `seed` and the epoch alone, so a sample is augmented and masked alike whatever the number
    of processes, of workers, and of samples a batch. Each process gets every `world`-th sample of the order, and all
    get the same number: the rest, less than one a process, is left out (other samples each epoch).
    """

    batch = 1  # samples that a process takes at a time, where the order depends on it

    def __init__(self, length: int, seed: int, rank: int, world: int, shares: Sequence[Share] = ()):
        """
        Args:
            length: number of samples.
            seed: of the run.
            rank, world: this process's number, and how many there are.
            shares: see `epoch_order`.
        """
        self.shares = shares
        self.drawn = sum(share.number for share in shares) if shares else length  # an epoch
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.epoch = 0
        self.windows: WindowedOrder | None = None  # see `epoch_order`
        self._seen = (0, 0, world, 1)  # see `skip`

    def skip(self, epoch: int, seen: int, world: int, batch: int) -> None:
        """Goes on in `epoch` after the first `seen` samples that all processes together were given; see `_remaining`.

        Later epochs are whole again.

        Args:
            world, batch: numbers of processes, and of samples a process took at a time, then.
        """
        self.epoch = epoch
        self._seen = (epoch, seen, world, batch)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.drawn // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = epoch_order(self.length, self.seed, self.epoch, self.shares, self.windows)
        parts = (part[self.rank :: self.world].long() for part in self._remaining(order))
        # (numbers and seeds are paired without a line of Python a sample)
        return chain.from_iterable(
            zip((part % self.length).tolist(), (order.sample_seed + part // self.length).tolist(), strict=True)
            for part in parts
        )

    def _remaining(self, order: EpochOrder) -> Iterator[Tensor]:
        """The parts of the epoch, without what has been seen before a resume.

        The processes, and the samples a batch, may be others than they were then: what is left is the same. For
        example, with the order 5 2 7 0 3 6 1 4 two processes were given 5 7 and 2 0 before the run stopped, so
        seen = 4. Three processes that go on share what is left, 3 6 1 4, in turn: 3, 6 and 1; the rest, less than one
        a process, is left out of this epoch, as it always is. (With batches of similar lengths the parts are sorted: so
        those of then are made again to find what was seen, and what is left is cut into parts anew.)
        """
        epoch, seen, world, batch = self._seen
        seen = seen if self.epoch == epoch else 0
        if not seen or (world, batch) == (self.world, self.batch):
            for part in self._parts(order.samples, self.world, self.batch, order.state):
                yield part[seen:]
                seen = max(seen - len(part), 0)
            return
        is_left = torch.ones(1 + int(order.samples.max()), dtype=torch.bool)
        for part in self._parts(order.samples, world, batch, order.state):
            is_left[part[:seen].long()] = False
            seen = max(seen - len(part), 0)
        left = order.samples[is_left[order.samples.long()]]
        yield from self._parts(left, self.world, self.batch, order.state)

    def _parts(self, samples: Tensor, world: int, batch: int, state: Tensor) -> Iterator[Tensor]:
        """Cuts samples (of all processes) in pieces, each a multiple of `world` long; leaves out what does not divide.

        Args:
            state: of the generator that shuffles, where something is shuffled.
        """
        yield from samples[: len(samples) // world * world].split(PART * world)


class LengthGroupedSampler(ShuffleSampler):
    """A `ShuffleSampler` whose batches hold texts of similar length, so that little is padded.

    The random order is cut into stretches of 100 batches (of all processes together); within a stretch the samples are
    sorted by length, cut into batches, and the batches shuffled. So a batch is drawn from 100 batches' worth of random
    samples, all processes meet texts of the same length at the same step, and what an epoch leaves out stays random.
    """

    STRETCH = 100  # batches

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int,
        world: int,
        batch: int,
        lengths: Callable[[np.ndarray], np.ndarray],
        shares: Sequence[Share] = (),
    ):
        """
        Args:
            length, seed, rank, world, shares: as of `ShuffleSampler`.
            batch: samples a process takes at a time.
            lengths: the lengths of the texts with given sample numbers, in any unit; asked for a stretch at a time.
        """
        super().__init__(length, seed, rank, world, shares)
        self.lengths = lengths
        self.batch = batch

    def _parts(self, samples: Tensor, world: int, batch: int, state: Tensor) -> Iterator[Tensor]:
        generator = torch.Generator()
        generator.set_state(state)
        samples, size = samples[: len(samples) // world * world], batch * world
        full = len(samples) // size * size
        for stretch in samples[:full].split(self.STRETCH * size):
            lengths = torch.from_numpy(self.lengths((stretch % self.length).numpy()))
            batches = stretch[lengths.argsort(stable=True)].view(-1, size)
            yield batches[torch.randperm(len(batches), generator=generator)].flatten()
        yield samples[full:]


class StepSampler(Sampler):
    """The batches of whole optimizer steps: of each step's samples, this process's share.

    The samples of a step are the same whatever the number of processes; shares differ by one where they do not divide.
    What an epoch has left for no whole step is left out, other samples each epoch.

    Attributes:
        sampler: of all samples; Lightning tells it the epoch.
    """

    def __init__(self, sampler: ShuffleSampler, size: int, rank: int, world: int):
        """
        Args:
            sampler: the order of all samples, as of a single process.
            size: samples of a step.
            rank, world: this process's number, and how many there are.
        """
        self.sampler, self.size, self.rank, self.world = sampler, size, rank, world

    def __len__(self) -> int:
        return len(self.sampler) // self.size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        samples = iter(self.sampler)
        while len(step := list(islice(samples, self.size))) == self.size:
            yield step[self.rank :: self.world]


def eval_batches(length: int, batch_size: int, rank: int, world: int, mixed: bool = False) -> list[Sequence[int]]:
    """This process's batches of an evaluation: every sample exactly once over all processes.

    They are in order, or `mixed`: in one random order, the same in every evaluation of as many samples. In order the
    texts of one image would be in one batch, where a loss among the pairs of the batch takes them for strangers.

    Batches are dealt out whole. So a batch holds the same samples, and the same padding, whatever the number of
    processes, and what is computed of it is equal to the last bit. All processes get as many, the last of some empty,
    because they ask each other before each whether to stop; at least one, because a loader without any leaves the
    evaluation.
    """
    starts = range(0, length, batch_size)
    batches: list[Sequence[int]] = [range(start, min(start + batch_size, length)) for start in starts[rank::world]]
    if mixed:
        order = np.random.default_rng(EVALUATION_ORDER).permutation(length)
        batches = [order[batch].tolist() for batch in batches]
    return batches + [range(0)] * (max(-(-len(starts) // world), 1) - len(batches))
