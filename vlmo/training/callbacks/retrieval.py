"""Retrieval recall on the val and test splits, at each validation and in a test run."""

import logging
from collections.abc import Iterable
from functools import partial

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from vlmo.distributed.collectives import rank, single_process
from vlmo.evaluation.reranking import RerankBy, reranked
from vlmo.evaluation.retrieval import best_ranks, encode, pair_batches, recalls
from vlmo.modules.vlmo_module import VLMo
from vlmo.tasks.base import BatchSize, Step
from vlmo.tasks.itc import ContrastTask
from vlmo.training.callbacks.skipping import judge_unreadable

log = logging.getLogger(__name__)


class RetrievalEvaluation(Callback):
    """Logs recall at each validation, of val (`recalls/val_*`) and test (`recalls/*`); of test alone in a test run.

    The mean of a split is `recalls/{split}_avg`. With re-ranking also `recalls/rerank_*` and `recalls/val_rerank_*`.
    """

    def __init__(self, rerank: int = 0, rerank_by: RerankBy = "published") -> None:
        """
        Args:
            rerank: number of candidates of each query that ITM re-orders; 0 for none.
            rerank_by: see `reranked`.
        """
        self.rerank, self.rerank_by = rerank, rerank_by

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for split in ("val", "test"):
            self._evaluate(trainer, pl_module, split, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module, "test", "test")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, split: str, phase: str) -> None:
        assert isinstance(pl_module, VLMo)
        data = trainer.datamodule  # type: ignore[attr-defined]
        image_loader, text_loader = data.retrieval_loaders(split)
        if not len(text_loader.dataset):  # (of all processes: whether to go on is decided alike in each)
            return
        autocast = trainer.precision_plugin.forward_context
        images = encode(pl_module, image_loader, "image", autocast)
        if images.skipped:
            judge_unreadable(split, images.skipped, len(image_loader.dataset))
        texts = encode(pl_module, text_loader, "text", autocast)
        if split == phase and data.recall_measures_all(split):
            batches = data.eval_batches(len(texts.number), mixed=True)  # as `val_dataloader` has them
            self._measure_contrast(pl_module, pair_batches(images, texts, batches), phase)
        ranks = best_ranks(texts, images), best_ranks(images, texts)
        found = recalls(*ranks)
        mean = sum(found.values()) / len(found)
        if self.rerank:
            if rank() == 0:
                log.warning(f"{split}: matching the first {self.rerank} candidates of each query takes a while")
            pairs = partial(data.pair_loader, split)
            again = reranked(pl_module, images, texts, ranks, self.rerank, pairs, autocast, self.rerank_by)
            found |= {f"rerank_{name}": value for name, value in recalls(*again).items()}
        prefix = "recalls/val_" if split == "val" else "recalls/"
        pl_module.log_dict({f"{prefix}{name}": value for name, value in found.items()})
        pl_module.log(f"recalls/{split}_avg", mean)

    def _measure_contrast(self, model: VLMo, pairs: Iterable[dict[str, Tensor]], phase: str) -> None:
        """Measures the contrast from the features that are there, in the batches that pairs are read in."""
        (task,) = (task for task in model.tasks if isinstance(task, ContrastTask))
        with torch.inference_mode():
            batches = list(pairs)
            with single_process():
                for features in batches:
                    sizes = [BatchSize(len(features["text"]), 0, 0)]
                    output = task.compare(Step({}, model.heads, training=False, sizes=sizes), features)
                    model.metrics.update(phase, {task.name: output})
