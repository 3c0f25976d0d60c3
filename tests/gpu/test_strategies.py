"""Precisions and strategies that need GPUs: the same run on each, against one GPU or one CPU in float32."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run
from tests import tables, tiny
from vlmo.modules import VLMo
from vlmo.training.runner import run as run_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
REPOSITORY = Path(run.__file__).parent
GPUS = torch.cuda.device_count()
DEVICES = min(GPUS, 2)  # sharding over a single GPU goes through the same code
NAMED = "task_mlm_itm_itc_base"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tables.write_coco(root)
    tables.write_vocabulary(root)
    return root


def train(data, log_dir, **options):
    """The losses of three steps and the newest checkpoint."""
    options = {
        "data_root": data,
        "tokenizer": data / "vocab.txt",
        "model_arch": "vlmo_tiny_patch16",
        "datasets": "['coco']",
        "loss_names.itm": 0,  # (its negatives are drawn: other numbers in another precision)
        "drop_path_rate": 0,
        "image_size": 32,
        "vocab_size": 64,
        "max_text_len": 16,
        "batch_size": 4,
        "per_gpu_batchsize": 4 // DEVICES,
        "num_gpus": DEVICES,
        "num_workers": 0,
        "precision": 32,
        "max_steps": 3,
        "log_every_n_steps": 1,
        "val_check_interval": 1.0,
        "log_dir": log_dir,
    } | options
    words = [f"{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, "run.py", "with", NAMED, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = log_dir.glob("*/version_*")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {name: [float(row[name]) for row in rows if row[name]] for name in ("itc/train/loss", "mlm/train/loss")}
    return losses, folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"precision": 16}, 0.02),
        ({"precision": "bf16"}, 0.05),
        ({"activation_checkpointing": True}, 1e-3),
        ({"activation_checkpointing": "offload"}, 1e-3),
        ({"strategy": "fsdp2"}, 1e-3),
        ({"strategy": "fsdp2", "precision": 16}, 0.02),
        ({"strategy": "fsdp2", "precision": "bf16", "activation_checkpointing": True, "compile": True}, 0.05),
        ({"strategy": "fsdp2_cpu_offload", "checkpoint_every_n_steps": 1}, 1e-3),
        ({"use_sharded_training": True}, 1e-3),
        ({"use_sharded_training": True, "precision": "bf16"}, 0.05),
        ({"strategy": "deepspeed_stage_2", "precision": 16}, 0.05),
    ],
)
def test_the_numbers_of_float32_and_a_checkpoint_that_one_process_reads(data, tmp_path, options, tolerance):
    for package, needed in (
        ("deepspeed", "deepspeed" in str(options) or "sharded" in str(options)),
        ("fairscale", "offload" in options.values()),
    ):
        if needed:
            pytest.importorskip(package)
    expected, _ = train(data, tmp_path / "plain")
    losses, checkpoint = train(data, tmp_path / "other", **options)
    for name, values in expected.items():
        assert losses[name] == pytest.approx(values, rel=tolerance), name
    model = VLMo(tiny.config(NAMED, max_text_len=16, loss_names={"itm": 0}, load_path=str(checkpoint)))
    assert not model.load_report.new


def test_one_gpu_computes_what_the_cpu_does(data, tmp_path):
    options = {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "datasets": ["coco"], "max_text_len": 16}
    options |= {"loss_names": {"itm": 0}, "fast_dev_run": True, "max_steps": None, "max_epoch": 1}
    there, here = (
        run_here(tiny.config(NAMED, num_gpus=gpus, log_dir=str(tmp_path / str(gpus)), **options)) for gpus in (1, 0)
    )
    assert there["itc/val/loss"] == pytest.approx(here["itc/val/loss"], rel=1e-3)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_process_without_readable_images(data, tmp_path):
    """The kernels of a GPU take a batch without samples, and nobody waits."""
    root = tmp_path / "data"
    root.mkdir()
    images = [tables.png(row % 7) if row else b"damaged" for row in range(200)]
    columns = {"image": images, "caption": [["a red cat"]] * 200, "image_id": [""] * 200, "split": ["train"] * 200}
    for split in ("train", "val"):
        tables.write_table(root / f"coco_caption_karpathy_{split}.arrow", columns)
    options = {"data_root": root, "batch_size": 2, "per_gpu_batchsize": 1, "max_steps": 100, "precision": "bf16"}
    losses, _ = train(data, tmp_path / "result", **options, **{"loss_names.itm": 1})
    assert len(losses["itc/train/loss"]) >= 99
    (listing,) = (tmp_path / "result").glob("*/version_0/unreadable_images.txt")
    assert "train: coco_caption_karpathy_train: image row 0" in listing.read_text()


def test_a_batch_without_samples_on_the_gpu():
    for arch in ("vlmo_tiny_patch16", "vlmo_base_plus_patch16"):
        model = VLMo(tiny.config(NAMED, model_arch=arch, loss_names={"itm": 0})).cuda().train()
        with torch.autocast("cuda", torch.float16):
            loss = sum(output.loss for output in model(model.empty_batch()).values())
        loss.backward()
        assert loss.item() == 0
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            name for name, _ in model.trained_parameters()
        }
