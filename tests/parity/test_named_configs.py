"""Every option and named config has the original's values (recorded in goldens/named_configs.json)."""

import json

import pytest

from tests.conftest import GOLDENS
from vlmo.config import ex, resolve
from vlmo.registry import TASKS
from vlmo.settings import Settings

RECORDED = json.loads((GOLDENS / "named_configs.json").read_text())
RECORDED_LOSSES = RECORDED["default"]["loss_names"]


def published(config):
    """The options that the original has, without the losses that are new here: those must be off."""
    new = {name: weight for name, weight in config["loss_names"].items() if name not in RECORDED_LOSSES}
    assert not any(new.values())
    losses = {name: config["loss_names"][name] for name in RECORDED_LOSSES}
    return {name: config[name] for name in RECORDED["default"]} | {"loss_names": losses}


def test_defaults():
    assert published(resolve()) == RECORDED["default"]


@pytest.mark.parametrize("name", RECORDED["named"])
def test_named_config(name):
    expected = RECORDED["default"] | RECORDED["named"][name]
    assert published(resolve(name)) == expected


@pytest.mark.parametrize("name", ex.named_configs)
def test_every_named_config_is_valid(name):
    Settings.from_config(resolve(name))


@pytest.mark.parametrize("size", ["base", "base_plus", "large"])
def test_stage_1_is_trained_as_beit(size):
    config = resolve(f"task_mim_{size}")
    assert config["model_arch"] == f"vlmo_{size}_patch16"
    expected = {
        "batch_size": 2048,
        "learning_rate": 1.5e-3,
        "adamw_betas": [0.9, 0.999],
        "weight_decay": 0.05,
        "warmup_steps": 10000,
        "decay_power": "cosine",
        "gradient_clip_val": 3.0,
    }
    assert {name: config[name] for name in expected} == expected
    assert round(config["mim_mask_ratio"] * (224 // 16) ** 2) == 75


@pytest.mark.parametrize("size, rate, decay, epochs", [("base", 4e-3, 0.65, 100), ("large", 1e-3, 0.75, 50)])
def test_image_classification_is_trained_as_beit(size, rate, decay, epochs):
    config = resolve(f"task_finetune_imagenet_{size}")
    expected = {"learning_rate": rate, "layer_decay": decay, "max_epoch": epochs, "batch_size": 1024, "image_size": 224}
    expected |= {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "weight_decay": 0.05, "decay_power": "cosine"}
    assert {name: config[name] for name in expected} == expected
    results = TASKS["image_classification"].published(Settings.from_config(config))
    assert results == ({"image_classification/test/accuracy": 85.5} if size == "base" else {})


def test_large_stage_2_is_there():
    config = resolve("task_textmlm_large")
    assert (config["batch_size"], config["max_text_len"], config["learning_rate"]) == (1024, 196, 5e-5)
