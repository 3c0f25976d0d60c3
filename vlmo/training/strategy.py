"""How the processes of a run share the work: Lightning's strategies, set up for this model."""

from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, Strategy

from vlmo.modules import VLMo
from vlmo.training.environment import SHARDED
from vlmo.training.sharding import ScalarsAsVectors, ShardedBlocks, WholeInEvaluation
from vlmo.training.unused_parameters import exclude_from_ddp


class StaticGraphDDP(DDPStrategy):
    """For fairscale's checkpoints, which run a backward pass of their own within the backward pass.

    A weight that several passes share is then ready more than once, which DDP expects of a static graph alone; and a
    static graph must reduce the gradients in every pass, also of those that are accumulated.
    """

    def __init__(self) -> None:
        super().__init__(static_graph=True)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        yield


class PrepareForSharding(Callback):
    """Makes the model one that DeepSpeed takes."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        ScalarsAsVectors(pl_module)


def build_strategy(name: str, model: VLMo) -> tuple[Strategy | str, list[Callback]]:
    """What Lightning's Trainer takes as its strategy, and the callbacks that the strategy needs."""
    if name.startswith("ddp"):
        exclude_from_ddp(model)
    if name == "ddp":
        offload = model.settings.activation_checkpointing == "offload"
        return StaticGraphDDP() if offload else DDPStrategy(gradient_as_bucket_view=True), []
    if name in SHARDED:
        return ShardedBlocks(cpu_offload=name == "fsdp2_cpu_offload"), [WholeInEvaluation()]
    return name, [PrepareForSharding()] if name.startswith("deepspeed") else []
