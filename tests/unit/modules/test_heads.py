"""The networks on top, by their formulas."""

import pytest
import torch
import torch.nn.functional as F

from vlmo.modules.heads import classifier
from vlmo.modules.model import Pooler, init_head
from vlmo.tasks.itc import ITCHead
from vlmo.tasks.itm import ITMHead
from vlmo.tasks.mlm import MLMHead


def test_pooler_reads_position_0():
    pooler, hidden = Pooler(6), torch.randn(2, 5, 6)
    expected = torch.tanh(hidden[:, 0] @ pooler.dense.weight.T + pooler.dense.bias)
    assert torch.allclose(pooler(hidden), expected, atol=1e-6)


def test_contrastive_features_have_unit_length_and_no_bias():
    head, x = ITCHead(6), torch.randn(3, 6)
    projected = x @ head.fc.weight.T
    assert torch.allclose(head(x), projected / projected.norm(dim=1, keepdim=True), atol=1e-6)
    assert set(head.state_dict()) == {"fc.weight"}


def test_matching_head():
    assert ITMHead(6)(torch.randn(3, 6)).shape == (3, 2)


def test_mlm_head_is_berts_with_an_untied_decoder():
    head, x = MLMHead(6, 11), torch.randn(2, 5, 6)
    with torch.no_grad():
        head.bias.normal_()
    dense, norm = head.transform.dense, head.transform.LayerNorm
    hidden = F.layer_norm(F.gelu(x @ dense.weight.T + dense.bias), (6,), norm.weight, norm.bias, 1e-12)
    assert torch.allclose(head(x), hidden @ head.decoder.weight.T + head.bias, atol=1e-5)
    assert set(head.state_dict()) == {
        "bias",
        "decoder.weight",
        *(f"transform.{part}.{kind}" for part in ("dense", "LayerNorm") for kind in ("weight", "bias")),
    }


def test_classifier():
    layers, x = classifier(6, 12, 5), torch.randn(3, 6)
    first, norm, _, last = layers
    hidden = F.gelu(F.layer_norm(first(x), (12,), norm.weight, norm.bias, 1e-5))
    assert torch.allclose(layers(x), last(hidden), atol=1e-6)
    assert [layer.weight.shape for layer in (first, last)] == [(12, 6), (5, 12)]


def test_initial_values():
    head = MLMHead(100, 200)
    init_head(head)
    for name, parameter in head.named_parameters():
        if name == "transform.LayerNorm.weight":
            assert (parameter == 1).all()
        elif "bias" in name:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
