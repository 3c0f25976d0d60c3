"""Parameters frozen by name, and adapters (LoRA) that are trained in place of linear layers and merged for use."""

import sys

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests import tiny
from tests.processes import in_processes
from vlmo.checkpoint import main
from vlmo.checkpoints.files import read
from vlmo.checkpoints.loading import vlmo_names
from vlmo.errors import VLMoError
from vlmo.modules import VLMo, VLMoModel
from vlmo.settings import Settings
from vlmo.training.environment import Environment
from vlmo.training.summary import summary
from vlmo.training.unused_parameters import exclude_from_ddp, unused_parameters

VQA, NLVR2, STAGE3 = "task_finetune_vqa_base_image480", "task_finetune_nlvr2_base", "task_mlm_itm_itc_base"


def trained(model):
    return {name for name, _ in model.trained_parameters()}


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_frozen_by_name():
    plain = tiny.model(VQA)
    model = tiny.model(VQA, freeze=["transformer.blocks.[01].*", "*.mlp_imag.*"])
    chosen = {name for name, _ in plain.named_parameters() if ".mlp_imag." in name}
    below = ("transformer.blocks.0.", "transformer.blocks.1.")
    chosen |= {name for name, _ in plain.named_parameters() if name.startswith(below)}
    assert trained(model) == trained(plain) - chosen
    assert set(model.frozen) == chosen
    in_groups = {name for group in model.parameter_groups() for name in group["names"]}
    assert in_groups == trained(model)
    printed = summary(model.settings, Environment("cpu", 1, 1, "auto", "32-true", None), model)
    assert f"in {len(chosen)} tensors are frozen by freeze=" in printed


def test_gradients_reach_what_is_neither_frozen_nor_unused():
    """By these names DDP is told what not to wait for."""
    model = tiny.model(STAGE3, freeze=["*.attn.*", "text_embeddings.*"], loss_names={"mlm": 0}).train()
    sum(output.loss for output in model(tiny.batch()).values()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == trained(model)
    assert {name for name, _ in model.named_parameters()} - reached == unused_parameters(model) | set(model.frozen)


def test_stage_2_freezes_as_ever():
    plain = tiny.model("task_textmlm_base")
    model = tiny.model("task_textmlm_base", freeze=["mlm_score.*"])
    assert trained(model) == {name for name in trained(plain) if not name.startswith("mlm_score.")}


@pytest.mark.parametrize(
    "patterns, said",
    [(["transfomer.blocks.0.*"], "freeze: 'transfomer.blocks.0.*' matches no name"), (["*"], "nothing is left")],
)
def test_patterns_that_cannot_be_meant(patterns, said):
    with pytest.raises(VLMoError) as error:
        tiny.model(VQA, freeze=patterns)
    assert said in str(error.value)


def test_evaluation_freezes_nothing(tmp_path):
    model = tiny.model(VQA)
    torch.save(model.state_dict(), tmp_path / "file.pt")
    evaluated = tiny.model(VQA, test_only=True, load_path=str(tmp_path / "file.pt"), freeze=["*"], lora_rank=2)
    assert evaluated.state_dict().keys() == model.state_dict().keys()


PARTS = {"frozen": {"freeze": ["transformer.blocks.0.*", "*.attn.*"]}, "adapters": {"lora_rank": 2}}


def gradients(model, batch, parallel=False):
    run = model
    if parallel:  # (which fails in its second pass if a parameter that it waits for got no gradient)
        exclude_from_ddp(model)
        run = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        run(batch)["vqa"].loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def made(part):
    torch.manual_seed(0)
    return tiny.model(VQA, **PARTS[part]).train()


def test_two_processes_as_one(tmp_path):
    pytest.importorskip("peft")
    batch = tiny.batch((6, 9, 12, 7))

    def work(rank):
        half = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
        return {part: gradients(made(part), half, True) for part in PARTS}

    found = in_processes(work, tmp_path)
    for part in PARTS:
        model = made(part)
        expected = gradients(model, batch)
        for result in found:
            assert result[part].keys() == expected.keys() == trained(model)
            for name, gradient in expected.items():
                assert (result[part][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path):
    """Builds a model and the same with adapters, from one file."""
    pytest.importorskip("peft")

    def build(named, **options):
        plain = tiny.model(named)
        torch.save(plain.state_dict(), tmp_path / "start.pt")
        config = tiny.config(named, load_path=str(tmp_path / "start.pt"), lora_rank=2, lora_alpha=6, **options)
        return plain, VLMo(config).eval()

    return build


def move_adapters(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3)


TARGETS = {"attention": ["*.attn.qkv", "*.attn.proj"], "experts": ["*.mlp_*.fc?"], "all": ["*.attn.*", "*.mlp_*"]}


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_by_hand(adapted, targets, tmp_path):
    """Before training it changes nothing; after it, the layer's weight is W + alpha / rank * B A."""
    plain, model = adapted(STAGE3, lora_targets=TARGETS[targets])
    batch = tiny.batch()
    expected = {name: output.loss for name, output in plain(batch).items() if name != "itm"}  # (which draws)
    found = model(batch)
    assert all(torch.allclose(found[name].loss, loss, rtol=1e-5) for name, loss in expected.items())

    move_adapters(model)
    with torch.no_grad():
        for name in model.adapted:
            layer = model.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert a.shape == (2, layer.in_features) and b.shape == (layer.out_features, 2)
            plain.get_submodule(name).weight += 6 / 2 * b @ a
    found = model(batch)
    for name, output in plain(batch).items():
        if name != "itm":
            assert not torch.allclose(output.loss, expected[name], rtol=1e-3)
            assert torch.allclose(found[name].loss, output.loss, rtol=1e-4), name

    model.save_pretrained(tmp_path / "folder")  # merged, under the names of released files
    merged = read(tmp_path / "folder").tensors
    assert merged.keys() == plain.state_dict().keys()
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in plain.state_dict().items())


def test_adapters_and_heads_are_trained(adapted):
    plain, model = adapted(VQA)
    heads = {name for name in trained(plain) if name.startswith(("vqa_classifier.", "pooler.", "token_type"))}
    adapters = {f"{name}.lora_{each}.default.weight" for name in model.adapted for each in "AB"}
    assert trained(model) == heads | adapters and len(model.adapted) == 2 * model.transformer.depth
    model.train()(tiny.batch())["vqa"].loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)
    rates = {name: group["lr"] for group in model.parameter_groups() for name in group["names"]}
    assert rates.keys() == trained(model)


def test_a_checkpoint_with_adapters_is_used_merged(adapted, tmp_path):
    plain, model = adapted(VQA)
    move_adapters(model)
    content = {"state_dict": model.state_dict(), "epoch": 3}
    model.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    file = read(tmp_path / "last.ckpt")
    assert any(".lora_A." in name for name in file.tensors)  # as trained, to go on with
    assert vlmo_names(file)[0].keys() == plain.state_dict().keys()

    batch = tiny.batch()
    logits = model(batch)["vqa"].outputs["logits"]
    assert main(["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "plain.pt")]) == 0
    for path in (tmp_path / "last.ckpt", tmp_path / "plain.pt"):
        loaded = VLMoModel.from_pretrained(path)
        hidden = loaded.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
        assert torch.allclose(loaded.vqa_classifier(loaded.pooler(hidden)), logits, atol=1e-4)
    again = tiny.config(VQA, load_path=str(tmp_path / "last.ckpt"), lora_rank=2)
    assert torch.allclose(VLMo(again).eval()(batch)["vqa"].outputs["logits"], logits, atol=1e-4)

    del content["state_dict"][next(name for name in content["state_dict"] if ".lora_A." in name)]
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(VLMoError, match="lacks a part of the adapter of transformer.blocks.0.attn.qkv"):
        vlmo_names(read(tmp_path / "damaged.ckpt"))


def test_adapters_that_cannot_be(monkeypatch):
    pytest.importorskip("peft")

    def problems(*named, **options):
        return Settings.examine(tiny.config(*named, lora_rank=4, **options))[1]

    assert problems(VQA) == []
    (line,) = problems("task_textmlm_base")
    assert "lora_rank=4: is for fine-tuning" in line
    (line,) = problems(VQA, strategy="fsdp2")
    assert "use strategy=auto or ddp" in line
    with pytest.raises(VLMoError, match="lora_targets: .* matches no name; names are such as transformer.blocks"):
        tiny.model(VQA, lora_rank=4, lora_targets=["*.attn.query"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(VLMoError, match="^lora_rank=4: needs a package that is not here: pip install peft$"):
        tiny.model(VQA, lora_rank=4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = problems(VQA)
    assert line == "lora_rank=4: needs a package that is not here: pip install peft"
