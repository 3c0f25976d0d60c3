"""python -m vlmo.checkpoint: what a file is, and its other forms."""

import json
import runpy
import sys

import pytest
import torch

from tests import tiny
from tests.tables import VOCABULARY, write_vocabulary
from vlmo.checkpoint import main
from vlmo.checkpoints.pretrained import metadata_of
from vlmo.errors import VLMoError
from vlmo.modules import VLMo, VLMoModel
from vlmo.registry import TASKS

WORDS = list(dict.fromkeys(VOCABULARY))
VQA = "task_finetune_vqa_base_image480"


@pytest.fixture
def run(capsys):
    """The exit status and what is printed, on standard output and error."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def saved(task, path, with_names=False):
    """A plain file, or with names a Lightning file."""
    model = tiny.model(task)
    if not with_names:
        torch.save(model.state_dict(), path)
        return model
    model.vocabulary, model.answers = WORDS, [f"answer {label}" for label in range(7)]
    content = {"state_dict": model.state_dict(), "epoch": 3}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return model


def table(text):
    return {line[:13].strip(): line[14:] for line in text.splitlines()}


@pytest.mark.parametrize(
    "task, stage, heads",
    [
        ("task_textmlm_base", "2 (language added; no vision-language experts)", "mlm_score"),
        ("task_mlm_itm_itc_base", "3 (pairs: itc, itm, mlm)", "itm_score, mlm_score"),
        (VQA, "fine-tuned for vqa", "vqa_classifier"),
        ("task_finetune_nlvr2_base", "fine-tuned for nlvr2", "nlvr2_classifier"),
        ("task_finetune_irtr_f30k_base", "fine-tuned for irtr", "itc_text_proj"),
    ],
)
def test_show(tmp_path, run, task, stage, heads):
    saved(task, tmp_path / "file.pt")
    status, out, _ = run("show", tmp_path / "file.pt")
    shown = table(out)
    assert status == 0 and shown["stage"] == stage and shown["heads"].endswith(heads)
    assert (shown["kind"], shown["architecture"], shown["resolution"]) == ("VLMo", "vlmo_tiny_patch16", "32 px")
    assert shown["text"] == "24 tokens, a vocabulary of 64" and "float32" in shown["weights"]
    assert shown.get("answers") == ("7, whose texts are not in the file" if task == VQA else None)


def test_show_lightning(tmp_path, run):
    saved(VQA, tmp_path / "last.ckpt", with_names=True)
    shown = table(run("show", tmp_path / "last.ckpt")[1])
    assert shown["file"].endswith("last.ckpt (state_dict)")
    assert shown["answers"].startswith("7 in the file: answer 0, answer 1")
    assert shown["vocabulary"].startswith("in the file, of bert-base-uncased, SHA-256 ")


@pytest.mark.parametrize("others, stage", [((), "fine-tuned for "), (("itm", "mlm"), "3 (pairs: itm, mlm, ")])
def test_show_names_tasks_that_are_not_known(tmp_path, run, others, stage):
    class Stranger(TASKS["nlvr2"]):
        name = "stranger"
        token_types = 2

        def heads(self, width):
            return {"stranger_score": torch.nn.Linear(width, 3)}

    tasks = (*others, Stranger())
    model = VLMoModel("vlmo_tiny_patch16", tasks, image_size=32, vocab_size=64, max_text_len=24)
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    shown = table(run("show", tmp_path / "folder")[1])
    assert shown["stage"].startswith(f"{stage}stranger (") and "--plugins" in shown["stage"]
    assert "stranger_score" in shown["heads"]
    if not others:
        assert "--plugins" in table(run("show", tmp_path / "plain.pt")[1])["stage"]
    with pytest.raises(VLMoError, match="'stranger' is unknown.*plugins"):
        VLMoModel.from_pretrained(tmp_path / "folder")
    status, _, err = run("show", tmp_path / "folder", "--plugins", "no.such.module")
    assert status == 2 and "no.such.module" in err


def test_beit_is_shown_and_not_converted(tmp_path, run):
    state = {
        name.removeprefix("transformer.").replace("_imag", ""): tensor
        for name, tensor in tiny.model("task_textmlm_base").state_dict().items()
        if name.startswith("transformer.") and "_text" not in name
    }
    state["rel_pos_bias.relative_position_bias_table"] = torch.zeros(9 + 3, 2)
    state["head.weight"] = torch.zeros(10, 2)
    torch.save({"model": state}, tmp_path / "beit.pth")
    shown = table(run("show", tmp_path / "beit.pth")[1])
    assert shown["kind"].startswith("BEiT") and shown["stage"] == "1 (vision)" and shown["resolution"] == "32 px"
    assert shown["left out"] == "1 tensors that no VLMo model takes" and "text" not in shown
    status, _, err = run("convert", tmp_path / "beit.pth", tmp_path / "out.pt")
    assert status == 2 and "is a BEiT file" in err


def test_from_lightning_to_folder_to_original_names(tmp_path, run):
    model = saved(VQA, tmp_path / "last.ckpt", with_names=True)
    assert run("convert", tmp_path / "last.ckpt", tmp_path / "folder")[0] == 0
    assert metadata_of(VLMo.from_pretrained(tmp_path / "folder")) == metadata_of(model)
    status, out, _ = run("convert", tmp_path / "folder", tmp_path / "new" / "plain.pt")
    assert status == 0 and table(out)["file"].endswith("plain.pt (plain)")
    plain = torch.load(tmp_path / "new" / "plain.pt", weights_only=True)
    expected = model.state_dict()
    assert set(plain) == set(expected)
    assert all(torch.equal(plain[name], expected[name]) for name in expected)
    assert not list(tmp_path.rglob("*.part"))


def test_older_names_and_index_buffers_are_converted(tmp_path, run):
    state = tiny.model("task_finetune_irtr_coco_base_image384").state_dict()
    expected = set(state)
    state["ifm_text_proj.fc.weight"] = state.pop("itc_text_proj.fc.weight")
    state["relative_position_index"] = torch.zeros(5, 5).long()
    state["text_embeddings.position_ids"] = torch.arange(24)[None]
    torch.save({"module": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "old.pt")
    assert run("convert", tmp_path / "old.pt", tmp_path / "new.pt")[0] == 0
    assert set(torch.load(tmp_path / "new.pt", weights_only=True)) == expected


def test_a_released_file_is_completed(tmp_path, run):
    saved(VQA, tmp_path / "vqa.pt")
    vocabulary = write_vocabulary(tmp_path)
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(["yes", "no"]))
    given = ("--answers", answers, "--tokenizer", vocabulary)
    assert run("convert", tmp_path / "vqa.pt", tmp_path / "folder", *given)[0] == 0
    model = VLMo.from_pretrained(tmp_path / "folder")
    assert model.answers == ["yes", "no"] and model.vocabulary == WORDS
    answers.write_text(json.dumps(["no"]))
    status, _, err = run("convert", tmp_path / "folder", tmp_path / "again", *given)
    assert status == 2 and "other answers: number 0" in err
    answers.write_text(json.dumps(["yes"] * 9))
    status, _, err = run("convert", tmp_path / "vqa.pt", tmp_path / "again", *given)
    assert status == 2 and "has 7 answers, not the 9" in err
    assert not (tmp_path / "again").exists()
    status, _, err = run("convert", tmp_path / "vqa.pt", tmp_path / "again.pt", *given)
    assert status == 2 and "a plain file holds weights only" in err


def test_refusals_are_one_line(tmp_path, run):
    saved(VQA, tmp_path / "vqa.pt")
    (tmp_path / "text.pt").write_text("text")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    for arguments, message in {
        ("show", tmp_path / "absent.pt"): "no such file",
        ("show", tmp_path / "text.pt"): "not a file of torch",
        ("show", tmp_path / "resnet.pt"): "VLMo's or BEiT's",
        ("convert", tmp_path / "vqa.pt", tmp_path / "vqa.pt"): "exists; give a new name",
        ("convert", tmp_path / "vqa.pt", tmp_path): "exists; give a new name",
        ("convert", tmp_path / "vqa.pt", tmp_path / "new.ckpt"): "give FILE.pt",
    }.items():
        status, out, err = run(*arguments)
        assert status == 2 and not out and message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_as_a_command(tmp_path, capsys, monkeypatch):
    saved(VQA, tmp_path / "vqa.pt")
    monkeypatch.setattr(sys, "argv", ["vlmo.checkpoint", "show", str(tmp_path / "vqa.pt")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("vlmo.checkpoint", run_name="__main__")
    assert stopped.value.code == 0 and "fine-tuned for vqa" in capsys.readouterr().out


# --- averages ---------------------------------------------------------------------------------------------------------


def test_average_by_hand(tmp_path, run):
    models = [saved(VQA, tmp_path / f"{number}.ckpt", with_names=True) for number in range(3)]
    files = [tmp_path / f"{number}.ckpt" for number in range(3)]
    status, out, _ = run("average", tmp_path / "soup.pt", *files)
    assert status == 0 and table(out)["stage"] == "fine-tuned for vqa"
    soup = torch.load(tmp_path / "soup.pt", weights_only=True)
    states = [model.state_dict() for model in models]
    assert soup.keys() == states[0].keys()
    for name, tensor in soup.items():
        assert torch.allclose(tensor, sum(state[name] for state in states) / 3, atol=1e-6), name
    assert not torch.equal(soup["vqa_classifier.3.weight"], states[0]["vqa_classifier.3.weight"])
    assert run("average", tmp_path / "folder", *files)[0] == 0
    whole = VLMoModel.from_pretrained(tmp_path / "folder")  # with all that it needs to be used
    assert whole.answers == [f"answer {label}" for label in range(7)]
    assert torch.equal(whole.vqa_classifier[3].weight, soup["vqa_classifier.3.weight"])
    run("average", tmp_path / "same.pt", files[0], files[0], files[0])
    same = torch.load(tmp_path / "same.pt", weights_only=True)
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in same.items())


def test_averages_that_cannot_be(tmp_path, run):
    saved(VQA, tmp_path / "one.pt")
    saved("task_finetune_nlvr2_base", tmp_path / "two.pt")
    for out, files, said in [
        ("out.pt", ["one.pt"], "a mean needs two files"),
        ("out.pt", ["one.pt", "two.pt"], "two.pt: is of another model than"),
        ("out.ckpt", ["one.pt", "one.pt"], "give FILE.pt, or the name of a folder"),
        ("one.pt", ["one.pt", "one.pt"], "exists"),
    ]:
        status, _, err = run("average", tmp_path / out, *(tmp_path / file for file in files))
        assert status == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()
