"""VLMo: the model with a training step, as Lightning takes it.

A step, for a reader: batch -> `training_step` -> `compute_tasks`, which asks every task for its requests, has them
encoded (`VLMoModel.encode`) and hands each task its hidden states -> metrics and logs. `docs/training_step.md` follows
a batch from the table to the optimizer.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlmo.batch import Batch, empty_batch
from vlmo.checkpoints.files import Checkpoint, read
from vlmo.checkpoints.loading import load_weights, other_classes
from vlmo.checkpoints.metadata import METADATA_KEY, resumed_names
from vlmo.checkpoints.pretrained import metadata_of
from vlmo.distributed.collectives import single_process, world_size
from vlmo.distributed.wire_format import with_pixels
from vlmo.modules.model import VLMoModel
from vlmo.registry import TASKS
from vlmo.settings import Settings
from vlmo.tasks.base import TaskOutput, compute_tasks, num_samples
from vlmo.training import optimizer as optim
from vlmo.training.metrics import Metrics
from vlmo.training.trained_parts import add_adapters, freeze
from vlmo.training.unused_parameters import unused_parameters
from vlmo.training.whole_batch import WholeBatch

log = logging.getLogger(__name__)


class VLMo(VLMoModel, pl.LightningModule):
    """The model of a config, with `load_path` loaded and the stage's freezing applied.

    Args:
        config: a resolved config (`vlmo.config.resolve`).
        loaded: the file at `load_path`, where it has been read already.
        label_names, vocabulary: names of the classes and tokens in use, saved with the weights; None: the file's.

    Raises:
        VLMoError: for a config that cannot work, and for a file that does not fit.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | Settings,
        loaded: Checkpoint | None = None,
        label_names: list[str] | None = None,
        vocabulary: list[str] | None = None,
    ) -> None:
        settings = config if isinstance(config, Settings) else Settings.from_config(config)
        tasks = [TASKS[name](settings) for name in settings.active]
        sizes = {option for task in tasks for option in task.sized_by.values()} - {"vocab_size"}
        super().__init__(
            settings.model_arch,
            tasks,
            image_size=settings.image_size,
            max_text_len=settings.max_text_len,
            max_text_len_of_initckpt=settings.max_text_len_of_initckpt,
            vocab_size=settings.vocab_size,
            drop_path_rate=settings.drop_path_rate,
            shared_ffn=settings.shared_ffn,
            activation_checkpointing=settings.activation_checkpointing,
            tokenizer=settings.tokenizer,
            loss_names=dict(settings.loss_names),
            **{name: getattr(settings, name) for name in sizes},
        )
        self.settings = settings
        self.save_hyperparameters({"config": settings.model_dump(mode="json")})
        required = [head for task in self.tasks for head in task.required_heads] if settings.test_only else []
        if settings.get_recall_rerank_metric and not any(task.provides == "matching" for task in tasks):
            matching = next(task for task in TASKS.values() if task.provides == "matching")(settings)
            self.add_heads(matching)  # no task trains it: it comes with the file
            required += matching.heads(1)
        elif settings.get_recall_rerank_metric and settings.test_only:
            required += [head for task in tasks if task.provides == "matching" for head in task.heads(1)]
        if settings.load_path:
            loaded = loaded or read(settings.load_path)
            load_weights(self, loaded, required, self.heads_to_reset(loaded, label_names))
        self.answers, self.vocabulary = label_names or self.answers, vocabulary or self.vocabulary
        # (beside pairs, a loss of images or texts alone trains with the others what they train)
        for trains in [task.trains for task in tasks if task.trains is not None and not task.prefix]:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(any(part in name for part in trains))
        self.adapted: list[str] = []  # names of the layers with adapters
        self.frozen: list[str] = []  # names of the parameters that `freeze` froze
        if settings.lora_rank and not settings.test_only:
            self.adapted = add_adapters(self, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
        if settings.freeze and not settings.test_only:
            self.frozen = freeze(self, settings.freeze)
        seed = settings.seed if settings.layout_invariant else None
        self.whole_batch = WholeBatch(self, settings.per_gpu_batchsize, seed) if settings.loads_whole_batch else None
        self.metrics = Metrics(self.tasks)
        self.step_is_skipped = False  # set before each optimizer step by who skips it

    @classmethod
    def build(cls, tasks: Sequence[str], options: Mapping[str, Any]) -> "VLMo":
        """Builds the model of some options: used by `from_pretrained`."""
        weights = {name: float(name in tasks) for name in TASKS}
        # (settings demand data that fit, of which nothing is read here)
        alone = {name: sorted(TASKS[name].datasets or ["images"]) for name in tasks if TASKS[name].alone}
        named = [TASKS[name].datasets for name in tasks if TASKS[name].datasets and name not in alone]
        fixed: dict[str, Any] = {"loss_names": weights, "beside": alone}
        if len(alone) == len(tasks) == 1:
            fixed |= {"beside": {}, "datasets": alone[tasks[0]]}
        elif named:
            fixed |= {"datasets": sorted(named[0])}
        return cls(Settings.defaults() | fixed | dict(options))

    # --- the step ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, TaskOutput]:
        """Computes all tasks that are on, by name; their losses are weighted by `loss_names`."""
        weights = self.settings.loss_names
        pixels: Any = with_pixels(batch)  # (a loader that is used by hand gives bytes)
        outputs = compute_tasks(self, self.tasks, pixels)
        return {name: replace(output, loss=output.loss * weights[name]) for name, output in outputs.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Gives the weighted sum of the losses; of a whole batch the contrast's, the others are for `backward`."""
        outputs = self._step(batch, "train")
        if not outputs:
            return None
        return sum((output.loss for output in outputs.values()), torch.zeros((), device=self.device))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures; the numbers are logged at the end of the epoch."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, TaskOutput]:
        """Measures, and hands the outputs to the callbacks that write predictions."""
        return self._step(batch, "test")

    def _step(self, batch: Batch, phase: str) -> dict[str, TaskOutput]:
        size = num_samples(batch)
        if not size:  # every sample of the batch was skipped as unreadable
            if world_size() == 1 or phase != "train":
                return {}
            batch = self.empty_batch()
        if phase != "train":
            with single_process():
                outputs = self(batch)
        elif self.whole_batch:
            outputs = self.whole_batch.first_pass(batch, self.global_step)
        else:
            outputs = self.forward(batch)  # (without hooks: FSDP2's are those of the step, and would gather twice)
        if size:  # (a process without samples only takes part in the exchanges)
            self.metrics.update(phase, outputs)
            if phase == "train":
                for name, output in outputs.items():
                    for key, value in output.scalars.items():
                        self.log(f"{name}/train/{key}", value, batch_size=size)
        return outputs

    def empty_batch(self) -> Batch:
        """Gives a batch without samples that every task can compute."""
        sizes = {"S": self.image_size, "P": self.transformer.window**2}
        fields = {name: field for task in self.tasks for name, field in task.own_fields.items()}
        finish = [task.derived for task in self.tasks]
        return empty_batch(fields, sizes, self.transformer.cls_token, finish)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: of a whole batch the second pass."""
        if not self.whole_batch:
            return super().backward(loss, *args, **kwargs)
        self.whole_batch.second_pass(loss, lambda outputs: self.metrics.update("train", outputs))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's hook: a whole batch stays where it is, its chunks are moved in turn."""
        if self.whole_batch and self.trainer.training:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook: images that came as bytes become pixels; of a whole batch, those of each chunk in turn."""
        if "images_are_bytes" not in batch or (self.whole_batch and self.trainer.training):
            return batch
        return self.trainer.precision_plugin.convert_input(with_pixels(batch))

    def on_train_start(self) -> None:
        """Of a whole batch the gradients of all chunks are exchanged together: DDP must not do it at each."""
        if self.whole_batch and isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False
        self._limit_weights()

    def on_train_batch_end(self, *_: Any) -> None:
        self._limit_weights()

    @torch.no_grad()
    def _limit_weights(self) -> None:
        for task in self.tasks:
            task.limit_weights(self.heads)

    # --- logs --------------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs what the step measured, over all its passes and processes; `train/loss` is what is minimised."""
        values = self.metrics.compute_step(self.device)
        weights = self.settings.loss_names
        self.log_dict({f"{name}/train/{key}": value for (name, key), value in values.items()})
        losses = [weights[name] * value for (name, key), value in values.items() if key == "loss"]
        if losses:
            self.log("train/loss", torch.stack(losses).sum())

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _log_epoch(self, phase: str) -> None:
        """Logs every metric that was updated as `{task}/{phase}/{key}_epoch`, and `{phase}/the_metric`."""
        values = self.metrics.compute_epoch(phase, self.device)
        for (name, key), value in values.items():
            tag = f"{name}/{key}" if "/" in key else f"{name}/{phase}/{key}"
            self.log(f"{tag}_epoch", value)
            if phase != "train":
                self.log(tag, value)
        primary = [[values[t.name, key] for key in t.primary_metrics if (t.name, key) in values] for t in self.tasks]
        scores = [float(torch.stack(found).sum()) for found in primary if found]
        if phase != "train" and f"recalls/{phase}_avg" in self.trainer.callback_metrics:  # measured just before
            scores.append(float(self.trainer.callback_metrics[f"recalls/{phase}_avg"]))
        if scores:  # (questions of a challenge's test set have no answers)
            self.log(f"{phase}/the_metric", sum(scores))

    # --- optimizer and files -----------------------------------------------------------------------------------------

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Gives names and values of what the optimizer updates: neither frozen nor out of every task's reach."""
        never = unused_parameters(self)
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad and name not in never]

    @property
    def downstream_heads(self) -> list[str]:
        """Beginnings of the names of the heads that are trained at `lr_mult` times the learning rate."""
        return [head for task in self.tasks if task.head_group for head in task.required_heads]

    def heads_to_reset(self, loaded: Checkpoint, label_names: Sequence[str] | None) -> dict[str, str]:
        """Beginnings of the names that start new whatever the file holds, each with the reason: see `reset_heads`."""
        if self.settings.reset_heads is True:
            return dict.fromkeys(self.downstream_heads, "reset_heads=True")
        if self.settings.test_only or self.settings.reset_heads is False:
            return {}
        return other_classes(loaded, self.tasks, self.state_dict(), label_names)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gives what the optimizer updates, and how: see `optimizer.parameter_groups`."""
        s = self.settings
        heads = self.downstream_heads
        trained, depth = self.trained_parameters(), self.transformer.depth
        return optim.parameter_groups(trained, s.learning_rate, s.weight_decay, s.lr_mult, heads, s.layer_decay, depth)

    def configure_optimizers(self) -> Any:
        s = self.settings
        groups = self.parameter_groups()
        if s.strategy.startswith("deepspeed") or s.use_sharded_training:
            groups = [group for group in groups if group["params"]]  # (it drops the others, and then lacks them)
        optimizer = optim.build_optimizer(s.optim_type, groups, s.learning_rate, s.adamw_betas)
        total = s.max_steps or int(self.trainer.estimated_stepping_batches)
        warmup = optim.warmup_length(s.warmup_steps, total)
        schedule = optim.build_schedule(optimizer, total, warmup, s.decay_power, s.end_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's hook after each optimizer step: one that was skipped does not count in the schedule."""
        if not self.step_is_skipped:
            scheduler.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: adds what travels with the weights, as plain values."""
        checkpoint[METADATA_KEY] = metadata_of(self).to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook on resuming: a run goes on with the names that it began with.

        Raises:
            VLMoError: if the data's answers or the tokenizer's vocabulary are others than the file's.
        """
        self.answers, self.vocabulary = resumed_names(checkpoint, self.answers, self.vocabulary)
