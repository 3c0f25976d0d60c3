"""The losses that take the place of the published contrast, by their formulas; and smoothed labels of classes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from vlmo.modules import VLMo
from vlmo.tasks import contrast_losses
from vlmo.tasks.base import BatchSize, Step
from vlmo.tasks.itc import contrast, count_same_images, same_images

# Four pairs, of which the first and the third have one image.
LOGITS = np.array([[3.0, 1.0, 2.0, 0.0], [0.5, 2.0, 1.0, 1.5], [2.5, 0.0, 1.0, 0.5], [1.0, 1.0, 0.0, 3.0]])
KEYS = torch.tensor([7, -2, 7, 5])
TWIN = {0: 2, 2: 0}
MODES = ["published", "mask", "positive"]


def computed(mode: str, **options) -> float:
    same = None if mode == "published" else same_images(KEYS)
    # (the similarities of unit vectors with these columns are theirs)
    image, text = torch.eye(4), torch.tensor(LOGITS.T, dtype=torch.float32)
    return contrast(image, text, torch.tensor(0.0), False, None, same, mode == "positive", **options)[0].item()


def by_hand(mode: str, decoupled: bool, smoothing: float) -> float:
    """Mean over both ways of -sum_j target_j s_j + log sum_(j compared) exp s_j."""
    losses = []
    for rows in (LOGITS, LOGITS.T):
        for own, row in enumerate(rows):
            twins = [TWIN[own]] if own in TWIN and mode != "published" else []
            right = [own, *twins] if mode == "positive" else [own]
            counted = [j for j in range(4) if not (mode == "mask" and j in twins)]
            target = np.zeros(4)
            target[right] = (1 - smoothing) / len(right)
            target[counted] += smoothing / len(counted)
            compared = [j for j in counted if not (decoupled and j in right)]
            losses.append(np.log(np.exp(row[compared]).sum()) - (target * row).sum())
    return float(np.mean(losses))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decoupled, smoothing", [(True, 0.0), (False, 0.1), (True, 0.1)])
def test_decoupled_and_smoothed_by_hand(mode, decoupled, smoothing):
    found = computed(mode, decoupled=decoupled, smoothing=smoothing)
    assert found == pytest.approx(by_hand(mode, decoupled, smoothing), rel=1e-5)


def test_smoothed_labels_are_torchs_where_nothing_is_left_out():
    logits, labels = torch.tensor(LOGITS), torch.arange(4)
    expected = [F.cross_entropy(way, labels, label_smoothing=0.2) for way in (logits, logits.t())]
    assert computed("published", smoothing=0.2) == pytest.approx((sum(expected) / 2).item(), rel=1e-5)


def test_the_decoupled_loss_still_pulls_a_pair_that_is_told_apart():
    """The gradient at the own pair is -1 whatever the others are (its "coupling multiplier" is gone)."""
    logits = torch.tensor([[20.0, 0.0], [0.0, 20.0]], requires_grad=True)
    contrast_losses.cross_entropy(logits, None, False, True, 0.0).backward()
    assert torch.allclose(2 * logits.grad, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    coupled = logits.detach().requires_grad_()
    contrast_losses.cross_entropy(coupled, None, False, False, 0.0).backward()
    assert coupled.grad.abs().max() < 1e-8


@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_nothing_to_tell_apart_is_no_loss_and_no_nan(pairs):
    logits = torch.randn(pairs, pairs, requires_grad=True)
    loss = contrast_losses.cross_entropy(logits, ~torch.eye(pairs, dtype=torch.bool), False, True, 0.0)
    loss.backward()
    assert loss.item() == 0 and logits.grad.isfinite().all()


def sigmoid_by_hand(mode: str, bias: float) -> np.ndarray:
    """The loss of each row of pairs."""
    losses = np.zeros(4)
    for i in range(4):
        for j in range(4):
            twin = mode != "published" and TWIN.get(i) == j
            if not (twin and mode == "mask"):
                sign = 1 if i == j or twin else -1
                losses[i] += math.log(1 + math.exp(-sign * (LOGITS[i, j] + bias)))
    return losses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [3, 1024])
def test_siglip_by_hand(mode, chunk, monkeypatch):
    monkeypatch.setattr(contrast_losses, "TEXTS_PER_CHUNK", chunk)
    same = None if mode == "published" else same_images(KEYS, 4)
    image, text = torch.eye(4, requires_grad=True), torch.tensor(LOGITS.T, dtype=torch.float32, requires_grad=True)
    bias = torch.tensor(-2.5, requires_grad=True)
    total, i2t, t2i = contrast_losses.siglip(image, text, torch.tensor(0.0), bias, [4], same, mode == "positive")
    assert total.item() == pytest.approx(sigmoid_by_hand(mode, -2.5).sum(), rel=1e-5)
    assert torch.allclose(i2t, torch.tensor(LOGITS).float() - 2.5) and torch.equal(t2i, i2t.t())
    total.backward()
    right = np.eye(4) + (mode == "positive") * same_images(KEYS).numpy()
    slope = 1 / (1 + np.exp(2.5 - LOGITS)) - right
    slope[same_images(KEYS).numpy() & (mode == "mask")] = 0
    assert np.allclose(bias.grad, slope.sum(), rtol=1e-5)
    assert np.allclose(text.grad, slope.T, atol=1e-6)


def test_siglip_begins_as_in_its_paper():
    model = tiny.config("task_mlm_itm_itc_base", contrast_loss="siglip")
    heads = {name: p.item() for name, p in VLMo(model).named_parameters() if name.startswith("logit_")}
    scales = {"logit_scale": math.log(10), "logit_vl_scale": math.log(10)}
    assert heads == pytest.approx(scales | {"logit_bias": -10, "logit_vl_bias": -10})


def test_siglip_is_the_mean_over_both_branches_and_measures_the_own_pairs():
    model, batch = tiny.model("task_mlm_itm_itc_base", contrast_loss="siglip"), tiny.batch()
    output = model(batch)["itc"]
    image, text = model.infer_image(batch), model.infer_text(batch)
    losses = []
    for features, branch in (("cls_feats", ""), ("cls_vlffn_feats", "vl_")):
        scale, bias = (getattr(model, f"logit_{branch}{each}") for each in ("scale", "bias"))
        logits = scale.exp() * image[features] @ text[features].t() + bias
        losses.append(-F.logsigmoid((2 * torch.eye(3) - 1) * logits).sum() / 3)
    assert torch.allclose(output.loss, (losses[0] + losses[1]) / 2, rtol=1e-5)
    total, count = output.measured["loss"]
    assert count == 3 and total / 3 == pytest.approx(output.loss.item())
    assert output.measured["vl_i2t_accuracy"][1] == 3


def test_a_process_computes_its_own_rows(monkeypatch):
    """Two of three pairs are this process's; the mean over both processes is then that over all rows."""
    image, text = F.normalize(torch.randn(2, 3, 8), dim=-1)
    elsewhere = torch.cat([image[2:], text[2:]], dim=1)
    monkeypatch.setattr(contrast_losses, "all_gather_rows", lambda rows, *_: torch.cat([rows, elsewhere]))
    task = tiny.model("task_finetune_irtr_coco_base_image384", contrast_loss="siglip").tasks[0]
    heads = {"logit_scale": torch.tensor(1.0), "logit_bias": torch.tensor(-0.5)}
    step = Step({}, heads, True, sizes=[BatchSize(2, 8, 0), BatchSize(1, 8, 0)])
    output = task.compare(step, {"image": image[:2], "text": text[:2]})
    logits = math.e * image @ text.t() - 0.5
    assert torch.allclose(output.outputs["i2t_logits"], logits[:2])
    assert torch.allclose(output.outputs["t2i_logits"], logits.t()[:2])
    own = -F.logsigmoid((2 * torch.eye(3) - 1) * logits)[:2].sum()
    assert torch.allclose(output.loss, own * 2 / 3)
    total, count = output.measured["loss"]
    assert count == 2 and total == pytest.approx(own.item())


def test_counting_without_comparing_all():
    for keys in ([], [1], [4, 4, 1, 4, 2], [3, 3, 3, 3], [5, -1, 5, -1]):
        keys = torch.tensor(keys, dtype=torch.int64)
        assert count_same_images(keys) == same_images(keys).sum() / 2


# --- the temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit, expected", [(100, 100), (None, 500)])
def test_the_scale_is_never_above_its_limit(limit, expected):
    model = tiny.model("task_mlm_itm_itc_base", logit_scale_max=limit)
    with torch.no_grad():
        for name in ("logit_scale", "logit_vl_scale"):
            getattr(model, name).fill_(math.log(500))
    model.on_train_batch_end(None, None, 0)
    assert model.logit_scale.exp().item() == pytest.approx(expected, rel=1e-5)
    assert model.logit_vl_scale.exp().item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(1.0)  # (below, it learns freely)
    model.on_train_batch_end(None, None, 0)
    assert model.logit_scale == 1.0


# --- classes ----------------------------------------------------------------------------------------------------------


def test_smoothed_answers():
    model = tiny.model("task_finetune_vqa_base_image480", label_smoothing=0.3)
    batch = tiny.batch()
    plain = model(batch)["vqa"]
    logits, targets = plain.outputs["logits"], plain.outputs["targets"]
    assert torch.allclose(plain.loss, 7 * F.binary_cross_entropy_with_logits(logits, targets))  # an evaluation's
    smoothed = model.train()(batch)["vqa"]
    expected = 7 * F.binary_cross_entropy_with_logits(logits, 0.7 * targets + 0.3 / 7)
    assert torch.allclose(smoothed.loss, expected, rtol=1e-5)
    assert torch.equal(smoothed.outputs["targets"], targets)  # by which it is scored


def test_smoothed_statements():
    model = tiny.model("task_finetune_nlvr2_base", label_smoothing=0.3)
    batch = tiny.batch(images=("image_0", "image_1"))
    plain = model(batch)["nlvr2"]
    log_p = plain.outputs["logits"].log_softmax(-1)
    own = log_p.gather(1, plain.outputs["labels"][:, None])[:, 0]
    assert torch.allclose(plain.loss, -own.mean(), rtol=1e-5)
    expected = -(0.7 * own + 0.3 * log_p.mean(1)).mean()
    assert torch.allclose(model.train()(batch)["nlvr2"].loss, expected, rtol=1e-5)
