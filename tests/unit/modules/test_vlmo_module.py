"""The model as its users see it: encoders, freezing, heads, the step."""

import inspect
import json

import pytest
import torch

from tests import tiny
from tests.conftest import GOLDENS
from vlmo.checkpoints.metadata import METADATA_KEY
from vlmo.checkpoints.pretrained import metadata_of
from vlmo.distributed.wire_format import from_bytes
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.tasks.base import TaskOutput

STAGE3 = "task_mlm_itm_itc_base"
VQA = "task_finetune_vqa_base_image480"
NLVR2 = "task_finetune_nlvr2_base"
IRTR = "task_finetune_irtr_coco_base_image384"
TEXT = "task_textmlm_base"
ALL = (STAGE3, VQA, NLVR2, IRTR, TEXT)


def batch_of(name, **options):
    return tiny.batch(images=("image_0", "image_1") if name == NLVR2 else ("image",), **options)


def losses(model, batch):
    torch.manual_seed(0)  # the same negatives
    return {name: output.loss.item() for name, output in model(batch).items()}


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_pair():
    model, batch = tiny.model(STAGE3), tiny.batch()
    found = model.infer(batch)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    width = model.transformer.embed_dim
    assert shapes == {
        "text_feats": (3, 16, width),
        "image_feats": (3, 5, width),
        "cls_feats": (3, width),
        "raw_cls_feats": (3, width),
        "image_masks": (3, 5),
        "text_masks": (3, 16),
        "text_ids": (3, 16),
        "text_labels": (3, 16),
    }
    assert torch.equal(found["raw_cls_feats"], found["text_feats"][:, 0])
    assert torch.equal(found["cls_feats"], model.pooler(found["text_feats"]))
    assert found["image_masks"].all()
    masked = model.infer(batch, mask_text=True)
    assert torch.equal(masked["text_ids"], batch["text_ids_mlm"])
    assert torch.equal(masked["text_labels"], batch["text_labels_mlm"])
    assert not torch.equal(masked["text_feats"], found["text_feats"])


def test_text_and_image_alone():
    model, batch = tiny.model(STAGE3), tiny.batch()
    text, image = model.infer_text(batch), model.infer_image(batch)
    assert text["text_feats"].shape == (3, 16, model.transformer.embed_dim)
    assert image["image_feats"].shape == (3, 5, model.transformer.embed_dim)
    for found, side, hidden in ((text, "text", text["text_feats"]), (image, "image", image["image_feats"])):
        assert torch.equal(found["raw_cls_feats"], hidden[:, 0])
        assert torch.equal(found["cls_feats"], getattr(model, f"itc_{side}_proj")(hidden[:, 0]))
        for name in ("cls_feats", "cls_vlffn_feats"):
            assert torch.allclose(found[name].norm(dim=1), torch.ones(3))
    assert model.infer_text(batch, vl_branch=False)["cls_vlffn_feats"] is None
    assert model.infer_image(batch, vl_branch=False)["cls_vlffn_feats"] is None
    assert model.infer_text(batch)["text_labels"] is batch["text_labels"]


def test_vl_branch_by_hand():
    model, batch = tiny.model(STAGE3), tiny.batch()
    x = model.text_embeddings(batch["text_ids"]) + model.token_type_embeddings.weight[0]
    biases, padding = model.attention_masks(model.relative_position_bias_table, "text", batch["text_masks"])
    for number, (block, bias) in enumerate(zip(model.transformer.blocks, biases, strict=True)):
        x = block(x, bias, "vl" if number >= model.transformer.vl_start else "text", padding=padding)
    by_hand = model.itc_vl_text_proj(model.transformer.norm(x)[:, 0])
    assert torch.allclose(model.infer_text(batch)["cls_vlffn_feats"], by_hand, atol=1e-6)

    x = model.transformer.embed_image(batch["image"]) + model.token_type_embeddings.weight[1]
    biases, _ = model.attention_masks(model.relative_position_bias_table, "image")
    for number, (block, bias) in enumerate(zip(model.transformer.blocks, biases, strict=True)):
        x = block(x, bias, "vl" if number >= model.transformer.vl_start else "image")
    by_hand = model.itc_vl_image_proj(model.transformer.norm(x)[:, 0])
    assert torch.allclose(model.infer_image(batch)["cls_vlffn_feats"], by_hand, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name):
    model = tiny.model(name)
    short, long = batch_of(name, padded=16), batch_of(name, padded=24)
    text = [model.infer_text(batch, vl_branch=name != TEXT) for batch in (short, long)]
    assert torch.allclose(text[0]["raw_cls_feats"], text[1]["raw_cls_feats"], atol=1e-5)
    for row, length in enumerate((6, 9, 12)):
        assert torch.allclose(text[0]["text_feats"][row, :length], text[1]["text_feats"][row, :length], atol=1e-5)
    if name != TEXT:
        pair = [model.infer(batch) for batch in (short, long)]
        assert torch.allclose(pair[0]["image_feats"], pair[1]["image_feats"], atol=1e-5)
        assert torch.allclose(pair[0]["cls_feats"], pair[1]["cls_feats"], atol=1e-5)
    assert losses(model, short) == pytest.approx(losses(model, long), rel=1e-4)


def test_what_padding_holds_is_of_no_account():
    model, batch = tiny.model(STAGE3), tiny.batch()
    rubbish = batch | {"text_ids": torch.where(batch["text_masks"].bool(), batch["text_ids"], 9)}
    assert torch.equal(model.infer(batch)["cls_feats"], model.infer(rubbish)["cls_feats"])


def test_samples_do_not_see_each_other():
    model, batch = tiny.model(STAGE3), tiny.batch()
    alone = {name: value[1:2] if torch.is_tensor(value) else value for name, value in batch.items()}
    assert torch.allclose(model.infer(batch)["cls_feats"][1], model.infer(alone)["cls_feats"][0], atol=1e-5)


def test_texts_that_are_too_long():
    with pytest.raises(VLMoError, match="texts of 32 tokens, but max_text_len=24"):
        tiny.model(STAGE3).infer_text(tiny.batch(padded=32))


def test_absolute_positions_of_base_plus():
    config = tiny.config("task_mlm_itm_itc_base_plus", model_arch="vlmo_base_plus_patch16")
    with torch.device("meta"):
        model = VLMo(config)
    assert model.relative_position_bias_table is None
    assert model.text_embeddings.absolute_positions
    assert not tiny.model(STAGE3).text_embeddings.absolute_positions


# --- parameters -------------------------------------------------------------------------------------------------------


def test_stage_2_trains_exactly_the_published_names():
    model = tiny.model(TEXT)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    experts = {
        f"transformer.blocks.{block}.{part}.{kind}"
        for block in range(model.transformer.depth)
        for part in ("mlp_text.fc1", "mlp_text.fc2", "norm2_text")
        for kind in ("weight", "bias")
    }
    embeddings = {"word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"}
    embeddings |= {"LayerNorm.weight", "LayerNorm.bias"}
    head = {"bias", "decoder.weight"}
    head |= {f"transform.{part}.{kind}" for part in ("dense", "LayerNorm") for kind in ("weight", "bias")}
    assert trained == experts | {f"text_embeddings.{name}" for name in embeddings} | {
        f"mlm_score.{name}" for name in head
    } | {
        "token_type_embeddings.weight",
        "relative_position_bias_table",
        "transformer.norm.weight",
        "transformer.norm.bias",
    }
    assert not [name for name, _ in model.named_parameters() if "_vl" in name]


@pytest.mark.parametrize("name", [STAGE3, VQA, NLVR2, IRTR])
def test_later_stages_train_everything(name):
    assert all(parameter.requires_grad for parameter in tiny.model(name).parameters())


HEADS = {
    STAGE3: {"mlm_score", "itm_score", "itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj"}
    | {"logit_scale", "logit_vl_scale"},
    TEXT: {"mlm_score"},
    IRTR: {"itc_text_proj", "itc_image_proj", "logit_scale"},
    VQA: {"vqa_classifier"},
    NLVR2: {"nlvr2_classifier"},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_those_of_the_losses(name):
    body = {"transformer", "text_embeddings", "token_type_embeddings", "pooler", "relative_position_bias_table"}
    assert {key.split(".")[0] for key in tiny.model(name).state_dict()} == body | HEADS[name]


def test_the_scales_start_at_the_published_temperature():
    model = VLMo(tiny.config(STAGE3))
    assert [model.logit_scale.exp().item(), model.logit_vl_scale.exp().item()] == pytest.approx([1 / 0.07] * 2)


def test_nlvr2_widens_the_token_types_of_a_loaded_file(tmp_path):
    before = tiny.model(STAGE3)
    torch.save(before.state_dict(), tmp_path / "stage3.pt")
    model = VLMo(tiny.config(NLVR2, load_path=str(tmp_path / "stage3.pt")))
    types = before.token_type_embeddings.weight
    assert torch.equal(model.token_type_embeddings.weight, types[[0, 1, 1]])


@pytest.mark.parametrize("reset", [False, True, "auto"])
@pytest.mark.parametrize("task", [VQA, NLVR2])
def test_heads_of_a_fine_tuned_file_are_kept_or_start_new(tmp_path, task, reset):
    before = tiny.model(task)
    torch.save(before.state_dict(), tmp_path / "tuned.pt")
    model = VLMo(tiny.config(task, load_path=str(tmp_path / "tuned.pt"), reset_heads=reset))
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, before.state_dict()[name])}
    heads = {name for name in before.state_dict() if name.startswith(tuple(model.downstream_heads))}
    assert heads
    assert kept == before.state_dict().keys() - (heads if reset is True else set())


@pytest.mark.parametrize(
    "saved, names, size, kept",
    [
        (["yes", "no"], ["yes", "no"], 7, True),
        (["yes", "no"], ["yes"], 7, True),  # as far as the tables show them
        (None, ["yes", "no"], 7, True),  # nobody knows
        (["yes", "no"], ["benign", "malignant"], 7, False),
        (None, ["benign", "malignant"], 2, False),
    ],
)
def test_a_head_for_other_classes_starts_new_by_itself(tmp_path, caplog, saved, names, size, kept):
    before = tiny.model(VQA)
    before.answers = saved
    torch.save({"state_dict": before.state_dict(), METADATA_KEY: metadata_of(before).to_dict()}, tmp_path / "tuned.pt")
    options = {"load_path": str(tmp_path / "tuned.pt"), "vqav2_label_size": size}
    model = VLMo(tiny.config(VQA, **options), label_names=names)
    output = "vqa_classifier.3.weight"
    assert torch.equal(model.state_dict()[output], before.state_dict()[output]) == kept
    assert ("initialised anew" in caplog.text) != kept
    assert model.answers == names
    if size == 7:  # an evaluation has the head of the file
        tested = VLMo(tiny.config(VQA, **options, test_only=True), label_names=names)
        assert torch.equal(tested.state_dict()[output], before.state_dict()[output])


def test_the_same_seed_gives_the_same_weights():
    torch.manual_seed(1)
    one = VLMo(tiny.config(STAGE3)).state_dict()
    torch.manual_seed(1)
    other = VLMo(tiny.config(STAGE3)).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- config -----------------------------------------------------------------------------------------------------------


def test_a_config_with_the_published_options_alone():
    published = json.loads((GOLDENS / "named_configs.json").read_text())["default"]
    config = {name: tiny.SMALL.get(name, value) for name, value in published.items()}
    assert set(VLMo(config)(tiny.batch())) == {"mlm", "itm", "itc"}


@pytest.mark.parametrize(
    "updates, line",
    [
        ({"model_arch": "vlmo_tiny"}, "model_arch: 'vlmo_tiny' is unknown; did you mean vlmo_tiny_patch16?"),
        ({"image_size": 33}, "multiple of the patch size 16"),
        ({"loss_names": {"itm": 1, "mml": 1}}, "loss_names: 'mml' is unknown; did you mean mlm?"),
    ],
)
def test_a_config_that_cannot_work(updates, line):
    with pytest.raises(VLMoError, match=line):
        VLMo(tiny.config(STAGE3) | updates)


def test_signatures_that_people_call():
    config, *options = inspect.signature(VLMo).parameters.values()
    assert config.name == "config" and all(option.default is None for option in options)
    signatures = {
        VLMo.infer: {"mask_text": False, "image_token_type_idx": 1},
        VLMo.infer_text: {"mask_text": False, "vl_branch": True},
        VLMo.infer_image: {"image_token_type_idx": 1, "vl_branch": True},
    }
    for function, defaults in signatures.items():
        _, batch, *options = inspect.signature(function).parameters.values()
        assert batch.name == "batch"
        assert {option.name: option.default for option in options} == defaults


# --- the step ---------------------------------------------------------------------------------------------------------


def test_weights_multiply_the_losses():
    full, part = tiny.model(STAGE3), tiny.model(STAGE3, loss_names={"mlm": 0.5, "itc": 3})
    part.load_state_dict(full.state_dict())
    whole, weighted = losses(full, tiny.batch()), losses(part, tiny.batch())
    assert weighted["mlm"] == pytest.approx(0.5 * whole["mlm"], rel=1e-5)
    assert weighted["itc"] == pytest.approx(3 * whole["itc"], rel=1e-5)
    assert weighted["itm"] == pytest.approx(whole["itm"], rel=1e-5)


def test_a_loss_that_is_off_is_not_computed():
    assert set(tiny.model(STAGE3, loss_names={"mlm": 0})(tiny.batch())) == {"itc", "itm"}


@pytest.mark.parametrize("weight", [0.001, 0.3])
def test_a_small_weight_trains_its_head(weight):
    model = tiny.model(STAGE3, loss_names={"mlm": weight, "itc": 1, "itm": weight})
    model.training_step(tiny.batch(), 0).backward()
    assert model.mlm_score.decoder.weight.grad.any()
    assert model.itm_score.fc.weight.grad.any()


def test_the_step_is_the_sum_of_the_losses():
    model, batch = tiny.model(STAGE3), tiny.batch()
    outputs = losses(model, batch)
    torch.manual_seed(0)
    assert model.training_step(batch, 0).item() == pytest.approx(sum(outputs.values()), rel=1e-6)
    assert all(isinstance(output, TaskOutput) for output in model(batch).values())


def test_images_may_be_bytes():
    model, batch = tiny.model("task_mlm_itm_itc_base"), tiny.batch()
    levels = torch.randint(0, 256, batch["image"].shape, dtype=torch.uint8)
    as_bytes, as_pixels = batch | {"image": levels}, batch | {"image": from_bytes(levels)}
    losses = [{name: output.loss for name, output in model(each).items()} for each in (as_bytes, as_pixels)]
    assert losses[0] == losses[1]
    features = [model.infer(each)["cls_feats"] for each in (as_bytes, as_pixels)]
    assert torch.equal(*features)


def test_a_batch_without_any_readable_image():
    model = tiny.model(STAGE3)
    assert model.training_step({"skipped": ["one", "two"]}, 0) is None
    assert model.validation_step({"skipped": ["one"]}, 0) is None
    assert model.test_step({"skipped": ["one"]}, 0) == {}


def test_steps_are_learnt_from():
    model, batch = VLMo(tiny.config(STAGE3)).train(), tiny.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]
