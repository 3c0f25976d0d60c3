"""Every option and named config has the original's values (recorded in goldens/named_configs.json)."""

import json

import pytest

from tests.conftest import GOLDENS
from vlmo.config import ex, resolve
from vlmo.settings import Settings

RECORDED = json.loads((GOLDENS / "named_configs.json").read_text())


def test_defaults():
    config = resolve()
    assert {name: config[name] for name in RECORDED["default"]} == RECORDED["default"]


@pytest.mark.parametrize("name", RECORDED["named"])
def test_named_config(name):
    expected = RECORDED["default"] | RECORDED["named"][name]
    config = resolve(name)
    assert {option: config[option] for option in expected} == expected


@pytest.mark.parametrize("name", ex.named_configs)
def test_every_named_config_is_valid(name):
    Settings.from_config(resolve(name))


def test_large_stage_2_is_there():
    config = resolve("task_textmlm_large")
    assert (config["batch_size"], config["max_text_len"], config["learning_rate"]) == (1024, 196, 5e-5)
