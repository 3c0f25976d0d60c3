"""`learning_checks=True`: why a run does not learn and what to change, in plain sentences (docs/learning_doctor.md)."""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from vlmo.distributed.collectives import gather_numbers, rank
from vlmo.files import append_lines
from vlmo.settings import Settings
from vlmo.tasks.base import num_samples
from vlmo.training.learning.data_checks import Finding, data_findings, duplicate_captions
from vlmo.training.learning.gauges import FeatureGauges, UpdateGauge, gradient_norms, trained_parts
from vlmo.training.learning.run_checks import RunChecks, few_negatives, frozen_findings
from vlmo.training.learning.seen import Seen
from vlmo.training.preparation import run_folder

log = logging.getLogger(__name__)

FILE = "learning.jsonl"
NO_HEADS = {"transformer", "text_embeddings", "token_type_embeddings", "attention_masks"}


class LearningChecks(Callback):
    """Looks at the first samples and at every logged step; a finding is said once, and written to `learning.jsonl`.

    Logs chance (`{task}/train/{metric}_chance`), gradient norms by part (`train/grad_norm/...`), the relative change of
    the weights (`train/update_ratio`), what heads read (`features/...`), false negatives a pair, the share of captions
    that are there twice, and the share of time waiting for data. Between logged steps nothing waits for the device.
    With several processes all of this is of the whole step; the first process judges and says it.

    Attributes:
        findings: so far, by code, each with the step after which it was found.
        chance: by task and metric.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.every = settings, settings.log_every_n_steps
        self.findings: dict[str, tuple[int, str]] = {}
        self.chance: dict[str, dict[str, float]] = {}
        self.seen = Seen()
        self._folder: Path | None = None
        self._measured: dict[str, Tensor | float] = {}
        self._copies: float | None = None
        self._logged_at = -1
        self._features: FeatureGauges | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._features = FeatureGauges({name: each for name, each in pl_module.heads.items() if name not in NO_HEADS})
        self._parts = trained_parts(pl_module)
        self._update = UpdateGauge(self._parts)
        self._checks = RunChecks(self.settings, pl_module.tasks, int(trainer.estimated_stepping_batches))
        self._start()
        self._tell(trainer.global_step, few_negatives(self.settings, pl_module.tasks))
        trained = {id(p) for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
        meant = self.settings.freeze or self.settings.lora_rank
        if not meant and any(id(p) in trained for parameters in self._parts.values() for p in parameters.values()):
            # (else the strategy has tensors of its own)
            self._tell(trainer.global_step, frozen_findings(self._parts, trained))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._features:
            self._features.remove()

    def _start(self) -> None:
        self._waited, self._line_time = 0.0, time.perf_counter()
        self._batch_end = self._line_time

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self._features
        self._waited += time.perf_counter() - self._batch_end
        self._features.on = self._due(trainer)
        self.seen.add(batch, num_samples(batch))

    def _due(self, trainer: Trainer) -> bool:
        """Whether the optimizer step that is being computed is logged."""
        return (trainer.global_step + 1) % self.every == 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        if self._due(trainer):
            self._measured |= {f"train/grad_norm/{part}": norm for part, norm in gradient_norms(self._parts).items()}
            self._update.before()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self._features
        self._batch_end = time.perf_counter()
        step = trainer.global_step
        if step % self.every or step == self._logged_at:
            return
        self._logged_at = step
        change = self._update.after()
        if change is not None:
            self._measured["train/update_ratio"] = change
        features = self._features.measure(pl_module.device)
        self._measured |= {f"features/{name}": value for name, value in features.items()}
        self._measured |= self._counted(trainer, pl_module, num_samples(batch))
        if self.seen.fetch() and rank() == 0:
            self._look_at_data(trainer, pl_module, step)
        if self._copies is not None:
            self._measured["train/duplicate_captions"] = self._copies
        for name, expected in self.chance.items():
            self._measured |= {f"{name}/train/{key}_chance": value for key, value in expected.items()}
        pl_module.log_dict(self._measured, rank_zero_only=True)
        if rank() == 0:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._tell(step, self._checks.findings(step, numbers, self.chance))
        self._measured = {}
        self._start()

    def _counted(self, trainer: Trainer, pl_module: Any, size: int) -> dict[str, Tensor | float]:
        """What is known without a device: the time of the process that waits longest, false negatives a pair.

        Args:
            size: samples of this process's batch.
        """
        elapsed = max(self._batch_end - self._line_time, 1e-6)
        everywhere = gather_numbers([size, int(1e6 * self._waited / elapsed)])
        found: dict[str, Tensor | float] = {"train/data_wait": max(wait for _, wait in everywhere) / 1e6}
        pairs = sum(count for count, _ in everywhere)
        for task in pl_module.tasks:
            same = trainer.callback_metrics.get(f"{task.name}/train/same_image_pairs")
            if same is not None and pairs:
                found[f"{task.name}/train/false_negatives"] = 2 * same / pairs
        return found

    def _look_at_data(self, trainer: Trainer, pl_module: Any, step: int) -> None:
        """Judges the first samples as they come in, and what chance is by them."""
        self.chance = {task.name: task.chance(self.seen.batches) for task in pl_module.tasks}
        total = trainer.datamodule.epoch_samples  # type: ignore[attr-defined]
        related = any(task.provides == "contrast" for task in pl_module.tasks)
        self._tell(step, data_findings(self.seen, pl_module.vocabulary, total, related))
        self._copies = duplicate_captions(self.seen)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if rank() == 0 and self.chance:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            last = self._checks.last[-1] if self._checks.last else {}
            self._tell(trainer.global_step, self._checks.validated({**last, **numbers}, self.chance))
        self._start()  # evaluation is neither training nor waiting

    def _tell(self, step: int, findings: Iterable[Finding]) -> None:
        """Says and writes what has not been said."""
        for code, sentence in findings:
            if code in self.findings or rank() != 0:
                continue
            self.findings[code] = (step, sentence)
            log.warning(f"learning ({code}): {sentence}")
            if self._folder:
                append_lines(self._folder / FILE, [json.dumps({"step": step, "code": code, "sentence": sentence})])
