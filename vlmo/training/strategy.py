"""How the processes of a run share the work: Lightning's strategies, set up for this model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
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
    """Makes the model one that FSDP and DeepSpeed take."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, VLMo)
        for parameter in _unreached(pl_module):  # FSDP moves its own alone
            parameter.data = parameter.data.to(trainer.strategy.root_device)
        ScalarsAsVectors(pl_module)


class ScalarsAsVectors:
    """Gives the parameters without dimensions one, which sharding needs; in files they have none, as ever.

    (The contrast's temperatures are such parameters. Without any, nothing is changed.)
    """

    def __init__(self, module: nn.Module) -> None:
        scalars = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim == 0}
        self.names = list(scalars)
        for parameter in scalars.values():
            parameter.data = parameter.data.reshape(1)
        if scalars:  # (functions: torch marks its hooks with attributes, which a method cannot have)
            module.register_state_dict_post_hook(lambda _, state, prefix, *rest: self._reshape(state, prefix, ()))
            module.register_load_state_dict_pre_hook(lambda _, state, prefix, *rest: self._reshape(state, prefix, (1,)))

    def _reshape(self, state: dict[str, Tensor], prefix: str, shape: tuple[int, ...]) -> None:
        for name in self.names:  # (of a whole state, FSDP leaves to other processes than the first empty shards)
            if prefix + name in state and state[prefix + name].numel():
                state[prefix + name] = state[prefix + name].reshape(shape)


def _unreached(model: VLMo) -> list[nn.Parameter]:
    names = unused_parameters(model)
    return [parameter for name, parameter in model.named_parameters() if name in names]


def build_strategy(name: str, model: VLMo) -> tuple[Strategy | str, list[Callback]]:
    """What Lightning's Trainer takes as its strategy, and the callbacks that the strategy needs."""
    if name.startswith("ddp"):
        exclude_from_ddp(model)
    if name == "ddp":
        offload = model.settings.activation_checkpointing == "offload"
        return StaticGraphDDP() if offload else DDPStrategy(gradient_as_bucket_view=True), []
    if name in ("fsdp", "fsdp_cpu_offload"):
        return ShardedBlocks(model, cpu_offload=name == "fsdp_cpu_offload"), [PrepareForSharding()]
    return name, [PrepareForSharding()] if name.startswith("deepspeed") else []
