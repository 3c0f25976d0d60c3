"""Whole runs with the options that leave the published recipe: adapters, another contrast, clipped gradients."""

import math

import pytest
import torch

from tests import tables, tiny
from tests.processes import run_on
from vlmo.checkpoint import main
from vlmo.checkpoints.files import TRAINED
from vlmo.errors import VLMoError
from vlmo.training.callbacks import knn

VQA, STAGE3 = "task_finetune_vqa_base_image480", "task_mlm_itm_itc_base"
SMALL = {"batch_size": 4, "per_gpu_batchsize": 4, "image_size": 32}


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_averaged_adapters_resume_exactly_and_are_evaluated_merged(go, tmp_path):
    pytest.importorskip("peft")
    options = SMALL | {"lora_rank": 2, "lora_targets": ["*.attn.*", "*.mlp_*"], "max_steps": 4, "ema_decay": 0.5}
    options |= {"val_check_interval": 1, "checkpoint_every_n_steps": 1, "learning_rate": 1e-2, "drop_path_rate": 0.1}
    through = go(VQA, log_dir=tmp_path / "through", **options)
    half = next((through.folder / "checkpoints").glob("epoch=*-step=2.ckpt"))
    resumed = go(VQA, log_dir=tmp_path / "resumed", resume_from=str(half), **options)
    expected, found = weights(through.last), weights(resumed.last)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(tensor.any() for name, tensor in found.items() if ".lora_B." in name)
    with pytest.raises(VLMoError, match="lora_alpha=3.*was trained with lora_alpha=16"):
        go(VQA, log_dir=tmp_path / "other", resume_from=str(half), **options | {"lora_alpha": 3})

    assert main(["convert", str(through.last), str(tmp_path / "merged.pt")]) == 0
    assert not any("lora" in name or "base_layer" in name for name in torch.load(tmp_path / "merged.pt"))
    for path in (through.last, tmp_path / "merged.pt"):
        evaluated = go(VQA, log_dir=tmp_path / "evaluated", load_path=str(path), test_only=True, image_size=32)
        assert evaluated.metrics["vqa/val/loss"] == pytest.approx(through.metrics["vqa/val/loss"], rel=1e-4)
    # those that the optimizer goes on from, merged likewise
    assert main(["convert", str(through.last), str(tmp_path / "trained.pt"), "--trained-weights"]) == 0
    averaged, trained = (torch.load(tmp_path / f"{name}.pt") for name in ("merged", "trained"))
    content = torch.load(through.last, weights_only=True)
    layer = "transformer.blocks.0.attn.qkv"
    for found, own in ((averaged, expected), (trained, expected | content[TRAINED])):
        b, a = (own[f"{layer}.lora_{part}.default.weight"] for part in "BA")
        merged = own[f"{layer}.base_layer.weight"] + 16 / 2 * b @ a
        assert torch.allclose(found[f"{layer}.weight"], merged, atol=1e-6)
    assert not torch.equal(averaged[f"{layer}.weight"], trained[f"{layer}.weight"])


@pytest.mark.slow
def test_averages_and_adapters_in_two_processes(data, micro, tmp_path):
    """Each has some of the samples; they validate and save what one process does."""
    pytest.importorskip("peft")
    options = SMALL | {"ema_decay": 0.5, "lora_rank": 2, "layout_invariant": True, "batch_size": 7, "model_arch": micro}
    options |= {"per_gpu_batchsize": 2, "max_steps": 4, "val_check_interval": 2, "learning_rate": 1e-2}
    options |= {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "vqav2_label_size": 3, "warmup_steps": 0}
    metrics, saved = {}, {}
    for world in (1, 2):
        config = tiny.config(VQA, log_dir=str(tmp_path / f"{world}"), **options)
        metrics[world] = run_on(world, config, tmp_path / f"{world} processes")[0]
        (last,) = (tmp_path / f"{world}").glob("*/version_*/checkpoints/last.ckpt")
        content = torch.load(last, weights_only=True)
        saved[world] = {"averages": content["state_dict"], "trained": content[TRAINED]}
    for tag in ("vqa/train/loss", "vqa/val/loss", "vqa/val/score"):
        assert metrics[2][tag] == pytest.approx(metrics[1][tag], rel=1e-5), tag
    for which, tensors in saved[1].items():
        assert saved[2][which].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.allclose(saved[2][which][name], tensor, rtol=1e-3, atol=1e-4), (which, name)
    assert not torch.equal(
        saved[1]["averages"]["vqa_classifier.0.weight"], saved[1]["trained"]["vqa_classifier.0.weight"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"ema_decay": 0.5}, {"lora_rank": 2}, {"ema_decay": 0.5, "lora_rank": 2}])
def test_averages_and_adapters_of_compiled_blocks(go, options, tmp_path):
    if "lora_rank" in options:
        pytest.importorskip("peft")
    options = SMALL | options | {"max_steps": 6, "val_check_interval": 2, "learning_rate": 1e-2, "drop_path_rate": 0.0}
    plain, compiled = (go(VQA, log_dir=tmp_path / str(how), compile=how, **options) for how in (False, True))
    for tag in ("vqa/train/loss", "vqa/val/loss"):
        expected = plain.logged(tag)
        assert len(expected) >= 3 and compiled.logged(tag) == pytest.approx(expected, rel=1e-3), tag


@pytest.mark.slow
def test_nearest_neighbours_of_weights_that_are_shared_out(data, micro, monkeypatch, tmp_path):
    """Measured in the middle of a validation; the processes have different numbers of images."""
    (tmp_path / "labelled").mkdir()
    tables.write_labelled_images(tmp_path / "labelled", rows=13)
    monkeypatch.setattr(knn, "SHARE", 26 / 16)
    monkeypatch.setattr(knn, "FEWEST", 1)
    options = SMALL | {"knn_data": str(tmp_path / "labelled"), "datasets": ["coco"], "model_arch": micro}
    options |= {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "layout_invariant": True, "batch_size": 8}
    options |= {"max_steps": 4, "val_check_interval": 2, "learning_rate": 1e-2, "warmup_steps": 0, "loggers": ["csv"]}
    found = {}
    for world, strategy in ((1, "auto"), (2, "ddp"), (2, "fsdp2")):
        config = tiny.config(STAGE3, log_dir=str(tmp_path / strategy), strategy=strategy, **options)
        found[strategy] = run_on(world, config, tmp_path / f"{strategy} processes")[0]
    for strategy in ("ddp", "fsdp2"):
        for tag in ("knn/accuracy", "itc/val/loss", "itc/train/loss"):
            assert found[strategy][tag] == pytest.approx(found["auto"][tag], rel=1e-4), (strategy, tag)


def test_the_norm_of_all_gradients_together_is_clipped(go, tmp_path):
    """A first step of SGD moves the weights by rate x gradient, whose norm is what it is clipped to."""
    options = SMALL | {"weight_decay": 0, "optim_type": "sgd", "lr_mult": 1, "learning_rate": 10.0, "warmup_steps": 0}
    options |= {"datasets": ["coco"], "max_steps": 1}
    start = go(STAGE3, log_dir=tmp_path / "start", **SMALL | {"datasets": ["coco"], "max_steps": 1}).last
    moved = {}
    for limit in (1e-3, 1e3):
        run = go(STAGE3, log_dir=tmp_path / str(limit), load_path=str(start), gradient_clip_val=limit, **options)
        before, after = weights(start), weights(run.last)
        moved[limit] = math.sqrt(sum((after[name] - tensor).square().sum() for name, tensor in before.items())) / 10
        (norm,) = run.logged("train/grad_norm").values()  # before it is clipped
        assert 1e-3 < norm < 1e3
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[1e3] == pytest.approx(norm, rel=1e-2)  # left as it is


@pytest.mark.slow
def test_the_scale_meets_its_limit(go, tmp_path):
    """At a high rate the scale would leave 1 / 0.07 by far more than 2 % in every step."""
    options = SMALL | {"datasets": ["coco"], "learning_rate": 0.1, "warmup_steps": 0, "max_steps": 6}
    free = go(STAGE3, log_dir=tmp_path / "free", **options).logged("itc/train/logit_scale")
    limit = min(max(free.values()), 20) / 1.02
    run = go(STAGE3, log_dir=tmp_path / "limited", logit_scale_max=limit, **options)
    assert max(free.values()) > limit >= max(run.logged("itc/train/logit_scale").values()) / (1 + 1e-6)
    assert weights(run.last)["logit_scale"].exp().item() <= limit * (1 + 1e-6)


@pytest.mark.slow
def test_siglip_trains_evaluates_and_is_cached(go, tmp_path):
    options = SMALL | {"datasets": ["coco"], "contrast_loss": "siglip", "same_image": "mask", "batch_size": 8}
    plain = go(STAGE3, log_dir=tmp_path / "plain", get_recall_metric=True, contrast_cache=True, **options)
    assert {"itc/val/loss", "itm/val/accuracy", "recalls/val_avg"} <= plain.metrics.keys()
    evaluated = go(
        STAGE3,
        log_dir=tmp_path / "evaluated",
        load_path=str(plain.last),
        test_only=True,
        get_recall_metric=True,
        **options,
    )
    assert "recalls/tr_r1" in evaluated.metrics
    # the features are those of any contrast
    assert go("task_finetune_irtr_coco_base_image384", load_path=str(plain.last), image_size=32, max_steps=1).metrics
