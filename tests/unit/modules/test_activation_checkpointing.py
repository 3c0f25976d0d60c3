"""Computing blocks again in the backward pass changes neither losses nor gradients, only what is kept."""

import importlib.util
import sys

import pytest
import torch

from tests import tiny
from vlmo.errors import VLMoError
from vlmo.modules import VLMo

NEEDS_FAIRSCALE = pytest.mark.skipif(importlib.util.find_spec("fairscale") is None, reason="needs fairscale")
KINDS = [True, pytest.param("offload", marks=NEEDS_FAIRSCALE)]


def step(named, how, bf16=False, compiled=False):
    """The losses and gradients of a training step with dropout and stochastic depth, and the numbers kept for it."""
    torch.manual_seed(0)
    model = VLMo(tiny.config(named, activation_checkpointing=how, drop_path_rate=0.4)).train()
    if compiled:
        model.transformer.compile_blocks()
    kept = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        outputs = model(tiny.batch())
    losses = {name: output.loss for name, output in outputs.items()}
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, sum(kept.values()), list(model.state_dict())


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("named", ["task_textmlm_base", "task_mlm_itm_itc_base"])
def test_losses_and_gradients_are_the_same(named, how):
    losses, gradients, kept, names = step(named, False)
    other_losses, other_gradients, other_kept, other_names = step(named, how)
    assert other_names == names
    for name, loss in losses.items():  # (without a gradient to come, attention may take another kernel)
        assert other_losses[name].item() == pytest.approx(loss.item(), rel=1e-6)
    assert set(other_gradients) == set(gradients)
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    assert other_kept < kept


@pytest.mark.slow
def test_compiled_blocks_of_many_shapes():
    # (a variant that was compiled for one request also fits others, and must not be met in place of theirs)
    losses, gradients, kept, _ = step("task_mlm_itm_itc_base", False, compiled=True)
    other_losses, other_gradients, other_kept, _ = step("task_mlm_itm_itc_base", True, compiled=True)
    for name, loss in losses.items():
        assert other_losses[name].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    assert other_kept < kept


def test_under_autocast():
    losses, gradients, *_ = step("task_mlm_itm_itc_base", False, bf16=True)
    other_losses, other_gradients, *_ = step("task_mlm_itm_itc_base", True, bf16=True)
    for name, loss in losses.items():  # (without a gradient to come, attention may take another kernel)
        assert other_losses[name].item() == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(other_gradients[name], gradient, rtol=1e-2, atol=1e-5), name


@pytest.mark.parametrize("how", KINDS)
def test_evaluation(how):
    model, plain = (tiny.model("task_mlm_itm_itc_base", activation_checkpointing=kind) for kind in (how, False))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, expected = (m.infer(tiny.batch())["cls_feats"] for m in (model, plain))
    assert torch.equal(found, expected)


def test_without_fairscale(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairscale.nn.checkpoint", None)
    with pytest.raises(VLMoError, match="pip install fairscale"):
        VLMo(tiny.config("task_textmlm_base", activation_checkpointing="offload"))
