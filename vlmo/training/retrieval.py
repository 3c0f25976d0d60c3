"""Retrieval recall on the val and test splits, at each validation and in a test run."""

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.evaluation.retrieval import encode, recalls
from vlmo.modules import VLMo


class RetrievalEvaluation(Callback):
    """Logs `recalls/{ir,tr}_r{1,5,10}` (test), `recalls/val_*`, and their means; the val mean enters the_metric."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for split, prefix in (("val", "recalls/val_"), ("test", "recalls/")):
            assert isinstance(pl_module, VLMo)
            image_loader, text_loader = trainer.datamodule.retrieval_loaders(split)  # type: ignore[attr-defined]
            if not len(text_loader.dataset):  # (of all processes: whether to go on is decided alike in each)
                continue
            autocast = trainer.precision_plugin.forward_context
            images, image_owner = encode(pl_module, image_loader, "image", autocast)
            texts, text_owner = encode(pl_module, text_loader, "text", autocast)
            found = recalls(images, image_owner, texts, text_owner)
            mean = sum(found.values()) / len(found)
            pl_module.log_dict({f"{prefix}{name}": value for name, value in found.items()})
            pl_module.log(f"recalls/{split}_avg", mean)
            if split == "val":
                pl_module.retrieval_recall = mean
