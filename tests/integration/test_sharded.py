"""DeepSpeed in two processes gives DDP's numbers, and checkpoints that one process reads; so does what is compiled.

On CPUs, where Lightning does not offer DeepSpeed (`sharded_on_cpu.py`); on GPUs: `tests/gpu/`.
"""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run
from tests import tiny
from vlmo.checkpoints import files
from vlmo.training.runner import run as run_here

pytestmark = pytest.mark.slow
REPOSITORY = Path(run.__file__).parent
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
NEEDS_FAIRSCALE = pytest.mark.skipif(importlib.util.find_spec("fairscale") is None, reason="needs fairscale")
TASKS = {
    "textmlm": ("task_textmlm_base", {"datasets": "['wikibk']"}),
    "itc": ("task_mlm_itm_itc_base", {"datasets": "['coco']", "contrast_gradient": "exact"}),
    "irtr": ("task_finetune_irtr_coco_base_image384", {"datasets": "['coco']", "get_recall_metric": False}),
}
WAYS = {
    "ddp": {},
    "accumulated": {"per_gpu_batchsize": 2},
    "offload": {"activation_checkpointing": "offload", "per_gpu_batchsize": 2},
    "fsdp2, compiled": {"strategy": "fsdp2", "compile": True, "activation_checkpointing": True},
    "zero 1": {"use_sharded_training": True},
    "zero 2": {"strategy": "deepspeed_stage_2", "activation_checkpointing": True},
}


@pytest.fixture(scope="session")
def go(data, tmp_path_factory):
    """The losses of a run of three steps, and its folder; each is made once."""
    made = {}

    def begin(task, way):
        if (task, way) not in made:
            made[task, way] = trained(data, tmp_path_factory.mktemp("result"), task, way)
        return made[task, way]

    return begin


def trained(data, log_dir, task, way, **given):
    named, options = TASKS[task]
    options = options | {
        "data_root": data,
        "tokenizer": data / "vocab.txt",
        "model_arch": "vlmo_tiny_patch16",
        "image_size": 32,
        "vocab_size": 64,
        "max_text_len": 16,
        "batch_size": 8,
        "per_gpu_batchsize": 4,
        "num_workers": 0,
        "precision": 32,
        "max_steps": 3,
        "max_epoch": 100,
        "warmup_steps": 0,
        "val_check_interval": 1.0,
        "drop_path_rate": 0.1,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "num_gpus": 2,
        "log_dir": log_dir,
    }
    words = [f"{name}={value}" for name, value in (options | WAYS[way] | given).items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "tests/integration/sharded_on_cpu.py", "with", named, *words],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = log_dir.glob("*/version_*")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {
        name: [float(row[name]) for row in rows if row[name]]
        for name in rows[0]
        if name.endswith(("train/loss", "val/loss"))
    }
    return losses, folder


@pytest.mark.parametrize(
    "task, way",
    [
        ("itc", "fsdp2, compiled"),
        pytest.param("itc", "zero 1", marks=NEEDS_DEEPSPEED),
        pytest.param("textmlm", "zero 2", marks=NEEDS_DEEPSPEED),
    ],
)
def test_numbers_and_checkpoints(go, data, task, way):
    expected, _ = go(task, "ddp")
    losses, folder = go(task, way)
    assert losses.keys() == expected.keys()
    for name, values in losses.items():
        assert values == pytest.approx(expected[name], rel=2e-3), name
    named, _ = TASKS[task]
    read = run_here(
        tiny.config(
            named,
            data_root=str(data),
            tokenizer=str(data / "vocab.txt"),
            datasets=["wikibk"] if task == "textmlm" else ["coco"],
            max_text_len=16,
            load_path=str(folder / "checkpoints" / "last.ckpt"),
            fast_dev_run=True,
            max_epoch=1,
            max_steps=None,
            get_recall_metric=False,
        )
    )
    assert all(value == value for value in read.values())


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("way", ["zero 1", "zero 2"])
def test_deepspeed_goes_on(data, tmp_path, way):
    through, folder = trained(data, tmp_path / "through", "irtr", way, max_steps=4, checkpoint_every_n_steps=2)
    (middle,) = folder.glob("checkpoints/*-step=2.ckpt")
    resumed, end = trained(data, tmp_path / "resumed", "irtr", way, max_steps=4, resume_from=f"'{middle}'")
    assert resumed["irtr/train/loss"] == pytest.approx(through["irtr/train/loss"][2:], rel=1e-6)
    before, after = (files.read(each / "checkpoints" / "last.ckpt").tensors for each in (folder, end))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@NEEDS_FAIRSCALE
def test_offloaded_and_accumulated(go):
    expected, _ = go("irtr", "accumulated")
    losses, _ = go("irtr", "offload")
    assert all(losses[name] == pytest.approx(expected[name], rel=1e-4) for name in expected)
