"""Sharing: folders that AutoModel loads, the hub (a stand-in on this machine), cards, and whether files are whole."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from tests import tiny
from tests.tables import VOCABULARY, picture
from vlmo import checkpoint
from vlmo.checkpoints.verification import verify
from vlmo.errors import VLMoError
from vlmo.inference import Predictor
from vlmo.modules.model import VLMoModel

WORDS = list(dict.fromkeys(VOCABULARY))
IMAGES = [picture(seed) for seed in range(2)]
TEXTS = ["the red cat", "a dog runs on the table"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few requests that pushing and loading small files makes."""

    protocol_version = "HTTP/1.1"
    files: dict[str, dict[str, bytes]] = {}  # by repository

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body, parts = self.rfile.read(size), self.path.strip("/").split("?")[0].split("/")
        url = f"http://127.0.0.1:{self.server.server_port}"
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.files.setdefault(name, {})
            return self.answer({"url": f"{url}/{name}", "name": name})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if name not in self.files:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if parts[4] == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/{name}/commit/{COMMIT}"})

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name not in self.files:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files = self.files[name]
        if parts[0] != "api":  # owner/name/resolve/commit/file
            data = files.get("/".join(parts[4:]))
            if data is None:
                return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self.answer(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        if len(parts) > 4 and parts[4] == "tree":
            oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
            return self.answer([{"type": "file", "path": p, "size": len(d), "oid": oids[p]} for p, d in files.items()])
        siblings = [{"rfilename": path} for path in files]
        return self.answer(
            {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        )

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "files", {})
    yield Hub.files
    server.shutdown()
    server.server_close()


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


def test_push_and_load(hub, model):
    assert model.push_to_hub("me/model", results={"R@1": 57.2}, licence="mit").endswith("/me/model")
    assert set(hub["me/model"]) == {"README.md", "config.json", "model.safetensors", "modeling_vlmo.py", "vocab.txt"}
    card = hub["me/model"]["README.md"].decode()
    for said in ("license: mit", "R@1 | 57.2", "fine-tuned for vqa", "model.answer(image, question)", '"me/model"'):
        assert said in card
    assert hashlib.sha256(hub["me/model"]["model.safetensors"]).hexdigest() in card
    assert_same(Predictor.from_pretrained("me/model"), Predictor(model))
    with pytest.raises(VLMoError, match="not on the Hugging Face hub"):
        VLMoModel.from_pretrained("me/other")
    with pytest.raises(VLMoError, match="no name on the hub"):
        model.push_to_hub("not a/name at all")


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
    assert hub["me/pushed"]["model.safetensors"] == (tmp_path / "folder" / "model.safetensors").read_bytes()
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
