"""Adapters (LoRA) in a checkpoint: for use, they are merged into the weights that they were trained beside."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmo.errors import VLMoError

SCALE = "lora_scale"  # in the state dict of a model with adapters: alpha / rank


def merge_adapters(tensors: Mapping[str, Tensor], path: str | Path = "") -> dict[str, Tensor]:
    """Gives the tensors without adapters: W + scale * B A where there is one, under the names of released files.

    Raises:
        VLMoError: naming `path`, if a part of an adapter is missing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, has_adapter, kind = name.partition(".base_layer.")
        if name == SCALE or ".lora_" in name:
            continue
        if has_adapter and kind == "weight":
            parts = [tensors.get(part) for part in (SCALE, *(f"{layer}.lora_{each}.default.weight" for each in "BA"))]
            if any(part is None for part in parts):
                raise VLMoError(f"{path}: lacks a part of the adapter of {layer}: damaged; give another load_path")
            scale, b, a = (part.float() for part in parts)  # type: ignore[union-attr]
            tensor = (tensor.float() + scale * (b @ a)).to(tensor.dtype)
        found[f"{layer}.{kind}" if has_adapter else name] = tensor
    return found
