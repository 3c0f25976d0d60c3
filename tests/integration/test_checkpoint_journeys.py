"""What people do with files one after the other: train, save, go on elsewhere, evaluate, use."""

import json
import logging
import shutil

import pyarrow as pa
import pytest
import torch

from tests import tiny
from tests.conftest import GOLDENS
from tests.tables import (
    VOCABULARY,
    write_coco,
    write_f30k,
    write_nlvr2,
    write_vocabulary,
    write_vqa,
    write_wikibk,
)
from vlmo.checkpoint import convert
from vlmo.checkpoints.loading import load_weights
from vlmo.errors import VLMoError
from vlmo.inference import Predictor
from vlmo.modules import VLMo
from vlmo.training.runner import run

WORDS = list(dict.fromkeys(VOCABULARY))
ANSWERS = ["answer 0", "answer 1", "answer 2"]
PRETRAIN, TEXT, VQA = "task_mlm_itm_itc_base", "task_textmlm_base", "task_finetune_vqa_base_image480"


class Workplace:
    """A folder with tables and a vocabulary, in which runs leave their files."""

    def __init__(self, folder, **options):
        self.folder = folder
        (folder / "data").mkdir()
        self.data = folder / "data"
        self.options = {"tokenizer": str(write_vocabulary(folder)), "vqav2_label_size": 3, "log_dir": str(folder)}
        self.options |= {"max_epoch": None, "max_steps": 1, "warmup_steps": 0, "drop_path_rate": 0.1} | options

    def run(self, task, **updates):
        """Trains a step or evaluates; the numbers, or the file that training left."""
        options = self.options | {"data_root": str(self.data)} | updates
        if task == PRETRAIN:
            options["datasets"] = ["coco"]
        measured = run(tiny.config(task, **options))
        if updates.get("test_only"):
            return measured
        files = sorted(self.folder.glob("*/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        return str(files[-1])


@pytest.fixture
def place(tmp_path):
    return Workplace(tmp_path)


def weights(path):
    return torch.load(path, weights_only=True, mmap=True)["state_dict"]


def answered_test_table(place):
    """Questions of the test set with their answers, so that a test run has something to count."""
    shutil.copy(place.data / "vqav2_rest_val.arrow", place.data / "vqav2_test.arrow")


# --- train -> save -> fine-tune at another resolution -> save -> evaluate -> use --------------------------------------


def journey(place, first_size, second_size):
    """Pre-training, VQA at another resolution, evaluation without the training data; returns the last file."""
    write_coco(place.data)
    write_vqa(place.data)
    answered_test_table(place)
    pretrained = place.run(PRETRAIN, image_size=first_size, max_text_len=16)
    tuned = place.run(VQA, image_size=second_size, max_text_len=16, load_path=pretrained)
    shutil.rmtree(place.data)
    place.data.mkdir()
    write_vqa(place.data)
    answered_test_table(place)
    for path in place.data.iterdir():  # what is left is what is asked
        if path.name != "vqav2_test.arrow":
            path.unlink()
    measured = place.run(VQA, image_size=second_size, max_text_len=16, load_path=tuned, test_only=True)
    assert 0 <= measured["vqa/test/score"] <= 1
    return tuned, measured


def test_pretrain_finetune_evaluate_and_predict(place, caplog):
    tuned, measured = journey(place, 32, 48)
    metadata = torch.load(tuned, weights_only=True)["vlmo"]
    assert metadata["answers"] == ANSWERS and metadata["vocabulary"] == WORDS
    assert (metadata["image_size"], metadata["model_arch"]) == (48, "vlmo_tiny_patch16")

    # prediction says what evaluation counted
    predictor = Predictor.from_pretrained(tuned, device="cpu")
    table = pa.ipc.open_file(place.data / "vqav2_test.arrow").read_all().to_pylist()
    written = {
        row["question_id"]: row["answer"] for row in json.loads((place.folder / "vqa_submit_last.json").read_text())
    }
    scores = []
    for row in table:
        found = [guesses[0].text for guesses in predictor.answer(row["image"], row["questions"])]
        assert found == [written[number] for number in row["question_id"]]
        for answer, names, values in zip(found, row["answers"], row["answer_scores"], strict=True):
            scores.append(dict(zip(names, values, strict=True)).get(answer, 0.0))
    assert measured["vqa/test/score"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)

    # at another resolution than its own: adapted, with a warning
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        place.run(VQA, image_size=32, max_text_len=16, load_path=tuned, test_only=True)
    assert "adapted to image_size=32 (window 3 -> 2)" in caplog.text


def test_every_form_of_a_file_gives_the_same_outputs(place):
    write_coco(place.data)
    lightning = place.run(PRETRAIN)
    convert(lightning, str(place.folder / "folder"))
    convert(str(place.folder / "folder"), str(place.folder / "plain.pt"))
    batch = tiny.batch()
    outputs = []
    for path in (lightning, place.folder / "folder", place.folder / "plain.pt"):
        model = VLMo(tiny.config(PRETRAIN, load_path=str(path))).eval()
        assert not model.load_report.new and not model.load_report.dropped and not model.load_report.resized
        torch.manual_seed(0)
        outputs.append(model(batch))
    for other in outputs[1:]:
        for name, output in outputs[0].items():
            assert torch.equal(output.loss, other[name].loss)
            assert all(torch.equal(value, other[name].outputs[key]) for key, value in output.outputs.items())
    assert set(torch.load(place.folder / "plain.pt", weights_only=True)) == set(weights(lightning))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vlmo_base_patch16", "vlmo_base_plus_patch16", "vlmo_large_patch16"])
def test_journey_of_the_published_sizes(tmp_path, arch):
    # sgd: a file is then a third as large
    place = Workplace(tmp_path, model_arch=arch, batch_size=2, per_gpu_batchsize=2, optim_type="sgd")
    sizes = (32, 48) if arch == "vlmo_large_patch16" else (224, 384)
    tuned, _ = journey(place, *sizes)
    model = VLMo.from_pretrained(tuned)
    model.save_pretrained(tmp_path / "folder", max_shard_size="500MB")
    again = VLMo.from_pretrained(tmp_path / "folder")
    batch = tiny.batch(image_size=sizes[1])
    with torch.no_grad():
        logits = [each.vqa_classifier(each.infer(batch)["cls_feats"]) for each in (model, again)]
    assert torch.equal(*logits)
    shutil.rmtree(tmp_path)


# --- one stage after the other ----------------------------------------------------------------------------------------


def test_stage_two_goes_on_and_becomes_stage_three(place):
    write_wikibk(place.data)
    write_coco(place.data)
    first = place.run(TEXT, max_text_len=32)
    second = place.run(TEXT, max_text_len=32, load_path=first)
    assert weights(first).keys() == weights(second).keys()
    frozen = "transformer.blocks.0.attn.qkv.weight"
    assert torch.equal(weights(first)[frozen], weights(second)[frozen])

    third = weights(place.run(PRETRAIN, load_path=second, learning_rate=1e-12, max_text_len=16))
    assert any("mlp_vl" in name for name in third) and not any("mlp_vl" in name for name in weights(second))
    for name in (frozen, "mlm_score.decoder.weight", "transformer.blocks.0.mlp_text.fc1.weight"):
        torch.testing.assert_close(third[name], weights(second)[name])
    positions = "text_embeddings.position_embeddings.weight"
    torch.testing.assert_close(third[positions], weights(second)[positions][:16])


def test_flickr_from_coco(place):
    write_coco(place.data)
    write_f30k(place.data)
    coco = place.run("task_finetune_irtr_coco_base_image384", image_size=48)
    f30k = place.run("task_finetune_irtr_f30k_base", load_path=coco, learning_rate=1e-12)
    heads = [name for name in weights(coco) if name.startswith(("itc_", "logit_scale"))]
    assert len(heads) == 3
    for name in heads:
        torch.testing.assert_close(weights(f30k)[name], weights(coco)[name])
    measured = place.run("task_finetune_irtr_f30k_base", load_path=f30k, test_only=True)
    assert 0 <= measured["recalls/ir_r1"] <= 1


def test_two_images_from_pairs(place):
    write_coco(place.data)
    write_nlvr2(place.data)
    pretrained = place.run(PRETRAIN)
    tuned = place.run("task_finetune_nlvr2_base", load_path=pretrained, learning_rate=1e-12)
    types = "token_type_embeddings.weight"
    torch.testing.assert_close(weights(tuned)[types], weights(pretrained)[types][[0, 1, 1]])
    assert "nlvr2/dev/accuracy" in place.run("task_finetune_nlvr2_base", load_path=tuned, test_only=True)


# --- names that contradict each other ---------------------------------------------------------------------------------


def rename_answer(folder, old, new):
    """In the tables and in the file beside them."""
    for path in folder.glob("vqav2_*.arrow"):
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        answers = [
            [[new if answer == old else answer for answer in each] for each in row or ()]
            for row in table["answers"].to_pylist()
        ]
        place = table.schema.get_field_index("answers")
        column = pa.array(answers, table.schema.field(place).type)
        table = table.set_column(place, "answers", column)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    path = folder / "vqav2_answers.json"
    path.write_text(json.dumps([new if answer == old else answer for answer in json.loads(path.read_text())]))


def test_other_answers_or_words_than_the_training_s(place, caplog):
    write_vqa(place.data)
    answered_test_table(place)
    tuned = place.run(VQA)
    rename_answer(place.data, "answer 1", "another")
    with pytest.raises(VLMoError, match="other answers: number 1 is 'answer 1' in the file and 'another' here"):
        place.run(VQA, load_path=tuned, test_only=True)
    with caplog.at_level(logging.WARNING):  # to train on is to learn anew
        again = place.run(VQA, load_path=tuned)
    assert "other classes" in caplog.text
    assert torch.load(again, weights_only=True)["vlmo"]["answers"][1] == "another"
    with pytest.raises(VLMoError, match="other answers"):
        place.run(VQA, resume_from=tuned, max_steps=2)

    rename_answer(place.data, "another", "answer 1")
    others = place.folder / "others.txt"
    others.write_text("\n".join([*WORDS[:5], *WORDS[:4:-1]]) + "\n")
    with pytest.raises(VLMoError, match="another vocabulary: token number 5"):
        place.run(VQA, load_path=tuned, test_only=True, tokenizer=str(others))


# --- files with the names that are out there --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage2_model():
    return VLMo(tiny.config(TEXT, model_arch="vlmo_base_patch16", image_size=224, max_text_len=196, vocab_size=30522))


def listed(config):
    """Names of a config, each with a tensor of its shape that takes no room in a file."""
    manifest = json.loads((GOLDENS / "state_dict_manifest.json").read_text())[config]["tensors"]
    return {name: torch.rand(1).expand(*shape) for name, shape in manifest.items()}


def test_the_names_of_beit(tmp_path, stage2_model):
    names = [name for name in listed(TEXT) if name.startswith("transformer.") and "_text" not in name]
    state = {
        name.removeprefix("transformer.").replace("_imag", ""): listed(TEXT)[name]
        for name in names
        if not name.startswith("transformer.norm")
    }
    for block in range(12):
        state[f"blocks.{block}.attn.relative_position_bias_table"] = torch.rand(1).expand(732, 12)
        state[f"blocks.{block}.attn.relative_position_index"] = torch.zeros(1).long().expand(197, 197)
    state |= {"fc_norm.weight": torch.rand(768), "fc_norm.bias": torch.rand(768)}
    state |= {"head.weight": torch.rand(1).expand(1000, 768), "head.bias": torch.rand(1000)}
    assert len(state) == 211
    torch.save({"model": state}, tmp_path / "beit.pth")
    report = load_weights(stage2_model, tmp_path / "beit.pth")
    assert len(report.taken) + len(report.resized) == 211 - 12 - 4 - 11  # eleven tables go into one
    assert set(report.dropped.values()) == {"index, recomputed", "of BEiT's own task"} and len(report.dropped) == 16
    text = ("_text.", "text_embeddings", "token_type", "transformer.norm", "mlm_score", "pooler")
    assert all(any(part in name for part in text) for name in report.new)
    table = stage2_model.relative_position_bias_table
    assert torch.equal(table[:732, 132:], state["blocks.11.attn.relative_position_bias_table"])


def test_the_names_of_a_released_stage_two_file(tmp_path, stage2_model):
    state = listed(TEXT)
    for name, shape in {
        "relative_position_index": (197, 197),
        "text_relative_position_index": (196, 196),
        "text_imag_relative_position_index": (393, 393),
        "text_embeddings.position_ids": (1, 196),
    }.items():
        state[name] = torch.zeros(1).long().expand(*shape)
    torch.save(state, tmp_path / "stage2.pt")
    report = load_weights(stage2_model, tmp_path / "stage2.pt")
    assert len(report.taken) == len(state) - 4 == 272
    assert not report.new and not report.resized and set(report.dropped.values()) == {"index, recomputed"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in stage2_model.state_dict().items())
