"""Parameter groups, optimizer and learning-rate schedule."""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vlmo.errors import VLMoError

# As published, by substring of the parameter's name. So every name with "bias" in it is spared (also
# relative_position_bias_table, q_bias, v_bias), while norm2_text, norm2_imag, norm2_vl and gamma_1, gamma_2 decay.
NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
# The lowest layer of layer decay, by substring likewise.
EMBEDDINGS = ("text_embeddings.", "token_type_embeddings.", "patch_embed.", "cls_token", "pos_embed", "mask_token")

OWN = ("adamw", "adam", "sgd")  # beside these, `optim_type` names what timm.optim has

BETAS = (0.9, 0.98)
EPS = 1e-8


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    lr_mult: float,
    head_names: Iterable[str] = (),
    layer_decay: float = 1.0,
    depth: int = 0,
) -> list[dict[str, Any]]:
    """The published four groups: weight decay or not, head or not; with `layer_decay`, these of each layer.

    Args:
        named_parameters: frozen ones are left out.
        lr_mult: the heads are trained at so many times the learning rate.
        head_names: modules, by substring of the parameters' names.
        layer_decay: learning rate of a layer as a multiple of the next one's. Layer 0 are the embeddings, 1 to `depth`
            the blocks; all else, the relative positions included, is layer `depth` + 1 and keeps its rate (as in BEiT).
        depth: number of blocks; without layer decay it does not matter.

    Returns:
        dicts with "params", "weight_decay", "lr" and "names" (of the parameters, for people and tests). Of the
        published four, empty ones are kept.
    """
    top = depth + 1
    layers = range(top + 1) if layer_decay < 1 else (top,)
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {
        (layer, head, no_decay): {
            "params": [],
            "names": [],
            "weight_decay": 0.0 if no_decay else weight_decay,
            "lr": learning_rate * (lr_mult if head else 1) * layer_decay ** (top - layer),
        }
        for layer in layers
        for head in (False, True)
        for no_decay in (False, True)
    }
    heads = tuple(head_names)
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            no_decay = any(part in name for part in NO_DECAY)
            head = any(part in name for part in heads)
            group = groups[layer_of(name, depth) if layer_decay < 1 else top, head, no_decay]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"] or layer_decay == 1]


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter, as `parameter_groups` counts."""
    if block := re.search(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if any(part in name for part in EMBEDDINGS) else depth + 1


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
    """Builds the optimizer over `parameter_groups`.

    Args:
        kind: "adamw" (the published one, with `betas`), "adam", "sgd" (momentum 0.9), or a name of timm.optim, which
            then has timm's defaults.

    Raises:
        VLMoError: if timm has none of that name.
    """
    if kind == "adamw":
        return AdamW(groups, lr=learning_rate, betas=betas, eps=EPS)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=learning_rate)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    from timm import optim  # here: few runs need it

    names = list(map(str, optim.list_optimizers()))
    if kind not in names:
        near = difflib.get_close_matches(kind, [*OWN, *names], 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.optim.list_optimizers() lists what there is"
        raise VLMoError(f"optim_type: {kind!r} is unknown; {hint}", field="optim_type")
    return optim.create_optimizer_v2(groups, opt=kind, lr=learning_rate)


def check_optimizer(kind: str) -> None:
    """Raises VLMoError if there is no such optimizer, or it cannot take a step here; near names are listed."""
    if kind in OWN:
        return
    try:
        state_share(kind)
    except VLMoError:
        raise
    except Exception as error:  # what a package that is missing or needs a GPU raises is its own affair
        raise VLMoError(
            f"optim_type={kind!r}: cannot be used here ({str(error).splitlines()[0]}); take another, such as adamw or "
            "lion"
        ) from error


def state_share(kind: str) -> float:
    """How large the optimizer's state is beside the parameters: measured, by a step on a small matrix."""
    from_elsewhere = kind.startswith(("bnb", "fused"))  # bitsandbytes and apex, which compute on GPUs only
    device = "cuda" if from_elsewhere and torch.cuda.is_available() else "cpu"
    parameter = nn.Parameter(torch.ones(64, 64, device=device))
    optimizer = build_optimizer(kind, [{"params": [parameter], "weight_decay": 0.0, "lr": 1e-3}], 1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()["state"].get(0, {})
    return sum(each.nbytes for each in state.values() if isinstance(each, Tensor) and each.ndim) / parameter.nbytes


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
