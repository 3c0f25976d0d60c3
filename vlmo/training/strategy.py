"""How the processes of a run share the work: Lightning's strategies, set up for this model."""

from typing import Any

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn

from vlmo.modules import VLMo
from vlmo.modules.multiway_transformer import Block
from vlmo.modules.reach import leave_to_each_process


class ShardedBlocks(FSDPStrategy):
    """FSDP by block: one block's weights are gathered at a time, and what lies outside the blocks for the whole step.

    Checkpoints are written whole, under the model's names. (A class of its own: Lightning refuses its own on a CPU.)
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(auto_wrap_policy={Block}, state_dict_type="full", ignored_states=_scalars(model), **options)


class ScalarGradients(Callback):
    """Takes the mean of the scalars' gradients over the processes, as FSDP shards nothing without dimensions."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for scalar in _scalars(pl_module):
            scalar.data = scalar.data.to(trainer.strategy.root_device)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for scalar in _scalars(pl_module):
            if scalar.grad is not None:
                dist.all_reduce(scalar.grad)
                scalar.grad /= dist.get_world_size()


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    """The contrast's temperatures."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 0]


def build_strategy(name: str, model: VLMo) -> tuple[Strategy | str, list[Callback]]:
    """What Lightning's Trainer takes as its strategy, and the callbacks that the strategy needs."""
    leave_to_each_process(model)
    if name == "ddp":
        # fairscale's checkpoints run a backward pass of their own within the backward pass: a weight that several
        # passes share is then ready more than once, which DDP expects of a static graph alone
        static = model.settings.activation_checkpointing == "offload"
        return DDPStrategy(static_graph=static, gradient_as_bucket_view=True), []
    if name in ("fsdp", "fsdp_cpu_offload"):
        return ShardedBlocks(model, cpu_offload=name == "fsdp_cpu_offload"), [ScalarGradients()]
    return name, []
