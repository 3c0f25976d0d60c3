"""What users read of a run: the summary before its first step, and the table of results at its end."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from vlmo.modules.vlmo_module import VLMo
from vlmo.registry import TASKS
from vlmo.settings import Settings
from vlmo.training.environment import Environment
from vlmo.training.run_length import RunLength

SPLITS = ("val", "dev", "test", "test-dev")
SIDES = {"tr": "image to text", "ir": "text to image"}


# --- at the start -----------------------------------------------------------------------------------------------------


def differences(settings: Settings) -> dict[str, Any]:
    """Gives the options whose value is not the default."""
    defaults = Settings.defaults()
    return {name: value for name, value in settings.model_dump(mode="json").items() if value != defaults[name]}


def summary(settings: Settings, environment: Environment, model: VLMo, length: RunLength | None = None) -> str:
    """The block printed before the first step; `length` is that of a training."""
    lines = [f"{settings.exp_name}: {settings.model_arch}, losses {' + '.join(settings.active)}"]
    lines += ["", "options that differ from the defaults"]
    for name, value in differences(settings).items():
        if name == "loss_names":
            value = {loss: weight for loss, weight in value.items() if weight}
        lines.append(f"  {name:<22} {json.dumps(value)}")
    device = torch.cuda.get_device_name() if environment.accelerator == "gpu" else f"{torch.get_num_threads()} threads"
    lines += ["", f"runs on    {environment.accelerator} x {settings.devices * settings.num_nodes} ({device})"]
    lines[-1] += f", precision {environment.precision}"
    if not settings.test_only:
        lines.append(
            f"batch      {settings.batch_size} = {settings.per_gpu_batchsize} a device x {settings.devices} devices x "
            f"{settings.num_nodes} nodes x {settings.accumulation} accumulated"
        )
    if length:
        lines.append(f"length     {length}")
    lines += [f"parameters {_count(model.parameters())}"]
    if not settings.test_only:
        lines[-1] += f", of which trained {_count(parameter for _, parameter in model.trained_parameters())}"
        if model.frozen:
            frozen = [model.get_parameter(name) for name in model.frozen]
            lines.append(f"  {_count(frozen):>8} in {len(frozen)} tensors are frozen by freeze={list(settings.freeze)}")
        if model.adapted:
            lines.append(f"  adapters of rank {settings.lora_rank} beside {len(model.adapted)} linear layers (LoRA)")
        for group in model.parameter_groups():
            if group["params"]:
                lines.append(
                    f"  {_count(group['params']):>8} in {len(group['params'])} tensors: learning rate {group['lr']:g}, "
                    f"weight decay {group['weight_decay']:g}"
                )
    if model.load_report:
        lines += ["", str(model.load_report)]
    return "\n".join([*lines, ""])


def _count(parameters: Any) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"


# --- at the end -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One number; in the table they stand in this order."""

    split: str
    place: tuple[Any, ...]  # among those of the split
    what: str
    tag: str
    share: bool  # shown in percent


def published(settings: Settings) -> dict[str, float]:
    """By log tag, the results that a run with these settings can be compared with, in percent."""
    found: dict[str, float] = {}
    for name in settings.active:
        found |= TASKS[name].published(settings)
    return found


def result_rows(settings: Settings | None, tags: Iterable[str]) -> tuple[list[Row], dict[str, float]]:
    """The rows of these log tags, in their order, and what was published for such settings (of None: nothing)."""
    expected = published(settings) if settings else {}
    return sorted(row for tag in {*tags, *expected} if (row := _row(tag))), expected


def results(settings: Settings, metrics: Mapping[str, float]) -> str:
    """The table; `metrics` by log tag, from which the numbers of training and the doubled ones are left out."""
    rows, expected = result_rows(settings, metrics)
    lines = ["", f"{'results':<66}{'here':>10}{'published':>12}"]
    for row in rows:
        here = "(server)" if row.tag not in metrics else f"{metrics[row.tag]:.4f}"
        if row.share and row.tag in metrics:
            here = f"{100 * metrics[row.tag]:.2f} %"
        paper = f"{expected[row.tag]:.1f} %" if row.tag in expected else ""
        lines.append(f"  {row.split:<10}{row.what:<30}{row.tag:<24}{here:>10}{paper:>12}".rstrip())
    if expected:
        task = "fine-tuned on " + " and ".join(settings.datasets)
        lines.append(f"  published: {settings.model_arch}, {task} at {settings.image_size} px (arXiv 2111.02358)")
    return "\n".join(lines)


def _row(tag: str) -> Row | None:
    """How a log tag is shown, of `recalls/...`, `{split}/the_metric` and `{task}/{split}/{key}`; None if it is not."""
    match tag.split("/"):
        case ["recalls", name]:
            return _recall_row(name, tag)
        case [split, "the_metric"]:
            return Row(split, (3,), "all headline numbers together", tag, False)
        case [task, split, key] if split in SPLITS and not key.endswith("_epoch"):
            return Row(split, (2, task, key), f"{task} {key.replace('_', ' ')}", tag, key != "loss")
    return None


def _recall_row(name: str, tag: str) -> Row | None:
    """Of `{val,test}_avg`, or `[val_][rerank_]{tr,ir}_r{k}`."""
    if name.endswith("_avg"):
        return Row(name.removesuffix("_avg"), (1,), "mean of the six recalls", tag, True)
    split = "val" if name.startswith("val_") else "test"
    name = name.removeprefix("val_")
    reranked = name.startswith("rerank_")
    side, k = name.removeprefix("rerank_").split("_r")
    what = f"{SIDES[side]}, recall@{k}" + (", ITM" if reranked else "")
    return Row(split, (0, reranked, side == "ir", int(k)), what, tag, True)
