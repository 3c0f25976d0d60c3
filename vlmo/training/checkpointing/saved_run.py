"""Which run a checkpoint is of: what it was started from, with which options; and what of them a resume takes over.

The name of a run's folder does not tell: every run has a `last.ckpt`, and a learning rate is not in the name.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from vlmo.checkpoints.files import DEEPSPEED_WEIGHTS
from vlmo.checkpoints.sharded import REST, is_sharded
from vlmo.errors import VLMoError
from vlmo.settings import Settings
from vlmo.settings.groups import ContinuingOptions, EvaluationOptions, MachineOptions
from vlmo.training.checkpointing.resume import KEY

log = logging.getLogger(__name__)

# These say how a run is carried out, how long it is, or where its files are, not what is trained.
FREE = {name for group in (MachineOptions, ContinuingOptions, EvaluationOptions) for name in group.model_fields}
FREE |= {"exp_name", "plugins", "num_workers", "prefetch_factor", "max_steps", "max_epoch", "tokenizer"}
FREE |= {"load_path", "activation_checkpointing"}  # (what was loaded is compared by its weights)
FREE -= {"precision"}
TRAINED_PARTS = ("freeze", "lora_rank", "lora_alpha", "lora_targets")  # (say of which parameters that state is)
IN_OPTIMIZER = ("learning_rate", "weight_decay", "adamw_betas", "lr_mult", "layer_decay")  # part of its saved state


def fingerprint(tensors: Mapping[str, Tensor] | None) -> str:
    """Tells weights from others by names, shapes and some of their values; "" without any."""
    if not tensors:
        return ""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().reshape(-1)
        some = values[:: max(len(values) // 64, 1)].contiguous()
        digest.update(f"{name} {tuple(tensors[name].shape)} {some.dtype} ".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of its run.

    Attributes:
        options: of the run; empty where they are not known.
        start: fingerprint of the weights that it started from; None where that is not known.
    """

    path: Path
    options: Mapping[str, Any]
    start: str | None

    @classmethod
    def read(cls, path: Path) -> "SavedRun":
        """Reads it from the file or folder; what cannot be read is not known."""
        file = path / (REST if is_sharded(path) else DEEPSPEED_WEIGHTS) if path.is_dir() else path
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            return cls(path, dict(content["hyper_parameters"]["config"]), content.get(KEY, {}).get("start"))
        except Exception:  # whether it is a checkpoint at all, and of this model, others look at
            return cls(path, {}, None)

    def other_start(self, settings: Settings, start: str) -> str | None:
        """Says what this run started from, if that is not what the settings name, whose fingerprint is `start`."""
        there, here = str(self.options.get("load_path", "")), settings.load_path
        same = self.start == start if self.start is not None else Path(there) == Path(here)
        if same or not self.options:
            return None
        what = "whose content was another then" if there == here else f"not from load_path={here or 'nothing'}"
        return f"{self.path}: its run was started from {there or 'nothing'}, {what}"

    @property
    def of_deepspeed(self) -> bool:
        """Whether DeepSpeed wrote it, which alone reads it, and whose optimizer's options are its own."""
        return self.path.is_dir() and not is_sharded(self.path)

    def _check_processes(self, settings: Settings) -> None:
        """Raises VLMoError if the run has another strategy or number of processes than DeepSpeed can go on with."""
        now = settings.use_sharded_training or settings.strategy.startswith("deepspeed")
        if now != self.of_deepspeed:
            there, here = ("DeepSpeed's", "another strategy") if self.of_deepspeed else ("not DeepSpeed's", "it")
            raise VLMoError(
                f"{self.path}: is {there}, and {here} cannot resume it; give the strategy that it was trained "
                f"with, or start from its weights with load_path={self.path}"
            )
        processes = len(list(self.path.glob("checkpoint/*optim_states.pt"))) if now else 0
        if now and processes != settings.devices * settings.num_nodes:
            raise VLMoError(
                f"{self.path}: DeepSpeed resumes only with as many processes as wrote it, {processes}; give "
                f"num_gpus and num_nodes that make as many, or start from its weights with load_path={self.path}"
            )

    def changed(self, settings: Settings) -> dict[str, tuple[Any, Any]]:
        """Options of what is trained that are others now: name -> (now, then)."""
        now = settings.model_dump(mode="json")
        names = [name for name in now if name in self.options and name not in FREE]
        return {name: (now[name], self.options[name]) for name in names if now[name] != self.options[name]}

    def check(self, settings: Settings, start: str) -> None:
        """Warns of all that is other than it was.

        Raises:
            VLMoError: if the state of the optimizer cannot be that of these settings.
        """
        self._check_processes(settings)
        changed = self.changed(settings)
        other_groups = 1 in changed.get("layer_decay", ())  # with it, each layer has groups of its own
        kept = IN_OPTIMIZER if self.of_deepspeed else ("layer_decay",) * other_groups
        for name in ("optim_type", *TRAINED_PARTS, *kept):
            if name in changed:
                now, then = changed[name]
                raise VLMoError(
                    f"{name}={now}: {self.path} was trained with {name}={then}, and a resume takes over the state of "
                    f"the optimizer; give {name}={then}, or start from its weights with load_path={self.path}"
                )
        if other := self.other_start(settings, start):
            log.warning(f"{other}: the run continues from the checkpoint")
        if changed:
            said = ", ".join(f"{name}={now} (there {then})" for name, (now, then) in changed.items())
            log.warning(f"the run continues with options that differ from those of {self.path}: {said}")


def apply_options(checkpoint: dict[str, Any], settings: Settings, groups: list[dict[str, Any]]) -> None:
    """Gives the saved optimizer and schedule the options of this run, where they are others; nothing else changes.

    Args:
        checkpoint: Lightning's, changed in place.
        groups: the parameters by group, as this run's optimizer has them.
    """
    then, now = checkpoint["hyper_parameters"]["config"], settings.model_dump(mode="json")
    if not checkpoint.get("optimizer_states") or all(then.get(name) == now[name] for name in IN_OPTIMIZER):
        return
    saved, schedule = checkpoint["optimizer_states"][0]["param_groups"], checkpoint["lr_schedulers"][0]
    for group, new in zip(saved, groups, strict=True):
        group |= {"initial_lr": new["lr"], "weight_decay": new["weight_decay"]}
        if settings.optim_type == "adamw":
            group["betas"] = settings.adamw_betas
    schedule["base_lrs"] = [group["initial_lr"] for group in saved]


def set_learning_rates(schedule: LambdaLR) -> None:
    """Sets the rates of the next step by the schedule of this run; a saved one may have ended, or been another."""
    rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(schedule.last_epoch)
