"""Parameter groups, optimizer and learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# As published, by substring of the parameter's name. So every name with "bias" in it is spared (also
# relative_position_bias_table, q_bias, v_bias), while norm2_text, norm2_imag, norm2_vl and gamma_1, gamma_2 decay.
NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
HEADS = ("vqa_classifier", "nlvr2_classifier")  # trained at `lr_mult` times the learning rate

BETAS = (0.9, 0.98)
EPS = 1e-8


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float, lr_mult: float
) -> list[dict[str, Any]]:
    """The four groups: decay or not, head or not; frozen parameters are left out, empty groups are kept.

    Returns:
        dicts with "params", "weight_decay", "lr" and "names" (of the parameters, for people and tests).
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": decay, "lr": rate}
        for rate in (learning_rate, learning_rate * lr_mult)
        for decay in (weight_decay, 0.0)
    ]
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            no_decay = any(part in name for part in NO_DECAY)
            head = any(part in name for part in HEADS)
            group = groups[2 * head + no_decay]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


class AdamW(torch.optim.AdamW):
    """AdamW whose eps is added before the bias correction of the second moment, as in the published runs.

    torch adds it after. By torch's measure eps is then eps / sqrt(1 - beta2^t): seven times larger at first, which
    tells on parameters whose gradients are about as small (many, in the recorded trajectory).
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        # Leave the skipping of steps with infinite gradients to the loss scaler (fp16), which the fused kernel offers
        # to do itself: a step that is skipped must not count in `updates`.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if all(parameter.grad is None for parameter in group["params"]):
                continue  # torch does not count such a step either
            group["updates"] = group.get("updates", 0) + 1  # part of the state dict, so it survives a resume
            group["eps"] = EPS / math.sqrt(1 - group["betas"][1] ** group["updates"])
        super().step()
        return loss


def build_optimizer(
    kind: str, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float] = BETAS
) -> Optimizer:
    """AdamW (with `betas`), Adam or SGD (momentum 0.9) over `parameter_groups`."""
    if kind == "adamw":
        return AdamW(groups, lr=learning_rate, betas=betas, eps=EPS)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=learning_rate)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)


def warmup_length(warmup_steps: float, total_steps: int) -> int:
    """Steps of warm-up: a fraction of all steps below 1, else the number itself."""
    return int(total_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)


def build_schedule(
    optimizer: Optimizer, total_steps: int, warmup_steps: int, decay_power: float | str, end_lr: float
) -> LambdaLR:
    """Linear warm-up from 0, then polynomial decay to `end_lr`, or a half cosine to 0; one call of step() an update."""
    from transformers import get_cosine_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

    if decay_power == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    decay_end = max(total_steps, warmup_steps + 1)  # warm-up to the last step would divide by 0 steps of decay
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, warmup_steps, decay_end, lr_end=end_lr, power=float(decay_power)
    )
