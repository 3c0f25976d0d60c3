"""Parameter groups and learning rates are the original's (recorded in goldens/optimizer.json)."""

import json

import pytest
import torch

from tests.conftest import GOLDENS
from vlmo.config import resolve
from vlmo.modules import VLMo
from vlmo.training import optimizer as optim

RECORDED = json.loads((GOLDENS / "optimizer.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_groups(name):
    config = resolve(name, **RECORDED[name]["overrides"])
    with torch.device("meta"):
        model = VLMo(config)
    heads = [head for task in model.tasks if task.head_group for head in task.required_heads]
    groups = optim.parameter_groups(
        model.named_parameters(), config["learning_rate"], config["weight_decay"], config["lr_mult"], heads
    )
    for group, expected in zip(groups, RECORDED[name]["groups"], strict=True):
        assert sorted(group["names"]) == sorted(expected["names"])
        assert group["weight_decay"] == expected["weight_decay"]
        assert group["lr"] == pytest.approx(expected["initial_lr"], rel=1e-12)


@pytest.mark.parametrize("name", RECORDED)
def test_learning_rates(name):
    config = resolve(name, **RECORDED[name]["overrides"])
    total = config["max_steps"] or 1000  # the recording's epochs had 1,000 steps in all
    rate, mult = config["learning_rate"], config["lr_mult"]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": r} for r in (rate, rate, rate * mult, rate * mult)]
    optimizer = optim.build_optimizer(config["optim_type"], groups, rate)
    warmup = optim.warmup_length(config["warmup_steps"], total)
    schedule = optim.build_schedule(optimizer, total, warmup, config["decay_power"], config["end_lr"])
    for step, expected in RECORDED[name]["lr"]:
        actual = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        assert actual == pytest.approx(expected, rel=1e-9), step
