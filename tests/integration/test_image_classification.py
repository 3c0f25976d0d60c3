"""Image classification from files of stages 1 and 3, with averaged weights; going on from any of its checkpoints."""

import csv

import pytest
import torch

from tests import tables
from tests.integration.test_resume import same
from vlmo.checkpoint import show
from vlmo.checkpoints.files import TRAINED
from vlmo.inference import Predictor

TASK = "task_finetune_imagenet_base"
OPTIONS = {
    "image_size": 32,
    "num_classes": 3,
    "learning_rate": 1e-3,
    "ema_decay": 0.5,
    "layer_decay": 1.0,
    "drop_path_rate": 0.2,
    "batch_size": 8,
    "max_steps": 5,
    "val_check_interval": 3,
    "tokenizer": "there is none",
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    tables.write_labelled_images(root, rows=14)
    return root


@pytest.fixture(scope="module")
def tuned(go, labelled):
    return go(TASK, **OPTIONS, data_root=str(labelled), checkpoint_every_n_steps=1)


def saved(path):
    return torch.load(path, weights_only=True)


def test_a_resumed_run_ends_with_the_same_weights_and_averages(tuned, go, labelled):
    expected = saved(tuned.last)
    assert not same(expected["state_dict"], expected["state_dict"] | expected[TRAINED])
    # in the middle of what is accumulated, where a validation has just been made, and in between
    for path in sorted((tuned.folder / "checkpoints").glob("epoch*"))[:3:2]:
        resumed = go(TASK, **OPTIONS, data_root=str(labelled), resume_from=str(path))
        found = saved(resumed.last)
        for part in ("state_dict", TRAINED, "optimizer_states", "lr_schedulers", "vlmo_resume"):
            assert same(expected[part], found[part]), (path, part)


def test_without_averages_the_same_is_learnt(tuned, go, labelled):
    plain = go(TASK, **OPTIONS | {"ema_decay": 0.0}, data_root=str(labelled))
    found, expected = saved(plain.last), saved(tuned.last)
    assert TRAINED not in found and set(found["state_dict"]) == set(expected["state_dict"])
    assert same(found["state_dict"], expected["state_dict"] | expected[TRAINED])
    assert same(found["optimizer_states"], expected["optimizer_states"])


def test_a_run_goes_on_without_averages(tuned, go, labelled):
    first = sorted((tuned.folder / "checkpoints").glob("epoch*"))[0]
    resumed = go(TASK, **OPTIONS | {"ema_decay": 0.0}, data_root=str(labelled), resume_from=str(first))
    found, expected = saved(resumed.last), saved(tuned.last)
    assert TRAINED not in found and same(found["state_dict"], expected["state_dict"] | expected[TRAINED])


def test_the_averages_are_what_is_validated_tested_and_used(tuned, go, labelled):
    options = OPTIONS | {"load_path": str(tuned.last), "test_only": True}
    tested = go(TASK, **options, data_root=str(labelled))
    for name in ("loss", "accuracy", "accuracy_top5"):
        key = f"image_classification/{{}}/{name}"
        assert tested.metrics[key.format("test")] == pytest.approx(tuned.metrics[key.format("val")], rel=1e-5)
    with (tested.log_dir / "image_classification_last.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image_id"] for row in rows) == sorted(f"val/{row % 3}/{row}.png" for row in range(14))
    right = sum(row["class_1"] == f"class {row['image_id'].split('/')[1]}" for row in rows)
    assert right / 14 == pytest.approx(tested.metrics["image_classification/test/accuracy"])
    predictor = Predictor.from_pretrained(tuned.last)
    best = predictor.classify_image(tables.picture(0), top_k=2)
    assert len(best) == 2 and best[0].text.startswith("class ") and best[0].score >= best[1].score
    assert "fine-tuned for image_classification" in show(str(tuned.last))


@pytest.mark.parametrize("stage", ["task_mim_base", "task_mlm_itm_itc_base"])
def test_it_starts_from_a_pre_trained_file(stage, go, data, labelled):
    tables.write_images(data)
    pretrained = go(stage, max_steps=1, datasets=["images" if "mim" in stage else "coco"])
    run = go(
        TASK, **OPTIONS | {"max_steps": 1, "ema_decay": 0.0}, data_root=str(labelled), load_path=str(pretrained.last)
    )
    start = saved(pretrained.last)["state_dict"]
    now = saved(run.last)["state_dict"]
    for name in ("transformer.patch_embed.proj.weight", "transformer.blocks.2.mlp_imag.fc1.weight"):
        assert torch.allclose(start[name], now[name], atol=2e-3) and start[name].std() > 0.01
    types = start.get("token_type_embeddings.weight", torch.zeros_like(now["token_type_embeddings.weight"]))
    assert torch.allclose(types, now["token_type_embeddings.weight"], atol=2e-3)
    assert not any("_text" in name or "_vl" in name for name in now)
