"""Random numbers that follow from keys."""

import pytest
import torch

from vlmo.modules.random import GAMMA, _hash, fold_in, to_uniform, uniform


def test_they_are_those_of_splitmix64():
    numbers = _hash(torch.arange(1, 4) * GAMMA)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0
    assert [number % 2**64 for number in numbers.tolist()] == published


def test_uniform_in_the_open_interval():
    drawn = uniform(fold_in(torch.arange(200), 7), 500)
    assert drawn.min() > 0 and drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.005)
    assert drawn.std().item() == pytest.approx(12**-0.5, abs=0.005)
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.25  # of 500 numbers each
    assert to_uniform(torch.tensor([0, -1])).tolist() == [0.5 / 2**23, 1 - 0.5 / 2**23]


def test_a_row_follows_from_its_key_alone():
    keys = fold_in(torch.arange(6), 3)
    drawn = uniform(keys, 4, 5)
    assert torch.equal(uniform(keys[[4, 1]], 4, 5), drawn[[4, 1]])
    assert torch.equal(uniform(keys, 7, 5)[:, :4], drawn)  # a longer text keeps the numbers of its first tokens


def test_every_use_has_numbers_of_its_own():
    keys = torch.arange(50)
    uses = [fold_in(keys, number) for number in (0, 1, 2**32 - 1, 2**62)]
    assert len(torch.cat(uses).unique()) == 200
    assert torch.equal(fold_in(keys[:, None], torch.tensor([0, 1])), torch.stack(uses[:2], dim=1))
