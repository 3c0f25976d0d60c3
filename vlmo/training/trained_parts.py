"""Which parameters a run trains: some can be frozen by their names, and linear layers have adapters trained instead."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from vlmo.checkpoints.lora import SCALE
from vlmo.errors import VLMoError

# what adapters stand in for: without `lora_rank` a fine-tuning trains these too
ADAPTED = ("transformer.", "text_embeddings.", "relative_position_bias_table")


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Freezes the parameters whose names match one of the patterns (`fnmatch`), and gives their names.

    Raises:
        VLMoError: if a pattern matches none, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = _matching(names, patterns, "freeze")
    for name in chosen:
        model.get_parameter(name).requires_grad_(False)
    if chosen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise VLMoError("freeze: nothing is left to train; leave a pattern out", field="freeze")
    return chosen


def add_adapters(model: Any, rank: int, alpha: int, patterns: Iterable[str]) -> list[str]:
    """Adds an adapter to linear layers of the blocks, W x + alpha / rank * B A x (LoRA, arXiv 2106.09685).

    The layers themselves, all else of the transformer, and the embeddings of texts are frozen; the heads are trained.
    A checkpoint holds the adapters apart, and what reads it for use merges them (`merge_adapters`).

    Args:
        model: `VLMo`, its weights loaded.
        patterns: of the layers' names (`fnmatch`).

    Returns:
        the names of the layers.

    Raises:
        VLMoError: if a pattern matches no layer, or `peft` is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise VLMoError(f"lora_rank={rank}: needs a package that is not here: pip install peft") from error

    blocks = model.transformer.blocks
    layers = {f"transformer.blocks.{name}": name for name, part in blocks.named_modules() if type(part) is nn.Linear}
    chosen = _matching(layers, patterns, "lora_targets")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[layers[name] for name in chosen])
    inject_adapter_in_model(config, blocks)
    model.register_buffer(SCALE, torch.tensor(alpha / rank))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or not name.startswith(ADAPTED))
    return chosen


def _matching(names: Iterable[str], patterns: Iterable[str], option: str) -> list[str]:
    """Gives those of the names that a pattern matches, in their order."""
    names, patterns = list(names), list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 1, 0) or names[:1]
            raise VLMoError(f"{option}: {pattern!r} matches no name; names are such as {near[0]}", field=option)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
