"""Going on from a checkpoint as if nothing had happened, also in the middle of an epoch.

Why not torchdata's StatefulDataLoader: here the samples of a batch follow from (seed, epoch, place in the order) alone,
so the place is one number, which the trainer knows exactly: the batches that it has *trained* on, whatever the workers
have made ahead. The stateful loader keeps a state for each worker besides, and refuses another number of them.

A checkpoint may be written at any batch, but it stands for the last optimizer step: what was accumulated since is not
in it and is computed again. So is a validation that was cut short.
"""

import logging
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.distributed.collectives import gather_objects, rank, world_size
from vlmo.errors import VLMoError
from vlmo.metrics import Mean
from vlmo.modules import VLMo
from vlmo.settings import Settings

log = logging.getLogger(__name__)

KEY = "vlmo_resume"  # in Lightning's checkpoints


class Resume(Callback):
    """Keeps what a checkpoint needs besides Lightning's own, and puts it back.

    Attributes:
        epoch: number of the current one.
        batches: passes of each process in this epoch that training has finished.
        place: (epoch, batches, whether they have been validated) that a checkpoint written now would go on from.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.epoch = self.batches = 0
        self._total = 0  # finished passes, over all epochs
        self._validated = True  # there is nothing to validate before the first batch
        # the state at the last optimizer step, while passes are being accumulated since; else that of the moment
        self._held: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def place(self) -> tuple[int, int, bool]:
        if self._held:
            return self._held["epoch"], self._held["batches"], self._held["validated"]
        return self.epoch, self.batches, self._validated

    # --- following the run -------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.epoch, self.batches, self._validated = trainer.current_epoch, batch_idx, True
        if trainer.accumulate_grad_batches == 1:
            self._held = None
        elif batch_idx % trainer.accumulate_grad_batches == 0:
            self._held = self._state(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches, self._validated = batch_idx + 1, False
        self._total += 1
        if self.batches % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._held = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not self._held:
            self._held = self._state(trainer, pl_module)  # validation draws random numbers

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True
        if self._held and self._held["batches"] == self.batches:
            self._held = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before the module logs and forgets the epoch's numbers: training may end here, in the middle of an epoch
        self._held = self._held or self._state(trainer, pl_module)

    def _state(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What this process would have to know to be as it is now."""
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "total": self._total,
            "validated": self._validated,
            "random": random_states(),
            "metrics": {name: (metric.sums(), metric.update_count) for name, metric in _metrics(pl_module).items()},
        }

    # --- writing -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = dict(self._held or self._state(trainer, pl_module))
        own = {"random": state.pop("random")}
        own["metrics"] = {name: (sums.cpu(), updates) for name, (sums, updates) in state.pop("metrics").items()}
        state["step"] = trainer.global_step
        checkpoint[KEY] = state | self._layout(trainer) | {"processes": gather_objects([own])}

    def _layout(self, trainer: Trainer) -> dict[str, int | bool]:
        """How samples are dealt out: with the same, a run goes on bit for bit."""
        return {
            "world": world_size(),
            "batch": self.settings.training_batch,
            "accumulation": trainer.accumulate_grad_batches,
            "samples": len(_dataset(trainer)),
            "seed": self.settings.seed,
            "grouped": self.settings.group_by_length,
        }

    # --- going on ----------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before Lightning reads its own state: makes that one of the two that it goes on from exactly.

        Those are: between two batches, validated or with the validation to come. (What it saves from its hooks tells
        one place from another by counters; some it takes for an epoch more, or for a validation that was made.)
        """
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get(KEY)
        if saved is None:
            raise VLMoError("the checkpoint to resume from is of an older version; start from it with load_path=FILE")
        self._loaded = saved
        epoch, batches, total = self._place_here(saved, trainer)
        counters = ("ready", "started", "processed", "completed")
        loops = checkpoint["loops"]["fit_loop"]
        in_epoch = dict(zip(counters, (epoch + 1, epoch + 1, epoch, epoch), strict=True))
        loops["epoch_progress"] = {"total": in_epoch, "current": dict(in_epoch)}
        loops["epoch_loop.batch_progress"] = {
            "total": dict.fromkeys(counters, total),
            "current": dict.fromkeys(counters, batches),
            "is_last_batch": batches >= self._epoch_length(trainer),
        }
        begun = dict.fromkeys(counters, 0) | ({} if saved["validated"] else {"ready": 1, "started": 1})
        loops["epoch_loop.val_loop.batch_progress"] = {
            "total": begun,
            "current": dict.fromkeys(counters, 0),
            "is_last_batch": False,
        }
        self.epoch, self.batches, self._total, self._validated = epoch, batches, total, saved["validated"]

    def _epoch_length(self, trainer: Trainer) -> int:
        """Batches of each process in a whole epoch."""
        share = len(_dataset(trainer)) // world_size()
        return max(share // self.settings.training_batch, 1)

    def _place_here(self, saved: dict[str, Any], trainer: Trainer) -> tuple[int, int, int]:
        """Epoch, batches in it and in all, as this run counts them; tells the data module where to go on."""
        layout = self._layout(trainer)
        epoch, length = saved["epoch"], self._epoch_length(trainer)
        assert isinstance(trainer.datamodule, MTDataModule)  # type: ignore[attr-defined]
        if changed := [name for name in ("samples", "seed", "grouped") if layout[name] != saved[name]]:
            if rank() == 0:
                what = ", ".join(f"{name} {layout[name]} for {saved[name]}" for name in changed)
                log.warning(f"resumed with training data in another order ({what}): epoch {epoch} begins anew")
            trainer.datamodule.resumed_at = (epoch, 0, 1, 1)  # type: ignore[attr-defined]
            return epoch, 0, epoch * length
        seen = min(saved["batches"] * saved["batch"] * saved["world"], layout["samples"])
        trainer.datamodule.resumed_at = (epoch, seen, saved["world"], saved["batch"])  # type: ignore[attr-defined]
        if layout.items() <= saved.items():
            return epoch, saved["batches"], saved["total"]
        if rank() == 0:
            then, now = (f"{x['world']} x {x['batch']} x {x['accumulation']}" for x in (saved, layout))
            log.warning(
                f"resumed with another split of the batch ({now} for {then} processes x samples x passes): each sample "
                "of the epoch is still seen once, but the numbers are not bit for bit those of an uninterrupted run"
            )
        left = (layout["samples"] - seen) // world_size() // self.settings.training_batch
        return epoch, length - left, epoch * length + length - left

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After everything that draws random numbers to begin with."""
        if self._loaded is None:
            return
        processes, exact = self._loaded["processes"], self._layout(trainer).items() <= self._loaded.items()
        if exact:
            set_random_states(processes[rank()]["random"])
        else:
            torch.manual_seed(
                int(np.random.SeedSequence([self.settings.seed, trainer.global_step, rank()]).generate_state(1)[0])
            )
        for name, metric in _metrics(pl_module).items():
            own = [processes[rank()]] if exact else processes if rank() == 0 else []
            found = [process["metrics"][name] for process in own if name in process["metrics"]]
            if found:
                metric.restore(sum(sums for sums, _ in found), sum(updates for _, updates in found))
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        # the steps that loggers count; Lightning adds one after a validation, made or not
        loop._batches_that_stepped = trainer.global_step - loop._should_check_val_fx(fetcher)
        if rank() == 0:
            log.info(f"resumed at step {trainer.global_step}, epoch {self.epoch}, batch {self.batches} of each process")
        self._loaded = None


def _metrics(pl_module: LightningModule) -> dict[str, Mean]:
    """Those of the epoch; the others are empty whenever a checkpoint is written."""
    assert isinstance(pl_module, VLMo)
    metrics = cast(Mapping[str, Mean], pl_module.measures.metrics)
    return {name: metric for name, metric in metrics.items() if name.startswith("train/")}


def _dataset(trainer: Trainer) -> Any:
    return trainer.datamodule.train_dataset  # type: ignore[attr-defined]


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and this process's GPU, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": (version, torch.tensor(numbers), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` gave; a GPU's is left out where there is none."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
