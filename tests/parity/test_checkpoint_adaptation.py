"""After loading a file a model holds what the original's held (recorded in goldens/checkpoint_adaptation.json)."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import GOLDENS
from tests.goldens import recipe
from vlmo.checkpoints.files import Checkpoint, recognise
from vlmo.checkpoints.loading import adapt
from vlmo.modules.positions import resize_absolute_position_embedding, resize_relative_position_bias_table

MANIFEST = json.loads((GOLDENS / "state_dict_manifest.json").read_text())
RECORDED = json.loads((GOLDENS / "checkpoint_adaptation.json").read_text())
INDEX_SHAPES = {  # as released stage-2 files hold them
    "relative_position_index": (197, 197),
    "text_relative_position_index": (196, 196),
    "text_imag_relative_position_index": (393, 393),
}


def shapes(config):
    return {name: tuple(shape) for name, shape in MANIFEST[config]["tensors"].items()}


def draw(shapes, salt):
    return {name: torch.as_tensor(recipe.weight(name, shape, salt)) for name, shape in shapes.items()}


def beit_file():
    """The 211 entries of beit_base_patch16_224_pt22k_ft22kto1k.pth."""
    file = {}
    for name, shape in shapes("task_textmlm_base").items():
        if name.startswith("transformer.") and "_text" not in name and not name.startswith("transformer.norm"):
            file[name.removeprefix("transformer.").replace("_imag", "")] = shape
    file |= {f"blocks.{i}.attn.relative_position_bias_table": (732, 12) for i in range(12)}
    file |= {"fc_norm.weight": (768,), "fc_norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,)}
    indices = {f"blocks.{i}.attn.relative_position_index": torch.zeros(197, 197).long() for i in range(12)}
    return draw(file, "beit:") | indices


def stage2_file():
    buffers = {name: torch.zeros(shape).long() for name, shape in INDEX_SHAPES.items()}
    buffers["text_embeddings.position_ids"] = torch.arange(196)[None]
    return draw(shapes("task_textmlm_base"), "st2:") | buffers


# recorded entry -> (the file, its kind, the config of the model)
CASES = {
    "beit_to_textmlm_base": (beit_file, "beit", "task_textmlm_base"),
    "stage2_to_pretrain_base": (stage2_file, "vlmo", "task_mlm_itm_itc_base"),
    "pretrain_to_task_finetune_vqa_base_image480": (
        lambda: draw(shapes("task_mlm_itm_itc_base"), "st3:"),
        "vlmo",
        "task_finetune_vqa_base_image480",
    ),
    "pretrain_to_task_finetune_vqa_base_plus_image480": (
        lambda: draw(shapes("task_mlm_itm_itc_base_plus"), "st3:"),
        "vlmo",
        "task_finetune_vqa_base_plus_image480",
    ),
}


@pytest.mark.parametrize("entry", CASES)
def test_adapted_tensors(entry):
    make_file, kind, config = CASES[entry]
    tensors = make_file()
    checkpoint = Checkpoint(Path("file.pt"), recognise(tensors), "plain", tensors)
    assert checkpoint.kind == kind
    adapted, report = adapt(checkpoint, {name: torch.zeros(shape) for name, shape in shapes(config).items()})

    recorded = RECORDED[entry]
    missing, unexpected = (ast.literal_eval(line.split(": ", 1)[1]) for line in recorded["log"])
    # the recording's VQA head was part of the loaded model only afterwards
    assert {n for n in report.new if not n.startswith("vqa_classifier")} == set(missing)
    dropped = {name.removeprefix("transformer.") for name in unexpected}
    assert {n for n, why in report.dropped.items() if not why.startswith("index")} == dropped - {
        "text_embeddings.position_ids"
    }
    assert set(adapted) == set(report.taken) | set(report.resized)
    for name, (shape, total, norm, some) in recorded["stats"].items():
        if name in missing:
            continue
        flat = adapted[name].double().flatten()
        assert list(adapted[name].shape) == shape, name
        np.testing.assert_allclose([flat.sum(), flat.norm()], [total, norm], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(flat[:: max(len(flat) // 5, 1)], some, rtol=0, atol=1e-5, err_msg=name)


def test_beit_file_is_taken_whole():
    tensors = beit_file()
    assert len(tensors) == 211
    target = {name: torch.full(shape, 7.0) for name, shape in shapes("task_textmlm_base").items()}
    adapted, report = adapt(Checkpoint(Path("beit.pth"), "beit", "model", tensors), target)
    assert set(report.dropped.values()) == {"index, recomputed", "of BEiT's own task"}
    table = adapted["relative_position_bias_table"]
    for i in (0, 11):
        assert torch.equal(table[:732, 12 * i : 12 * i + 12], tensors[f"blocks.{i}.attn.relative_position_bias_table"])
    assert (table[732:] == 7).all()


def test_stage2_file_is_taken_whole():
    target = {name: torch.zeros(shape) for name, shape in shapes("task_textmlm_base").items()}
    tensors = stage2_file()
    adapted, report = adapt(Checkpoint(Path("stage2.pt"), "vlmo", "plain", tensors), target)
    assert not report.new and not report.resized and set(report.dropped.values()) == {"index, recomputed"}
    assert all(adapted[name] is tensors[name] for name in target)


def test_relative_table_and_token_types_at_480():
    golden = np.load(GOLDENS / "relpos_task_finetune_vqa_base_image480.npz")
    config = shapes("task_mlm_itm_itc_base")
    names = ("relative_position_bias_table", "token_type_embeddings.weight")
    file = draw({name: config[name] for name in names}, "st3:")
    table = resize_relative_position_bias_table(file[names[0]], 14, 30)
    np.testing.assert_allclose(table[:, :24], golden["table"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(file[names[1]][:, :32], golden["token_type"])


def test_absolute_positions_at_480():
    golden = np.load(GOLDENS / "pos_task_finetune_vqa_base_plus_image480.npz")
    file = draw({"transformer.pos_embed": (1, 197, 544)}, "st3:")
    positions = resize_absolute_position_embedding(file["transformer.pos_embed"], 30)
    np.testing.assert_allclose(positions[0, :, :24], golden["pos"], rtol=0, atol=1e-6)
