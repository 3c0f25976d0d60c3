"""Devices, strategy and precision from the options and from what the machine has."""

import importlib.util

import pytest
import torch

from tests import tiny
from vlmo.errors import VLMoError
from vlmo.settings import Settings
from vlmo.training.environment import choose_environment


@pytest.fixture
def choose(monkeypatch):
    """The environment on a machine with that many GPUs."""

    def chosen(gpus=0, bf16=True, **updates):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
        options = {"num_gpus": 1, "batch_size": 24, "per_gpu_batchsize": 4} | updates
        return choose_environment(Settings.from_config(tiny.config(**options)))

    return chosen


def test_no_gpu(choose):
    assert choose(num_gpus=0).accelerator == "cpu"
    assert choose(num_gpus=0).notices == []
    environment = choose(num_gpus=1)
    assert (environment.accelerator, environment.devices) == ("cpu", 1)
    assert "no GPU on this machine" in environment.notices[0]


@pytest.mark.parametrize(
    "updates, message",
    [
        (
            {"num_gpus": 2},
            r"num_gpus=2: this machine has 1; ask for that many \(0 is the CPU\), or add accelerator=cpu",
        ),
        ({"num_gpus": [0, 1]}, r"num_gpus=\[0, 1\]: this machine has 1 GPUs, none has number \[1\]"),
        (
            {"use_sharded_training": True, "num_gpus": 0},
            "DeepSpeed shards over GPUs only: set use_sharded_training=False",
        ),
        ({"strategy": "deepspeed_stage_2", "num_gpus": 2, "accelerator": "cpu"}, "DeepSpeed shards over GPUs only"),
        ({"strategy": "dpp"}, "strategy='dpp': there is no such strategy"),
    ],
)
def test_what_the_machine_does_not_have(choose, updates, message):
    with pytest.raises(VLMoError, match=message) as error:
        choose(gpus=1, **updates)
    assert "\n" not in str(error.value)


def test_a_gpu_that_is_asked_for_is_not_replaced(choose):
    with pytest.raises(VLMoError, match="num_gpus=1: this machine has 0"):
        choose(gpus=0, accelerator="gpu")


def test_gpus(choose):
    assert (choose(gpus=2).accelerator, choose(gpus=2).devices) == ("gpu", 1)
    picked = choose(gpus=4, num_gpus=[1, 3])
    assert (picked.accelerator, picked.devices) == ("gpu", [1, 3])
    assert choose(gpus=2, accelerator="cpu").accelerator == "cpu"
    assert choose(gpus=2, num_gpus=0).accelerator == "cpu"


def test_cpu_processes(choose):
    environment = choose(num_gpus=3, accelerator="cpu")
    assert (environment.accelerator, environment.devices) == ("cpu", 3)
    assert environment.strategy == "ddp"


def test_strategy(choose, monkeypatch):
    assert choose(num_gpus=0).strategy == "auto"
    assert choose(gpus=2, num_gpus=2).strategy == "ddp"
    assert choose(gpus=2, num_gpus=2, strategy="fsdp2").strategy == "fsdp2"
    assert choose(num_gpus=2, accelerator="cpu", strategy="fsdp2").strategy == "fsdp2"
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("NODE_RANK", "0")
    assert choose(gpus=1, num_nodes=2).num_nodes == 2
    assert choose(gpus=1, num_nodes=2).strategy == "ddp"


def test_deepspeed(choose, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert choose(gpus=2, num_gpus=2, use_sharded_training=True).strategy == "deepspeed_stage_1"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VLMoError, match="pip install deepspeed"):
        choose(gpus=2, num_gpus=2, use_sharded_training=True)


@pytest.mark.parametrize(
    "gpus, precision, bf16, expected",
    [
        (1, 16, True, "16-mixed"),
        (1, "16", True, "16-mixed"),
        (1, 32, True, "32-true"),
        (1, "bf16", True, "bf16-mixed"),
        (1, "auto", True, "bf16-mixed"),
        (1, "auto", False, "16-mixed"),
        (0, "auto", True, "32-true"),
        (0, 32, True, "32-true"),
        (0, 16, True, "32-true"),
        (0, "bf16", True, "bf16-mixed"),
    ],
)
def test_precision(choose, gpus, precision, bf16, expected):
    environment = choose(gpus=gpus, bf16=bf16, num_gpus=gpus, precision=precision)
    assert environment.precision == expected
    assert len(environment.notices) == (gpus == 0 and precision == 16)
