"""`python -m vlmo.doctor learn with ...`: can each loss of a run be driven to zero on one batch?

A model that cannot learn a few samples by heart will learn nothing of many: then something in data, targets, learning
rate or weights is wrong, and it is known after two minutes.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vlmo.checkpoints.loading import read
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets.base_dataset import Skipped
from vlmo.distributed.wire_format import with_pixels
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.tasks.base import num_samples
from vlmo.training.learning.data_checks import Finding, data_findings
from vlmo.training.learning.seen import Seen
from vlmo.training.optimizer import build_optimizer
from vlmo.training.preparation import resolve_label_names

LOOK = 0.25  # share of the time that the first samples are looked at for
NEAR_ZERO, FALLS = 0.05, 0.7  # of the loss at chance
WARMUP = 10  # steps
TRIES = 50  # samples drawn for each one that is wanted


@dataclass
class LossCurve:
    """A loss on the one batch, weighted as it is logged.

    Attributes:
        chance: that of a model that knows nothing of the inputs; where that is unknown, the first.
    """

    name: str
    chance: float | None
    values: list[float] = field(default_factory=list)

    @property
    def reference(self) -> float:
        return self.chance or self.values[0]

    @property
    def last(self) -> float:
        """The mean of the last steps: matching draws other negatives in each."""
        return float(np.mean(self.values[-5:]))

    @property
    def verdict(self) -> str:
        """ "zero", "falls" or "stuck" """
        share = self.last / self.reference
        return "zero" if share < NEAR_ZERO else "falls" if share < FALLS else "stuck"

    def __str__(self) -> str:
        said = {"zero": "can be driven to zero", "falls": "falls, not to zero in this time", "stuck": "STUCK"}
        chance = "" if self.chance is None else f" (chance {self.chance:.3f})"
        return (
            f"{self.name:<8} {said[self.verdict]}: {self.values[0]:.3f} at first, {self.last:.4f} after "
            f"{len(self.values):,} steps{chance}"
        )


def one_device(settings: Settings, samples: int) -> Settings:
    """The settings of a run with one process, batches of so many samples, and nothing drawn that can be left away."""
    on_gpu = settings.num_gpus != 0 and settings.accelerator != "cpu" and torch.cuda.is_available()
    small = {"num_gpus": int(on_gpu), "num_nodes": 1, "strategy": "auto", "use_sharded_training": False}
    small |= {"batch_size": samples, "per_gpu_batchsize": samples, "num_workers": 0, "drop_path_rate": 0.0}
    small |= {"contrast_cache": False, "layout_invariant": False, "dataset_weights": {}, "compile": False}
    return settings.model_copy(update=small)


def look_at_data(datamodule: MTDataModule, vocabulary: list[str] | None, seconds: float) -> list[Finding]:
    """Judges the first samples that training would see, as many as can be read in so many seconds."""
    seen, end = Seen(), time.monotonic() + seconds
    for batch in datamodule.train_dataloader():
        seen.add(batch, num_samples(batch))
        if seen.complete or time.monotonic() > end:
            break
    seen.fetch()
    related = any(task.provides == "contrast" for task in datamodule.tasks)
    return list(data_findings(seen, vocabulary, datamodule.epoch_samples, related))


def one_batch(datamodule: MTDataModule, samples: int) -> Any:
    """Makes a batch of training samples of different images and texts, which a contrast can tell apart.

    Raises:
        VLMoError: if there are not two of the kind.
    """
    dataset, settings = datamodule.train_dataset, datamodule.settings
    order = np.random.default_rng(settings.seed).permutation(len(dataset))[: samples * TRIES]
    kept: list[Any] = []
    known: set[Any] = set()
    for index in order.tolist():
        sample = dataset[(index, settings.seed)]
        if isinstance(sample, Skipped):
            continue
        marks = {("image", sample.get("img_index")), ("text", tuple(sample.get("text_ids", (index,))))}
        if known.isdisjoint(marks):
            known |= marks
            kept.append(sample)
        if len(kept) == samples:
            break
    if len(kept) < 2:
        raise VLMoError(
            f"of the first {len(order):,} training samples no two have different images and texts: nothing can be "
            "learnt from them; look at the tables"
        )
    return datamodule.train_dataloader().collate_fn(kept)


def overfit(settings: Settings, model: VLMo, batch: Any, seconds: float, rate: float) -> list[LossCurve]:
    """Trains on one batch until every loss is near zero, or the time is over.

    Args:
        rate: learning rate, after a warm-up of WARMUP steps.
    """
    device = torch.device("cuda" if settings.num_gpus else "cpu")
    curves = {task.name: LossCurve(task.name, task.chance([batch]).get("loss")) for task in model.tasks}
    model.to(device).train()
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    batch = with_pixels(moved)
    optimizer = build_optimizer(settings.optim_type, model.parameter_groups(), rate, settings.adamw_betas)
    rates = [group["lr"] * rate / settings.learning_rate for group in optimizer.param_groups]
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        step += 1
        for group, highest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = highest * min(step / WARMUP, 1)
        outputs = model(batch)
        optimizer.zero_grad()
        sum((output.loss for output in outputs.values()), torch.zeros((), device=device)).backward()
        optimizer.step()
        for name, output in outputs.items():
            curves[name].values.append(float(output.loss.detach()) / settings.loss_names[name])
        measured = [curve for curve in curves.values() if curve.values]
        if step > WARMUP and all(curve.last < NEAR_ZERO * curve.reference / 2 for curve in measured):
            break
    return [curve for curve in curves.values() if curve.values]


def report(settings: Settings, seconds: float = 120.0, samples: int = 16, learning_rate: float | None = None) -> int:
    """Looks at the data, overfits, and prints what came of both; gives the exit status, 0 if nothing is wrong.

    Raises:
        VLMoError: for files that cannot be used.
    """
    end = time.monotonic() + seconds
    settings = one_device(settings, samples)
    datamodule = MTDataModule(settings)
    datamodule.setup("fit")
    loaded = read(settings.load_path) if settings.load_path else None
    names, vocabulary = resolve_label_names(settings, datamodule, loaded.metadata if loaded else None)
    findings = look_at_data(datamodule, vocabulary, LOOK * seconds)
    for code, sentence in findings:
        print(f"data     {code}: {sentence}")
    if not findings:
        print("data     nothing wrong with the first samples")
    torch.manual_seed(settings.seed)
    model = VLMo(settings, loaded, label_names=names, vocabulary=vocabulary)
    batch = one_batch(datamodule, samples)
    rate = learning_rate or settings.learning_rate
    print(f"batch    {num_samples(batch)} samples, learning rate {rate:g}", flush=True)
    curves = overfit(settings, model, batch, end - time.monotonic(), rate)
    for curve in curves:
        print(curve)
    trouble = diagnosis(curves)
    if trouble is None and not findings:
        print("one batch can be learnt: data, targets, weights and learning rate work together")
        return 0
    print(trouble or "one batch can be learnt; the data have the problems above")
    return 2


def diagnosis(curves: list[LossCurve]) -> str | None:
    """Says what is wrong, and what to do; None: nothing is."""
    if not curves:
        return "no step was possible in this time: give more with --seconds"
    if any(not np.isfinite(curve.last) or curve.last > 2 * curve.values[0] for curve in curves):
        return "a loss rises: the learning rate is too high; divide it by 10 (--rate tries another)"
    stuck = [curve.name for curve in curves if curve.verdict == "stuck"]
    if not stuck:
        return None
    steps = len(curves[0].values)
    few = f" ({steps} steps are few: give more with --seconds)" if steps < 100 else ""
    return (
        f"{', '.join(stuck)}: not even one batch can be learnt{few}; try another learning rate (--rate), and look "
        "whether targets belong to inputs and whether weights are frozen"
    )
