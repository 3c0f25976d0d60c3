"""What the person is told."""

import re

import pytest
import torch

from tests import tiny
from vlmo.config import resolve
from vlmo.planning.devices import find_device
from vlmo.settings import Settings
from vlmo.training.callbacks.console import folded, short
from vlmo.training.environment import choose_environment
from vlmo.training.summary import differences, summary
from vlmo.training.utilisation import teraflops_per_sample


def summary_of(*named, **updates):
    model = tiny.model(*named, **updates)
    return summary(model.settings, choose_environment(model.settings), model), model


def test_summary():
    text, model = summary_of("task_finetune_vqa_base_image480", batch_size=16, log_every_n_steps=7)
    lines = text.splitlines()
    assert lines[0] == "finetune_vqa_base_image480: vlmo_tiny_patch16, losses vqa"
    assert "batch      16 = 4 a device x 1 devices x 1 nodes x 4 accumulated" in lines
    assert "precision 32-true" in text
    everything, trained = (
        f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"
        for parameters in (model.parameters(), (p for _, p in model.trained_parameters()))
    )
    assert f"parameters {everything}, of which trained {trained}" in lines
    assert re.search(r"log_every_n_steps +7\n", text)
    assert not re.search(r"\n +mlm_prob ", text)  # as by default
    rates = re.findall(r"([\d.]+) M in (\d+) tensors: learning rate (\S+), weight decay (\S+)", text)
    assert [(rate, decay) for _, _, rate, decay in rates] == [
        ("3e-05", "0.01"),
        ("3e-05", "0"),
        ("0.0006", "0.01"),
        ("0.0006", "0"),
    ]
    assert sum(int(tensors) for _, tensors, _, _ in rates) == len(model.trained_parameters())


def test_summary_of_stage_2_tells_what_is_trained():
    text, model = summary_of("task_textmlm_base")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert f"of which trained {trained:.2f} M" in text


def test_summary_of_an_evaluation_reports_the_file(tmp_path):
    torch.save(tiny.model("task_mlm_itm_itc_base").state_dict(), tmp_path / "stage3.pt")
    model = tiny.model("task_mlm_itm_itc_base", test_only=True, load_path=str(tmp_path / "stage3.pt"))
    text = summary(model.settings, choose_environment(model.settings), model)
    assert "stage3.pt" in text
    assert "batch " not in text
    assert "learning rate" not in text


def test_only_what_differs_from_the_defaults():
    assert differences(Settings.from_config(resolve())) == {}
    assert set(differences(Settings.from_config(resolve(seed=3, num_gpus=[0])))) == {"seed", "num_gpus"}


def test_a_line_is_folded_to_the_terminal():
    parts = ["step 1/2", "loss 3.0 = itm 1.0", "+ itc 2.0", "lr 1e-3"]
    assert folded(parts, 0) == "step 1/2  loss 3.0 = itm 1.0 + itc 2.0  lr 1e-3"
    assert folded(parts, 30) == "step 1/2  loss 3.0 = itm 1.0\n    + itc 2.0  lr 1e-3"
    assert [short(number) for number in (12_345, 1_234_567, 4_560_000_000)] == ["12,345", "1.23M", "4.56G"]


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_devices_by_the_names_of_cuda(name, known):
    found = find_device(name)
    assert (found and found.name) == known


def test_operations_that_cannot_be_counted_end_no_training(monkeypatch, caplog):
    settings = tiny.model("task_mlm_itm_itc_base").settings
    monkeypatch.setattr("vlmo.planning.step.step_cost", lambda *_: 1 / 0)
    assert teraflops_per_sample(settings) is None and "MFU" in caplog.text
