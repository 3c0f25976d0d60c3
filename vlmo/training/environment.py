"""Where a run runs: devices, processes, strategy and precision, checked against what the machine has."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import StrategyRegistry

from vlmo.errors import VLMoError
from vlmo.modules.block import offloading_wrapper
from vlmo.settings import Settings
from vlmo.training.launch import choose_cluster

ON_GPUS_ONLY = ("deepspeed", "fsdp")  # beginnings of strategies' names


@dataclass(frozen=True)
class Environment:
    """Arguments of Lightning's Trainer, and what the person should know about how they were chosen."""

    accelerator: str
    devices: int | list[int]
    num_nodes: int
    strategy: str
    precision: Any
    cluster: ClusterEnvironment | None
    notices: list[str] = field(default_factory=list)


def choose_environment(settings: Settings) -> Environment:
    """The environment that `settings` asks for on this machine.

    Raises:
        VLMoError: if there are fewer GPUs than asked for, a package that is needed is missing, or the processes that
            were started are not those that the settings ask for.
    """
    notices: list[str] = []
    accelerator = _accelerator(settings, notices)
    devices: int | list[int] = settings.devices
    if accelerator == "gpu" and isinstance(settings.num_gpus, tuple):
        devices = list(settings.num_gpus)
    strategy = _strategy(settings, accelerator)
    if settings.activation_checkpointing == "offload":
        offloading_wrapper()
    return Environment(
        accelerator,
        devices,
        settings.num_nodes,
        strategy,
        _precision(settings, accelerator, notices),
        choose_cluster(settings),
        notices,
    )


def _accelerator(settings: Settings, notices: list[str]) -> str:
    if settings.num_gpus == 0 or settings.accelerator == "cpu":
        return "cpu"
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.accelerator == "auto" and settings.num_gpus == 1 and present == 0:
        notices.append("no GPU on this machine: running on the CPU (num_gpus=0 says so without this notice)")
        return "cpu"
    if isinstance(settings.num_gpus, tuple):
        absent = [number for number in settings.num_gpus if number >= present]
        if absent:
            raise VLMoError(
                f"num_gpus={list(settings.num_gpus)}: this machine has {present} GPUs, none has number {absent}"
            )
    elif settings.num_gpus > present:
        raise VLMoError(
            f"num_gpus={settings.num_gpus}: this machine has {present}; ask for that many (0 is the CPU), "
            "or add accelerator=cpu for that many CPU processes"
        )
    return "gpu"


def _strategy(settings: Settings, accelerator: str) -> str:
    strategy = "deepspeed_stage_1" if settings.use_sharded_training else settings.strategy
    if strategy.startswith(ON_GPUS_ONLY) and accelerator != "gpu":
        raise VLMoError(
            "DeepSpeed and FSDP shard over GPUs only: set use_sharded_training=False and strategy=auto on a CPU"
        )
    if strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise VLMoError("DeepSpeed is not installed: pip install deepspeed")
    if strategy != "auto" and strategy not in StrategyRegistry.available_strategies():
        raise VLMoError(
            f"strategy={strategy!r}: Lightning has no such strategy; leave it at auto, or name one such as ddp or fsdp"
        )
    return "ddp" if strategy == "auto" and settings.devices * settings.num_nodes > 1 else strategy


def _precision(settings: Settings, accelerator: str, notices: list[str]) -> Any:
    asked = str(settings.precision)
    if accelerator == "cpu":
        if asked == "16":
            notices.append("precision=16 is for GPUs: computing in 32 (precision=bf16 if this CPU is fast at it)")
        return "bf16-mixed" if asked == "bf16" else "32-true"
    if asked == "auto":
        asked = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"
    return {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}[asked]
