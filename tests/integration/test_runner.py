"""Runs of a few steps: every task is trained and evaluated, and everything that a run leaves is there."""

import json
import logging
import math
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger

from tests import tables, tiny
from vlmo.datasets import base_dataset
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.registry import LOGGERS
from vlmo.settings import Settings
from vlmo.training.disk_usage import checkpoint_size
from vlmo.training.preparation import make_run_folder

TEXT = "task_textmlm_base"
STAGE3 = "task_mlm_itm_itc_base"
VQA = "task_finetune_vqa_base_image480"
NLVR2 = "task_finetune_nlvr2_base"
IRTR = "task_finetune_irtr_f30k_base"


# --- every task: trained, then evaluated from what it has written -----------------------------------------------------


@pytest.fixture(scope="module")
def stage2(go):
    return go(TEXT)  # 10 texts: 2 batches an epoch


@pytest.fixture(scope="module")
def stage3(go):
    return go(STAGE3, datasets=["coco", "f30k"], max_steps=8)  # 31 pairs: 7 batches an epoch


@pytest.fixture(scope="module")
def vqa(go):
    return go(VQA)


@pytest.fixture(scope="module")
def nlvr2(go):
    return go(NLVR2)  # 6 statements: 1 batch an epoch


@pytest.fixture(scope="module")
def irtr(go):
    return go(IRTR)


def test_stage_2(stage2, go):
    assert set(stage2.logged("textmlm/train/loss")) == {0, 1, 2}
    assert {"textmlm/val/loss", "textmlm/val/accuracy_epoch", "val/the_metric"} <= set(stage2.metrics)
    assert stage2.metrics["textmlm/val/loss"] == pytest.approx(math.log(64), abs=2)
    again = go(TEXT, test_only=True, load_path=str(stage2.last), batch_size=4)
    assert set(again.metrics) >= {"textmlm/test/loss", "textmlm/test/accuracy", "test/the_metric"}
    # the same texts serve both
    assert again.metrics["textmlm/test/loss"] == pytest.approx(stage2.metrics["textmlm/val/loss"], rel=1e-4)


def test_stage_2_leaves_the_shared_attention_as_it_was(stage2, go):
    trained = torch.load(stage2.last, weights_only=True)["state_dict"]
    first = torch.load(stage2.folder / "checkpoints" / "epoch=0-step=2.ckpt", weights_only=True)["state_dict"]
    changed = {name for name in trained if not torch.equal(trained[name], first[name])}
    assert changed
    assert not [name for name in changed if "attn" in name or "imag" in name or "gamma" in name or "norm1" in name]


def test_stage_3_on_two_sets(stage3):
    assert set(stage3.logged("mlm/train/loss")) == set(range(8))
    last = stage3.rows[-1] | stage3.metrics
    for tag in ("itc/val/i2t_accuracy", "itc/val/t2i_accuracy_epoch", "itm/val/accuracy", "mlm/val/loss_epoch"):
        assert tag in last, tag
    logged = {tag for row in stage3.rows for tag in row}
    assert {"itc/train/loss", "itc/train/i2t_accuracy", "itc/train/logit_scale", "itc/train/vl_logit_scale"} <= logged
    assert {"itm/train/loss", "itm/train/accuracy", "mlm/train/accuracy", "mlm/train/loss_epoch"} <= logged
    primary_metrics = stage3.metrics["itc/val/i2t_accuracy"] + stage3.metrics["itc/val/t2i_accuracy"]
    primary_metrics += stage3.metrics["itm/val/accuracy"] + stage3.metrics["mlm/val/accuracy"]
    assert stage3.metrics["val/the_metric"] == pytest.approx(primary_metrics, rel=1e-5)


def test_vqa(vqa, go, tmp_path):
    assert set(vqa.logged("vqa/train/score")) == {0, 1, 2}
    assert 0 <= vqa.metrics["vqa/val/score_epoch"] <= 1
    assert vqa.metrics["val/the_metric"] == vqa.metrics["vqa/val/score"]
    weights = tmp_path / "best of all.pt"
    vqa.last.rename(weights)
    test = go(VQA, test_only=True, load_path=str(weights))
    submitted = json.loads((test.log_dir / "vqa_submit_best of all.json").read_text())
    assert [row["question_id"] for row in submitted] == [0, 1, 10, 11, 20, 21, 30, 31]
    assert {row["answer"] for row in submitted} <= {f"answer {label}" for label in range(3)}
    assert "test/the_metric" not in test.metrics  # nobody has told the answers of the test set
    assert test.folder.parent.name == "finetune_vqa_base_image480_seed1_from_best of all"


def test_nlvr2(nlvr2, go):
    assert {"nlvr2/dev/accuracy", "nlvr2/dev/accuracy_epoch", "nlvr2/test/accuracy_epoch"} <= set(nlvr2.metrics)
    assert nlvr2.metrics["val/the_metric"] == nlvr2.metrics["nlvr2/dev/accuracy"]
    test = go(NLVR2, test_only=True, load_path=str(nlvr2.last))
    for tag in ("nlvr2/dev/loss", "nlvr2/test/loss", "nlvr2/dev/accuracy_epoch"):
        assert test.metrics[tag] == pytest.approx(nlvr2.metrics[tag], rel=1e-4)


def test_retrieval(irtr, go):
    recalls = {f"{side}_r{k}" for side in ("ir", "tr") for k in (1, 5, 10)}
    expected = {f"recalls/{name}" for name in recalls} | {f"recalls/val_{name}" for name in recalls}
    expected |= {"recalls/val_avg", "recalls/test_avg", "irtr/val/i2t_accuracy", "val/the_metric"}
    assert expected <= set(irtr.metrics)
    mean = sum(irtr.metrics[f"recalls/val_{name}"] for name in recalls) / 6
    assert irtr.metrics["recalls/val_avg"] == pytest.approx(mean, rel=1e-5)
    accuracies = irtr.metrics["irtr/val/i2t_accuracy"] + irtr.metrics["irtr/val/t2i_accuracy"]
    assert irtr.metrics["val/the_metric"] == pytest.approx(accuracies + mean, rel=1e-5)
    assert irtr.metrics["recalls/ir_r10"] == 1  # of three images
    test = go(IRTR, test_only=True, load_path=str(irtr.last))
    for name in ("ir_r1", "tr_r1"):
        assert test.metrics[f"recalls/{name}"] == pytest.approx(irtr.metrics[f"recalls/{name}"])
    assert not any(tag.startswith("recalls/val") for tag in test.metrics)  # test alone is read


def test_a_retrieval_evaluation_reads_each_image_and_each_text_once(irtr, go, monkeypatch):
    """And what it says of the contrast is what a pass over all pairs says."""
    read = Counter()

    def counted(module, name):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: read.update([name]) or plain(*arguments))

    counted(base_dataset, "decode_image")
    counted(base_dataset, "tokenize")
    options = {"test_only": True, "load_path": str(irtr.last), "per_gpu_batchsize": 4}
    apart = go(IRTR, **options).metrics
    assert read == {"decode_image": 3, "tokenize": 15}  # of the test split: five texts an image
    pairs = go(IRTR, **options, get_recall_metric=False).metrics
    assert read["decode_image"] == 3 + 15
    for tag in ("irtr/test/loss", "irtr/test/i2t_accuracy", "irtr/test/t2i_accuracy"):
        assert apart[tag] == pytest.approx(pairs[tag], rel=1e-5)


def test_retrieval_without_a_test_split(irtr, go, data, tmp_path, caplog):
    nothing = {"image": pa.nulls(0), "caption": pa.nulls(0)}
    for name in ("train", "val"):
        shutil.copy(data / f"f30k_caption_karpathy_{name}.arrow", tmp_path)
    tables.write_table(tmp_path / "f30k_caption_karpathy_test.arrow", nothing)
    trained = go(IRTR, data_root=str(tmp_path), max_steps=1)
    assert "f30k_caption_karpathy_test.arrow: has no caption; continuing without it" in caplog.text
    evaluated = go(IRTR, data_root=str(tmp_path), test_only=True, load_path=str(irtr.last))
    for metrics in (trained.metrics, evaluated.metrics):
        assert "recalls/val_avg" in metrics and "recalls/test_avg" not in metrics
    assert evaluated.metrics["recalls/val_ir_r1"] == pytest.approx(irtr.metrics["recalls/val_ir_r1"])


def test_the_stages_start_from_one_another(stage2, stage3, go, capsys):
    go(STAGE3, datasets=["coco"], max_steps=1, load_path=str(stage2.last))
    report = capsys.readouterr().out
    assert "left new" in report and "mlp_vl" in report
    assert go(NLVR2, max_steps=1, load_path=str(stage3.last)).metrics
    assert go(TEXT, max_steps=1, load_path=str(stage2.last), image_size=48).metrics


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_files_of_a_run(stage3):
    assert stage3.folder == stage3.log_dir / "mlm_itm_itc_base_seed1_from_" / "version_0"
    names = {path.name for path in stage3.folder.iterdir()}
    assert {"settings.json", "metrics.csv", "checkpoints"} <= names
    assert [name for name in names if name.startswith("events.out.tfevents")]
    saved = json.loads((stage3.folder / "settings.json").read_text())
    assert Settings.from_config(saved) == Settings.from_config(stage3.config)


def test_a_checkpoint_each_validation_and_the_last(stage2, stage3, nlvr2):
    assert stage2.checkpoints == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert stage3.checkpoints == ["epoch=0-step=7.ckpt", "last.ckpt"]
    assert nlvr2.checkpoints == [f"epoch={epoch}-step={epoch + 1}.ckpt" for epoch in range(3)] + ["last.ckpt"]
    assert torch.load(stage3.last, weights_only=True)["global_step"] == 8


def test_one_last_checkpoint_where_training_ends_before_any_validation(irtr, go):
    run = go(STAGE3, datasets=["coco", "f30k"], max_steps=2)
    assert run.checkpoints == ["last.ckpt"]
    assert torch.load(run.last, weights_only=True)["global_step"] == 2
    assert "itc/val/i2t_accuracy" in run.metrics  # and is validated all the same


def test_sets_without_validation_are_saved_each_epoch(go, data):
    tables.write_captions(data, "vg", rows=2, texts=4, first=50)
    run = go(STAGE3, datasets=["vg"], max_steps=3)
    assert run.checkpoints == ["epoch=0-step=2.ckpt", "epoch=1-step=3.ckpt", "last.ckpt"]
    assert not [tag for tag in run.metrics if "/val/" in tag]


def test_validation_after_a_number_of_batches(go):
    run = go(TEXT, val_check_interval=3, max_steps=3, batch_size=8)  # 2 passes a step: 6 batches, over 3 epochs
    assert len(run.logged("textmlm/val/loss")) == 2
    run = go(TEXT, val_check_interval=0.5, max_steps=2)
    assert len(run.logged("textmlm/val/loss")) == 2


def test_max_steps_decides_whatever_max_epoch_is(go, capsys, caplog):
    run = go(TEXT, max_steps=4, max_epoch=1, batch_size=8, warmup_steps=9)  # 2 batches an epoch, which are one step
    assert run.checkpoints[-2:] == ["epoch=3-step=4.ckpt", "last.ckpt"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("length ")]
    assert "4 steps = 4.0 epochs" in line and "max_epoch=1" in line
    assert "warmup_steps=9" in caplog.text


def test_runs_of_the_same_name_lie_side_by_side(go, tmp_path):
    for _ in range(2):
        run = go(TEXT, log_dir=tmp_path, max_steps=1)
    assert sorted(path.name for path in run.folder.parent.iterdir()) == ["version_0", "version_1"]


def test_runs_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    settings = Settings.from_config(
        tiny.config(TEXT, log_dir=str(tmp_path), num_gpus=2, batch_size=8, per_gpu_batchsize=4)
    )
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(make_run_folder, [settings] * 16))
    assert len(set(folders)) == 16 and all(folder.is_dir() for folder in folders)
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of a run makes none
    assert not make_run_folder(settings).exists()


def test_a_run_that_cannot_begin_leaves_no_folder(go, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGERS, "csv", lambda *_: {}["account"])
    with pytest.raises(VLMoError, match="csv cannot be set up"):
        go(TEXT, log_dir=tmp_path)
    assert not list(tmp_path.glob("*/version_*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_training_in_a_thread(go, tmp_path, caplog, workers):
    caplog.set_level(logging.INFO)
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(go, TEXT, log_dir=tmp_path, max_steps=2, num_workers=workers).result()
    assert run.last.exists() and "main thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_trial_writes_nothing(go, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = go(IRTR, log_dir=tmp_path / "result", fast_dev_run=True, max_steps=None)
    assert list(tmp_path.iterdir()) == []
    assert "irtr/val/loss" in run.metrics
    assert "logs and checkpoints" not in capsys.readouterr().out


def test_console(go, capsys):
    run = go(STAGE3, datasets=["coco"], max_steps=2, batch_size=8)
    out = capsys.readouterr().out
    assert "batch      8 = 4 a device x 1 devices x 1 nodes x 2 accumulated" in out
    for step in ("step 1/2  loss ", "step 2/2  loss "):
        assert out.count(step) == 1
    assert "GiB" in out and "itm/val/accuracy" in out
    assert f"logs and checkpoints: {run.folder}" in out


class Recording(Logger):
    """A logger from outside, which keeps what it is given."""

    name, version = "recording", "0"

    def __init__(self):
        super().__init__()
        self.tags = set()

    def log_hyperparams(self, params, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.tags |= set(metrics)


def test_callbacks_and_loggers_from_outside(go):
    class Counting(Callback):
        steps = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.steps += 1

    counting, recording = Counting(), Recording()
    run = go(TEXT, max_steps=2, callbacks=[counting], more_loggers=[recording])
    assert counting.steps == 2
    assert {"train/loss", "train/grad_norm", "textmlm/train/loss", "textmlm/val/loss"} <= recording.tags
    assert run.logged("train/loss")  # those of the options are there too


@pytest.mark.parametrize("loggers", [[], ["tensorboard"]])
def test_without_csv(go, tmp_path, loggers):
    run = go(TEXT, log_dir=tmp_path, max_steps=2, loggers=loggers, checkpoint_every_n_steps=1)
    assert {path.name for path in run.folder.iterdir()} >= {"settings.json", "checkpoints"}
    assert run.checkpoints == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "last.ckpt"]
    assert "textmlm/val/loss" in run.metrics
    again = go(TEXT, log_dir=tmp_path, max_steps=3, loggers=loggers, resume_during_training=True)
    assert again.folder.name == "version_1" and steps_of(again.last) == 3


def test_the_loss_that_is_minimised_is_logged_and_shown(go, capsys):
    run = go(STAGE3, datasets=["coco"], max_steps=1, loss_names={"mlm": 0.5, "itm": 0})
    parts = [run.logged(f"{name}/train/loss")[0] for name in ("itc", "mlm")]
    total = parts[0] + 0.5 * parts[1]
    assert run.logged("train/loss")[0] == pytest.approx(total, rel=1e-5)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/1"))
    assert f"loss {total:.3f} = itc {parts[0]:.3f} + 0.5 x mlm {parts[1]:.3f}" in line
    assert f"grad {run.logged('train/grad_norm')[0]:.3g}" in line


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "lamb"])
@pytest.mark.parametrize("task", [TEXT, VQA])  # with frozen weights; with weights that the loss does not reach
def test_the_size_of_a_checkpoint_is_known_before(go, task, optimizer):
    run = go(task, optim_type=optimizer, max_steps=1, model_arch="vlmo_tiny_patch16")
    expected = checkpoint_size(VLMo(run.config), optimizer)
    assert run.last.stat().st_size == pytest.approx(expected, rel=0.05)  # (names and metadata are not counted)


@pytest.mark.parametrize("optimizer", ["lion", "muon"])
def test_an_optimizer_of_timm_with_layer_decay_goes_on_exactly(go, tmp_path, optimizer):
    options = {"optim_type": optimizer, "layer_decay": 0.7, "checkpoint_every_n_steps": 1, "learning_rate": 1e-3}
    through = go(TEXT, log_dir=tmp_path / "through", **options)
    middle = through.folder / "checkpoints" / "epoch=0-step=1.ckpt"
    resumed = go(TEXT, log_dir=tmp_path / "resumed", resume_from=str(middle), **options)
    first, second = (torch.load(run.last, weights_only=True)["state_dict"] for run in (through, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the same again ---------------------------------------------------------------------------------------------------


def training_losses(run):
    return run.logged("irtr/train/loss")


def test_the_same_seed_gives_the_same_losses_for_any_number_of_workers(go):
    options = {"max_steps": 7, "drop_path_rate": 0.2, "get_recall_metric": False}  # more than two epochs
    first = training_losses(go(IRTR, **options))
    assert len(first) == 7
    assert training_losses(go(IRTR, **options)) == first
    assert training_losses(go(IRTR, **options, num_workers=2)) == first
    assert training_losses(go(IRTR, **options, seed=2)) != first


def test_the_seed_gives_the_weights(go):
    def frozen(seed):  # by stage 2, so as they began
        return torch.load(go(TEXT, seed=seed, max_steps=1).last, weights_only=True)["state_dict"][
            "transformer.cls_token"
        ]

    assert torch.equal(frozen(1), frozen(1))
    assert not torch.equal(frozen(1), frozen(2))


def test_accumulation_takes_the_same_samples(go):
    options = {"drop_path_rate": 0.0, "max_steps": 2, "datasets": ["wikibk"]}
    whole = go(TEXT, **options, per_gpu_batchsize=4, batch_size=4)
    parts = go(TEXT, **options, per_gpu_batchsize=2, batch_size=4)
    assert parts.metrics["textmlm/val/loss"] == pytest.approx(whole.metrics["textmlm/val/loss"], rel=1e-3)


def steps_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_resuming_goes_on_where_the_run_was(go, tmp_path):
    options = {"drop_path_rate": 0.0, "get_recall_metric": False, "decay_power": 1}
    through = go(IRTR, log_dir=tmp_path / "through", max_steps=5, **options)
    middle = through.folder / "checkpoints" / "epoch=0-step=3.ckpt"
    resumed = go(IRTR, log_dir=tmp_path / "resumed", max_steps=5, resume_from=str(middle), **options)
    assert training_losses(resumed) == pytest.approx(
        {step: loss for step, loss in training_losses(through).items() if step >= 3}, rel=1e-5
    )
    assert steps_of(resumed.last) == 5
    weights, again = (torch.load(run.last, weights_only=True)["state_dict"] for run in (through, resumed))
    assert all(torch.allclose(weights[name], again[name], atol=1e-7) for name in weights)


def test_resuming_during_training_finds_the_newest(go, tmp_path):
    options = {"log_dir": tmp_path, "get_recall_metric": False, "resume_during_training": True}
    first = go(IRTR, max_steps=2, **options)  # there is none to begin with
    assert sorted(training_losses(first)) == [0, 1]
    second = go(IRTR, max_steps=4, **options)
    assert sorted(training_losses(second)) == [2, 3]
    third = go(IRTR, max_steps=5, **options)
    assert sorted(training_losses(third)) == [4]
    assert [path.name for path in sorted(second.folder.parent.iterdir())] == ["version_0", "version_1", "version_2"]
    assert steps_of(third.last) == 5


@pytest.mark.parametrize("what", ["weights alone", "another task", "no checkpoint"])
def test_what_cannot_be_resumed(go, stage3, tmp_path, what):
    path = tmp_path / "start.ckpt"
    if what == "weights alone":
        torch.save(torch.load(stage3.last, weights_only=True)["state_dict"], path)
    elif what == "another task":
        path = stage3.last
    else:
        path.write_bytes(b"nothing")
    with pytest.raises(VLMoError, match=str(path)):
        go(NLVR2, log_dir=tmp_path / "result", resume_from=str(path))
    assert not (tmp_path / "result").exists()


def test_weights_of_the_losses(go):
    options = {"datasets": ["coco"], "max_steps": 1, "drop_path_rate": 0.0}
    whole, half = go(STAGE3, **options), go(STAGE3, **options, loss_names={"mlm": 0.5, "itm": 0})
    assert half.logged("mlm/train/loss")[0] == pytest.approx(whole.logged("mlm/train/loss")[0], rel=1e-5)
    assert "itm/train/loss" not in {tag for row in half.rows for tag in row}


# --- images that cannot be decoded ------------------------------------------------------------------------------------


@pytest.fixture
def damaged(data, tmp_path):
    """Makes a folder whose coco tables have 200 captions a split, of which some belong to damaged images."""

    def made(train=0, val=0, test=0):
        for split, bad in (("train", train), ("val", val), ("test", test)):
            images = [tables.png(row % 7) if row >= bad else b"damaged" for row in range(200)]
            columns = {"image": images, "caption": [["a red cat"]] * 200}
            columns |= {"image_id": [str(row) for row in range(200)], "split": [split] * 200}
            tables.write_table(tmp_path / f"coco_caption_karpathy_{split}.arrow", columns)
        return {"data_root": str(tmp_path), "datasets": ["coco"], "batch_size": 20, "per_gpu_batchsize": 20}

    return made


def test_a_few_damaged_images_are_left_out_and_counted(go, damaged, caplog):
    with caplog.at_level(logging.WARNING):
        run = go(STAGE3, **damaged(train=2, val=1), max_steps=10, loss_names={"itm": 0, "mlm": 0})
    assert len([line for line in caplog.messages if line.startswith("left out: coco_caption_karpathy_train")]) == 2
    assert "train: 2 samples left out, their images cannot be decoded" in caplog.text
    assert "val: 1 samples left out" in caplog.text
    assert len((run.folder / "unreadable_images.txt").read_text().splitlines()) == 3
    assert len(run.logged("itc/train/loss")) == 10


def test_damaged_images_of_an_evaluation(go, stage3, damaged, caplog):
    options = damaged(test=2)
    with caplog.at_level(logging.WARNING):
        run = go(STAGE3, **options, test_only=True, load_path=str(stage3.last))
    assert "test: 2 samples left out" in caplog.text
    assert run.metrics["itc/test/loss"] > 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_damaged_images_stop_the_run(go, damaged, split):
    with pytest.raises(VLMoError, match=rf"\d of 200 {split} samples have images that cannot be decoded, more than 1%"):
        go(STAGE3, **damaged(**{split: 5}), max_steps=10, loss_names={"itm": 0, "mlm": 0})
