"""Sharing: folders that AutoModel loads, the hub (a stand-in on this machine), cards, and whether files are whole."""

import hashlib
import time

import pytest
import torch

from tests import tiny
from tests.hub import Hub
from tests.tables import VOCABULARY, picture
from vlmo import checkpoint
from vlmo.checkpoints import pretrained
from vlmo.checkpoints.verification import verify
from vlmo.errors import VLMoError
from vlmo.inference import Predictor
from vlmo.modules.model import VLMoModel

WORDS = list(dict.fromkeys(VOCABULARY))
IMAGES = [picture(seed) for seed in range(2)]
TEXTS = ["the red cat", "a dog runs on the table"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = VLMoModel(
        "vlmo_tiny_patch16", ("vqa", "itc"), image_size=32, vocab_size=64, max_text_len=24, vqav2_label_size=4
    )
    built.vocabulary, built.answers = WORDS, ["yes", "no", "red", "blue"]
    return built.eval()


def assert_same(found, expected):
    assert found.answer(IMAGES, TEXTS, top_k=4) == expected.answer(IMAGES, TEXTS, top_k=4)
    assert torch.equal(found.embed_images(IMAGES), expected.embed_images(IMAGES))
    assert torch.equal(found.embed_texts(TEXTS), expected.embed_texts(TEXTS))


def test_push_and_load(hub, model, tmp_path):
    assert model.push_to_hub("me/model", results={"R@1": 57.2}, licence="mit").endswith("/me/model")
    names = {"README.md", "config.json", "model.safetensors", "modeling_vlmo.py", "vocab.txt"}
    assert set(hub.files["me/model"]) == names and hub.large("me/model") == {"model.safetensors"}
    card = hub.content("me/model", "README.md").decode()
    for said in ("license: mit", "R@1 | 57.2", "fine-tuned for vqa", "model.answer(image, question)", '"me/model"'):
        assert said in card
    assert hashlib.sha256(hub.content("me/model", "model.safetensors")).hexdigest() in card
    assert_same(Predictor.from_pretrained("me/model"), Predictor(model))
    model.save_pretrained(tmp_path / "folder")
    (loaded,) = (tmp_path / "cache").rglob("model.safetensors")
    assert loaded.read_bytes() == (tmp_path / "folder" / "model.safetensors").read_bytes()


def test_weights_in_several_files(hub, model, monkeypatch):
    monkeypatch.setattr(pretrained, "MAX_SHARD_SIZE", "1MB")
    model.push_to_hub("me/model")
    assert len(hub.large("me/model")) > 2
    assert_same(Predictor.from_pretrained("me/model"), Predictor(model))


@pytest.mark.parametrize(
    "refused, said",
    [
        ({"create": 401}, "hf auth login"),
        ({"create": 403}, "hf auth login"),
        ({"batch": 403}, "hf auth login"),
        ({"commit": 401}, "hf auth login"),
        ({"create": 404}, "no such owner"),
        ({"preupload": 400}, r"\(Bad request: no\)"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_line(hub, model, refused, said):
    hub.refused = refused
    with pytest.raises(VLMoError, match=said) as raised:
        model.push_to_hub("me/model")
    assert "me/model" in str(raised.value) and "\n" not in str(raised.value)
    assert not hub.files.get("me/model")


def test_names_that_there_are_not(hub, model):
    with pytest.raises(VLMoError, match="not on the Hugging Face hub"):
        VLMoModel.from_pretrained("me/other")
    with pytest.raises(VLMoError, match="no name on the hub"):
        model.push_to_hub("not a/name at all")


def test_interrupted_transfers(hub, model, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # (before it tries again, for up to a minute)
    hub.interrupted = 100
    with pytest.raises(VLMoError, match="me/model: .*model.safetensors.* push it again") as raised:
        model.push_to_hub("me/model")
    assert "\n" not in str(raised.value) and hub.files["me/model"] == {}  # no half of a model
    hub.interrupted = 1
    model.push_to_hub("me/model")
    hub.interrupted = 100
    with pytest.raises(VLMoError, match="me/model: .* does not answer") as raised:
        VLMoModel.from_pretrained("me/model")
    assert "\n" not in str(raised.value)
    hub.interrupted = 1
    assert_same(Predictor.from_pretrained("me/model"), Predictor(model))


def test_auto_model(model, tmp_path, monkeypatch):
    from transformers import AutoModel, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model.save_pretrained(tmp_path / "folder")
    loaded = AutoModel.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert_same(loaded.predictor(), Predictor(model))
    batch = tiny.batch()
    with torch.no_grad():
        output = loaded(batch["image"], batch["text_ids"], batch["text_masks"])
        assert torch.equal(output.image_embeds, model.image_features(batch["image"]))
        assert torch.equal(output.text_embeds, model.text_features(batch["text_ids"], batch["text_masks"]))
        pair = model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
    assert torch.equal(output.last_hidden_state, pair)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "folder" / "model.safetensors"
    ).read_bytes()


def test_commands(model, tmp_path, hub, capsys):
    content = {
        "state_dict": model.state_dict(),
        "hyper_parameters": {"datasets": ["coco"], "seed": 7},
        "global_step": 9,
    }
    from vlmo.checkpoints.pretrained import metadata_of

    torch.save(content | {"vlmo": metadata_of(model).to_dict()}, tmp_path / "last.ckpt")
    (tmp_path / "results.json").write_text('{"R@1": 12.5}')
    words = ["--results", str(tmp_path / "results.json"), "--license", "apache-2.0"]
    assert checkpoint.main(["save-pretrained", str(tmp_path / "last.ckpt"), str(tmp_path / "folder"), *words]) == 0
    card = (tmp_path / "folder" / "README.md").read_text()
    for said in ("datasets: ['coco']", "seed: 7", "steps done: 9", "R@1 | 12.5", "apache-2.0"):
        assert said in card
    assert checkpoint.main(["verify", str(tmp_path / "folder")]) == 0
    assert checkpoint.main(["push", str(tmp_path / "last.ckpt"), "me/pushed", *words]) == 0
    pushed = hub.content("me/pushed", "model.safetensors")
    assert pushed == (tmp_path / "folder" / "model.safetensors").read_bytes()
    capsys.readouterr()


def test_verify_finds_what_is_wrong(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "folder")
    assert verify(tmp_path / "folder")[1] == []
    weights = tmp_path / "folder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert "SHA-256" in verify(tmp_path / "folder")[1][0]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["pooler.dense.bias"][0] = torch.nan
    del tensors["transformer.norm.weight"]
    tensors["transformer.norm.bias"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "plain.pt")
    wrong = verify(tmp_path / "plain.pt")[1]
    assert [word in line for word, line in zip(("pooler.dense.bias", "norm.weight", "norm.bias"), wrong, strict=True)]
    assert checkpoint.main(["verify", str(tmp_path / "plain.pt"), "--sha256", "0"]) == 1
    assert "WRONG" in capsys.readouterr().out
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:1000])
    assert checkpoint.main(["verify", str(tmp_path / "cut.pt")]) == 2
