"""What frozen features of images know of labelled ones, measured while a model is trained."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from vlmo.distributed.collectives import all_gather_rows, rank, world_size
from vlmo.distributed.wire_format import from_bytes
from vlmo.errors import VLMoError
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.pictures import Picture
from vlmo.evaluation.suites.probes import block_features, nearest_neighbours, read_labelled, standardise
from vlmo.modules import VLMo
from vlmo.settings import Settings

log = logging.getLogger(__name__)

SHARE = 0.01  # images, of the samples that are trained on between two validations
FEWEST, MOST = 100, 2000  # of an image, a sample's size as bytes is kept in memory: 150 KB at 224 px


def samples_between(settings: Settings, epoch_samples: int) -> int:
    """How many samples are trained on between two validations."""
    interval = settings.val_check_interval
    return int(interval * epoch_samples) if isinstance(interval, float) else interval * settings.joint_batch


def spaced(number: int, count: int) -> list[int]:
    """Gives `count` of `number` places, evenly spaced."""
    return [place * number // count for place in range(count)]


class NearestNeighbours(Callback):
    """Logs `knn/accuracy` at each validation: that of the suite `knn`, of the last block's vision expert.

    An image is encoded once, without a backward pass, so that it costs less than a sample of training. There are at
    most 1 % as many as samples between two validations, whatever the clock says: a run that goes on from a checkpoint
    measures the same. `knn/share_of_time` is the part of the training's time so far that this took.
    """

    def __init__(self, settings: Settings, epoch_samples: int, validates: bool = True) -> None:
        """
        Args:
            validates: whether there are data to validate on.

        Raises:
            VLMoError: if there are no labelled images, too few of them may be used, or nothing will be validated.
        """
        if not validates:
            raise VLMoError("knn_data: is measured at validations, and the data have none to validate on")
        folder = Path(settings.knn_data)
        train, test = (read_labelled(folder, split, hashed=False) for split in ("train", "test"))
        there = len(train.pictures) + len(test.pictures)
        between = samples_between(settings, epoch_samples)
        allowed = min(int(SHARE * between), MOST, there)
        if allowed < min(FEWEST, there):
            raise VLMoError(
                f"knn_data={settings.knn_data}: 1 % of the {between:,} samples between two validations are {allowed} "
                f"images, too few to tell anything; validate less often (val_check_interval), every {FEWEST * 100:,} "
                "samples or more"
            )
        tests = max(round(allowed * len(test.pictures) / there), 1)
        self.pictures: list[Picture] = []
        self.labels: list[int] = []
        for data, count in ((train, max(allowed - tests, 1)), (test, tests)):
            places = spaced(len(data.pictures), count)
            self.pictures += [data.pictures[place] for place in places]
            self.labels += [data.labels[place] for place in places]
        self.first_test, self.classes = len(self.pictures) - tests, len(train.names)
        self.decoding = settings.image_decoding
        self.pixels, self.numbers = torch.empty(0), torch.empty(0)  # of this process
        self._began = self._taken = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Decodes the images, each process its part."""
        self._began = began = time.monotonic()
        numbers = torch.arange(rank(), len(self.pictures), world_size())
        scorer = Scorer(pl_module, None, decoding=self.decoding)
        self.pixels, known = scorer.read([self.pictures[number] for number in numbers.tolist()])
        if not known.all():
            log.warning(f"knn_data: {int((~known).sum())} images cannot be decoded; continuing without them")
        self.pixels, self.numbers = self.pixels[known], numbers[known]
        self._taken = time.monotonic() - began

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VLMo)
        if not self._began:  # (a validation without training)
            return
        began = time.monotonic()
        features = self._features(trainer, pl_module)
        number = all_gather_rows(self.numbers.to(pl_module.device)[:, None])[:, 0]
        order = number.argsort()
        number, features = number[order].cpu(), features[order].cpu()
        test = number >= self.first_test
        labels = torch.tensor(self.labels)[number]
        known, asked = standardise(features[~test], features[test])
        chosen = nearest_neighbours(known, labels[~test], asked, self.classes)
        self._taken += time.monotonic() - began
        share = self._taken / max(time.monotonic() - self._began, 1e-9)
        accuracy = float((chosen == labels[test]).double().mean())
        pl_module.log_dict({"knn/accuracy": accuracy, "knn/share_of_time": share})

    def _features(self, trainer: Trainer, model: VLMo) -> Tensor:
        """(N, D) of all processes' images."""
        last = model.transformer.depth - 1
        found = [torch.empty(0, model.transformer.embed_dim, device=model.device)]
        for batch in self.pixels.split(model.settings.per_gpu_batchsize):
            with trainer.precision_plugin.forward_context():
                features = block_features(model, from_bytes(batch.to(model.device)), (last,))
            found.append(features[f"block {last}, image expert"].float())
        return all_gather_rows(torch.cat(found))
