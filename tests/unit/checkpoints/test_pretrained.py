"""Models as folders, files and back, and what travels with the weights."""

import json

import pytest
import torch
from safetensors import safe_open

from tests import tiny
from tests.tables import VOCABULARY
from vlmo.checkpoints.files import Checkpoint, read, recognise
from vlmo.checkpoints.metadata import Metadata, first_mismatch, incompatibilities, vocabulary_hash
from vlmo.checkpoints.pretrained import infer_metadata, metadata_of
from vlmo.errors import VLMoError
from vlmo.modules import VLMo

WORDS = list(dict.fromkeys(VOCABULARY))
ANSWERS = [f"answer {label}" for label in range(7)]
TASKS = {
    "task_textmlm_base": ("textmlm",),
    "task_mlm_itm_itc_base": ("mlm", "itm", "itc"),
    "task_finetune_vqa_base_image480": ("vqa",),
    "task_finetune_nlvr2_base": ("nlvr2",),
    "task_finetune_irtr_coco_base_image384": ("irtr",),
}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def vqa():
    model = tiny.model("task_finetune_vqa_base_image480")
    model.answers, model.vocabulary = ANSWERS, WORDS
    return model


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_folder_and_plain_file_of_every_task(tmp_path, task):
    model = tiny.model(task)
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    for path in (tmp_path / "folder", tmp_path / "folder" / "model.safetensors", tmp_path / "plain.pt"):
        again = VLMo.from_pretrained(path)
        assert set(again.settings.active) == set(TASKS[task])
        assert same(again, model)
        assert not again.training and not again.load_report.new and not again.load_report.dropped


@pytest.mark.parametrize("arch", ["vlmo_tiny_patch16", "vlmo_base_plus_patch16"])
def test_what_names_and_shapes_tell(arch):
    config = tiny.config("task_finetune_nlvr2_base", model_arch=arch, image_size=48, max_text_len=17)
    with torch.device("meta"):
        tensors = VLMo(config).state_dict()
    found = infer_metadata(Checkpoint("file.pt", recognise(tensors), "plain", tensors))
    expected = {"model_arch": arch, "image_size": 48, "max_text_len": 17, "vocab_size": 64}
    assert expected.items() <= found.options.items()
    assert found.tasks == ("nlvr2",)


def test_folder_holds_what_it_needs(tmp_path, vqa):
    vqa.save_pretrained(tmp_path)
    files = ["config.json", "model.safetensors", "modeling_vlmo.py", "vocab.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert (tmp_path / "vocab.txt").read_text().splitlines() == WORDS
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["answers"] == ANSWERS and content["image_size"] == 32
    assert content["vocabulary_sha256"] == vocabulary_hash(WORDS)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(vqa.state_dict())  # the original's names
    again = VLMo.from_pretrained(tmp_path)
    assert metadata_of(again) == metadata_of(vqa)
    again.vocabulary = None
    again.save_pretrained(tmp_path)  # over the old one
    assert VLMo.from_pretrained(tmp_path).vocabulary is None


def test_shards(tmp_path, vqa):
    vqa.save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    assert same(VLMo.from_pretrained(tmp_path), vqa)
    assert same(VLMo(tiny.config("task_finetune_vqa_base_image480", load_path=str(tmp_path))), vqa)
    shards[0].unlink()
    with pytest.raises(VLMoError, match=f"lacks {shards[0].name}, which"):
        VLMo.from_pretrained(tmp_path)


def test_lightning_file_to_folder_to_original_names(tmp_path, vqa):
    """Outputs stay equal to the last bit."""
    content = {"state_dict": vqa.state_dict(), "hyper_parameters": dict(vqa.hparams)}
    vqa.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    first = VLMo.from_pretrained(tmp_path / "last.ckpt")
    first.save_pretrained(tmp_path / "folder")
    second = VLMo.from_pretrained(tmp_path / "folder")
    torch.save(second.state_dict(), tmp_path / "plain.pt")
    third = VLMo(tiny.config("task_finetune_vqa_base_image480", load_path=str(tmp_path / "plain.pt"))).eval()
    assert metadata_of(first) == metadata_of(second) == metadata_of(vqa)
    batch = tiny.batch()
    expected = vqa(batch)["vqa"]
    for model in (first, second, third):
        output = model(batch)["vqa"]
        assert torch.equal(output.outputs["logits"], expected.outputs["logits"])
        assert torch.equal(output.loss, expected.loss)


def test_another_task_and_other_options(tmp_path, vqa, caplog):
    vqa.save_pretrained(tmp_path)
    model = VLMo.from_pretrained(tmp_path, task=("itc", "itm"), image_size=48)
    assert set(model.settings.active) == {"itc", "itm"} and model.settings.image_size == 48
    assert model.answers is None and model.vocabulary == WORDS
    assert "left new" in caplog.text and "itm_score" in caplog.text
    assert torch.equal(model.pooler.dense.weight, vqa.pooler.dense.weight)


def test_stage2_file_is_for_text(tmp_path):
    model = tiny.model("task_textmlm_base")
    torch.save(model.state_dict(), tmp_path / "stage2.pt")
    again = VLMo.from_pretrained(tmp_path / "stage2.pt", task="itc")
    assert again.transformer.vl_start < again.transformer.depth and any(
        "mlp_vl" in name for name in again.load_report.new
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded(tmp_path, vqa):
    with pytest.raises(VLMoError, match="no such file"):
        VLMo.from_pretrained(tmp_path / "absent.pt")
    with pytest.raises(VLMoError, match="owner/no-such-model: no file or folder here, and the Hugging Face hub"):
        VLMo.from_pretrained("owner/no-such-model")
    torch.save({n: t for n, t in vqa.state_dict().items() if "vqa" not in n}, tmp_path / "bare.pt")
    with pytest.raises(VLMoError, match="has no head; give a task"):
        VLMo.from_pretrained(tmp_path / "bare.pt")
    with pytest.raises(VLMoError, match="task: 'vqaa' is unknown; did you mean vqa"):
        VLMo.from_pretrained(tmp_path / "bare.pt", task="vqaa")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(VLMoError, match="VLMo's or BEiT's"):
        VLMo.from_pretrained(tmp_path / "foreign.pt")
    with pytest.raises(VLMoError, match="image_siz: there is no such option"):
        VLMo.from_pretrained(tmp_path / "bare.pt", task="vqa", image_siz=48)
    with pytest.raises(VLMoError, match="is a file; give a folder"):
        vqa.save_pretrained(tmp_path / "bare.pt")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "{", "is not JSON"),
        ("config.json", '{"vlmo_version": "1", "image_size": 32}', "is damaged .model_arch"),
        ("vocab.txt", "[PAD]\n", "is not the vocabulary that config.json names"),
    ],
)
def test_damaged_folder(tmp_path, vqa, name, content, message):
    vqa.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(VLMoError, match=message):
        VLMo.from_pretrained(tmp_path)


def test_folder_of_another_project_is_not_ours(tmp_path, vqa):
    vqa.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert read(tmp_path).metadata is None


def test_retyped_metadata_is_refused(tmp_path, vqa):
    for wrong in ({"answers": 3}, {"model_arch": None}, "text", None):
        content = metadata_of(vqa).to_dict() | wrong if isinstance(wrong, dict) else wrong
        torch.save({"state_dict": vqa.state_dict(), "vlmo": content}, tmp_path / "file.ckpt")
        with pytest.raises(VLMoError, match="what it says of the model is damaged"):
            read(tmp_path / "file.ckpt")


# --- names ------------------------------------------------------------------------------------------------------------


def test_first_difference():
    assert first_mismatch(["a", "b"], ["a", "b"]) is None
    assert first_mismatch(["a", "", "c"], ["a", "b", ""]) is None  # unknown on one side
    assert first_mismatch(["a", "b"], ["a"]) is None
    assert first_mismatch(["a", "b"], ["a", "c"]) == "number 1 is 'b' in the file and 'c' here"
    assert first_mismatch(["a"], ["a", "b"]) == "number 1 is 'b' here, and the file has 1"


def test_contradictions_name_the_file_and_the_place():
    saved = Metadata(tiny.config(), ["yes", "no"], ["[PAD]", "cat"])
    assert incompatibilities(None, ["no"], ["x"], "f") == []
    assert incompatibilities(saved, None, None, "f") == []
    assert incompatibilities(saved, ["yes"], ["[PAD]", "cat"], "f") == []
    answers, words = incompatibilities(saved, ["no"], ["[PAD]", "dog"], "f.ckpt")
    assert answers.startswith("f.ckpt: was trained with other answers: number 0 is 'yes' in the file and 'no' here")
    assert words.startswith("f.ckpt: was trained with another vocabulary: token number 1 is 'cat' in the file")


def test_resuming_keeps_the_names(vqa):
    content = {}
    vqa.on_save_checkpoint(content)
    model = tiny.model("task_finetune_vqa_base_image480")
    model.on_load_checkpoint(content)
    assert metadata_of(model) == metadata_of(vqa)
    model.answers = ["another", *ANSWERS[1:]]
    with pytest.raises(VLMoError, match="resume from: was trained with other answers"):
        model.on_load_checkpoint(content)
    model.on_load_checkpoint({})  # a file from before
