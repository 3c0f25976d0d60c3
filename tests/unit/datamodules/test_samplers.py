"""Which process sees which samples."""

from hypothesis import given
from hypothesis import strategies as st

from vlmo.datamodules.samplers import ShuffleSampler, eval_batches


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


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_takes_every_sample_once_in_the_same_batches(length, batch_size, world):
    shares = [eval_batches(length, batch_size, rank, world) for rank in range(world)]
    batches = sorted((list(batch) for share in shares for batch in share), key=lambda batch: batch[0])
    assert [number for batch in batches for number in batch] == list(range(length))
    assert batches == [list(batch) for batch in eval_batches(length, batch_size, 0, 1)]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
