"""FSDP2: weights, gradients and the state of the optimizer shared out among the processes (torch's `fully_shard`).

Lightning's own ModelParallelStrategy does not carry it: it refuses 16-mixed, the default precision, and any plugin that
writes checkpoints. So this is a `DDPStrategy`, whose processes it takes, with another model.

Private names of torch's FSDP2 stand here: `_get_fsdp_state`, of it `_lazy_init`, and before torch 2.14
`_root_post_backward_final_callback`. `tests/unit/training/test_sharding.py` says which of them a new torch has changed.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vlmo.checkpoints import sharded
from vlmo.modules import VLMo
from vlmo.training.unused_parameters import unused_parameters


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
        for name in self.names:
            if prefix + name in state and state[prefix + name].shape != shape:
                state[prefix + name] = _whole(state[prefix + name]).reshape(shape)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: VLMo, mesh: DeviceMesh, policy: OffloadPolicy) -> None:
    """Shares out the model's parameters, in place.

    One block's weights are gathered at a time, in each pass, and what lies outside the blocks for the whole step: heads
    and single parameters are used outside `forward` too. Parts that no loss reaches are shared out by themselves, so
    that nothing ever gathers them.
    """
    share = partial(fully_shard, mesh=mesh, offload_policy=policy)
    for part in _unreached(model):
        share(part)
    for block in model.transformer.blocks:
        share(block, reshard_after_forward=True)
    root = share(model, reshard_after_forward=False)
    root.set_reshard_after_backward(False, recurse=False)  # (a step may have several backward passes)
    register_fsdp_forward_method(model, "training_step")


def _unreached(model: VLMo) -> list[nn.Module]:
    """The largest modules none of whose parameters any loss reaches."""
    never, found = unused_parameters(model), dict[str, nn.Module]()
    for path, module in model.named_modules():
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if names and names <= never and not path.startswith(tuple(f"{above}." for above in found)):
            found[path] = module
    return list(found.values())


class ShardedBlocks(DDPStrategy):
    """FSDP2 by block, for training; an evaluation alone has the model whole in each process, as with DDP.

    Gradients are averaged over the processes in each backward pass, so that no process ever keeps all of them.
    Checkpoints go from and to any number of processes and other strategies: see `sharded`.
    """

    def __init__(self, cpu_offload: bool = False) -> None:
        """
        Args:
            cpu_offload: weights, gradients and the state of the optimizer stay in the CPU's memory.
        """
        super().__init__()
        pinned = torch.cuda.is_available()
        self.policy = CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else OffloadPolicy()
        self.scalars: list[str] = []

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # each process reads its part

    def setup(self, trainer: Trainer) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING
        if not fits and not isinstance(self.model, FSDPModule):
            return super().setup(trainer)
        assert self.accelerator and isinstance(self.model, VLMo)
        self.accelerator.setup(trainer)
        if not isinstance(self.model, FSDPModule):
            self.model_to_device()
            self.scalars = ScalarsAsVectors(self.model).names
            shard(self.model, init_device_mesh(self.root_device.type, (self.world_size,)), self.policy)
        if fits:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if loss is None:  # there will be no backward pass
            self.model.reshard()  # type: ignore[union-attr, operator]
        return loss

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().backward(*args, **kwargs)
        self.model.reshard()  # type: ignore[union-attr, operator]
        return loss

    def teardown(self) -> None:
        """Leaves the parts where they are: an evaluation may follow."""
        if not isinstance(self.model, FSDPModule):
            return super().teardown()
        assert self.accelerator and self.cluster_environment
        for each in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            each.teardown()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As of any strategy, with tensors that are shared out; those of scalars are whole."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        for number in self._numbers_of_scalars(state["param_groups"]):
            each = state["state"].get(number, {})
            state["state"][number] = {key: _as_scalar(value) for key, value in each.items()}
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)  # all processes write

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what another run of any strategy wrote, this process's part of each tensor."""
        path = Path(checkpoint_path)
        if not sharded.is_sharded(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {key: self._empty(key, size, dtype) for key, (size, dtype) in sharded.listing(path).items()}
        sharded.read_into(path, tensors)
        return sharded.put_together(sharded.read_rest(path), tensors)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module
        own = dict(self.lightning_module.named_parameters())
        saved = checkpoint["state_dict"]
        placed = {name: _share(tensor, own[name]) if name in own else tensor for name, tensor in saved.items()}
        self.lightning_module.load_state_dict(placed, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = list(_parameters(optimizer))
            state = {
                number: {
                    key: _share(value, own[number]) if _is_elementwise(key, value, own[number]) else value
                    for key, value in entries.items()
                }
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict(dict(saved) | {"state": state})

    def _empty(self, key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """What a stored tensor is read into: like the parameter that it is of, if it is as large."""
        parameter = self._parameter_of(key)
        if isinstance(parameter, DTensor) and parameter.shape == size:
            return torch.empty_like(parameter.detach(), dtype=dtype)
        return torch.empty(size, dtype=dtype)

    def _parameter_of(self, key: str) -> Tensor | None:
        kind, *rest = key.split(sharded.SEPARATOR)
        if kind == "state_dict":
            return dict(self.lightning_module.named_parameters()).get(rest[0])  # type: ignore[union-attr]
        optimizer, _, number, _ = rest
        return list(_parameters(self.optimizers[int(optimizer)]))[int(number)]

    def _numbers_of_scalars(self, groups: list[dict[str, Any]]) -> list[int]:
        names = [name for group in groups for name in group["names"]]
        return [names.index(name) for name in self.scalars if name in names]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """Gives them in the order by which a state dict counts."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _as_scalar(value: Any) -> Any:
    return value.full_tensor().reshape(()) if isinstance(value, DTensor) else value


def _is_elementwise(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether an entry of an optimizer's state has a value for each of the parameter's (counts of steps do not)."""
    return isinstance(value, Tensor) and key != "step" and value.numel() == parameter.numel()


def _share(saved: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a saved tensor, as of the parameter; one that was read in parts is that already."""
    if isinstance(saved, DTensor) or not isinstance(parameter, DTensor):
        return saved
    whole = saved.reshape(parameter.shape).to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


class WholeInEvaluation(Callback):
    """Gathers all weights for an evaluation: the processes differ in what they compute, also in how much."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gather(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_out(pl_module)

    def _gather(self, model: nn.Module) -> None:
        if not isinstance(model, FSDPModule):
            return
        model._get_fsdp_state()._lazy_init()  # (if a block were the first to run, it would be the root)
        model.set_reshard_after_forward(False)
        for part in _shared(model):
            part.unshard()

    def _share_out(self, model: nn.Module) -> None:
        if not isinstance(model, FSDPModule):
            return
        for part in _shared(model):
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)
        # the order of the blocks in the evaluation is not that of the next step
        if hasattr(model, "reset_iter_state"):
            model.reset_iter_state()
        else:  # torch before 2.14: as after a backward pass
            model._get_fsdp_state()._root_post_backward_final_callback()


def _shared(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
