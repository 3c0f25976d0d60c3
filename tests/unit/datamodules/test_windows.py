"""The order where sources are read from one end to the other, and what batches announce of it."""

import numpy as np
import pytest
import torch

from tests import tables
from tests.source_files import write_forms
from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datamodules.samplers import Share, ShuffleSampler, epoch_order
from vlmo.datamodules.windows import WindowedOrder

PIECES = np.array([0, 90, 200, 310, 390, 500, 610, 700, 800, 900, 1000])


def drawn(order, seed=1, epoch=0):
    return epoch_order(sum(int(part[-1]) for part in order.parts), seed, epoch, windows=order).samples


def test_each_sample_once_in_an_order_that_follows_from_seed_and_epoch():
    order = WindowedOrder([PIECES, np.array([0, 300])], 200)
    samples = drawn(order)
    assert samples.dtype == torch.int32 and sorted(samples.tolist()) == list(range(1300))
    assert torch.equal(samples, drawn(order))
    assert not torch.equal(samples, drawn(order, epoch=1)) and not torch.equal(samples, drawn(order, seed=2))
    # parts are mixed evenly
    halves = [(half >= 1000).sum().item() for half in samples.split(650)]
    assert 110 < halves[0] < 190
    assert order.fingerprint != WindowedOrder([PIECES, np.array([0, 300])], 100).fingerprint


def test_a_window_is_read_from_few_pieces():
    for window in drawn(WindowedOrder([PIECES], 200)).split(200):
        pieces = np.searchsorted(PIECES, window.numpy(), side="right")
        assert len(np.unique(pieces)) <= 4
        assert window.diff().abs().float().mean() > 20  # and shuffled within


def test_all_of_it_is_one_window_of_anything_in_any_order():
    plain = epoch_order(1000, 1, 0).samples
    assert torch.equal(plain, drawn(WindowedOrder([np.array([0, 1000])], 10)))


def test_going_on_in_the_middle():
    order = WindowedOrder([PIECES], 200)
    whole = ShuffleSampler(1000, 1, 0, 1)
    whole.windows = order
    numbers = [number for number, _ in whole]
    for world in (1, 3):
        left = []
        for rank in range(world):
            later = ShuffleSampler(1000, 1, rank, world)
            later.windows = order
            later.skip(0, 400, 2, 1)
            left += [number for number, _ in later]
        assert set(left) <= set(numbers[400:]) and len(set(left)) == len(left) >= 600 - world


def test_weights_draw_by_windows_too():
    order = WindowedOrder([PIECES, np.array([0, 300])], 200)
    shares = [Share.of(1000, 0.5), Share.of(300, 2)]
    epochs = [epoch_order(1300, 1, epoch, shares, order).samples.numpy() for epoch in range(4)]
    assert not np.array_equal(epochs[0], epochs[2])
    for first, second in (epochs[:2], epochs[2:]):
        both = np.concatenate([first, second])
        halves = both[both < 1000]
        assert sorted(halves.tolist()) == list(range(1000))  # of a half each, all in two epochs
        twice = np.unique(both[both >= 1000] % 1300, return_counts=True)[1]
        assert twice.tolist() == [4] * 300
        for window in np.split(first[first < 1000][:400], 2):
            assert len(np.unique(np.searchsorted(PIECES, window, side="right"))) <= 4


def test_a_weighted_run_goes_on_in_the_middle():
    order, shares = WindowedOrder([PIECES, np.array([0, 300])], 200), [Share.of(1000, 0.5), Share.of(300, 2)]

    def sampler():
        made = ShuffleSampler(1300, 1, 0, 1, shares)
        made.windows = order
        return made

    later = sampler()
    later.skip(0, 400, 1, 1)
    assert list(later) == list(sampler())[400:]


@pytest.fixture
def loader(tmp_path):
    forms = write_forms(tmp_path, 24)
    tokenizer = str(tables.write_vocabulary(tmp_path))

    def made(form, **updates):
        options = {"image_size": 32, "per_gpu_batchsize": 4, "batch_size": 4, "num_workers": 0, "num_gpus": 0}
        options |= {"datasets": forms[form], "tokenizer": tokenizer, "data_cache": str(tmp_path / "cache")}
        module = MTDataModule(resolve("task_mlm_itm_itc_base", **options | updates))
        module.setup("fit")
        return module.train_dataloader()

    return made


def test_a_batch_announces_what_others_need(loader):
    batches = list(loader("parquet", shuffle_window=8).batch_sampler)
    announced, needed = set(), set()
    for batch in batches:
        announced |= set(batch.units)
        dataset = loader("parquet").dataset.dataset
        needed |= set(dataset.units(np.array([number for number, _ in batch.keys])))
        assert needed <= announced
    units = [unit for batch in batches for unit in batch.units]
    assert len(units) == len(set(units)) == 4 + 6  # row groups, each once
    assert len(batches[0].units) < 10  # not all at once


def test_every_epoch_has_each_sample_once(loader):
    for workers in (0, 2):
        found = loader("parquet", shuffle_window=8, num_workers=workers)
        for epoch in range(2):
            found.batch_sampler.sampler.set_epoch(epoch)
            numbers = [number for batch in found for number in batch["raw_index"].tolist()]
            assert sorted(numbers) == list(range(24)) != numbers


def test_options_of_sources_alone_need_no_root(loader):
    assert len(loader("tar", data_root="")) == 6
