"""Where Lightning's loops stand, in Lightning's own terms: the only code here that knows its private state.

That is `checkpoint["loops"]`, and `_batches_that_stepped`, `_should_check_val_fx` and `_data_fetcher` of its loops.
`tests/unit/training/test_loop_state.py` compares each with a real run, and so names what a new Lightning has changed.
"""

from typing import Any

from pytorch_lightning import Trainer

COUNTERS = ("ready", "started", "processed", "completed")


def set_loops(
    checkpoint: dict[str, Any], epoch: int, batches: int, total: int, is_last_batch: bool, validated: bool
) -> None:
    """Makes the state of the loops one of the two that Lightning goes on from exactly.

    Those are: between two batches, validated or with the validation to come. (What Lightning saves from its hooks tells
    one place from another by counters; some it takes for an epoch more, or for a validation that was made.)

    Args:
        checkpoint: Lightning's, changed in place.
        epoch: its number.
        batches, total: finished by each process, in this epoch and in all.
        is_last_batch: whether the epoch has no more.
        validated: whether no validation is to come before the next batch.
    """
    loops = checkpoint["loops"]["fit_loop"]
    in_epoch = dict(zip(COUNTERS, (epoch + 1, epoch + 1, epoch, epoch), strict=True))
    loops["epoch_progress"] = {"total": in_epoch, "current": dict(in_epoch)}
    loops["epoch_loop.batch_progress"] = {
        "total": dict.fromkeys(COUNTERS, total),
        "current": dict.fromkeys(COUNTERS, batches),
        "is_last_batch": is_last_batch,
    }
    begun = dict.fromkeys(COUNTERS, 0) | ({} if validated else {"ready": 1, "started": 1})
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": begun,
        "current": dict.fromkeys(COUNTERS, 0),
        "is_last_batch": False,
    }


def set_logged_step(trainer: Trainer) -> None:
    """Sets the step that loggers count from; Lightning adds one after a validation, made or not."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    loop._batches_that_stepped = trainer.global_step - loop._should_check_val_fx(fetcher)
