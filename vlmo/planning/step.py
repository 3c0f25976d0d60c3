"""A training step on tensors that have a shape alone: how much memory it takes, and how many operations.

The step is the model's own, forward and backward, run by autograd; nothing is computed and hardly any memory is taken.
Every tensor is followed from its creation to its end, so that what is counted is what lives at the same time.

The tensors are fake ones of the CPU, also for a run on GPUs: torch differentiates fake CUDA tensors on machines with a
GPU only. `_as_on_gpu` makes the step go a GPU's way: blocks compute all rows, attention is a fused kernel that keeps
no scores but gets the biases of the whole batch as a mask (the memory-efficient one: FlashAttention takes no mask), and
autocast leaves the functions in 32 bits that it does there.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmo.batch import IGNORE_INDEX, Field
from vlmo.modules import VLMo, attention, block
from vlmo.planning.compute import counter
from vlmo.planning.recording import Recorder
from vlmo.settings import Settings

ALIGNED = 512  # bytes, of what a GPU's allocator hands out
ANSWERS = 10  # "K", the most entries of a row: next to nothing


@dataclass(frozen=True)
class StepCost:
    """What a training step costs a device, beside the weights and the optimizer.

    Attributes:
        activations: bytes, the most that live at a time beyond weights, gradients and the optimizer's state: what
            is kept for the backward pass, its intermediate results, the batch, and 16-bit copies of the weights.
        gradients: bytes.
        flops: floating-point operations of all passes of the step, as torch's FlopCounterMode counts them.
    """

    activations: int
    gradients: int
    flops: int


def on_gpu(settings: Settings) -> bool:
    """Whether the run is for GPUs, whether or not this machine has one."""
    return settings.num_gpus != 0 and settings.accelerator != "cpu"


def autocast_type(settings: Settings) -> torch.dtype | None:
    """The 16-bit type that the run computes in; None: 32 bits. Of GPUs it is taken that they have bf16."""
    if not on_gpu(settings):
        return torch.bfloat16 if str(settings.precision) == "bf16" else None
    types = {"16": torch.float16, "bf16": torch.bfloat16, "auto": torch.bfloat16}
    return types.get(str(settings.precision))


def step_cost(settings: Settings, per_gpu_batchsize: int, flops: bool = True) -> StepCost:
    """Measures a step of `per_gpu_batchsize` samples a pass, with texts of the greatest length.

    Args:
        flops: count them, which takes a third longer; else 0.
    """
    accumulation = settings.accumulation
    passes = min(accumulation, 2) if settings.accumulated_batches == 1 else 1  # (chunks of a batch are alike)
    one = settings.model_copy(
        update={
            "per_gpu_batchsize": per_gpu_batchsize,
            "batch_size": per_gpu_batchsize * passes,
            "num_gpus": min(settings.devices, 1) if on_gpu(settings) else 0,
            "num_nodes": 1,
            "load_path": "",
            "activation_checkpointing": bool(settings.activation_checkpointing),
        }
    )
    gradients_stay = accumulation > passes or settings.devices * settings.num_nodes > 1  # (under DDP in its buckets)
    recorder = Recorder()
    model = fake_model(one, recorder)
    batch = synthetic_batch(model, one.training_batch)
    counted = counter() if flops else None
    # a batch that is given whole is cut by its values: what is small must have some then, which takes longer
    shapes = recorder if settings.accumulated_batches < accumulation else recorder.fake
    place = _as_on_gpu() if on_gpu(settings) else nullcontext()
    live = LiveMemory(ALIGNED if on_gpu(settings) else 1)
    with quick(), shapes, _Answers(one.max_text_len), place, live as memory:
        memory.leave_out([*model.parameters(), *model.buffers()])
        for _, parameter in model.trained_parameters():  # as any step but the first finds them
            parameter.grad = torch.empty_like(parameter)
        gradients = memory.live
        for value in batch.values():
            if isinstance(value, Tensor):
                memory.add(value)
        with counted or nullcontext():
            _run_pass(model, batch, autocast_type(settings), zero_gradients=not gradients_stay)
    total = counted.get_total_flops() * accumulation // passes if counted else 0
    return StepCost(memory.peak - gradients, gradients, total)


@contextmanager
def quick() -> Iterator[None]:
    """Within it, torch does not ask at each operation anew whether there is a GPU."""
    with mock.patch.object(FakeTensorMode, "avoid_device_init", not torch.cuda.is_available()):
        yield


# --- the step --------------------------------------------------------------------------------------------------------


class _Model(VLMo):
    """Logs nothing."""

    device = torch.device("cpu")

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    def log_dict(self, *args: Any, **kwargs: Any) -> None: ...


def fake_model(settings: Settings, recorder: Recorder) -> VLMo:
    """Builds the model of a run in training mode, on the CPU, its weights without values."""
    with torch.device("meta"):
        model = _Model(settings).train()
    with recorder.fake:
        model.to_empty(device="cpu")
    model.trainer = SimpleNamespace(model=model, training=True, global_step=0, current_epoch=0)
    return model


def synthetic_batch(model: VLMo, size: int) -> dict[str, Any]:
    """Makes a batch as the loader does, with texts of the greatest length, and masked as much as `mlm_prob` says."""
    s = model.settings
    sizes = {"S": s.image_size, "P": model.transformer.window**2, "T": s.max_text_len, "K": ANSWERS}
    fields: dict[str, Field] = {name: field for task in model.tasks for name, field in task.own_fields.items()}
    batch: Any = {"images_are_bytes": True, "raw_index": torch.arange(size)}
    for name, field in fields.items():
        shape = [size, *(sizes[each] if isinstance(each, str) else each for each in field.shape)]
        batch[name] = [""] * size if field.dtype is None else torch.ones(shape, dtype=field.dtype)
    for name in [name for name in batch if name.endswith("text_labels_mlm")]:  # of the words between [CLS] and [SEP]
        masked = max(round(s.mlm_prob * (s.max_text_len - 2)), 1)
        batch[name][:, [0, *range(1 + masked, s.max_text_len)]] = IGNORE_INDEX
    for name in [name for name in batch if name.endswith("patch_mask")]:
        batch[name][:, round(s.mim_mask_ratio * sizes["P"]) :] = False
    for task in model.tasks:
        batch |= task.derived(batch)
    return batch


def _run_pass(model: VLMo, batch: Any, dtype: torch.dtype | None, zero_gradients: bool) -> None:
    """Forward and backward, in the order of Lightning, which drops the old gradients in between."""
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model.training_step(batch, 0)
    assert loss is not None
    if zero_gradients:
        model.zero_grad()
    model.backward(loss)


class _Answers(TorchDispatchMode):
    """Answers what the step asks of values, which fake tensors do not have.

    Blocks that leave out rows compute all: which they are is not known, and it is at most all. (A GPU's do not ask.) A
    number, of texts' lengths when a whole batch is cut, is the greatest length.
    """

    def __init__(self, max_text_len: int) -> None:
        super().__init__()
        self.max_text_len = max_text_len

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.aten.nonzero.default:
                return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
            if func is torch.ops.aten._local_scalar_dense.default:
                return self.max_text_len
            if func is torch.ops.aten._fused_sdp_choice.default and not block.leaves_out_rows(args[0]):
                return SDPBackend.EFFICIENT_ATTENTION.value  # as on a GPU
        return func(*args, **(kwargs or {}))


# --- what lives ------------------------------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Follows the memory of the tensors that are made within it, real or fake, until nobody holds it any more.

    Args:
        aligned: bytes, of which an allocator hands out multiples.

    Attributes:
        live, peak: bytes now, and the most so far.
    """

    def __init__(self, aligned: int = 1) -> None:
        super().__init__()
        self.aligned, self.live, self.peak = aligned, 0, 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor) -> int:
        """Counts a tensor that was made outside; gives its bytes, 0 if it shares memory that is counted already."""
        return self._follow(tensor, counted=True)

    def leave_out(self, tensors: list[Tensor]) -> None:
        """Has these, and what shares their memory, not counted."""
        for tensor in tensors:
            self._follow(tensor, counted=False)

    def _follow(self, tensor: Tensor, counted: bool) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)  # (the same object as long as the memory lives)
        if key in self._known:
            return 0
        size = -(-storage.nbytes() // self.aligned) * self.aligned if counted else 0

        def freed(reference: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
        return size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.add(each)
        return result


# --- as on a GPU -----------------------------------------------------------------------------------------------------


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Within it, what runs on tensors of the CPU goes the way that it goes on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(block, "leaves_out_rows", lambda x: False))
        stack.enter_context(mock.patch.object(attention, "_attend", _attend_with_mask))
        stack.enter_context(mock.patch.object(F, "layer_norm", _in_32_bits(F.layer_norm)))
        stack.enter_context(mock.patch.object(torch, "addcmul", _in_32_bits(torch.addcmul)))
        yield


def _attend_with_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor | None) -> Tensor:
    mask = bias.to(q.dtype) if padding is None else bias.to(q.dtype) + padding[..., : bias.shape[-1]].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _in_32_bits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Has autocast treat a function as on a GPU: it computes in 32 bits, and keeps what it computed of.

    (torch's lists: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference)
    """

    def called(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        return function(*args, **kwargs)

    return called
