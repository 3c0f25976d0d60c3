"""Averages of the weights over the steps, which are evaluated and saved in place of the weights themselves."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vlmo.checkpoints.files import AVERAGES, TRAINED


class WeightAverages(Callback):
    """Keeps an exponential moving average of every trained weight: average = d * average + (1 - d) * weight.

    d is `decay`, but at step t at most (1 + t) / (10 + t), so that the first weights are soon forgotten. Steps that are
    skipped do not count. In validations the model has the averages; checkpoints hold them as its weights, and beside
    them, under TRAINED, the weights that the optimizer goes on from.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # by name: memory of the model's parameters, and the averages
        self.trained: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """After a checkpoint has been loaded; one of a run without averages begins them."""
        self.trained = {name: parameter.data for name, parameter in pl_module.trained_parameters()}
        start = self.trained | self._loaded
        self.averages = {name: start[name].to(weight.device, copy=True) for name, weight in self.trained.items()}
        self._loaded = {}
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:  # (gradients are still being accumulated)
            return
        self._step = step
        if not pl_module.step_is_skipped:
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(list(self.averages.values()), list(self.trained.values()), step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give(pl_module, self.averages)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give(pl_module, self.trained)

    def _give(self, model: LightningModule, weights: dict[str, Tensor]) -> None:
        """Has the parameters lie in other memory; nothing is copied."""
        parameters = dict(model.named_parameters())
        for name, weight in weights.items():
            parameters[name].data = weight

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Also in the middle of a validation."""
        checkpoint["state_dict"] = checkpoint["state_dict"] | self.averages
        checkpoint[TRAINED] = self.trained

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(AVERAGES, {})
