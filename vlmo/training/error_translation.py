"""What ends a run from outside - memory, loader processes - told in terms of the settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import torch
from pytorch_lightning import Trainer

from vlmo.errors import VLMoError
from vlmo.settings import Settings


@contextmanager
def explain_failures(settings: Settings, trainer: Trainer) -> Iterator[None]:
    """Makes a failed allocation, and a loader process that died or failed, an error that says what to change.

    Raises:
        VLMoError: in place of torch's.
    """
    try:
        yield
    except VLMoError as error:
        if _raised_in(error)[-1] != "torch._utils":
            raise
        # raised in a loader process: torch raises the same type here, with the traceback of there as its message
        raise VLMoError(str(error).strip().rpartition(f"{VLMoError.__name__}: ")[2]) from error
    except (MemoryError, RuntimeError, OSError, EOFError) as error:  # (torch.OutOfMemoryError is a RuntimeError)
        explanation = _explanation(error, settings, trainer)
        if explanation is None:
            raise
        raise VLMoError(explanation) from error


def _raised_in(error: BaseException) -> list[str]:
    """Modules that an error went through, the one that raised it last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]


def _explanation(error: Exception, settings: Settings, trainer: Trainer) -> str | None:
    if isinstance(error, torch.OutOfMemoryError):
        return _less_memory("the GPU's", settings, trainer)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # (torch's on a CPU has no type)
        return _less_memory("the machine's", settings, trainer)
    if isinstance(error, RuntimeError | OSError) and "Too many open files" in f"{error} {error.__cause__}":
        return (
            f"too many files are open at step {trainer.global_step + 1}: raise the limit, such as ulimit -n 65536, or "
            f"lower num_workers (now {settings.num_workers}). To continue from the last checkpoint: "
            "resume_during_training=True"
        )
    if _is_of_a_loader_process(error):
        how = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"a process that loads data has died at step {trainer.global_step + 1} ({how}). Mostly the machine has run "
            f"out of memory (lower num_workers, now {settings.num_workers}) or of shared memory (a container needs a "
            "larger /dev/shm), or a data file was changed meanwhile. To continue from the last checkpoint: "
            "resume_during_training=True"
        )
    return None


def _is_of_a_loader_process(error: Exception) -> bool:
    """Whether a loader process died: the loader says so, or, while a batch is handed over, a broken pipe does."""
    modules = _raised_in(error)
    if isinstance(error, OSError | EOFError):
        return any(module.startswith("multiprocessing.") for module in modules)
    return modules[-1].startswith("torch.utils.data.")


def _less_memory(whose: str, settings: Settings, trainer: Trainer) -> str:
    half = max(settings.per_gpu_batchsize // 2, 1)
    checkpointing = "" if settings.activation_checkpointing else "set activation_checkpointing=True (a third slower), "
    return (
        f"{whose} memory did not suffice at step {trainer.global_step + 1}: lower per_gpu_batchsize (now "
        f"{settings.per_gpu_batchsize}; {half} takes more passes for the same batch_size), {checkpointing}or lower "
        f"image_size (now {settings.image_size}) or max_text_len (now {settings.max_text_len}), or take a smaller "
        "model_arch"
    )
