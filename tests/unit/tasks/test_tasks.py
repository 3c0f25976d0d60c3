"""The losses by their formulas, their metrics, and what their gradients reach."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from vlmo.batch import FIELDS, VALUES, Field
from vlmo.errors import VLMoError
from vlmo.modules import linear_cross_entropy
from vlmo.modules.attention import first_positions
from vlmo.modules.model import Encode, VLMoModel
from vlmo.registry import ARCHITECTURES
from vlmo.registry import TASKS as REGISTERED
from vlmo.tasks import itm, mlm
from vlmo.tasks.base import BatchSize, Step, Task, TaskOutput
from vlmo.tasks.itc import contrast, contrast_output, same_images
from vlmo.tasks.itm import draw_negatives, leave_out
from vlmo.tasks.mim import normalised_patches
from vlmo.tasks.vqa import dense_targets
from vlmo.training.unused_parameters import unused_parameters

TASKS = {
    "mim": "task_mim_base",
    "textmlm": "task_textmlm_base",
    "vqa": "task_finetune_vqa_base_image480",
    "nlvr2": "task_finetune_nlvr2_base",
    "snli_ve": "task_finetune_snli_ve_base_image384",
    "gqa": "task_finetune_gqa_base_image480",
    "irtr": "task_finetune_irtr_coco_base_image384",
    "image_classification": "task_finetune_imagenet_base",
}


DRAW = itm.draw_negatives


def model_of(*names, **updates):
    """A model with these losses alone."""
    weights = dict.fromkeys(REGISTERED, 0) | dict.fromkeys(names, 1)
    named = TASKS.get(names[0], "task_mlm_itm_itc_base")
    return tiny.model(named, loss_names=weights, **updates)


def batch_of(*names):
    return tiny.batch(images=("image_0", "image_1") if "nlvr2" in names else ("image",))


def encode_masked_image(model, image, patch_mask):
    """(B, P, D)"""
    request = Encode(image, patch_mask=patch_mask, mask_token=model.mim_mask_token)
    return model.encode([request])[0][0][:, 1:]


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTERED)
def test_a_task_declares_what_it_needs(name):
    task = REGISTERED[name]
    assert task.name == name
    assert set(task.primary_metrics) <= set(task.metrics)
    heads = task(model_arch="vlmo_tiny_patch16", vocab_size=64, shared_ffn=False).heads(8)
    assert set(task.required_heads) <= set(heads)
    assert all(any(head in beginning for head in heads) for beginning in task.sized_by)


@pytest.mark.parametrize("name", REGISTERED)
def test_a_task_reads_no_field_that_it_does_not_declare(name):
    model = model_of(*([name] if not REGISTERED[name].requires else ["itc", name]))
    declared = {field for task in model.tasks for field in task.fields}
    batch = {field: value for field, value in batch_of(name).items() if field in declared}
    assert model(batch)[name].loss.isfinite()


def test_each_comes_after_what_it_requires():
    assert [task.name for task in VLMoModel("vlmo_tiny_patch16", ["itm", "mlm", "itc"]).tasks][-1] == "itm"


# --- masked words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, weight", [("mlm", 0.25), ("textmlm", 1.0)])
def test_masked_words(name, weight):
    model, batch = model_of(name), tiny.batch()
    output = model(batch)[name]
    encode = model.infer if name == "mlm" else model.infer_text
    hidden = encode(batch, mask_text=True)["text_feats"]
    logits, labels = model.mlm_score(hidden), batch["text_labels_mlm"]
    assert torch.allclose(output.loss, weight * F.cross_entropy(logits.flatten(0, 1), labels.flatten()), rtol=1e-5)
    assert output.outputs["logits"].shape == ((labels != -100).sum(), 64)


def test_many_masked_words_are_scored_in_chunks(monkeypatch):
    model, batch = model_of("textmlm").eval(), tiny.batch()
    whole = model(batch)["textmlm"]
    monkeypatch.setattr(mlm, "CHUNK", 2)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 2)
    parts = model(batch)["textmlm"]
    assert "logits" not in parts.outputs and "logits" in whole.outputs
    assert torch.allclose(parts.loss, whole.loss)
    measured, labels = parts.measured["accuracy"]
    assert measured == whole.measured["accuracy"][0] and labels > 2


def test_no_masked_word_is_no_loss_and_no_nan():
    model = model_of("mlm")
    batch = tiny.batch() | {"text_labels_mlm": torch.full((3, 16), -100)}
    output = model(batch)["mlm"]
    output.loss.backward()
    assert output.loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert model.mlm_score.decoder.weight.grad is not None


# --- contrast ---------------------------------------------------------------------------------------------------------


def info_nce(image, text, log_scale):
    logits = log_scale.exp() * image @ text.T
    own = torch.arange(len(image))
    return -(logits.log_softmax(1)[own, own].mean() + logits.log_softmax(0)[own, own].mean()) / 2, logits


def test_contrast_is_the_mean_over_both_branches():
    model, batch = model_of("itc"), tiny.batch()
    output = model(batch)["itc"]
    image, text = model.infer_image(batch), model.infer_text(batch)
    plain, logits = info_nce(image["cls_feats"], text["cls_feats"], model.logit_scale)
    fused, vl_logits = info_nce(image["cls_vlffn_feats"], text["cls_vlffn_feats"], model.logit_vl_scale)
    assert torch.allclose(output.loss, (plain + fused) / 2, rtol=1e-5)
    assert torch.allclose(output.outputs["i2t_logits"], logits, rtol=1e-5)
    assert torch.allclose(output.outputs["t2i_logits"], logits.T, rtol=1e-5)
    assert torch.allclose(output.outputs["vl_i2t_logits"], vl_logits, rtol=1e-5)
    assert output.scalars["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    hits = (vl_logits.argmax(1) == torch.arange(3)).sum(), (vl_logits.argmax(0) == torch.arange(3)).sum()
    assert output.measured["vl_i2t_accuracy"] == (hits[0], 3) and output.measured["vl_t2i_accuracy"] == (hits[1], 3)


def test_retrieval_contrasts_the_plain_features_alone():
    model, batch = model_of("irtr"), tiny.batch()
    image, text = model.infer_image(batch)["cls_feats"], model.infer_text(batch)["cls_feats"]
    assert torch.allclose(model(batch)["irtr"].loss, info_nce(image, text, model.logit_scale)[0], rtol=1e-5)


def test_contrast_is_computed_in_float32():
    image, text = F.normalize(torch.randn(2, 16, 32), dim=-1)
    exact, exact_logits, _ = contrast(image, text, torch.tensor(4.6), False)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits, _ = contrast(image, text, torch.tensor(4.6), False)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, exact_logits)
    assert torch.equal(loss, exact)


def test_the_scale_is_never_clamped():
    unit = torch.eye(3)
    _, logits, _ = contrast(unit, unit, torch.tensor(6.0), False)  # e^6 is four times CLIP's ceiling of 100
    assert torch.allclose(logits, unit * torch.tensor(6.0).exp())


def test_without_experts_there_is_one_contrast_and_one_feed_forward():
    model, batch = model_of("mlm", "itm", "itc", shared_ffn=True), tiny.batch()
    assert not any("mlp_text" in name or "_vl" in name for name in model.state_dict())
    image, text = model.infer_image(batch)["cls_feats"], model.infer_text(batch)["cls_feats"]
    outputs = model(batch)
    assert torch.allclose(outputs["itc"].loss, info_nce(image, text, model.logit_scale)[0], rtol=1e-5)
    sum(output.loss for output in outputs.values()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == unused_parameters(model)


# Four pairs, of which the first and the third have one image.
SIMILARITIES = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.5, 2.0, 1.0, 1.5], [2.5, 0.0, 1.0, 0.5], [1.0, 1.0, 0.0, 3.0]])
KEYS = torch.tensor([7, -2, 7, 5])


def nll(logits: list[float], right: list[int]) -> float:
    """Minus the mean log-probability of the right ones among these."""
    total = math.log(sum(math.exp(value) for value in logits))
    return sum(total - logits[each] for each in right) / len(right)


def by_hand(mode: str) -> float:
    found = []
    for rows in (SIMILARITIES.tolist(), SIMILARITIES.t().tolist()):
        for own, row in enumerate(rows):
            twin = {0: 2, 2: 0}.get(own)
            if mode == "mask" and twin is not None:
                left = [value for column, value in enumerate(row) if column != twin]
                found.append(nll(left, [own - (twin < own)]))
            else:
                found.append(nll(row, [own] if mode != "positive" or twin is None else [own, twin]))
    return sum(found) / len(found)


@pytest.mark.parametrize("mode", ["published", "mask", "positive"])
def test_captions_of_one_image(mode):
    same = same_images(KEYS)
    assert same.nonzero().tolist() == [[0, 2], [2, 0]]
    treated = None if mode == "published" else same
    # (the similarities of unit vectors with these columns are theirs)
    loss, logits, _ = contrast(
        torch.eye(4), SIMILARITIES.t(), torch.tensor(0.0), False, None, treated, mode == "positive"
    )
    assert torch.equal(logits, SIMILARITIES)
    assert loss.item() == pytest.approx(by_hand(mode), rel=1e-6)


@pytest.mark.parametrize("mode, right", [("published", 3), ("mask", 4), ("positive", 4)])
def test_a_caption_of_the_same_image_is_no_error(mode, right):
    treated = None if mode == "published" else same_images(KEYS)
    measured = contrast_output(torch.tensor(0.0), SIMILARITIES, torch.arange(4), treated).measured
    assert measured["i2t_accuracy"] == (right, 4)


@pytest.mark.parametrize("mode", ["published", "mask", "positive"])
@pytest.mark.parametrize("name", ["itc", "irtr"])
def test_every_mode_counts_them(name, mode):
    model, batch = model_of(name, same_image=mode), tiny.batch((6, 9, 12, 7, 8))
    alone = model(batch)[name]
    batch["image_key"] = torch.tensor([4, 4, 1, 4, 2])
    output = model(batch)[name]
    assert output.scalars["same_image_pairs"] == 3 and alone.scalars["same_image_pairs"] == 0
    assert ("same_image" in output.outputs) == (mode != "published")
    assert torch.equal(output.loss, alone.loss) == (mode == "published")
    del batch["image_key"]
    if mode == "published":
        assert "same_image_pairs" not in model(batch)[name].scalars
    else:
        with pytest.raises(VLMoError, match="image_key"):
            model(batch)


# --- matching ---------------------------------------------------------------------------------------------------------


def test_negatives_are_drawn_by_the_softmax_without_the_own_pair():
    logits = torch.tensor([[9.0, 0.0, 1.0, 2.0], [2.0, 9.0, 2.0, 0.0]])
    drawn = torch.stack([draw_negatives(logits) for _ in range(4000)])
    for row in range(2):
        weights = logits[row].exp()
        weights[row] = 0
        share = torch.bincount(drawn[:, row], minlength=4) / len(drawn)
        assert share[row] == 0
        assert torch.allclose(share, weights / weights.sum(), atol=0.03)


@pytest.mark.parametrize("keys, allowed", [([1, 1, 2, 3], {2, 3}), ([1, 1, 1, 1], {1, 2, 3})])
def test_no_negative_of_the_own_image_unless_there_is_no_other(keys, allowed):
    logits = leave_out(torch.zeros(1, 4), same_images(torch.tensor(keys))[:1])
    assert {int(draw_negatives(logits)) for _ in range(200)} == allowed


@pytest.mark.parametrize("mode, possible", [("published", {1, 2}), ("mask", {2}), ("positive", {2})])
@pytest.mark.parametrize("negatives", ["global", "local"])
def test_matching_follows_the_contrast(negatives, mode, possible, monkeypatch):
    drawn = set()

    def draw(logits, *_):
        drawn.update(logits[0].isfinite().nonzero()[:, 0].tolist())
        return DRAW(logits)

    monkeypatch.setattr(itm, "draw_negatives", draw)
    model, batch = model_of("itc", "itm", same_image=mode, negatives=negatives), tiny.batch()
    batch["image_key"] = torch.tensor([4, 4, 1])
    assert model(batch)["itm"].loss.isfinite()
    assert drawn - {0} == possible


@pytest.mark.parametrize("own", [500.0, -500.0])
def test_negatives_where_one_pair_dominates(own):
    logits = torch.full((3, 3), 0.0).fill_diagonal_(own)
    drawn = torch.stack([draw_negatives(logits) for _ in range(200)])
    assert not (drawn == torch.arange(3)).any()
    assert {tuple(row) for row in drawn.unique(dim=0).tolist()} == {
        (a, b, c) for a in (1, 2) for b in (0, 2) for c in (0, 1)
    }
    assert not logits.requires_grad


def test_of_two_pairs_each_is_the_negative_of_the_other():
    model, batch = model_of("itc", "itm"), tiny.batch((6, 9))
    output = model(batch)["itm"]
    swapped_image = batch | {"image": batch["image"].flip(0)}
    swapped_text = batch | {name: batch[name].flip(0) for name in ("text_ids", "text_masks")}
    pairs = (batch, swapped_image, swapped_text)
    logits = model.itm_score(torch.cat([model.infer(pair)["cls_feats"] for pair in pairs]))
    labels = torch.tensor([1, 1, 0, 0, 0, 0])
    assert torch.allclose(output.outputs["logits"], logits, atol=1e-5)
    assert output.outputs["labels"].tolist() == labels.tolist()
    assert torch.allclose(output.loss, F.cross_entropy(logits, labels), rtol=1e-5)


def test_texts_draw_images_and_images_draw_texts():
    model, batch = model_of("itc", "itm"), tiny.batch()
    images, texts = [1, 2, 0], [2, 0, 1]  # the hardest image of each text, the hardest text of each image
    far = torch.full((3, 3), -1e4)
    logits = {"t2i_logits": far.clone(), "i2t_logits": far.clone(), "labels": torch.arange(3)}
    logits["t2i_logits"][range(3), images] = 0
    logits["i2t_logits"][range(3), texts] = 0
    provided = {"contrast": TaskOutput(torch.zeros(()), logits)}
    task, step = model.tasks[1], Step(batch, model.heads, True, provided, [BatchSize(3, 16, 0)])
    output = task.loss(step, model.encode(task.requests(step)))
    swapped_image = batch | {"image": batch["image"][images]}
    swapped_text = batch | {name: batch[name][texts] for name in ("text_ids", "text_masks")}
    pairs = (batch, swapped_image, swapped_text)
    expected = model.itm_score(torch.cat([model.infer(pair)["cls_feats"] for pair in pairs]))
    assert torch.allclose(output.outputs["logits"], expected, atol=1e-5)


def test_a_single_pair_has_no_negative():
    outputs = model_of("itc", "itm", "mlm")(tiny.batch((6,)))
    assert set(outputs) == {"itc", "mlm"}
    assert outputs["itc"].loss.item() == 0


# --- VQA --------------------------------------------------------------------------------------------------------------


def test_vqa_is_binary_cross_entropy_times_the_answers():
    model, batch = model_of("vqa"), tiny.batch()
    output = model(batch)["vqa"]
    logits = model.vqa_classifier(model.infer(batch)["cls_feats"])
    targets = torch.zeros(3, 7)
    for row in range(3):
        targets[row, row % 7], targets[row, (row + 2) % 7] = 1.0, 0.3
    p = logits.sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean() * 7
    assert torch.equal(output.outputs["targets"], targets)
    assert torch.allclose(output.loss, by_hand, rtol=1e-5)


def test_targets_from_lists_and_from_padded_tensors():
    labels, scores = [[3, 0, 6], [], [2]], [[1.0, 0.3, 0.6], [], [0.9]]
    padded = torch.tensor([[3, 0, 6], [-1, -1, -1], [2, -1, -1]])
    padded_scores = torch.tensor([[1.0, 0.3, 0.6], [0, 0, 0], [0.9, 0, 0]])
    expected = torch.zeros(3, 7)
    expected[0, 3], expected[0, 0], expected[0, 6], expected[2, 2] = 1.0, 0.3, 0.6, 0.9
    assert torch.equal(dense_targets(labels, scores, 7, torch.device("cpu")), expected)
    assert torch.equal(dense_targets(padded, padded_scores, 7, torch.device("cpu")), expected)
    nobody = torch.zeros(2, 0, dtype=torch.long)
    assert not dense_targets(nobody, torch.zeros(2, 0), 7, torch.device("cpu")).any()
    assert not dense_targets([[], []], [[], []], 7, torch.device("cpu")).any()


def test_questions_without_answers_are_not_measured():
    model, batch = model_of("vqa"), tiny.batch()
    nobody = {
        "vqa_labels": torch.zeros(3, 0, dtype=torch.long),
        "vqa_scores": torch.zeros(3, 0),
    }
    output = model(batch | nobody | {"answered": torch.tensor([False] * 3)})["vqa"]
    assert output.measured == {}
    assert output.outputs["logits"].shape == (3, 7)


def test_of_some_questions_the_answers_are_known():
    model, batch = model_of("vqa"), tiny.batch()
    some = model(batch | {"answered": torch.tensor([True, False, True])})["vqa"]
    assert torch.equal(some.loss, model(batch)["vqa"].loss)
    logits, targets = (some.outputs[name][[0, 2]] for name in ("logits", "targets"))
    score, count = some.measured["score"]
    assert count == 2
    assert score.item() == pytest.approx(targets[[0, 1], logits.argmax(1)].sum().item())
    loss, count = some.measured["loss"]
    assert count == 2
    assert loss.item() == pytest.approx(2 * 7 * F.binary_cross_entropy_with_logits(logits, targets).item())


# --- NLVR2 ------------------------------------------------------------------------------------------------------------


def test_nlvr2_reads_both_pictures_with_token_types_of_their_own():
    model, batch = model_of("nlvr2"), batch_of("nlvr2")
    assert len(model.token_type_embeddings.weight) == 3
    output = model(batch)["nlvr2"]
    first, second = (model.infer(batch, image_token_type_idx=number)["cls_feats"] for number in (1, 2))
    logits = model.nlvr2_classifier(torch.cat([first, second], dim=1))
    assert torch.allclose(output.outputs["logits"], logits, atol=1e-6)
    assert torch.allclose(output.loss, F.cross_entropy(logits, batch["answers"].long()), rtol=1e-5)
    same = batch | {"image_1": batch["image_0"]}
    first, second = (model.infer(same, image_token_type_idx=number)["cls_feats"] for number in (1, 2))
    assert not torch.allclose(first, second, atol=1e-4)
    with torch.no_grad():
        model.token_type_embeddings.weight[2] = model.token_type_embeddings.weight[1]
    assert torch.equal(model.infer(same, image_token_type_idx=2)["cls_feats"], first)


def test_answers_may_be_a_list():
    model, batch = model_of("nlvr2"), batch_of("nlvr2")
    listed = batch | {"answers": batch["answers"].tolist()}
    assert torch.equal(model(listed)["nlvr2"].loss, model(batch)["nlvr2"].loss)


def test_nlvr2_measures_dev_and_test_apart():
    model, batch = model_of("nlvr2"), batch_of("nlvr2")
    both = model(batch)["nlvr2"]
    assert set(both.measured) == {"dev/loss", "dev/accuracy", "test/loss", "test/accuracy"}
    loss, count = both.measured["test/loss"]
    assert count == 2
    dev_loss, dev_count = both.measured["dev/loss"]
    assert (loss + dev_loss).item() / (count + dev_count) == pytest.approx(both.loss.item(), rel=1e-5)
    dev = model(batch | {"table_name": ["nlvr2_dev"] * 3})["nlvr2"]
    assert set(dev.measured) == {"dev/loss", "dev/accuracy"}
    assert set(model.train()(batch)["nlvr2"].measured) == {"loss", "accuracy"}


# --- masked images ----------------------------------------------------------------------------------------------------


def test_hidden_patches_are_regressed_with_mean_0_and_deviation_1():
    model, batch = model_of("mim"), batch_of("mim")
    hidden = batch["patch_mask"]
    pixels = batch["image"].reshape(3, 3, 2, 16, 2, 16).permute(0, 2, 4, 3, 5, 1).reshape(3, 4, 768)[hidden]
    pixels = (pixels - pixels.mean(1, keepdim=True)) / pixels.std(1, keepdim=True)
    predicted = model.mim_score(encode_masked_image(model, batch["image"], hidden))[hidden]
    assert predicted.shape == pixels.shape
    output = model(batch)["mim"]
    assert torch.allclose(output.loss, (predicted - pixels).square().mean(), rtol=1e-4)


def test_a_patch_of_one_colour_has_finite_pixels():
    assert normalised_patches(torch.ones(1, 3, 32, 32), 16).abs().max() == 0


def test_hidden_patches_have_their_visual_tokens_as_labels():
    model, batch = model_of("mim", mim_target="dalle", mim_tokenizer="encoder.pkl"), batch_of("mim")
    output = model(batch)["mim"]
    hidden = encode_masked_image(model, batch["image"], batch["patch_mask"])
    labels = torch.where(batch["patch_mask"], batch["visual_tokens"], -100)
    expected = F.cross_entropy(model.mim_score(hidden).flatten(0, 1), labels.flatten())
    assert torch.allclose(output.loss, expected, rtol=1e-5)
    assert output.outputs["logits"].shape == (batch["patch_mask"].sum(), 8192)


def test_what_is_hidden_is_not_seen():
    model, batch = model_of("mim"), batch_of("mim")
    hidden = batch["patch_mask"]
    pixels = hidden.reshape(3, 1, 2, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(pixels, -batch["image"], batch["image"])
    encoded = encode_masked_image(model, batch["image"], hidden)
    assert torch.equal(encode_masked_image(model, other, hidden), encoded)
    assert not torch.allclose(encode_masked_image(model, -batch["image"], hidden), encoded)


# --- all --------------------------------------------------------------------------------------------------------------

SETS = [("mlm", "itc", "itm"), ("textmlm",), ("irtr",), ("vqa",), ("nlvr2",), ("mim",)]


@pytest.mark.parametrize("names", SETS)
def test_losses_are_finite_under_large_logits(names):
    model = model_of(*names)
    with torch.no_grad():
        for head in ("mlm_score", "itm_score", "mim_score", *(h for task in model.tasks for h in task.required_heads)):
            for parameter in getattr(model, head).parameters() if hasattr(model, head) else ():
                parameter.mul_(1e3)
        if hasattr(model, "logit_scale"):
            model.logit_scale.fill_(9.0)  # e^9 = 8,000
    outputs = model(batch_of(*names))
    loss = sum(output.loss for output in outputs.values())
    loss.backward()
    assert set(outputs) == set(names)
    assert all(output.loss.dtype == torch.float32 and output.loss.isfinite() for output in outputs.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("names", SETS)
def test_losses_under_autocast(names):
    model, batch = model_of(*names), batch_of(*names)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)
    for name in set(names) - {"itm"}:  # (draws its negatives)
        assert rough[name].loss.dtype == torch.float32
        assert rough[name].loss.item() == pytest.approx(exact[name].loss.item(), rel=0.1), name


def test_stochastic_depth_and_dropout_are_for_training():
    model, batch = model_of("irtr", drop_path_rate=0.3), tiny.batch()
    assert torch.equal(model(batch)["irtr"].loss, model(batch)["irtr"].loss)
    model.train()
    assert not torch.equal(model(batch)["irtr"].loss, model(batch)["irtr"].loss)


REACH = [*SETS, ("mlm",), ("itc",), ("mlm", "itc")]


@pytest.mark.parametrize("arch", ["vlmo_tiny_patch16", "vlmo_absolute_patch16"])
@pytest.mark.parametrize("names", REACH)
def test_gradients_reach_everything_but_what_is_said_to_be_out_of_reach(names, arch, monkeypatch):
    absolute = dict(ARCHITECTURES["vlmo_tiny_patch16"], relative_positions=False, layer_scale=None)
    monkeypatch.setitem(ARCHITECTURES, "vlmo_absolute_patch16", absolute)
    model = model_of(*names, model_arch=arch)
    model.requires_grad_(True)  # (stage 2 freezes)
    sum(output.loss for output in model(batch_of(*names)).values()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == unused_parameters(model)
    relative = arch == "vlmo_tiny_patch16"  # (stage 1 has no text)
    assert ("text_embeddings.position_embeddings.weight" in without) == (relative and names != ("mim",))
    assert ("transformer.blocks.2.mlp_vl.fc1.weight" in without) == (names in (("irtr",),))


@pytest.mark.parametrize("names", [("mlm", "itc"), *SETS[1:]])  # (ITM: in two processes, `test_distributed.py`)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_batch_without_samples_has_losses_of_zero_that_reach_all_the_same(names, bf16):
    model = model_of(*names, drop_path_rate=0.2).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(model.empty_batch())
    loss = sum(output.loss for output in outputs.values())
    loss.backward()
    assert loss.item() == 0
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in model.trained_parameters()}
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


class BoxTask(Task):
    """Made up, with fields of every kind that no built-in task has."""

    name = "boxes"
    paths = ("image",)
    fields = {
        "image": FIELDS["image"],
        "boxes": Field(("K", 4), torch.float32, padding=0),
        "area": Field((), torch.float32),
        "difficult": Field((), torch.bool),
        "phrases": VALUES,
    }

    def heads(self, width):
        return {"box_head": torch.nn.Linear(width, 4)}

    def requests(self, step):
        return [Encode(image=step.batch["image"], positions=first_positions(step.batch["image"]))]

    def loss(self, step, encoded):
        batch = step.batch
        assert batch["difficult"].dtype == torch.bool and len(batch["phrases"]) == len(batch["area"])
        found = step.heads["box_head"](encoded[0][0][:, 0])
        return TaskOutput(((found[:, None] - batch["boxes"]).abs().sum((1, 2)) * batch["area"]).sum())


def test_fields_of_a_new_task_are_there_in_a_batch_without_samples(monkeypatch):
    monkeypatch.setitem(REGISTERED, "boxes", BoxTask)
    model = model_of("boxes").train()
    batch = model.empty_batch()
    assert batch.keys() >= BoxTask.fields.keys() and batch["boxes"].shape[::2] == (0, 4) and batch["phrases"] == []
    loss = model(batch)["boxes"].loss
    loss.backward()
    assert loss.item() == 0 and not model.box_head.weight.grad.any()


def test_dropping_every_branch_leaves_no_weight_without_a_gradient():
    model = model_of("mlm", "itc", "itm").train()
    for block in model.transformer.blocks:
        block.drop_path.drop_prob = 1 - 1e-9  # by sample: the branch is computed, and its share of the sum is 0
    sum(output.loss for output in model(tiny.batch()).values()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in model.trained_parameters()}
