"""Where the time of a step goes: a trace and a table of torch's profiler, from a few steps of a run."""

import logging
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.training.preparation import run_folder

log = logging.getLogger(__name__)

PASSED_BY = 3  # passes before the profiler looks: the first are slower
ROWS = 40  # of the table


class StepProfile(Callback):
    """Profiles that many forward passes and writes `profile_trace.json.gz` and `profile.txt` to the run's folder.

    The trace opens in https://ui.perfetto.dev. Profiling slows the run down while it lasts.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.profiler: torch.profiler.profile | None = None
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self._folder
        if not trainer.is_global_zero or folder is None:
            return
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=PASSED_BY - 1, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=lambda profiler: _write(profiler, folder),
            profile_memory=True,
        )
        self.profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.profiler:
            self.profiler.step()
            if self.profiler.step_num == PASSED_BY + self.steps:
                self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.profiler:
            log.warning(f"profile_steps={self.steps}: training ended before {PASSED_BY + self.steps} forward passes")
            self._stop()

    def _stop(self) -> None:
        assert self.profiler
        self.profiler.stop()
        self.profiler = None


def _write(profiler: torch.profiler.profile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "profile_trace.json.gz"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
    (folder / "profile.txt").write_text(table + "\n")
    log.info(f"profile written to {folder}")
