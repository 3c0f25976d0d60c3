"""Parameter groups, the published AdamW, and the schedules."""

import math

import pytest
import torch

from tests import tiny
from vlmo.errors import VLMoError
from vlmo.training import optimizer as optim

BETA1, BETA2, EPS = 0.9, 0.98, 1e-8


def adamw_by_hand(start, gradients, rate, decay):
    """Adam whose eps joins the root of the plain second moment, before it is corrected for its start at 0."""
    x, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(gradients, start=1):
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        step = rate * math.sqrt(1 - BETA2**t) / (1 - BETA1**t)
        x = x * (1 - rate * decay) - step * m / (v.sqrt() + EPS)
    return x


def train(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-9], ids=["large", "as large as eps", "small"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_by_hand(size, decay):
    start, gradients = torch.randn(50).double(), size * torch.randn(6, 50).double()
    parameter = torch.nn.Parameter(start.clone())
    groups = [{"params": [parameter], "weight_decay": decay, "lr": 1e-2}]
    train(optim.build_optimizer("adamw", groups, 1e-2), parameter, gradients)
    expected = adamw_by_hand(start, gradients, 1e-2, decay)
    assert torch.allclose(parameter, expected, rtol=0, atol=1e-12)


def test_adamw_is_not_torchs_where_gradients_are_small():
    start, gradients = torch.zeros(50).double(), 1e-8 * torch.ones(1, 50).double()
    moved = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        train(kind([parameter], lr=1e-2, betas=(BETA1, BETA2), eps=EPS), parameter, gradients)
        moved.append(parameter[0].item())
    assert moved[0] / moved[1] == pytest.approx(2 / (1 + 1 / math.sqrt(0.02)))


def test_adamw_goes_on_from_its_state():
    start, gradients = torch.randn(50).double(), 1e-8 * torch.randn(8, 50).double()
    through = torch.nn.Parameter(start.clone())
    train(optim.AdamW([through], lr=1e-2, betas=(BETA1, BETA2)), through, gradients)

    first = torch.nn.Parameter(start.clone())
    before = optim.AdamW([first], lr=1e-2, betas=(BETA1, BETA2))
    train(before, first, gradients[:4])
    second = torch.nn.Parameter(first.detach().clone())
    after = optim.AdamW([second], lr=1e-2, betas=(BETA1, BETA2))
    after.load_state_dict(before.state_dict())
    train(after, second, gradients[4:])
    assert torch.equal(second, through)


def test_a_closure_is_called_with_gradients_on():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3
    assert (parameter < 1).all()


def test_other_optimizers():
    parameter = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [parameter], "weight_decay": 0.0, "lr": 0.1}]
    assert type(optim.build_optimizer("adam", groups, 0.1)) is torch.optim.Adam
    sgd = optim.build_optimizer("sgd", groups, 0.1)
    train(sgd, parameter, torch.ones(2, 3))
    assert torch.allclose(parameter, torch.full((3,), 1 - 0.1 - 0.19))  # momentum 0.9


def test_groups_hold_every_trained_parameter_once():
    model = tiny.model("task_finetune_vqa_base_image480")
    model.pooler.requires_grad_(False)
    groups = optim.parameter_groups(model.named_parameters(), 1e-4, 0.01, 20, ["vqa_classifier"])
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [
        (0.01, 1e-4),
        (0.0, 1e-4),
        (0.01, pytest.approx(2e-3)),
        (0.0, pytest.approx(2e-3)),
    ]
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert [len(group["params"]) for group in groups] == [len(group["names"]) for group in groups]
    plain, no_decay, head, head_spared = (set(group["names"]) for group in groups)
    assert {"transformer.blocks.0.gamma_1", "transformer.blocks.0.norm2_text.weight", "transformer.cls_token"} <= plain
    assert {"relative_position_bias_table", "transformer.blocks.0.attn.q_bias", "transformer.norm.weight"} <= no_decay
    assert {"transformer.blocks.0.norm1.weight", "text_embeddings.LayerNorm.weight"} <= no_decay
    assert {name.split(".")[0] for name in head | head_spared} == {"vqa_classifier"}
    assert head_spared == {f"vqa_classifier.{layer}.bias" for layer in (0, 1, 3)}


def test_layer_decay():
    model = tiny.model("task_finetune_vqa_base_image480")
    depth, decay = model.transformer.depth, 0.5
    arguments = (model.named_parameters(), 1e-4, 0.01, 20, ["vqa_classifier"])
    groups = optim.parameter_groups(*arguments, layer_decay=decay, depth=depth)
    assert all(group["params"] for group in groups)
    rates = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert sorted(rates) == sorted(name for name, _ in model.named_parameters())

    def share(name):
        return rates[name][0] / 1e-4

    lowest = decay ** (depth + 1)
    for name in ("transformer.cls_token", "transformer.patch_embed.proj.weight", "token_type_embeddings.weight"):
        assert share(name) == pytest.approx(lowest)
    assert share("text_embeddings.LayerNorm.weight") == pytest.approx(lowest)
    for block in range(depth):
        assert share(f"transformer.blocks.{block}.norm1.weight") == pytest.approx(decay ** (depth - block))
    for name in ("transformer.norm.weight", "relative_position_bias_table", "pooler.dense.weight"):
        assert share(name) == pytest.approx(1)
    assert share("vqa_classifier.0.weight") == pytest.approx(20)
    # each layer still decays as published
    assert rates["transformer.blocks.0.norm1.weight"][1] == 0 and rates["transformer.blocks.0.gamma_1"][1] == 0.01


def test_an_optimizer_of_timm_takes_the_groups():
    weight = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [weight], "names": ["w"], "weight_decay": 0.0, "lr": 0.1}, {"params": [], "weight_decay": 0.1}]
    train(optim.build_optimizer("lion", groups, 0.1), weight, torch.tensor([[5.0, -3.0, 0.1]]))
    assert torch.allclose(weight, torch.tensor([0.9, 1.1, 0.9]))  # (the signs alone)


def test_optimizers_that_are_unknown_or_do_not_work_here():
    for name in ("adamw", "lion", "muon", "lamb"):
        optim.check_optimizer(name)
    with pytest.raises(VLMoError, match="optim_type: 'lionn' is unknown; did you mean lion"):
        optim.check_optimizer("lionn")
    with pytest.raises(VLMoError, match="optim_type='adahessian': cannot be used here"):  # needs a second derivative
        optim.check_optimizer("adahessian")


@pytest.mark.parametrize("kind, share", [("adamw", 2), ("adam", 2), ("sgd", 1), ("lion", 1), ("adan", 4)])
def test_the_state_is_measured(kind, share):
    assert optim.state_share(kind) == share


def test_torchs_private_step_supports_amp_scaling():
    """Torch's loss scaler asks for it; where it is absent or true, the fused step would skip and yet be counted."""
    weight = torch.nn.Parameter(torch.ones(1))
    assert torch.optim.AdamW([weight], fused=True)._step_supports_amp_scaling is True
    assert optim.AdamW([weight])._step_supports_amp_scaling is False


@pytest.mark.parametrize(
    "given, total, steps",
    [(0.1, 200, 20), (0.1, 15, 1), (0, 200, 0), (0.99, 100, 99), (150, 1500, 150), (1, 10, 1), (2500.0, 9, 2500)],
)
def test_warm_up_is_a_fraction_below_1_else_steps(given, total, steps):
    assert optim.warmup_length(given, total) == steps


def rates(total, warmup, power, end=0.0, rate=1.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = optim.build_schedule(optimizer, total, warmup, power, end)
    seen = []
    for _ in range(total + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_linear_warm_up_then_polynomial_decay():
    assert rates(6, 2, 1) == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])
    assert rates(6, 2, 2) == pytest.approx([0, 0.5, 1, 0.5625, 0.25, 0.0625, 0])
    assert rates(6, 2, 1, end=0.4, rate=2.0) == pytest.approx([0, 1, 2, 1.6, 1.2, 0.8, 0.4])


def test_cosine():
    expected = [0, 0.5, 1] + [0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3, 4)]
    assert rates(6, 2, "cosine") == pytest.approx(expected)


@pytest.mark.parametrize("power", [1, "cosine"])
def test_nothing_but_warm_up(power):
    assert rates(3, 3, power) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert rates(2, 4, power) == pytest.approx([0, 0.25, 0.5])
