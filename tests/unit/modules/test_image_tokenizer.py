"""DALL-E's tokenizer from a file in its published form, with random weights."""

import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmo.checkpoints.files import read_pickled_module
from vlmo.errors import VLMoError
from vlmo.modules.image_tokenizer import DalleEncoder
from vlmo.tasks.mim import load_tokenizer


def write(path, encoder, package="published_encoder"):
    """Pickles the network whole, as instances of classes of a package that is then not there any more."""
    module = types.ModuleType(package)
    sys.modules[package] = module
    classes = {}
    for part in encoder.modules():
        if type(part).__module__.startswith("vlmo."):
            name = type(part).__name__
            classes[name] = classes.get(name) or type(name, (nn.Module,), {"__module__": package})
            setattr(module, name, classes[name])
            part.__class__ = classes[name]
            part.note = {"device": torch.device("cpu"), "sizes": (1, 2), "use_float16": True}
    try:
        torch.save(encoder, path)
    finally:
        del sys.modules[package]
    return path


def random_encoder(codes=32):
    encoder = DalleEncoder(width=8, blocks=2, codes=codes)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.01 if name.endswith(".b") else 0.5))
    return encoder


def by_formula(weights, image):
    """The published architecture, written out."""

    def conv(x, name):
        w = weights[f"blocks.{name}.w"]
        return F.conv2d(x, w, weights[f"blocks.{name}.b"], padding=(w.shape[-1] - 1) // 2)

    x = conv(0.8 * image + 0.1, "input")
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            here = f"group_{group}.block_{block}"
            residual = x
            for number in (1, 2, 3, 4):
                residual = conv(residual.relu(), f"{here}.res_path.conv_{number}")
            x = (conv(x, f"{here}.id_path") if group > 1 and block == 1 else x) + residual / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv(x.relu(), "output.conv")


def test_a_published_file(tmp_path):
    encoder = random_encoder()
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    loaded = load_tokenizer(write(tmp_path / "encoder.pkl", encoder))
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    image = torch.rand(2, 3, 32, 32)
    assert torch.allclose(loaded(image), by_formula(weights, image), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_published_size():
    with torch.device("meta"):
        encoder = DalleEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert encoder(torch.zeros(1, 3, 112, 112, device="meta")).shape == (1, 8192, 14, 14)


def test_one_token_a_patch_at_half_the_resolution():
    encoder = random_encoder()
    image = 2 * torch.rand(2, 3, 64, 64) - 1
    tokens = encoder.visual_tokens(image, window=4)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    half = F.interpolate(image / 2 + 0.5, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(tokens, encoder(half).argmax(1).flatten(1))
    assert len(tokens.unique()) > 1


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm_was_done",)


def test_no_code_of_the_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"network": Harmful()}, "encoder.pkl")
    with pytest.raises(VLMoError, match="holds no pickled network|cannot be read as a pickled network"):
        read_pickled_module("encoder.pkl")
    assert not os.path.exists("harm_was_done")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(VLMoError, match="no such file"):
        load_tokenizer(tmp_path / "absent.pkl")
    (tmp_path / "text.pkl").write_text("not a network")
    with pytest.raises(VLMoError, match="cannot be read as a pickled network"):
        load_tokenizer(tmp_path / "text.pkl")
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pkl")
    with pytest.raises(VLMoError, match="holds no pickled network"):
        load_tokenizer(tmp_path / "plain.pkl")
    torch.save(nn.Linear(2, 2), tmp_path / "linear.pkl")
    with pytest.raises(VLMoError, match="is not the encoder of DALL-E's tokenizer"):
        load_tokenizer(tmp_path / "linear.pkl")
    lacking = random_encoder()
    del lacking.blocks.group_2.block_2
    with pytest.raises(VLMoError, match="is not the encoder of DALL-E's tokenizer"):
        load_tokenizer(write(tmp_path / "lacking.pkl", lacking))
    with pytest.raises(VLMoError, match="has 9000 codes"):
        load_tokenizer(write(tmp_path / "large.pkl", random_encoder(9000)))
