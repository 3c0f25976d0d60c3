"""Stage 1: images alone are learnt from, and stage 2 starts from what it leaves."""

import pytest
import torch

from tests import tables, tiny
from tests.unit.modules.test_image_tokenizer import random_encoder, write
from vlmo.checkpoint import convert, show
from vlmo.modules import VLMo

MIM = "task_mim_base"
FAST = {
    "learning_rate": 1e-2,
    "train_transform_keys": ["square_transform"],
    "batch_size": 4,
    "per_gpu_batchsize": 4,
    "warmup_steps": 1,
}


@pytest.fixture(scope="module")
def stage1(go, data):
    tables.write_images(data)
    return go(MIM, **FAST, max_steps=60, tokenizer="there is none", mim_mask_ratio=0.5, image_size=64)


def test_the_reconstruction_improves(stage1):
    losses = list(stage1.logged("mim/train/loss").values())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert 0 < stage1.metrics["mim/val/loss"] < 2


def test_it_owns_no_text(stage1):
    names = set(torch.load(stage1.last, weights_only=True)["state_dict"])
    assert {name for name in names if not name.startswith("transformer.")} == {
        "relative_position_bias_table",
        "mim_mask_token",
        "mim_score.weight",
        "mim_score.bias",
    }
    assert not any("_text" in name or "_vl" in name for name in names)
    assert "stage         1 (vision)" in show(str(stage1.last))


def vision(model):
    return {n: t for n, t in model.state_dict().items() if n.startswith("transformer.") and "_text" not in n}


@pytest.mark.parametrize("plain", [False, True])
def test_stage_2_starts_from_it(stage1, micro, tmp_path, plain):
    path = stage1.last
    if plain:
        path = tmp_path / "stage1.pt"
        convert(str(stage1.last), str(path))
    model = VLMo(tiny.config("task_textmlm_base", model_arch=micro, image_size=64, load_path=str(path)))
    trained = torch.load(stage1.last, weights_only=True)["state_dict"]
    loaded = vision(model)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.items())
    assert torch.equal(model.relative_position_bias_table, trained["relative_position_bias_table"])
    report = model.load_report
    assert "stage1 weights" in report.title
    assert set(report.taken) == {*loaded, "relative_position_bias_table"}
    assert set(report.dropped) == {"mim_mask_token", "mim_score.weight", "mim_score.bias"}
    assert any(name.startswith("text_embeddings.") for name in report.new)


def test_stage_3_at_another_resolution_starts_from_it(stage1, micro):
    options = {"model_arch": micro, "image_size": 32, "load_path": str(stage1.last)}
    model = VLMo(tiny.config("task_mlm_itm_itc_base", **options))
    assert set(model.load_report.resized) == {"relative_position_bias_table"}


def test_it_continues_and_is_evaluated(stage1, go):
    options = FAST | {"mim_mask_ratio": 0.5, "image_size": 64}
    resumed = go(MIM, **options, max_steps=62, resume_from=str(stage1.last))
    assert sorted(resumed.logged("mim/train/loss")) == [60, 61]
    evaluated = go(MIM, **options, load_path=str(stage1.last), test_only=True)
    assert evaluated.metrics["mim/test/loss"] == pytest.approx(stage1.metrics["mim/val/loss"], rel=1e-5)


def test_visual_tokens_of_a_tokenizer_file(go, tmp_path):
    file = write(tmp_path / "encoder.pkl", random_encoder())
    options = {"mim_target": "dalle", "mim_tokenizer": str(file), "datasets": ["coco", "nlvr2"]}
    run = go(MIM, **FAST, **options, max_steps=20)
    losses = run.logged("mim/train/loss")
    assert losses[19] < losses[0]
    assert 0 <= run.metrics["mim/val/accuracy"] <= 1
