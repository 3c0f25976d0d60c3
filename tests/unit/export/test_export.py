"""Exported folders: equal to the model for any batch and text length in every runtime, and sufficient in themselves."""

import json

import pytest
import torch

from tests import tiny
from tests.tables import VOCABULARY, picture
from vlmo.errors import VLMoError
from vlmo.export.__main__ import export, main
from vlmo.export.forward_passes import columns_of, forward_passes
from vlmo.inference import Predictor
from vlmo.inference.exported import ExportedPredictor, open_predictor

WORDS = list(dict.fromkeys(VOCABULARY))
IMAGES = [picture(seed) for seed in range(5)]
TEXTS = ["the red cat", "a dog runs on the table", "what is left", "a", "the table the table the table"]
PRETRAIN, VQA, NLVR2 = "task_mlm_itm_itc_base", "task_finetune_vqa_base_image480", "task_finetune_nlvr2_base"
PACKAGE = {"onnx": "onnxscript", "openvino": "openvino", "torch": "torch"}
INPUTS = {
    "embed_images": (IMAGES,),
    "embed_texts": (TEXTS,),
    "match": (IMAGES, TEXTS),
    "answer": (IMAGES, TEXTS),
    "compare": (IMAGES, IMAGES[::-1], TEXTS),
}


def predictor(task=PRETRAIN, **options):
    torch.manual_seed(0)
    model = tiny.model(task, **options)
    model.vocabulary = WORDS
    model.answers = ["yes", "no", "red", "blue"] if task == VQA else None
    return Predictor(model, batch_size=2)


def numbers(results):
    if isinstance(results, torch.Tensor):
        return results
    return torch.tensor([each if isinstance(each, float) else each[0].score for each in results])


def assert_same(exported, model):
    assert exported.offers == [name for name in INPUTS if name in exported.offers]
    for name in exported.offers:
        for size in (1, 2, 5):
            given = [column[:size] for column in INPUTS[name]]
            found, expected = (numbers(getattr(each, name)(*given)) for each in (exported, model))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind, task",
    [
        ("torch", NLVR2),
        *(
            pytest.param(kind, task, marks=pytest.mark.slow)
            for kind in ("torch", "onnx", "openvino")
            for task in (PRETRAIN, VQA, NLVR2)
        ),
    ],
)
def test_equal_to_the_model(tmp_path, kind, task):
    pytest.importorskip(PACKAGE[kind])
    model = predictor(task)
    lines = export(model, tmp_path / "out", kind, source="last.ckpt")
    exported = open_predictor(tmp_path / "out", batch_size=3)
    assert set(exported.offers) == set(columns_of(model)) and len(lines) == len(exported.offers)
    assert_same(exported, model)
    content = json.loads((tmp_path / "out" / "export.json").read_text())
    assert content["image"]["size"] == 32 and content["image"]["mean"] == [0.5] * 3
    assert (tmp_path / "out" / "vocab.txt").read_text().splitlines() == WORDS
    assert exported.answers == model.answers


@pytest.mark.slow
def test_absolute_positions(tmp_path):
    model = predictor(model_arch="vlmo_base_plus_patch16")
    export(model, tmp_path / "out", "torch")
    assert_same(ExportedPredictor(tmp_path / "out"), model)


def test_uses_have_their_own_forward_passes():
    found, left_out = forward_passes(predictor())
    assert [(each.name, each.inputs) for each in found] == [
        ("embed_images", ("image",)),
        ("embed_texts", ("text_ids", "text_masks")),
        ("match", ("image", "text_ids", "text_masks")),
    ]
    assert not left_out
    nameless = predictor(VQA)
    nameless.answers = None
    with pytest.raises(VLMoError, match="does not hold its answers"):
        forward_passes(nameless)


@pytest.mark.slow
def test_what_was_not_exported_is_said(tmp_path):
    model = predictor()
    export(model, tmp_path / "out", "torch")
    exported = ExportedPredictor(tmp_path / "out")
    assert (
        exported.classify(IMAGES[:1], ["cat", "dog"])[0][0].text
        == model.classify(IMAGES[:1], ["cat", "dog"])[0][0].text
    )
    with pytest.raises(VLMoError, match="fill_mask: is not among what was exported"):
        exported.fill_mask("a [MASK]")
    with pytest.raises(VLMoError, match="vqa_classifier"):
        exported.answer(IMAGES[0], "what")
    with pytest.raises(VLMoError, match="is not among"):
        exported.embed_images(IMAGES, "vl")
    with pytest.raises(VLMoError, match="exists"):
        export(model, tmp_path / "out", "torch")
    (tmp_path / "out" / "match.pt2").unlink()
    with pytest.raises(VLMoError, match="lacks match.pt2"):
        ExportedPredictor(tmp_path / "out")
    (tmp_path / "out" / "export.json").write_text("{}")
    with pytest.raises(VLMoError, match="damaged"):
        ExportedPredictor(tmp_path / "out")


def test_mistakes_of_the_command(tmp_path, capsys):
    assert main(["nowhere.pt", str(tmp_path / "out"), "--format", "torch", "--int8"]) == 2
    assert "--int8: is for --format onnx and openvino" in capsys.readouterr().err
    assert main(["nowhere.pt", str(tmp_path / "out"), "--format", "torch"]) == 2
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8_and_its_loss(tmp_path, kind, capsys):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "nncf"}[kind])
    pytest.importorskip(PACKAGE[kind])
    model = predictor()
    model.model.save_pretrained(tmp_path / "model")
    rows = []
    for number in range(24):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": TEXTS[number % 5], "label": number % 2})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [str(tmp_path / "model"), str(tmp_path / "out"), "--format", kind, "--int8"]
    assert main([*words, "--calibrate", str(tmp_path / "rows.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "recall@1 image to text" in printed and "match: accuracy" in printed
    exported = ExportedPredictor(tmp_path / "out")
    cosine = (exported.embed_images(IMAGES) * model.embed_images(IMAGES)).sum(-1)
    assert cosine.min() > 0.9 and not torch.equal(exported.embed_images(IMAGES), model.embed_images(IMAGES))
