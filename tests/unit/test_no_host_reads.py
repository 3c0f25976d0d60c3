"""A training step never asks its device for a value: each time the processor would wait for all that is queued there.

On a CPU, a dispatch mode refuses the operations that read values; the blocks go the way of a GPU. On fake tensors of a
"cuda" device, what is read does not exist. Other processes are fake too: each is taken to hold what this one holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from vlmo.modules import VLMo, block
from vlmo.registry import TASKS
from vlmo.tasks import base
from vlmo.training.optimizer import build_optimizer

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "repeat_interleave"}
CONFIGS = {
    "mim": "task_mim_base",
    "textmlm": "task_textmlm_base",
    "mlm": "task_mlm_itm_itc_base",
    "itm": "task_mlm_itm_itc_base",
    "itc": "task_mlm_itm_itc_base",
    "irtr": "task_finetune_irtr_coco_base_image384",
    "vqa": "task_finetune_vqa_base_image480",
    "nlvr2": "task_finetune_nlvr2_base_image384",
    "snli_ve": "task_finetune_snli_ve_base_image384",
    "gqa": "task_finetune_gqa_base_image480",
    "image_classification": "task_finetune_imagenet_base",
}


class NoReads(TorchDispatchMode):
    """Fails at an operation whose result, or the shape of it, depends on values that a GPU would have to be asked."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        assert name not in READS and not mask, f"{name} reads from the device"
        return function(*args, **(kwargs or {}))


def model_of(name: str, world: int = 1) -> VLMo:
    sizes = {"batch_size": 3 * world, "per_gpu_batchsize": 3, "num_gpus": world, "accelerator": "cpu"}
    return tiny.model(CONFIGS[name], drop_path_rate=0.2, **sizes).train()


def batch_of(model: VLMo) -> dict:
    """As the loader gives it: with what the tasks derive."""
    batch = tiny.batch(images=("image", "image_0", "image_1")) | {"images_are_bytes": True}
    batch["image"] = torch.randint(0, 256, batch["image"].shape).float() / 127.5 - 1
    for task in model.tasks:
        batch |= task.derive(batch)
    return batch


@contextmanager
def processes(world: int, monkeypatch) -> Iterator[None]:
    """This process as one of so many, whose batches are all as large as this one's."""
    if world == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=world // 2, world_size=world)
    monkeypatch.setattr(base, "gather_numbers", lambda own: [tuple(own)] * world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_every_task_is_looked_at():
    assert set(CONFIGS) == {name for name, task in TASKS.items() if task.__module__.startswith("vlmo.")}


def step(model: VLMo, batch: dict, optimizer: torch.optim.Optimizer) -> None:
    outputs = model(batch)
    model.metrics.update("train", outputs)
    sum(output.loss for output in outputs.values()).backward()
    model.metrics.compute_step(model.device)
    optimizer.step()


def optimizer_of(model: VLMo) -> torch.optim.Optimizer:
    return build_optimizer("adamw", model.parameter_groups(), 1e-4)


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_backward_and_optimizer(name, world, monkeypatch):
    monkeypatch.setattr(block, "leaves_out_rows", lambda x: False)
    model = model_of(name, world)
    batch, optimizer = batch_of(model), optimizer_of(model)
    with processes(world, monkeypatch):
        step(model, batch, optimizer)  # (what is made once is made)
        with NoReads():
            step(model, batch, optimizer)


@pytest.mark.parametrize("read", [lambda loss: loss.item(), lambda loss: bool(loss > 0)])
def test_a_read_that_is_put_back_is_found(read, monkeypatch):
    monkeypatch.setattr(block, "leaves_out_rows", lambda x: False)
    model = model_of("itc")
    batch, forward = batch_of(model), base.mean

    def reading(value, count):
        read(value)
        return forward(value, count)

    monkeypatch.setattr("vlmo.tasks.itc.mean", reading)
    with pytest.raises(AssertionError, match="reads from the device"), NoReads():
        step(model, batch, optimizer_of(model))


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_on_a_device_that_holds_no_values(name, world, monkeypatch):
    model = model_of(name, world)
    batch = batch_of(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = torch.nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
        for key, buffer in module._buffers.items():
            module._buffers[key] = moved(buffer)
    with processes(world, monkeypatch), mode:
        outputs = model({key: moved(value) for key, value in batch.items()})
    assert all(output.loss.device.type == "cuda" for output in outputs.values())
