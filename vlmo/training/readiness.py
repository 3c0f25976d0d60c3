"""What a run needs, looked at check by check before it begins: `python -m vlmo.doctor with ...` prints it."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial

import torch

from vlmo.checkpoints import loading as checkpoint
from vlmo.checkpoints.files import Checkpoint
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets.scan import cluster_advice, scan_dataset
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.registry import DATASETS
from vlmo.settings import Settings
from vlmo.training.checkpointing.files import check_resume, resume_path
from vlmo.training.checkpointing.saved_run import fingerprint
from vlmo.training.disk_usage import checkpoint_size, num_checkpoints
from vlmo.training.environment import choose_environment
from vlmo.training.loggers import check_loggers
from vlmo.training.optimizer import check_optimizer
from vlmo.training.preparation import check_log_dir, existing_folder, resolve_label_names
from vlmo.training.run_length import RunLength

log = logging.getLogger("vlmo.doctor")


class RunChecks:
    """The checks of one run, in the order in which the runner makes them."""

    def __init__(self, settings: Settings, problems: Sequence[str] = ()) -> None:
        """
        Args:
            problems: with the options, which have been reported.
        """
        known = tuple(name for name in settings.datasets if name in DATASETS)
        self.settings = settings.model_copy(update={"datasets": known})
        self.option_problems = list(problems)
        self.datamodule = MTDataModule(self.settings)
        self.stage = "test" if settings.test_only else "fit"
        self.texts: Counter[str] = Counter()  # by split

    @cached_property
    def model(self) -> VLMo:
        """Shapes only, no memory, without `load_path`. Raises VLMoError where wrong options stand in the way."""
        try:
            with torch.device("meta"):
                return VLMo(self.settings.model_copy(update={"load_path": ""}))
        except Exception as error:
            if self.option_problems:  # which have been reported, so this is no other problem
                raise VLMoError("\n".join(self.option_problems)) from error
            raise

    @cached_property
    def loaded(self) -> Checkpoint | None:
        """What `load_path` holds. Raises VLMoError if it is no checkpoint."""
        loaded = checkpoint.read(self.settings.load_path) if self.settings.load_path else None
        if loaded:
            checkpoint.refuse_foreign(loaded)
        return loaded

    def devices(self) -> Iterator[str]:
        environment = choose_environment(self.settings)
        for notice in environment.notices:
            log.warning(notice)
        count = self.settings.devices * self.settings.num_nodes
        yield (
            f"{environment.accelerator}, {count} process{'es' * (count > 1)}, strategy {environment.strategy}, "
            f"precision {environment.precision}"
        )

    def optimizer(self) -> Iterator[str]:
        check_optimizer(self.settings.optim_type)
        yield self.settings.optim_type

    def loggers(self) -> Iterator[str]:
        check_loggers(self.settings.loggers)
        yield ", ".join(self.settings.loggers) or "none"

    def tables(self) -> Iterator[str]:
        """All that the runner checks of files, tokenizer and options of the data."""
        self.datamodule.check(self.stage)
        place = f" in {self.datamodule.root}" if self.settings.data_root else ""
        yield f"{', '.join(self.datamodule.specs)}{place}: columns as needed"

    def split(self, name: str, split: str) -> Iterator[str]:
        found = scan_dataset(self.datamodule.root, DATASETS[name], split, self.settings)
        self.texts[split] += found.texts if name in self.datamodule.specs else 0
        if found.files:
            yield f"{name} {split}: {found}"
        if advice := cluster_advice(found, os.cpu_count() or 1):
            yield f"{name} {split}: {advice}"
        if not found.undecodable:
            return
        line = (
            f"{name} {split}: {len(found.undecodable)} of {found.sampled} sampled images cannot be decoded, such as "
            f"{found.undecodable[0]}; with more than 1 % a run stops: re-create the file (DATA.md)"
        )
        if len(found.undecodable) > found.sampled / 2:
            raise VLMoError(line)
        log.warning(line)

    def checkpoint(self) -> Iterator[str]:
        if self.loaded:
            size = sum(tensor.nbytes for tensor in self.loaded.tensors.values())
            yield f"{self.loaded.path}: {len(self.loaded.tensors)} tensors, {_gigabytes(size)}"

    def fit(self) -> Iterator[str]:
        """The model, and what it would take of the checkpoint."""
        yield f"{self.settings.model_arch}: {sum(p.numel() for p in self.model.parameters()) / 1e6:,.1f} M parameters"
        if self.loaded:
            label_names = None
            with suppress(VLMoError):  # (said of the data)
                label_names = self.datamodule.label_names()
            anew = self.model.heads_to_reset(self.loaded, label_names)
            for beginning, why in anew.items():
                log.warning(f"{beginning}* is initialised anew: {why}")
            _, report = checkpoint.adapt(self.loaded, self.model.state_dict(), anew)
            yield from str(report).splitlines()[1:]
            heads = [head for task in self.model.tasks for head in task.required_heads]
            checkpoint.require(self.loaded, report, heads if self.settings.test_only else ())

    def names(self) -> Iterator[str]:
        """The tokens, and the names of the classes: are they those that the checkpoint was trained with?"""
        metadata = self.loaded.metadata if self.loaded else None
        labels, vocabulary = resolve_label_names(self.settings, self.datamodule, metadata)
        yield (f"{len(vocabulary):,} tokens" if vocabulary else "no text") + (
            f", {len(labels):,} answers" if labels else ""
        )

    def resuming(self) -> Iterator[str]:
        named = bool(self.settings.resume_from)  # then it does not matter what was loaded, nor whether it could be
        start = "" if named else fingerprint(self.loaded.tensors if self.loaded else None)
        path = resume_path(self.settings, start)
        if path:
            check_resume(path, self.model)
            yield f"continues {path}"

    def length(self) -> Iterator[str]:
        if self.texts["train"] and not self.settings.test_only:
            length = RunLength.of(self.settings, self.texts["train"])
            for warning in length.warnings():
                log.warning(warning)
            yield str(length)

    def disk(self) -> Iterator[str]:
        check_log_dir(self.settings)
        free = shutil.disk_usage(existing_folder(self.settings.log_dir)).free
        yield f"{self.settings.log_dir}: {_gigabytes(free)} free"
        if self.settings.fast_dev_run or not self.texts["train"]:
            return
        number = num_checkpoints(self.settings, self.texts)
        size = checkpoint_size(self.model, self.settings.optim_type)
        plan = f"the run will write about {number:,} checkpoints of {_gigabytes(size)}"
        if number * size > free:
            raise VLMoError(
                f"log_dir={self.settings.log_dir}: {plan}, and has {_gigabytes(free)} free; give another log_dir, or "
                "validate less often (val_check_interval)"
            )
        yield plan

    def checks(self) -> Iterator[tuple[str, Callable[[], Iterable[str]]]]:
        """All of them, by name."""
        yield "devices", self.devices
        yield "optimizer", self.optimizer
        yield "loggers", self.loggers
        yield "data", self.tables
        is_root = self.settings.data_root and self.datamodule.root.is_dir()
        beside = [name for datasets in self.settings.beside.values() for name in datasets if name in DATASETS]
        for name in (*self.datamodule.specs, *beside):
            for split in self.datamodule.splits(self.stage) if is_root or ":" in name else ():
                yield "", partial(self.split, name, split)
        yield "length", self.length
        yield "checkpoint", self.checkpoint
        yield "model", self.fit
        yield "names", self.names
        yield "resuming", self.resuming
        yield "disk", self.disk


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
