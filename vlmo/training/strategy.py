"""How the processes of a run share the work: Lightning's strategies, set up for this model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn

from vlmo.modules import VLMo
from vlmo.modules.block import Block
from vlmo.training.unused_parameters import exclude_from_ddp, unused_parameters


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


class ShardedBlocks(FSDPStrategy):
    """FSDP by block: one block's weights are gathered at a time, and what lies outside the blocks for the whole step.

    Weights that no loss reaches stay whole: FSDP saves no optimizer that lacks some of its weights. Checkpoints are
    written whole, under the model's names. (A class of its own: Lightning refuses its own on a CPU.)
    """

    def __init__(self, model: VLMo, **options: Any) -> None:
        super().__init__(auto_wrap_policy={Block}, state_dict_type="full", ignored_states=_unreached(model), **options)


class PrepareForSharding(Callback):
    """Makes the model one that FSDP and DeepSpeed take.

    Neither takes a weight without dimensions: the contrast's temperatures have one here, and in files none as ever.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for parameter in _unreached(pl_module):  # FSDP moves its own alone
            parameter.data = parameter.data.to(trainer.strategy.root_device)
        # its weights are together only where all processes compute, so all take every step
        pl_module.steps_together = isinstance(trainer.strategy, ShardedBlocks)
        scalars = [(name, parameter) for name, parameter in pl_module.named_parameters() if parameter.ndim == 0]
        if not scalars:
            return

        def reshape(state: dict[str, Tensor], prefix: str, shape: tuple[int, ...]) -> None:
            for name, _ in scalars:  # (of a whole state, FSDP leaves to other processes than the first empty shards)
                if prefix + name in state and state[prefix + name].numel():
                    state[prefix + name] = state[prefix + name].reshape(shape)

        for _, parameter in scalars:
            parameter.data = parameter.data.reshape(1)
        pl_module.register_state_dict_post_hook(lambda module, state, prefix, _: reshape(state, prefix, ()))
        pl_module.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: reshape(state, prefix, (1,)))


def _unreached(model: VLMo) -> list[nn.Parameter]:
    names = unused_parameters(model)
    return [parameter for name, parameter in model.named_parameters() if name in names]


def build_strategy(name: str, model: VLMo) -> tuple[Strategy | str, list[Callback]]:
    """What Lightning's Trainer takes as its strategy, and the callbacks that the strategy needs."""
    exclude_from_ddp(model)
    if name == "ddp":
        offload = model.settings.activation_checkpointing == "offload"
        return StaticGraphDDP() if offload else DDPStrategy(gradient_as_bucket_view=True), []
    if name in ("fsdp", "fsdp_cpu_offload"):
        return ShardedBlocks(model, cpu_offload=name == "fsdp_cpu_offload"), [PrepareForSharding()]
    return name, [PrepareForSharding()] if name.startswith("deepspeed") else []
