"""Checkpoints: read a file (`files.py`), adapt it to a model, load it, and report.

    load(model, source)  =  read(path)  ->  adapt(checkpoint, model.state_dict())  ->  copy into the model

A file is recognised by its names, never by the task. The model is untouched until everything is decided.
"""

import logging
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmo.checkpoints.files import Checkpoint, read
from vlmo.checkpoints.lora import SCALE, merge_adapters
from vlmo.checkpoints.metadata import Metadata, first_mismatch
from vlmo.checkpoints.resizing import TABLE, fit
from vlmo.errors import VLMoError
from vlmo.registry import ARCHITECTURES

log = logging.getLogger(__name__)

NOTHING: Mapping[str, str] = {}
# Ends of names of index buffers: recomputed, because a file of another image size would carry wrong ones.
INDEX_BUFFERS = ("relative_position_index", "position_ids")
BEIT_HEADS = ("fc_norm.", "head.", "lm_head.", "mask_token")
# A file holds each part of a model whole or not at all (see `_part`); without these it is no start for training.
NEEDED_PARTS = {
    "beit": ("transformer", TABLE),
    "stage1": ("transformer", "transformer.norm", TABLE),
    "vlmo": ("transformer", "text experts", "transformer.norm", TABLE, "text_embeddings", "token_type_embeddings"),
}


@dataclass
class Report:
    """What became of a checkpoint's tensors; as text, a short table."""

    title: str
    taken: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)  # name -> what was done
    dropped: dict[str, str] = field(default_factory=dict)  # name -> why
    new: list[str] = field(default_factory=list)  # what the file lacks: stays as initialised
    metadata: Metadata | None = None  # what the file says of itself

    def __str__(self) -> str:
        resized = "; ".join(f"{name}: {how}" for name, how in self.resized.items())
        reasons = {why: [n for n in self.dropped if self.dropped[n] == why] for why in self.dropped.values()}
        dropped = "; ".join(f"{why}: {_summary(names)}" for why, names in reasons.items())
        lines = [
            self.title,
            _line("taken", len(self.taken), _summary(self.taken)),
            _line("resized", len(self.resized), resized),
            _line("dropped", len(self.dropped), dropped),
            _line("left new", len(self.new), _summary(self.new)),
        ]
        return "\n".join(lines)


def load(
    model: nn.Module, source: str | Path | Checkpoint, required: Iterable[str] = (), anew: Mapping[str, str] = NOTHING
) -> Report:
    """Loads a file into the model, adapted to it; on any error the model is as it was.

    Args:
        source: the file, or what was read of it.
        required: beginnings of names that the file must hold, such as the head that an evaluation needs.
        anew: beginnings of names that are not taken from the file, each with the reason.

    Raises:
        VLMoError: if the file cannot be read, does not fit, or lacks something required.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read(source)
    target = model.state_dict()
    adapted, report = adapt(checkpoint, target, anew)
    require(checkpoint, report, required)
    with torch.no_grad():
        for name, tensor in adapted.items():
            target[name].copy_(tensor)
    return report


def load_weights(
    model: Any, source: str | Path | Checkpoint, required: Iterable[str] = (), anew: Mapping[str, str] = NOTHING
) -> Report:
    """Loads a file into the model; the names of classes and tokens come along. Arguments and errors as of `load`."""
    model.load_report = report = load(model, source, required, anew)
    for beginning, why in anew.items():
        path = source.path if isinstance(source, Checkpoint) else source
        log.warning(f"{path}: {beginning}* is initialised anew: {why}")
    if report.metadata:
        model.vocabulary = report.metadata.vocabulary
        heads = tuple(head for task in model.tasks if task.named_classes for head in task.required_heads)
        kept = not any(beginning.startswith(heads) for beginning in anew)
        if heads and kept and any(name.startswith(heads) for name in report.taken):
            model.answers = report.metadata.answers
    return report


def other_classes(
    checkpoint: Checkpoint, tasks: Iterable[Any], target: Mapping[str, Tensor], names: Sequence[str] | None
) -> dict[str, str]:
    """Beginnings of names of the outputs that mean other classes than a run's: training starts them new. With reasons.

    Args:
        target: the model's state dict.
        names: of the run's classes, where they are known.
    """
    saved = checkpoint.metadata.answers if checkpoint.metadata else None
    anew = {}
    for task in (task for task in tasks if task.head_group):
        run = names if task.named_classes else None
        mismatch = first_mismatch(saved, run) if saved and run else None
        for beginning in task.sized_by or task.required_heads:
            own = [(n, t) for n, t in checkpoint.tensors.items() if n.startswith(beginning) and n in target and t.ndim]
            sizes = next(((len(t), len(target[n])) for n, t in own if len(t) != len(target[n])), None)
            if own and mismatch:
                anew[beginning] = f"the file was trained with other classes: {mismatch}"
            elif sizes and not (saved and run):
                anew[beginning] = f"the file has {sizes[0]} classes, the run {sizes[1]}"
            elif own and run and not saved and len(run) < len(own[0][1]) and beginning in task.sized_by:
                log.warning(
                    f"{checkpoint.path}: does not say which its classes are; if they are not the data's {len(run)}, "
                    f"give {task.sized_by[beginning]}={len(run)} for new outputs"
                )
    return anew


def require(checkpoint: Checkpoint, report: Report, required: Iterable[str]) -> None:
    """Raises VLMoError if the file lacks names that begin so (see `load`)."""
    missing = [prefix for prefix in required if any(name.startswith(prefix) for name in report.new)]
    if missing:
        raise VLMoError(
            f"{checkpoint.path}: lacks {', '.join(missing)}, which this task needs; "
            "give a checkpoint that was trained on the task with load_path=FILE, or train first (test_only=False)"
        )


def _whose(names: Iterable[str]) -> str:
    if any(name.startswith("beit.") or re.search(r"encoder\.layer\.\d+\.lambda_1", name) for name in names):
        return "is BEiT as Hugging Face's transformers name its weights; give Microsoft's or timm's file"
    return "no name in it is VLMo's or BEiT's"


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Raises VLMoError if no name of the file is VLMo's or BEiT's."""
    if checkpoint.kind == "foreign":
        some = ", ".join(list(checkpoint.tensors)[:3])
        raise VLMoError(
            f"{checkpoint.path}: {_whose(checkpoint.tensors)} (it holds {some}, ...); give another load_path"
        )


# --- adapt ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def adapt(
    checkpoint: Checkpoint, target: Mapping[str, Tensor], anew: Mapping[str, str] = NOTHING
) -> tuple[dict[str, Tensor], Report]:
    """The checkpoint's tensors under the names and in the shapes of a model.

    Args:
        target: the model's state dict; where a file gives only a part of a tensor, the rest is taken from here.
        anew: as of `load`.

    Returns:
        A state dict with the names of `target` that the file provides, and the report.

    Raises:
        VLMoError: if the file is of another model or size, or lacks a part of what it must hold; one line a problem.
    """
    path = checkpoint.path
    refuse_foreign(checkpoint)
    report = Report(f"{path}: {checkpoint.kind} weights ({checkpoint.container})", metadata=checkpoint.metadata)
    source, report.dropped = vlmo_names(checkpoint)
    _check_size(path, source, target)
    adapted, problems = {}, []
    for name, tensor in source.items():
        if name not in target:
            report.dropped[name] = "not used by this model"
            continue
        if new := next((beginning for beginning in anew if name.startswith(beginning)), ""):
            report.dropped[name] = anew[new]
            continue
        try:
            if tensor.is_floating_point() and tensor.shape == target[name].shape:
                adapted[name], change = tensor, ""
            else:
                adapted[name], change = fit(name, tensor, target[name])
        except VLMoError as error:
            problems.append(f"{path}: {error}")
            continue
        if change:
            report.resized[name] = change
        else:
            report.taken.append(name)
    missing = [name for name in target if name not in source]
    report.new = [name for name in target if name not in source or name in report.dropped]
    problems += [f"{path}: {line}" for line in _incomplete(checkpoint.kind, source, missing)]
    if not adapted and not problems:
        problems = [f"{path}: holds nothing that this model has; give another load_path"]
    if problems:
        more = [f"{path}: and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise VLMoError("\n".join(problems[:10] + more))
    return adapted, report


def vlmo_names(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under VLMo's names, adapters merged; and what no VLMo model takes, with the reason.

    Raises:
        VLMoError: if a BEiT file's position tables cannot be put together, or an adapter is damaged.
    """
    source: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    tensors = checkpoint.tensors
    if SCALE in tensors:
        tensors = merge_adapters(tensors, checkpoint.path)
    for name, tensor in tensors.items():
        if name.endswith(INDEX_BUFFERS):
            dropped[name] = "index, recomputed"
        elif checkpoint.kind != "beit":
            source["itc_" + name.removeprefix("ifm_") if name.startswith("ifm_") else name] = tensor
        elif name.endswith(TABLE):
            tables[name] = tensor
        elif name.startswith(BEIT_HEADS):
            dropped[name] = "of BEiT's own task"
        else:  # BEiT's feed-forward part is the vision expert
            name = re.sub(r"^(blocks\.\d+\.)(mlp|norm2)\.", r"\1\2_imag.", name)
            source["transformer." + name] = tensor
    if tables:
        source[TABLE] = _merge_beit_tables(checkpoint.path, tables, num_blocks(source))
    return source, dropped


def _merge_beit_tables(path: Path, tables: dict[str, Tensor], depth: int) -> Tensor:
    """(rows, depth * heads) from one table (rows, heads) a block, or from the one that self-supervised BEiT shares."""
    blocks = [tables[name] for name in sorted(tables, key=lambda n: [int(i) for i in re.findall(r"\d+", n)])]
    if len(blocks) == 1:
        blocks *= depth
    if len({(table.shape, table.dtype) for table in blocks}) > 1 or blocks[0].ndim != 2:
        raise VLMoError(f"{path}: the blocks' {TABLE} are not alike: damaged; download the file again")
    return torch.cat(blocks, dim=-1)


def num_blocks(names: Iterable[str]) -> int:
    """Number of transformer blocks among VLMo's names."""
    blocks = [re.match(r"transformer\.blocks\.(\d+)\.", name) for name in names]
    return max((int(match[1]) + 1 for match in blocks if match), default=0)


def _check_size(path: Path, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Names the architecture that would fit, instead of one line for each of the hundreds of tensors that do not."""
    known = {(size["depth"], size["embed_dim"]): name for name, size in ARCHITECTURES.items()}
    sizes, texts = [], []
    for tensors in (source, target):
        norm = tensors.get("transformer.blocks.0.norm1.weight")
        if norm is None or norm.ndim != 1:
            return  # a damaged file: what it lacks is said elsewhere
        sizes.append((num_blocks(tensors), len(norm)))
        texts.append(f"{sizes[-1][0]} blocks of width {sizes[-1][1]} ({known.get(sizes[-1], 'no size known here')})")
    if sizes[0] != sizes[1]:
        remedy = f"set model_arch={known[sizes[0]]} or give" if sizes[0] in known else "give"
        raise VLMoError(f"{path}: holds {texts[0]}, the model has {texts[1]}; {remedy} another load_path")


def _part(name: str) -> str:
    """The part of the model to which a name belongs."""
    if name.startswith("transformer."):
        experts = re.search(r"_(text|vl)\.", name)
        if experts:
            return f"{experts[1]} experts"
        return "transformer.norm" if name.startswith("transformer.norm.") else "transformer"
    return _root(name)


def _incomplete(kind: str, source: Mapping[str, Tensor], new: list[str]) -> list[str]:
    """One line for each part that the file must hold, or holds in part, and lacks something of."""
    present = {_part(name) for name in source}
    missing = _count([n for n in new if _part(n) in present or _part(n) in NEEDED_PARTS[kind]], _part)
    return [
        f"lacks {count} tensors of {part} (such as {next(n for n in new if _part(n) == part)}): "
        "damaged, or of another model; give another load_path"
        for part, count in missing.items()
    ]


# --- report -----------------------------------------------------------------------------------------------------------


def _root(name: str) -> str:
    return name.split(".")[0]


def _group(name: str) -> str:
    return re.sub(r"^(transformer\.)?blocks\.\d+\.(\w+).*", r"blocks.*.\2", name) if "blocks." in name else _root(name)


def _count(names: Iterable[str], group: Callable[[str], str]) -> Counter[str]:
    return Counter(group(name) for name in names)


def _summary(names: Iterable[str]) -> str:
    return ", ".join(f"{group} ({count})" for group, count in _count(names, _group).items())


def _line(label: str, count: int, text: str) -> str:
    return textwrap.fill(f"  {label:<8}{count:5}  {text}", 120, subsequent_indent=" " * 17, break_long_words=False)
