"""VLMo: owns the weights, encodes text, images and pairs, and runs the objectives that are on.

The step, for a reader: batch -> `training_step` -> `forward` -> each objective's `compute` (which calls the encoders of
`encoders.py`, then its head and loss) -> metrics and logs. Pairs of all objectives go through the model in one pass.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlmo.checkpoints.files import Checkpoint
from vlmo.distributed.collectives import single_process, world_size
from vlmo.modules.block import Modality
from vlmo.modules.embeddings import TextEmbeddings
from vlmo.modules.encoders import Batch, Encoders
from vlmo.modules.heads import ITMHead, MLMHead, Pooler, init_head
from vlmo.modules.masks import AttentionMasks
from vlmo.modules.multiway_transformer import ARCHITECTURES, build_transformer
from vlmo.modules.positions import num_table_rows
from vlmo.settings import Settings
from vlmo.tasks import ObjectiveOutput, get_objectives, num_samples, objective_names
from vlmo.tasks.base import compute_all, empty_batch
from vlmo.tasks.mlm import locate_masked_words
from vlmo.training import optimizer as optim
from vlmo.training.contrast_cache import ContrastCache
from vlmo.training.metrics import Metrics
from vlmo.training.unused_parameters import unused_parameters

# What stage 2 trains, by substring of the name; the shared attention and the vision experts keep what stage 1 learnt
# (paper: section 3.3).
STAGE2_TRAINS = (
    "text_embeddings",
    "token_type_embeddings",
    "mlp_text",
    "norm2_text",
    "mlm_score",
    "relative_position_bias_table",
    "transformer.norm",
)
# of a batch, (B, T)
TEXT_FIELDS = ("text_ids", "text_masks", "text_labels", "text_ids_mlm", "text_labels_mlm")


class VLMo(Encoders):
    """The model of a config, with `load_path` loaded and the stage's freezing applied.

    Args:
        config: a resolved config (`vlmo.config.resolve`).
        loaded: the file at `load_path`, where it has been read already.

    Raises:
        VLMoError: for a config that cannot work, and for a file that does not fit.
    """

    # heads, present as the objectives that are on declare them
    mlm_score: MLMHead
    itm_score: ITMHead
    logit_scale: nn.Parameter
    logit_vl_scale: nn.Parameter
    vqa_classifier: nn.Sequential
    nlvr2_classifier: nn.Sequential
    mim_score: nn.Linear

    def __init__(self, config: dict[str, Any], loaded: Checkpoint | None = None) -> None:
        super().__init__()
        settings = Settings.from_config(config, {"architectures": ARCHITECTURES, "losses": objective_names()})
        self.settings = settings
        self.save_hyperparameters({"config": settings.model_dump(mode="json")})
        self.objectives = get_objectives(settings.active)
        self.retrieval_recall: float | None = None  # mean recall of the last retrieval evaluation, if one runs
        self.validated_at = -1  # step of the last validation
        self.steps_together = False  # whether a process must take part in every step of an evaluation too

        self.transformer = build_transformer(
            settings.model_arch,
            experts=_experts(settings),
            img_size=settings.image_size,
            drop_path_rate=settings.drop_path_rate,
            activation_checkpointing=settings.activation_checkpointing,
        )
        dim = self.transformer.embed_dim
        if "mim" not in settings.active:
            self._add_text_and_pairs(settings, dim)
        relative = self.transformer.relative_positions
        rows = num_table_rows(self.transformer.window, settings.max_text_len_of_initckpt)
        columns = self.transformer.depth * self.transformer.num_heads  # block by block
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, columns)) if relative else None
        self.attention_masks = AttentionMasks(
            self.transformer.window,
            settings.max_text_len,
            settings.max_text_len_of_initckpt,
            self.transformer.depth,
            relative,
        )
        self._add_heads(settings, dim)

        if settings.load_path:
            required = [head for o in self.objectives for head in o.evaluation_heads] if settings.test_only else []
            if settings.get_recall_rerank_metric and (settings.test_only or "itm" not in settings.active):
                required.append("itm_score")  # nothing else gives it a meaning
            self.load_weights(loaded or settings.load_path, required)
        if "textmlm" in settings.active:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(any(part in name for part in STAGE2_TRAINS))

        self.contrast_cache = ContrastCache(self, settings.per_gpu_batchsize) if settings.contrast_cache else None
        self.measures = Metrics(self.objectives)

    def _add_text_and_pairs(self, settings: Settings, dim: int) -> None:
        """What stage 1 has no use for: so its files hold what BEiT's hold, whatever the tokenizer later is."""
        self.text_embeddings = TextEmbeddings(
            settings.vocab_size,
            dim,
            settings.max_text_len,
            absolute_positions=not self.transformer.relative_positions,
            dropout=settings.drop_path_rate,
        )
        # 0 text, 1 image, 2 second image of NLVR2
        self.token_type_embeddings = nn.Embedding(3 if "nlvr2" in settings.active else 2, dim)
        self.pooler = Pooler(dim)
        for part in (self.text_embeddings, self.token_type_embeddings, self.pooler):
            init_head(part)

    def _add_heads(self, settings: Settings, dim: int) -> None:
        for objective in self.objectives:
            for name, head in objective.heads(dim, settings).items():
                if not hasattr(self, name):  # objectives share heads by name
                    if isinstance(head, nn.Module):
                        init_head(head)
                    setattr(self, name, head)
        if settings.get_recall_rerank_metric and not hasattr(self, "itm_score"):
            self.itm_score = ITMHead(dim)  # no objective trains it: it comes with the file
            init_head(self.itm_score)

    # --- steps -------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds where the masked words are, while counting them needs no wait for the device.

        On a CPU it also cuts what pads texts to a multiple of 8, which helps GPUs alone.
        """
        if "text_masks" not in batch:
            return batch
        batch = dict(batch)
        if self.device.type == "cpu":
            longest = int(batch["text_masks"].sum(dim=1).max())
            batch |= {name: batch[name][:, :longest] for name in TEXT_FIELDS if name in batch}
        if {"mlm", "textmlm"} & set(self.settings.active) and not self.contrast_cache:  # (which cuts the batch up)
            batch |= locate_masked_words(batch["text_labels_mlm"])
        return batch

    def forward(self, batch: Batch) -> dict[str, ObjectiveOutput]:
        """All objectives that are on, by name; their losses are weighted by `loss_names`."""
        with self.attention_masks.one_step():
            outputs = compute_all(self.objectives, self, batch, {})
        for name, output in outputs.items():
            output.loss = output.loss * self.settings.loss_names[name]
        return outputs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The weighted sum of the losses; with `contrast_cache` the contrast's alone, the others are for `backward`."""
        outputs = self._step(batch, "train")
        return (
            sum((output.loss for output in outputs.values()), torch.zeros((), device=self.device)) if outputs else None
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures; the numbers are logged at the end of the epoch."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, ObjectiveOutput]:
        """Measures, and hands the outputs to the callbacks that write predictions."""
        return self._step(batch, "test")

    def _step(self, batch: Batch, phase: str) -> dict[str, ObjectiveOutput]:
        if not num_samples(batch):  # every sample of the batch was skipped as unreadable
            if world_size() == 1 or not (phase == "train" or self.steps_together):
                return {}
            batch = empty_batch(self.settings.image_size, self.transformer.cls_token)
        if phase == "train" and self.contrast_cache:
            outputs = self.contrast_cache.first_pass(batch)
        else:
            with nullcontext() if phase == "train" else single_process():
                outputs = self(batch)
        size = num_samples(batch)
        if size:  # (a process without samples only takes part in the exchanges)
            self.measures.update(phase, outputs)
        for name, output in outputs.items() if phase == "train" and size else ():
            for key, value in output.scalars.items():
                self.log(f"{name}/train/{key}", value, batch_size=size)
        return outputs

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: with `contrast_cache` the second pass over the batch."""
        if not self.contrast_cache:
            return super().backward(loss, *args, **kwargs)
        self.contrast_cache.second_pass(loss, lambda outputs: self.measures.update("train", outputs))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's hook: with `contrast_cache` a training batch stays where it is, its chunks are moved in turn."""
        if self.contrast_cache and self.trainer.training:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_train_start(self) -> None:
        """With `contrast_cache` the gradients of all chunks are exchanged together: DDP must not do it at each."""
        if self.contrast_cache and isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs what the step measured: over all its passes, on all processes."""
        self.log_dict(self.measures.compute_step())

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")
        self.validated_at = self.global_step

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _log_epoch(self, phase: str) -> None:
        """Logs every metric that was updated as `{objective}/{phase}/{key}_epoch`, and `{phase}/the_metric`."""
        values = self.measures.compute_epoch(phase)
        for (name, key), value in values.items():
            tag = f"{name}/{key}" if "/" in key else f"{name}/{phase}/{key}"
            self.log(f"{tag}_epoch", value)
            if phase != "train":
                self.log(tag, value)
        heads = [[values[o.name, key] for key in o.primary_metrics if (o.name, key) in values] for o in self.objectives]
        scores = [float(torch.stack(found).mean()) for found in heads if found]
        if phase != "train" and self.retrieval_recall is not None:
            scores.append(self.retrieval_recall)
        if scores:  # questions of VQA's test set have no answers
            self.log(f"{phase}/the_metric", sum(scores))

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and values of what the optimizer updates: neither frozen nor out of every objective's reach."""
        never = unused_parameters(self)
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad and name not in never]

    def configure_optimizers(self) -> Any:
        s = self.settings
        groups = optim.parameter_groups(self.trained_parameters(), s.learning_rate, s.weight_decay, s.lr_mult)
        if s.strategy.startswith("deepspeed") or s.use_sharded_training:
            groups = [group for group in groups if group["params"]]  # (it drops the others, and then lacks them)
        optimizer = optim.build_optimizer(s.optim_type, groups, s.learning_rate, s.adamw_betas)
        total = s.max_steps or int(self.trainer.estimated_stepping_batches)
        warmup = optim.warmup_length(s.warmup_steps, total)
        schedule = optim.build_schedule(optimizer, total, warmup, s.decay_power, s.end_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _experts(settings: Settings) -> tuple[Modality, ...]:
    """Beside the vision expert, those that the losses reach."""
    if "mim" in settings.active or settings.shared_ffn:
        return ()
    return ("text",) if "textmlm" in settings.active else ("text", "vl")
