"""How long a run is: batches of an epoch, optimizer steps, epochs; and whether its schedule fits into it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vlmo.settings import Settings
from vlmo.training.optimizer import warmup_length


@dataclass(frozen=True)
class RunLength:
    """The length of a run on some number of training samples.

    Attributes:
        epoch_batches: batches of each process in an epoch; the last incomplete one is left out.
        epoch_steps: optimizer steps of an epoch. The last one takes what batches there are, so that with accumulation
            it may be made of fewer passes.
        steps: optimizer steps of the run: `max_steps`, else those of `max_epoch` epochs.
    """

    settings: Settings
    epoch_batches: int
    epoch_steps: int
    steps: int

    @classmethod
    def of(cls, settings: Settings, samples: int) -> "RunLength":
        """Computes it from the number of training samples."""
        s = settings
        batches = max(samples // s.joint_batch, 1)
        epoch_steps = math.ceil(batches / s.accumulated_batches)
        return cls(s, batches, epoch_steps, s.max_steps or epoch_steps * (s.max_epoch or 0))

    @property
    def batches(self) -> int:
        """Batches of each process in the whole run."""
        epochs, steps = divmod(self.steps, self.epoch_steps)
        return epochs * self.epoch_batches + steps * self.settings.accumulated_batches

    def __str__(self) -> str:
        s, epochs = self.settings, self.steps / self.epoch_steps
        line = f"{self.steps:,} steps = {epochs:,.1f} epochs of {self.epoch_steps:,} steps"
        ignored = s.max_steps and s.max_epoch and s.max_epoch < epochs
        return line + (f" (max_epoch={s.max_epoch} is ignored, as max_steps is set)" if ignored else "")

    def warnings(self) -> Iterator[str]:
        """Gives a line for what of the schedule the run does not reach."""
        s = self.settings
        warmup = warmup_length(s.warmup_steps, self.steps)
        if warmup >= self.steps:
            highest = s.learning_rate * self.steps / warmup
            yield (
                f"warmup_steps={s.warmup_steps:g}: the run has {self.steps:,} steps, so that the learning rate reaches "
                f"{highest:.2g} of learning_rate={s.learning_rate:g} and never decays; give fewer (below 1 it is a "
                f"fraction of all steps, such as 0.1), or train longer"
            )
