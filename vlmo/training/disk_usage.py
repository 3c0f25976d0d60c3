"""What a training run will write."""

import math
from collections.abc import Mapping

from vlmo.modules.vlmo_module import VLMo
from vlmo.settings import Settings
from vlmo.training.optimizer import state_share
from vlmo.training.run_length import RunLength


def checkpoint_size(model: VLMo, optim_type: str) -> int:
    """Bytes of a training checkpoint: the weights, and what the optimizer keeps of those that are trained, and their
    averages."""
    trained = sum(parameter.nbytes for _, parameter in model.trained_parameters())
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    averages = trained if model.settings.ema_decay else 0
    return weights + int(state_share(optim_type) * trained) + averages


def num_checkpoints(s: Settings, texts: Mapping[str, int]) -> int:
    """How many checkpoints a run has at its end: one a validation (without validation data, one an epoch), those that
    are written between them every so many steps, and the last; but no more than are kept.

    Args:
        texts: number of samples by split.
    """
    length = RunLength.of(s, texts["train"])
    if not texts["val"]:
        between = length.epoch_batches
    elif isinstance(s.val_check_interval, int):
        between = s.val_check_interval
    else:
        between = max(int(length.epoch_batches * s.val_check_interval), 1)
    written = math.ceil(length.batches / between)
    if s.checkpoint_every_n_steps:
        written += length.steps // s.checkpoint_every_n_steps
    return min(written, s.keep_last or written) + 1
