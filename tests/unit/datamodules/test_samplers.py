"""Which process sees which samples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmo.datamodules import samplers
from vlmo.datamodules.samplers import (
    EpochOrder,
    LengthGroupedSampler,
    Share,
    ShuffleSampler,
    StepSampler,
    epoch_order,
    eval_batches,
)


def drawn(length, world, seed=1, epoch=0):
    samplers = [ShuffleSampler(length, seed, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@given(st.integers(0, 40), st.integers(1, 5))
def test_processes_share_the_samples_equally(length, world):
    shares = drawn(length, world)
    assert [len(share) for share in shares] == [length // world] * world
    numbers = [number for share in shares for number, _ in share]
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= set(range(length))
    assert len({seed for share in shares for _, seed in share}) <= 1


def test_order_and_seed_change_with_epoch_and_run():
    runs = [drawn(20, 1, seed, epoch)[0] for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert drawn(20, 1)[0] == runs[0]
    assert len({tuple(number for number, _ in run) for run in runs}) == 3
    assert len({run[0][1] for run in runs}) == 3


def test_the_global_batches_do_not_depend_on_the_number_of_processes():
    alone = drawn(24, 1)[0]
    shares = drawn(24, 2)
    for step in range(3):
        together = shares[0][4 * step : 4 * step + 4] + shares[1][4 * step : 4 * step + 4]
        assert sorted(together) == sorted(alone[8 * step : 8 * step + 8])


def grouped(lengths, batch, world, seed=1, epoch=0):
    """What each process is given."""
    lengths, shares = np.array(lengths, np.int64), []
    for rank in range(world):
        sampler = LengthGroupedSampler(len(lengths), seed, rank, world, batch, lengths.take)
        sampler.STRETCH = 3
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    return shares


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 4), st.integers(1, 3))
def test_grouping_by_length_keeps_every_sample_once(lengths, batch, world):
    shares = grouped(lengths, batch, world)
    assert [len(share) for share in shares] == [len(lengths) // world] * world
    # the same samples and seed as without grouping, in another order
    assert sorted(pair for share in shares for pair in share) == sorted(
        pair for share in drawn(len(lengths), world) for pair in share
    )
    assert shares == grouped(lengths, batch, world)


@given(st.lists(st.integers(1, 30), min_size=24, max_size=60), st.integers(1, 4))
def test_the_batches_of_a_stretch_do_not_overlap_in_length(lengths, batch):
    """Over both processes: what is taken at the same step has the same length, or nearly."""
    shares = grouped(lengths, batch, 2)
    stretch = 3 * batch
    for start in range(0, len(lengths) // (2 * batch) * batch, stretch):
        end = min(start + stretch, len(lengths) // (2 * batch) * batch)
        spans = []
        for step in range(start, end, batch):
            taken = [lengths[number] for share in shares for number, _ in share[step : step + batch]]
            spans.append((min(taken), max(taken)))
        spans.sort()
        assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))


def test_grouped_order_changes_with_epoch_and_run():
    lengths = list(range(40)) * 2
    runs = [grouped(lengths, 4, 1, seed, epoch)[0] for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert len({tuple(number for number, _ in run) for run in runs}) == 3
    first = [[lengths[number] for number, _ in run[:4]] for run in runs]
    assert len({tuple(lengths) for lengths in first}) > 1  # not always the shortest first


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_evaluation_takes_every_sample_once_in_the_same_batches(length, batch_size, world, mixed):
    shares = [eval_batches(length, batch_size, rank, world, mixed) for rank in range(world)]
    order = [number for batch in eval_batches(length, length or 1, 0, 1, mixed) for number in batch]
    assert sorted(order) == list(range(length)) and (mixed or order == sorted(order))
    batches = [list(batch) for share in shares for batch in share if batch]
    batches.sort(key=lambda batch: order.index(batch[0]))
    assert [number for batch in batches for number in batch] == order  # whatever the batch, and the processes
    assert batches == [list(batch) for batch in eval_batches(length, batch_size, 0, 1, mixed) if batch]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert {len(share) for share in shares} == {max(-(-len(batches) // world), 1)}


def test_mixed_evaluation_parts_the_texts_of_an_image():
    images = [[number // 5 for number in batch] for batch in eval_batches(5000, 20, 0, 1, mixed=True)]
    strangers = sum(len(set(batch)) for batch in images) / 5000
    assert strangers > 0.95  # in order, 4 of 20


WORLDS_AND_BATCHES = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    st.lists(st.integers(1, 30), max_size=60), WORLDS_AND_BATCHES, WORLDS_AND_BATCHES, st.integers(0, 20), st.booleans()
)
def test_going_on_with_as_many_or_other_processes(lengths, then, now, batches, group):
    def samplers(world, batch):
        made = []
        for rank in range(world):
            sampler = ShuffleSampler(len(lengths), 1, rank, world)
            if group:
                sampler = LengthGroupedSampler(len(lengths), 1, rank, world, batch, np.array(lengths, np.int64).take)
                sampler.STRETCH = 3
            sampler.set_epoch(3)
            made.append(sampler)
        return made

    begun = [list(sampler)[: batches * then[1]] for sampler in samplers(*then)]
    seen = sum(map(len, begun))
    going_on = samplers(*now)
    for sampler in going_on:
        sampler.skip(3, seen, *then)
    rest = [list(sampler) for sampler in going_on]
    assert {len(share) for share in rest} == {(len(lengths) - seen) // now[0]}
    if now == then:
        assert [one + other for one, other in zip(begun, rest, strict=True)] == [list(s) for s in samplers(*now)]
    numbers = [number for share in begun + rest for number, _ in share]
    assert len(set(numbers)) == len(numbers)
    for sampler, fresh in zip(going_on, samplers(*now), strict=True):
        sampler.set_epoch(4)
        fresh.set_epoch(4)
        assert list(sampler) == list(fresh)


def test_the_order_of_an_epoch_follows_from_its_numbers():
    one, same, later = epoch_order(9, 3, 1), epoch_order(9, 3, 1), epoch_order(9, 3, 2)
    assert torch.equal(one.samples, same.samples) and one.sample_seed == same.sample_seed
    assert sorted(one.samples.tolist()) == list(range(9))
    assert one.sample_seed != later.sample_seed and not torch.equal(one.samples, later.samples)
    sampler = ShuffleSampler(9, 3, rank=0, world=1)
    sampler.set_epoch(1)
    assert list(sampler) == [(number, one.sample_seed) for number in one.samples.tolist()]


def test_the_worked_example_of_a_resume(monkeypatch):
    order = EpochOrder(torch.tensor([5, 2, 7, 0, 3, 6, 1, 4], dtype=torch.int32), 0, torch.Generator().get_state())
    monkeypatch.setattr(samplers, "epoch_order", lambda *numbers: order)
    before = [[number for number, _ in ShuffleSampler(8, 0, rank, 2)][:2] for rank in range(2)]
    assert before == [[5, 7], [2, 0]]
    after = [ShuffleSampler(8, 0, rank, 3) for rank in range(3)]
    for sampler in after:
        sampler.skip(epoch=0, seen=4, world=2, batch=1)
    assert [[number for number, _ in sampler] for sampler in after] == [[3], [6], [1]]


# --- weights of data sets ---------------------------------------------------------------------------------------------

SHARES = [Share.of(10, 2), Share.of(7, 0.5), Share.of(4, 1), Share.of(6, 1.5)]  # samples 0-9, 10-16, 17-20, 21-26


def weighted(epoch, rank=0, world=1, seed=3, grouped=False):
    sampler = ShuffleSampler(27, seed, rank, world, SHARES)
    if grouped:
        sampler = LengthGroupedSampler(27, seed, rank, world, 2, lambda numbers: numbers % 5, SHARES)
    sampler.set_epoch(epoch)
    return sampler


def test_a_weight_says_how_often_an_epoch_draws_a_sample():
    seen = np.zeros(27, int)
    for epoch in range(4):
        keys = list(weighted(epoch))
        assert len(keys) == len(weighted(epoch)) == 20 + 4 + 4 + 9
        assert len(set(keys)) == len(keys)  # a sample that is drawn twice is augmented and masked in two ways
        counts = np.bincount([number for number, _ in keys], minlength=27)
        assert (counts[:10] == 2).all() and (counts[17:21] == 1).all()
        assert counts[10:17].max() == 1 and set(counts[21:]) == {1, 2}
        seen += counts
        if epoch == 1:
            assert (seen[10:17] >= 1).all()  # two halves are all
            assert (seen[21:] == 3).all()
    orders = [[number for number, _ in weighted(epoch)] for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    halves = [sorted(n for n, _ in weighted(0, seed=seed) if 10 <= n < 17) for seed in range(6)]
    assert len(set(map(tuple, halves))) > 1  # which half comes first is random


def test_a_share_is_rounded_up_exactly():
    assert [Share.of(30, 0.1).number, Share.of(31, 0.1).number, Share.of(5, 1e-6).number] == [3, 4, 1]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_a_weighted_epoch_and_go_on_in_it(world, grouped):
    whole = list(weighted(1, grouped=grouped))
    dealt = [list(weighted(1, rank, world, grouped=grouped)) for rank in range(world)]
    assert {len(share) for share in dealt} == {37 // world}
    together = [key for share in dealt for key in share]
    assert len(set(together)) == len(together) and set(together) <= set(whole)

    resumed = [weighted(1, rank, world, grouped=grouped) for rank in range(world)]  # two of each process are done
    for sampler in resumed:
        sampler.skip(1, 2 * world, world, sampler.batch)
    assert [list(sampler) for sampler in resumed] == [share[2:] for share in dealt]

    others = [weighted(1, rank, world + 1, grouped=grouped) for rank in range(world + 1)]  # one process more goes on
    for sampler in others:
        sampler.skip(1, 2 * world, world, resumed[0].batch)
    after = {key for sampler in others for key in sampler}
    done = {key for share in dealt for key in share[:2]}
    assert not after & done and len(after) >= 37 - 2 * world - world


def test_steps_of_a_weighted_epoch_are_the_same_for_any_number_of_processes():
    alone = list(StepSampler(weighted(2), 5, 0, 1))
    two = [list(StepSampler(weighted(2), 5, rank, 2)) for rank in range(2)]
    assert len(alone) == len(StepSampler(weighted(2), 5, 0, 1)) == 7
    assert [sorted(one + other) for one, other in zip(*two, strict=True)] == [sorted(step) for step in alone]


def test_numbers_of_a_weighted_epoch_take_four_bytes():
    assert epoch_order(27, 3, 0, SHARES).samples.dtype == torch.int32
    assert epoch_order(27, 3, 0).samples.dtype == torch.int32
