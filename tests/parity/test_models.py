"""Features, logits, losses and gradients equal what the original computes (recorded in goldens/task_*.npz)."""

import numpy as np
import pytest
import torch

from tests.conftest import GOLDENS
from tests.parity import models

CONFIGS = sorted(path.stem for path in GOLDENS.glob("task_*.npz"))
# of each kind one is in the default tier; .ci/run runs the others too
LONG = {"task_finetune_vqa_base_image480", "task_mlm_itm_itc_base_plus", "task_finetune_nlvr2_base_image384"}
FEATURES = dict(atol=2e-5, rtol=0)


def close(actual, expected, what, **tolerance):
    np.testing.assert_allclose(actual.detach().numpy(), expected, err_msg=what, **tolerance)


def check_features(model, batch, golden):
    pair = model.infer(batch) if "vl_cls_feats" in golden else None
    if pair is not None:
        close(pair["cls_feats"][:, :64], golden["vl_cls_feats"], "vl_cls_feats", **FEATURES)
        close(pair["text_feats"][:, :3, :16], golden["vl_text_feats"], "vl_text_feats", **FEATURES)
        close(pair["image_feats"][:, :3, :16], golden["vl_image_feats"], "vl_image_feats", **FEATURES)
    if "vl2_cls_feats" in golden:
        second = model.infer(batch, image_token_type_idx=2)
        close(second["cls_feats"][:, :64], golden["vl2_cls_feats"], "vl2_cls_feats", **FEATURES)
    if "text_cls_feats" in golden:
        text, image = model.infer_text(batch), model.infer_image(batch)
        for side, encoded in (("text", text), ("image", image)):
            for key in ("cls_feats", "cls_vlffn_feats"):
                if f"{side}_{key}" in golden:
                    close(encoded[key][:, :64], golden[f"{side}_{key}"], f"{side}_{key}", **FEATURES)
    if "text_feats" in golden:
        hidden = model.infer_text(batch, mask_text=True, vl_branch=False)["text_feats"]
        close(hidden[:, :4, :16], golden["text_feats"], "text_feats", **FEATURES)
    if "mlm_logits" in golden:
        encode = model.infer if pair is not None else model.infer_text
        logits = model.mlm_score(encode(batch, mask_text=True)["text_feats"])
        close(logits[:, :3, :32], golden["mlm_logits"], "mlm_logits", **FEATURES)


def check_outputs(outputs, golden):
    losses = {k: v for k, v in golden.items() if k.endswith("_loss")}
    if "textmlm" in outputs:  # recorded under the name of its kind
        losses = {"textmlm_loss": losses.pop("mlm_loss"), **losses}
    assert {f"{name}_loss" for name in outputs} == set(losses)
    for name, output in outputs.items():
        close(output.loss, losses[f"{name}_loss"], f"{name}_loss", rtol=1e-4)
        for kind in ("i2t_logits", "logits"):
            if f"{name}_{kind}" in golden and name != "mlm":  # (recorded of the first positions: see check_features)
                close(output.outputs[kind][:, :64], golden[f"{name}_{kind}"], f"{name}_{kind}", **FEATURES)


def check_gradients(model, golden):
    recorded = {k.removeprefix("grad/"): v for k, v in golden.items() if k.startswith("grad/")}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name, digest in recorded.items() if digest[0] > 0} <= set(gradients)
    for name, expected in recorded.items():
        if expected[0] == 0:
            continue
        norm = expected[0]
        actual = models.gradient_digest(gradients[name])
        np.testing.assert_allclose(actual[0], norm, rtol=1e-4, err_msg=name)
        # sums cancel: compare them on the scale of the norm
        np.testing.assert_allclose(actual[1:], expected[1:], rtol=1e-4, atol=1e-3 * norm, err_msg=name)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CONFIGS])
def test_features_losses_and_gradients(name):
    golden = dict(np.load(GOLDENS / f"{name}.npz"))
    model, config = models.build(name)
    model.eval()
    batch = models.batch(config)
    with torch.no_grad():
        check_features(model, batch, golden)
    outputs = model(batch)
    check_outputs(outputs, golden)
    sum(output.loss for output in outputs.values()).backward()
    check_gradients(model, golden)
