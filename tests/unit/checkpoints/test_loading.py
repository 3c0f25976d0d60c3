"""Reading, recognising, adapting and loading checkpoint files of a model of a few thousand weights."""

import argparse
import collections
import os
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vlmo.checkpoints.files import read
from vlmo.checkpoints.loading import load, other_classes
from vlmo.errors import VLMoError
from vlmo.modules.multiway_transformer import ARCHITECTURES, MultiWayTransformer
from vlmo.modules.positions import num_table_rows
from vlmo.registry import TASKS

WIDTH, DEPTH, HEADS = 8, 2, 2


class SmallModel(nn.Module):
    """The names of VLMo at a size that tests can save hundreds of times."""

    def __init__(self, image_size=48, text_len=40, token_types=2, answers=5, relative=True, vl=True, heads=("vqa",)):
        super().__init__()
        self.transformer = MultiWayTransformer(
            image_size, 16, WIDTH, DEPTH, HEADS, vl_start=1 if vl else DEPTH, relative_positions=relative
        )
        self.text_embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(11, WIDTH),
                "position_embeddings": nn.Embedding(text_len, WIDTH),
                "token_type_embeddings": nn.Embedding(2, WIDTH),
                "LayerNorm": nn.LayerNorm(WIDTH),
            }
        )
        self.token_type_embeddings = nn.Embedding(token_types, WIDTH)
        if relative:
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros(num_table_rows(image_size // 16), DEPTH * HEADS)
            )
        if "vqa" in heads:
            self.vqa_classifier = nn.Sequential(
                nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, answers)
            )
        if "itc" in heads:
            self.itc_text_proj = nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH, bias=False)})
            self.logit_scale = nn.Parameter(torch.ones([]))


def random_state(**kwargs):
    return {name: torch.randn_like(value) for name, value in SmallModel(**kwargs).state_dict().items()}


def saved(content, path, **kwargs):
    torch.save(content, path, **kwargs)
    return path


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(model, path, match, required=()):
    """The error, after checking that the model is as it was."""
    before = snapshot(model)
    with pytest.raises(VLMoError, match=match) as caught:
        load(model, path, required)
    assert same(snapshot(model), before)
    return str(caught.value)


# --- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["plain", "state_dict", "module", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_containers(tmp_path, container, prefix):
    state = random_state()
    content = {prefix + name: value for name, value in state.items()}
    content = content if container == "plain" else {container: content, "epoch": 3}
    checkpoint = read(saved(content, tmp_path / "file.ckpt"))
    assert (checkpoint.kind, checkpoint.container) == ("vlmo", container)
    model = SmallModel()
    load(model, tmp_path / "file.ckpt")
    assert same(snapshot(model), state)


def test_safetensors_and_files_before_torch_1_6(tmp_path):
    state = random_state()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    saved(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("model.safetensors", "old.pt"):
        model = SmallModel()
        load(model, tmp_path / name)
        assert same(snapshot(model), state)


class AttributeDict(dict):
    """As Lightning's: a dict of a class that weights_only does not know."""


class Call:
    """Calls the function if it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_only_tensors_are_unpickled(tmp_path):
    state, trace = random_state(), tmp_path / "trace"
    others = {
        "hyper_parameters": AttributeDict(config=AttributeDict(seed=1)),
        "args": argparse.Namespace(seed=1, path=pathlib.Path("a")),
        "score": np.float64(0.5),
        "array": np.zeros(3),
        "callbacks": {AttributeDict: collections.defaultdict(list, a=[1])},
        "trap": Call(open, str(trace), "w"),
    }
    model = SmallModel()
    load(model, saved({"state_dict": state} | others, tmp_path / "last.ckpt"))
    assert same(snapshot(model), state)
    path = saved({"state_dict": state, "trap": Call(os.mkdir, str(trace))}, tmp_path / "trap.ckpt")
    refused(SmallModel(), path, "mkdir")
    assert not trace.exists()


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>Not found</html>")
    shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path, "page.pt")
    saved({"epoch": 3}, tmp_path / "numbers.pt")
    saved([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "folder").mkdir()
    model = SmallModel()
    refused(model, tmp_path / "absent.pt", "no such file")
    refused(model, tmp_path / "folder", "is a folder; give a checkpoint file")
    refused(model, tmp_path / "empty.pt", "not a file of torch")
    refused(model, tmp_path / "page.pt", "not a file of torch")
    refused(model, tmp_path / "other.zip", "no checkpoint")
    refused(model, tmp_path / "numbers.pt", "no named tensors")
    refused(model, tmp_path / "list.pt", "no named tensors")
    saved(random_state(), tmp_path / "folder" / "weights.pt")
    refused(model, tmp_path / "folder", r"such as .*weights\.pt")


# --- recognise and adapt ----------------------------------------------------------------------------------------------


def beit_state(image_size=48, shared=False):
    """A BEiT file's names at the small size, with the rows of its table(s) numbered by layer and head."""
    small = random_state(image_size=image_size, vl=False)
    state = {
        name.removeprefix("transformer.").replace("_imag", ""): value
        for name, value in small.items()
        if name.startswith("transformer.") and "_text" not in name and not name.startswith("transformer.norm")
    }
    rows = (2 * (image_size // 16) - 1) ** 2 + 3
    if shared:
        state["rel_pos_bias.relative_position_bias_table"] = torch.randn(rows, HEADS)
        state |= {"norm.weight": torch.randn(WIDTH), "norm.bias": torch.randn(WIDTH)}
        state |= {"mask_token": torch.zeros(1, 1, WIDTH), "lm_head.weight": torch.zeros(8192, WIDTH)}
    else:
        for i in range(DEPTH):
            state[f"blocks.{i}.attn.relative_position_bias_table"] = torch.randn(rows, HEADS)
            state[f"blocks.{i}.attn.relative_position_index"] = torch.zeros(10, 10).long()
        state |= {"fc_norm.weight": torch.zeros(WIDTH), "head.weight": torch.zeros(1000, WIDTH)}
    return state


@pytest.mark.parametrize("shared", [False, True])
def test_beit_file(tmp_path, shared):
    state = beit_state(shared=shared)
    model = SmallModel(vl=False)
    report = load(model, saved({"model": state}, tmp_path / "beit.pth"))
    loaded = model.state_dict()
    for i in range(DEPTH):
        name = "rel_pos_bias." if shared else f"blocks.{i}.attn."
        table = loaded["relative_position_bias_table"][:, HEADS * i : HEADS * (i + 1)]
        assert torch.equal(table[:28], state[name + "relative_position_bias_table"])
        assert not table[28:].any()
    assert torch.equal(loaded["transformer.blocks.1.mlp_imag.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(loaded["transformer.blocks.1.norm2_imag.bias"], state["blocks.1.norm2.bias"])
    assert ("transformer.norm.weight" in report.taken) == shared
    assert set(report.dropped.values()) <= {"index, recomputed", "of BEiT's own task"}


def test_beit_file_of_another_image_size(tmp_path):
    model = SmallModel(image_size=64)
    report = load(model, saved({"model": beit_state()}, tmp_path / "beit.pth"))
    assert report.resized["relative_position_bias_table"] == "window 3 -> 4, rows below 52"
    assert model.relative_position_bias_table[:52].any() and not model.relative_position_bias_table[52:].any()


@pytest.mark.parametrize("relative", [True, False])
def test_another_image_size_and_back(tmp_path, relative):
    state = random_state(relative=relative)
    model = SmallModel(image_size=80, relative=relative)
    report = load(model, saved(state, tmp_path / "48.pt"))
    name = "relative_position_bias_table" if relative else "transformer.pos_embed"
    assert list(report.resized) == [name]
    state80 = snapshot(model)
    assert len(load(SmallModel(image_size=80, relative=relative), saved(state80, tmp_path / "80.pt")).resized) == 0
    assert list(load(SmallModel(relative=relative), tmp_path / "80.pt").resized) == [name]


def test_stage3_from_stage2(tmp_path):
    """Text positions are cut, index buffers dropped; VL experts and heads stay as they were."""
    state = random_state(text_len=196, vl=False, heads=())
    state["text_embeddings.position_ids"] = torch.arange(196)[None]
    state["text_imag_relative_position_index"] = torch.zeros(5, 5).long()
    model = SmallModel(heads=("itc",))
    before = snapshot(model)
    report = load(model, saved(state, tmp_path / "stage2.pt"))
    assert all("_vl." in name or name.startswith(("itc", "logit")) for name in report.new)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.new)
    name = "text_embeddings.position_embeddings.weight"
    assert torch.equal(model.state_dict()[name], state[name][:40])
    assert report.resized == {name: "first 40 of 196 rows"}
    text = str(report)
    assert "blocks.*.mlp_vl (4)" in text and "index, recomputed: text_embeddings (1)" in text
    assert max(map(len, text.splitlines()[1:])) <= 120 and len(text.splitlines()) < 12


def test_longer_texts_than_the_file_has(tmp_path):
    state, model = random_state(), SmallModel(text_len=50)
    name = "text_embeddings.position_embeddings.weight"
    further = model.state_dict()[name][40:].clone()
    report = load(model, saved(state, tmp_path / "file.pt"))
    assert torch.equal(model.state_dict()[name], torch.cat([state[name], further]))
    assert "the rest new" in report.resized[name]


def test_token_types(tmp_path):
    two, three = random_state(), random_state(token_types=3)
    name = "token_type_embeddings.weight"
    model = SmallModel(token_types=3)
    load(model, saved(two, tmp_path / "two.pt"))
    assert torch.equal(model.state_dict()[name], two[name][[0, 1, 1]])
    load(model, saved(three, tmp_path / "three.pt"))
    assert torch.equal(model.state_dict()[name], three[name])
    model = SmallModel()
    load(model, tmp_path / "three.pt")
    assert torch.equal(model.state_dict()[name], three[name][:2])


def test_older_name_of_the_contrastive_heads(tmp_path):
    state = random_state(heads=("itc",))
    state["ifm_text_proj.fc.weight"] = state.pop("itc_text_proj.fc.weight")
    model = SmallModel(heads=("itc",))
    load(model, saved(state, tmp_path / "old.pt"), required=["itc_text_proj"])
    assert torch.equal(model.state_dict()["itc_text_proj.fc.weight"], state["ifm_text_proj.fc.weight"])


def test_precision_of_the_file_does_not_matter(tmp_path):
    state = {name: value.half() for name, value in random_state().items()}
    model = SmallModel()
    load(model, saved(state, tmp_path / "half.pt"))
    assert same(snapshot(model), {name: value.float() for name, value in state.items()})


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_missing_head(tmp_path):
    path = saved(random_state(heads=()), tmp_path / "file.pt")
    refused(SmallModel(), path, "lacks vqa_classifier, which this task needs", required=["vqa_classifier"])
    assert load(SmallModel(), path).new  # no error when it is to be trained


def test_foreign_file(tmp_path):
    path = saved({"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}, tmp_path / "resnet.pt")
    refused(SmallModel(), path, "VLMo's or BEiT's .it holds conv1.weight")


def test_plain_vit_is_foreign(tmp_path):
    state = {name: value for name, value in beit_state().items() if "q_bias" not in name}
    refused(SmallModel(), saved(state, tmp_path / "vit.pt"), "VLMo's or BEiT's")


@pytest.mark.parametrize("fits", ["vlmo_base_patch16", None])
def test_size_of_another_model(tmp_path, monkeypatch, fits):
    state = random_state()
    if fits:
        monkeypatch.setitem(ARCHITECTURES, fits, {"depth": DEPTH, "embed_dim": WIDTH})
    model = SmallModel()
    model.transformer = MultiWayTransformer(48, 16, 16, 3, 2, vl_start=1)
    message = f"set model_arch={fits} or give another" if fits else "; give another"
    text = refused(model, saved(state, tmp_path / "file.pt"), message)
    assert "2 blocks of width 8" in text and "3 blocks of width 16" in text and "\n" not in text


def test_number_of_answers(tmp_path):
    path = saved(random_state(answers=7), tmp_path / "vqa.pt")
    refused(SmallModel(), path, r"\[7, 16\] in the file, \[5, 16\] in the model; set vqav2_label_size=7")


def test_heads_that_are_reset_stay_as_they_are(tmp_path):
    state = random_state(answers=7)
    path = saved(state, tmp_path / "vqa.pt")
    model = SmallModel()
    before = snapshot(model)
    report = load(model, path, anew={"vqa_classifier": "reset_heads=True"})
    heads = [name for name in before if name.startswith("vqa_classifier")]
    assert heads and set(heads) <= set(report.new) and set(heads) <= set(report.dropped)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in heads)
    assert torch.equal(model.state_dict()["transformer.norm.bias"], state["transformer.norm.bias"])


@pytest.mark.parametrize(
    "part", ["transformer.blocks.0.attn.proj.weight", "transformer.norm.bias", "mlp_vl.fc1", "vqa"]
)
def test_part_of_a_part(tmp_path, part):
    state = random_state()
    state.pop(next(name for name in state if part in name))
    refused(SmallModel(), saved(state, tmp_path / "file.pt"), "lacks 1 tensors of .*damaged")


def test_beit_tables_that_differ(tmp_path):
    state = beit_state()
    state["blocks.1.attn.relative_position_bias_table"] = torch.zeros(5, HEADS)
    refused(SmallModel(), saved(state, tmp_path / "beit.pt"), "not alike")


def test_table_of_no_window(tmp_path):
    state = random_state()
    state["relative_position_bias_table"] = torch.zeros(500, DEPTH * HEADS)
    refused(SmallModel(), saved(state, tmp_path / "file.pt"), "max_text_len_of_initckpt=196")


# --- anything may be on a disk ----------------------------------------------------------------------------------------

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good file in each format, and its weights."""
    folder, state = tmp_path_factory.mktemp("files"), random_state()
    saved({"state_dict": state, "epoch": 1}, folder / "good.ckpt")
    saved(state, folder / "good.old", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "good.safetensors")
    return folder, state


def load_or_refuse(path):
    """The state if the file loads - then whole - or None if it is refused, the model untouched."""
    model = SmallModel()
    before = snapshot(model)
    try:
        report = load(model, path)
    except VLMoError as error:
        assert str(path) in str(error)
        assert same(snapshot(model), before)
        return None
    assert sorted([*report.taken, *report.resized, *report.new]) == sorted(before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.new)
    return snapshot(model)


@FUZZ
@given(data=st.data(), name=st.sampled_from(["good.ckpt", "good.old", "good.safetensors"]))
def test_truncated(files, tmp_path, data, name):
    content = (files[0] / name).read_bytes()
    (tmp_path / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert load_or_refuse(tmp_path / name) is None


@FUZZ
@given(data=st.data(), name=st.sampled_from(["good.ckpt", "good.old", "good.safetensors"]))
def test_flipped_byte(files, tmp_path, data, name):
    content = bytearray((files[0] / name).read_bytes())
    early = st.integers(0, 3000)  # where the names and shapes are
    for position in data.draw(st.lists(early | st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[position] ^= data.draw(st.integers(1, 255))
    (tmp_path / name).write_bytes(content)
    state = load_or_refuse(tmp_path / name)
    if name == "good.ckpt" and state is not None:  # the one format with checksums
        assert same(state, files[1])


@FUZZ
@given(data=st.data())
def test_renamed_and_retyped(files, tmp_path, data):
    state = dict(files[1])
    for name in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3, unique=True)):
        value = state.pop(name)
        changed = [value.long(), value.bool(), value.to(torch.complex64), value.to_sparse(), value[None], value[:0]]
        changed += [value.flatten()[:1], torch.tensor(1.0), "text", None, [1.0], value.numpy(), value.to("meta")]
        if data.draw(st.booleans()):
            state[data.draw(st.sampled_from([name + "x", "x" + name, name[1:], "blocks.0.attn.q_bias"]))] = value
        else:
            state[name] = data.draw(st.sampled_from(changed))
    load_or_refuse(saved(state, tmp_path / "file.pt"))


def test_outputs_of_other_classes_start_new(tmp_path, caplog):
    path = saved(random_state(answers=5), tmp_path / "a.pt")
    source, model = read(path), SmallModel(answers=2)
    before = model.vqa_classifier[3].weight.clone()
    tasks = [TASKS["vqa"]()]
    anew = other_classes(source, tasks, model.state_dict(), ["yes", "no"])
    assert list(anew) == ["vqa_classifier.3."] and "5 classes, the run 2" in anew["vqa_classifier.3."]
    report = load(model, source, anew=anew)
    assert torch.equal(model.vqa_classifier[3].weight, before)
    assert torch.equal(model.vqa_classifier[0].weight, source.tensors["vqa_classifier.0.weight"])
    assert {"vqa_classifier.3.weight", "vqa_classifier.3.bias"} <= set(report.new) & set(report.dropped)
    assert other_classes(source, tasks, SmallModel(answers=5).state_dict(), ["yes", "no"]) == {}
    assert "vqav2_label_size=2" in caplog.text  # nobody can tell whether they are the same


def test_hugging_faces_beit_is_named(tmp_path):
    path = saved({"beit.encoder.layer.0.attention.attention.query.weight": torch.zeros(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(VLMoError, match="Hugging Face"):
        load(SmallModel(), path)
