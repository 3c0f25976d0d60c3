"""State-dict names and shapes are the original's: released files load, and what we save loads there."""

import json

import pytest
import torch

from tests.conftest import GOLDENS
from vlmo.config import resolve
from vlmo.modules import VLMo

MANIFEST = json.loads((GOLDENS / "state_dict_manifest.json").read_text())


@pytest.mark.parametrize("name", MANIFEST)
def test_names_shapes_and_drop_path(name):
    recorded = MANIFEST[name]
    with torch.device("meta"):
        model = VLMo(resolve(name))
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == recorded["tensors"]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions, 3) == recorded["parameters_millions"]
    rates = [block.drop_path.drop_prob for block in model.transformer.blocks]
    assert rates == pytest.approx(recorded["drop_path"], abs=1e-6)
