"""How much of a device's peak a training reaches: the operations of its model over those that the device could do."""

import logging

import torch

from vlmo.settings import Settings

log = logging.getLogger(__name__)


def peak_teraflops(settings: Settings, device: torch.device) -> float | None:
    """Gives the device's peak in 1e12 operations a second, as given or as its name says; None: unknown."""
    from vlmo.planning.devices import find_device

    if settings.peak_teraflops or device.type != "cuda":
        return settings.peak_teraflops
    known = find_device(torch.cuda.get_device_name(device))
    return known.teraflops if known else None


def teraflops_per_sample(settings: Settings) -> float | None:
    """Counts 1e12 operations of a sample, forward and backward, with a text of the greatest length.

    What is computed twice to save memory by `activation_checkpointing` is counted once. None, with a warning, where the
    step of a task cannot be run on tensors without values.
    """
    from vlmo.planning.step import quick, step_cost

    once = settings.model_copy(update={"activation_checkpointing": False})
    try:
        with torch.random.fork_rng(devices=[]), quick():
            flops = step_cost(once, once.per_gpu_batchsize).flops
    except Exception as error:  # of a plugin's task, for one: the number is worth no training
        log.warning(f"MFU is not shown: the operations of a step cannot be counted ({error})")
        return None
    return flops / 1e12 / (once.per_gpu_batchsize * once.accumulation)
