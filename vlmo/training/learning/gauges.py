"""What is measured of a step's features, gradients and update, on the device: nobody waits for a number here."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from vlmo.modules.model import VLMoModel
from vlmo.training.unused_parameters import unused_parameters

# parts of the model, by what of a parameter's name says so; the first that fits
PARTS = {
    "text_expert": ("mlp_text.", "norm2_text."),
    "image_expert": ("mlp_imag.", "norm2_imag."),
    "vl_expert": ("mlp_vl.", "norm2_vl."),
    "attention": (".attn.", ".norm1."),
    "text_embedding": ("text_embeddings.",),
    "image_embedding": ("patch_embed.", "cls_token", "pos_embed"),
}
ROWS = 256  # features of a batch that are looked at
ELEMENTS = 1 << 16  # weights of a tensor whose update is looked at


def part_of(name: str) -> str:
    """Tells which part a parameter belongs to: one of PARTS, or "heads"."""
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "heads")


def trained_parts(model: VLMoModel) -> dict[str, dict[str, nn.Parameter]]:
    """Gives, by part, the parameters that the tasks mean to train, whether or not they are trained."""
    never = unused_parameters(model)
    wanted = [task.trains for task in model.tasks if task.trains is not None]
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name not in never and all(any(word in name for word in words) for words in wanted):
            parts.setdefault(part_of(name), {})[name] = parameter
    return parts


def gradient_norms(parts: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Gives the norm of the gradient of each part that has one; all processes must call it."""
    norms = {}
    for part, parameters in parts.items():
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if gradients:
            norm = get_total_norm(gradients)
            norms[part] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def effective_rank(features: Tensor) -> Tensor:
    """Gives how many directions features (N, D) vary in: (sum of variances)^2 / sum of their squares, a scalar.

    It is the participation ratio of the covariance's eigenvalues, which needs no decomposition (a GPU waits for one).
    """
    centred = features - features.mean(0)
    gram = centred @ centred.t() if len(centred) < centred.shape[1] else centred.t() @ centred
    return gram.trace().square() / gram.square().sum().clamp_min(1e-30)


class FeatureGauges:
    """Measures what each head reads, in the passes of steps in which it is `on`.

    Attributes:
        measured: "{head}/feature_norm", "{head}/effective_rank" and "{head}/spread" (variance over mean square).
    """

    def __init__(self, heads: Mapping[str, Any]) -> None:
        """
        Args:
            heads: modules by name, those that read features (N, D) or (N, R, D).
        """
        self.on = False
        self.measured: dict[str, Tensor] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in heads.items()
            if isinstance(module, nn.Module)
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def measure(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not self.on or not arguments or not module.training:
                return
            features = arguments[0]
            if isinstance(features, Tensor) and features.is_floating_point() and features.ndim >= 2:
                with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
                    self._measure(name, features)

        return measure

    def _measure(self, name: str, features: Tensor) -> None:
        rows = features.detach().float().flatten(0, -2)[:ROWS]
        if len(rows) < 2:
            return
        square = rows.square().sum(1)
        variance = (rows - rows.mean(0)).square().sum(1).mean()
        self.measured[f"{name}/feature_norm"] = square.sqrt().mean()
        self.measured[f"{name}/effective_rank"] = effective_rank(rows)
        self.measured[f"{name}/spread"] = variance / square.mean().clamp_min(1e-30)


class UpdateGauge:
    """Measures how much a step changes the weights of the blocks, relative to their size, by a sample of them."""

    def __init__(self, parts: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self.weights = [
            max(parameters.values(), key=lambda p: p.numel())
            for part, parameters in parts.items()
            if part.endswith(("_expert", "attention"))
        ]
        self._before: list[Tensor] = []

    def before(self) -> None:
        """Remembers the weights as they are before the step."""
        self._before = _sample(self.weights)

    def after(self) -> Tensor | None:
        """Gives the relative change since `before`; None if that was not called, or there are no blocks."""
        before, self._before = self._before, []
        if not before:
            return None
        change = [new - old for new, old in zip(_sample(self.weights), before, strict=True)]
        return get_total_norm(change) / get_total_norm(before).clamp_min(1e-30)


def _sample(weights: Iterable[Tensor]) -> list[Tensor]:
    """Copies of some elements of each, on the device; of sharded ones, this process's."""
    local = [(each.to_local() if isinstance(each, DTensor) else each).detach() for each in weights]
    return [each.flatten()[:ELEMENTS].float().clone() for each in local]
