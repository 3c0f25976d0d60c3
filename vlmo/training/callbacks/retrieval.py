"""Retrieval recall on the val and test splits, at each validation and in a test run."""

import logging
from functools import partial

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.distributed.collectives import rank
from vlmo.evaluation.reranking import reranked
from vlmo.evaluation.retrieval import best_ranks, encode, recalls
from vlmo.modules import VLMo

log = logging.getLogger(__name__)


class RetrievalEvaluation(Callback):
    """Logs `recalls/{ir,tr}_r{1,5,10}` (test), `recalls/val_*`, and their means; the val mean enters the_metric.

    With re-ranking also `recalls/rerank_*` and `recalls/val_rerank_*`.
    """

    def __init__(self, rerank: int = 0) -> None:
        """rerank: number of candidates of each query that ITM orders anew; 0 for none."""
        self.rerank = rerank

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for split, prefix in (("val", "recalls/val_"), ("test", "recalls/")):
            assert isinstance(pl_module, VLMo)
            data = trainer.datamodule  # type: ignore[attr-defined]
            image_loader, text_loader = data.retrieval_loaders(split)
            if not len(text_loader.dataset):  # (of all processes: whether to go on is decided alike in each)
                continue
            autocast = trainer.precision_plugin.forward_context
            images = encode(pl_module, image_loader, "image", autocast)
            texts = encode(pl_module, text_loader, "text", autocast)
            ranks = best_ranks(texts, images), best_ranks(images, texts)
            found = recalls(*ranks)
            mean = sum(found.values()) / len(found)
            if self.rerank:
                if rank() == 0:
                    log.warning(f"{split}: matching the first {self.rerank} candidates of each query takes a while")
                pairs = partial(data.pair_loader, split)
                again = reranked(pl_module, images, texts, ranks, self.rerank, pairs, autocast)
                found |= {f"rerank_{name}": value for name, value in recalls(*again).items()}
            pl_module.log_dict({f"{prefix}{name}": value for name, value in found.items()})
            pl_module.log(f"recalls/{split}_avg", mean)
            if split == "val":
                pl_module.retrieval_recall = mean
