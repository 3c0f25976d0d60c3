"""What the person sees of a run: the summary at the start, and a line of numbers while training."""

import json
import sys
import time
from typing import Any

import psutil
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm import tqdm

from vlmo.config import resolve
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.tasks import num_samples
from vlmo.training import optimizer as optim
from vlmo.training.environment import Environment


def differences(settings: Settings) -> dict[str, Any]:
    """The options whose value is not the default."""
    defaults = Settings.from_config(resolve()).model_dump()
    return {name: value for name, value in settings.model_dump().items() if value != defaults[name]}


def summary(settings: Settings, environment: Environment, model: VLMo) -> str:
    """The block printed before the first step."""
    lines = [f"{settings.exp_name}: {settings.model_arch}, losses {' + '.join(settings.active)}"]
    lines += ["", "options that differ from the defaults"]
    for name, value in differences(settings).items():
        if name == "loss_names":
            value = {loss: weight for loss, weight in value.items() if weight}
        lines.append(f"  {name:<22} {json.dumps(value)}")
    device = torch.cuda.get_device_name() if environment.accelerator == "gpu" else f"{torch.get_num_threads()} threads"
    lines += ["", f"runs on    {environment.accelerator} x {settings.devices * settings.num_nodes} ({device})"]
    lines[-1] += f", precision {environment.precision}"
    if not settings.test_only:
        lines.append(
            f"batch      {settings.batch_size} = {settings.per_gpu_batchsize} a device x {settings.devices} devices x "
            f"{settings.num_nodes} nodes x {settings.accumulation} accumulated"
        )
    trained = _count(parameter for _, parameter in model.trained_parameters())
    lines += [f"parameters {_count(model.parameters())}, of which trained {trained}"]
    if not settings.test_only:
        groups = optim.parameter_groups(
            model.trained_parameters(), settings.learning_rate, settings.weight_decay, settings.lr_mult
        )
        for group in groups:
            if group["params"]:
                lines.append(
                    f"  {_count(group['params']):>8} in {len(group['params'])} tensors: learning rate {group['lr']:g}, "
                    f"weight decay {group['weight_decay']:g}"
                )
    if model.load_report:
        lines += ["", str(model.load_report)]
    return "\n".join([*lines, ""])


def _count(parameters: Any) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"


class ConsoleLine(Callback):
    """One line every `every` steps: losses, learning rate, throughput, memory, share of time waiting for data.

    Only with a line the device is waited for. The throughput is also logged, as `train/samples_per_sec`.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        # since the last line: seconds between the end of a batch and the start of the next, samples of this process
        self.waited, self.samples = 0.0, 0
        self.line_time = self.batch_end = time.perf_counter()
        self.printed_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()  # evaluation is neither training nor waiting

    def _start(self) -> None:
        self.waited, self.samples = 0.0, 0
        self.line_time = self.batch_end = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.batch_end

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch_end = time.perf_counter()
        self.samples += num_samples(batch)
        step = trainer.global_step
        if step % self.every or step == self.printed_at or not trainer.is_global_zero:
            return
        self.printed_at = step
        tqdm.write(self._line(trainer, pl_module, step), file=sys.stdout)
        sys.stdout.flush()  # into a file, too, a line appears when it is written
        self._start()

    def _line(self, trainer: Trainer, pl_module: Any, step: int) -> str:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}  # (waits for the device)
        seconds = max(time.perf_counter() - self.line_time, 1e-9)
        speed = self.samples * trainer.world_size / seconds
        pl_module.log("train/samples_per_sec", speed, rank_zero_only=True)
        losses = {name.split("/")[0]: v for name, v in logged.items() if name.endswith("/train/loss")}
        total = int(trainer.estimated_stepping_batches)
        parts = [f"step {step:,}/{total:,}", f"loss {sum(losses.values()):.3f}"]
        if len(losses) > 1:
            parts[-1] += " = " + " + ".join(f"{name} {value:.3f}" for name, value in losses.items())
        parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.1e}")
        parts += [f"{speed:,.1f} samples/s", memory(trainer), f"data {self.waited / seconds:.0%}"]
        return "  ".join(parts)


def memory(trainer: Trainer) -> str:
    """Memory in use: the peak of the GPU, or what this process holds of the machine's."""
    if trainer.strategy.root_device.type == "cuda":
        device = trainer.strategy.root_device
        used, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        used, there = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    return f"mem {used / 2**30:.1f}/{there / 2**30:.0f} GiB"


def console_callbacks(settings: Settings) -> list[Callback]:
    """Progress bar (where a person is looking) and console line."""
    bar = TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 0)
    return [ConsoleLine(settings.log_every_n_steps), bar]
