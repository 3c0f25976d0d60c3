"""How long a run is, and what of its schedule it reaches."""

import pytest
import torch

from vlmo.config import resolve
from vlmo.settings import Settings
from vlmo.training.optimizer import build_schedule
from vlmo.training.run_length import RunLength


def length(samples, **options):
    defaults = {"batch_size": 12, "per_gpu_batchsize": 4, "max_steps": None, "max_epoch": 2}
    return RunLength.of(Settings.from_config(resolve("task_mlm_itm_itc_base", **defaults | options)), samples)


def test_the_last_incomplete_batch_is_left_out():
    assert length(47).epoch_batches == 11  # of 4, the original's 12th had 3 samples
    assert length(48).epoch_batches == 12
    assert length(3).epoch_batches == 1
    assert length(47, num_gpus=3, accelerator="cpu").epoch_batches == 3  # of each process


def test_accumulation_that_does_not_divide_an_epoch():
    found = length(44)  # 11 batches, 3 a step: the fourth step of an epoch takes 2
    assert (found.epoch_batches, found.epoch_steps, found.steps, found.batches) == (11, 4, 8, 22)
    assert 11 * 2 // 3 == 7  # the original's schedule ended one step before its run did
    assert length(44, contrast_cache=True).epoch_steps == 3


def test_max_steps_decides_whatever_max_epoch_is():
    found = length(44, max_steps=10, max_epoch=1)
    assert (found.steps, found.batches) == (10, 2 * 11 + 2 * 3)
    assert "2.5 epochs" in str(found) and "max_epoch=1 is ignored" in str(found)
    assert "ignored" not in str(length(44, max_steps=10, max_epoch=3))
    assert "ignored" not in str(length(44))


def test_the_published_schedule_on_coco_alone():
    found = length(113_287 * 5, batch_size=1024, max_steps=200_000, max_epoch=200)
    assert found.steps == 200_000 and "361" in str(found)  # 200 epochs would be 110,800 steps


@pytest.mark.parametrize(
    "options, warned",
    [
        ({"warmup_steps": 2000}, True),
        ({"warmup_steps": 8}, True),
        ({"warmup_steps": 7}, False),
        ({"warmup_steps": 0.1}, False),
        ({"warmup_steps": 0}, False),
        ({"warmup_steps": 100, "max_steps": 3}, True),
        ({"warmup_steps": 100, "max_steps": 300}, False),
    ],
)
def test_a_warm_up_that_the_run_does_not_get_through(options, warned):
    warnings = list(length(44, **options).warnings())
    assert len(warnings) == warned
    assert all("warmup_steps" in line for line in warnings)


def test_the_highest_rate_that_is_told_is_the_schedules():
    found = length(44, warmup_steps=2000, learning_rate=1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    schedule = build_schedule(optimizer, found.steps, 2000, 1, 0)
    for _ in range(found.steps):
        optimizer.step()
        schedule.step()
    assert f"{schedule.get_last_lr()[0]:.2g}" == "4e-06"
    assert "4e-06" in next(found.warnings())
