"""What is measured of a step's features, gradients and update, on the device: nobody waits for a number here.

It is that of the whole step, over all processes, however samples and weights are shared out among them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from vlmo.distributed.collectives import all_gather_rows, gather_numbers, world_size
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
ROWS = 256  # features of a step that are looked at


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
    gradients = {
        part: [p.grad for p in parameters.values() if p.grad is not None] for part, parameters in parts.items()
    }
    return {part: _norm(each) for part, each in gradients.items() if each}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all together, of sharded ones that of the whole."""
    norm = get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def effective_rank(features: Tensor) -> Tensor:
    """Gives how many directions features (N, D) vary in: (sum of variances)^2 / sum of their squares, a scalar.

    It is the participation ratio of the covariance's eigenvalues, which needs no decomposition (a GPU waits for one).
    """
    centred = features - features.mean(0)
    gram = centred @ centred.t() if len(centred) < centred.shape[1] else centred.t() @ centred
    return gram.trace().square() / gram.square().sum().clamp_min(1e-30)


class FeatureGauges:
    """Keeps some of what each head reads, in the passes of steps in which it is `on`, and measures it."""

    def __init__(self, heads: Mapping[str, Any]) -> None:
        """
        Args:
            heads: modules by name, those that read features (N, D) or (N, R, D).
        """
        self.on = False
        modules = {name: module for name, module in heads.items() if isinstance(module, nn.Module)}
        self._rows: dict[str, list[Tensor]] = {name: [] for name in modules}
        self._hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            # (a pass without gradients is repeated with them)
            if not self.on or not arguments or not module.training or not torch.is_grad_enabled():
                return
            features, kept = arguments[0], self._rows[name]
            room = max(ROWS // world_size(), 1) - sum(map(len, kept))
            if room > 0 and isinstance(features, Tensor) and features.is_floating_point() and features.ndim >= 2:
                kept.append(features.detach().flatten(0, -2)[:room].to(torch.float32, copy=True))

        return keep

    def measure(self, device: torch.device) -> dict[str, Tensor]:
        """Gives "{head}/feature_norm", "{head}/effective_rank" and "{head}/spread" (variance over mean square).

        They are of all processes' rows since the last call; all processes must call it.
        """
        own = {name: torch.cat(kept) if kept else torch.empty(0, 0, device=device) for name, kept in self._rows.items()}
        shapes = gather_numbers([size for rows in own.values() for size in rows.shape])
        found: dict[str, Tensor] = {}
        for number, (name, kept) in enumerate(self._rows.items()):
            kept.clear()
            of_head = [shape[2 * number : 2 * number + 2] for shape in shapes]
            if sum(count for count, _ in of_head) >= 2:
                found |= {f"{name}/{key}": value for key, value in _measured(own[name], of_head).items()}
        return found


def _measured(own: Tensor, shapes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    rows = all_gather_rows(own, shapes=shapes)
    square = rows.square().sum(1)
    variance = (rows - rows.mean(0)).square().sum(1).mean()
    return {
        "feature_norm": square.sqrt().mean(),
        "effective_rank": effective_rank(rows),
        "spread": variance / square.mean().clamp_min(1e-30),
    }


class UpdateGauge:
    """Measures how much a step changes the weights of the blocks, relative to their size: the largest of each part."""

    def __init__(self, parts: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        largest = [
            max(parameters.values(), key=lambda p: p.numel())
            for part, parameters in parts.items()
            if part.endswith(("_expert", "attention"))
        ]
        self.weights = [weight for weight in largest if weight.numel()]  # (DeepSpeed's stage 3 puts them away)
        self._before: list[Tensor] = []

    def before(self) -> None:
        """Remembers the weights as they are before the step."""
        self._before = [weight.detach().clone() for weight in self.weights]

    def after(self) -> Tensor | None:
        """Gives the relative change since `before`; None if that was not called, or there are no blocks.

        All processes must call it.
        """
        before, self._before = self._before, []
        if not before:
            return None
        change = [weight.detach() - old for weight, old in zip(self.weights, before, strict=True)]
        return _norm(change) / _norm(before).clamp_min(1e-30)
