"""The data of a run: the configured data sets together, as loaders for training, validation, test and retrieval."""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, Dataset

from vlmo.batch import FIELDS, Field
from vlmo.datamodules.collate import Collator
from vlmo.datamodules.read_ahead import AnnouncedBatches, ReadAhead
from vlmo.datamodules.samplers import (
    LengthGroupedSampler,
    SeenSamples,
    Share,
    ShuffleSampler,
    StepSampler,
    eval_batches,
)
from vlmo.datamodules.windows import PIECES, WindowedOrder
from vlmo.datasets.base_dataset import BaseDataset, Beside, ConcatDataset, ImageView, PairView, TextView
from vlmo.datasets.checks import check_tables, split_files, split_tables
from vlmo.datasets.masked_images import MaskedImages, PatchMasker
from vlmo.distributed.collectives import rank, world_size
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS, TASKS
from vlmo.settings import PATCH_SIZE, Settings
from vlmo.tasks.base import Task
from vlmo.text import Tokenizer, TokenMasker, load_tokenizer
from vlmo.transforms import keys_to_transforms
from vlmo.transforms.square import CropAtScale, leave_bytes

log = logging.getLogger(__name__)

STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
RECALL_SPLITS = ("val", "test")  # both are measured, whatever the stage


class MTDataModule(LightningDataModule):
    """Loaders over all of `datasets` together; the batches are described in `Collator`.

    Every process loads its own share, so the Trainer needs `use_distributed_sampler=False`. Training leaves out the
    last incomplete batch (other samples each epoch, since the order is drawn anew): all processes take the same number
    of equal steps, and no loss among the pairs of a batch meets a lone pair. With fewer samples than a batch holds, a
    smaller batch is what there is. Evaluation takes every sample exactly once.
    """

    def __init__(self, config: Mapping[str, Any] | Settings):
        super().__init__()
        self.settings = config if isinstance(config, Settings) else Settings.from_config(config)
        DATASETS.require(self.settings.datasets, "datasets")
        self.specs = {name: DATASETS[name] for name in self.settings.datasets}
        # (a doctor looks at the data of a run whose losses are misspelt)
        self.tasks = [TASKS[name](self.settings) for name in self.settings.active if name in TASKS]
        together = [task for task in self.tasks if not task.prefix]  # (the others have data of their own)
        self.wanted = {name for task in together for name in task.fields}
        others = [task for task in self.tasks if task.prefix]
        self.beside = {task.name: MTDataModule(_settings_beside(task, self.settings)) for task in others}
        self.root = Path(self.settings.data_root).expanduser()
        self._warned: list[str] = []
        self._opened: dict[str, dict[str, BaseDataset | MaskedImages]] = {}
        self._without_text = bool(together) and not any("text" in task.reads for task in together)
        self._seen: SeenSamples | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """BERT's. Raises VLMoError if it cannot be had."""
        # samples are tokenised one by one in the workers; said here, tokenizers has no warning to give after the fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return load_tokenizer(self.settings.tokenizer)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """All that a batch of this run can have, by name."""
        parts = [*(spec.dataset for spec in self.specs.values()), *self.tasks]
        others = {f"{task}.{name}": field for task, data in self.beside.items() for name, field in data.fields.items()}
        return FIELDS | {name: field for part in parts for name, field in part.fields.items()} | others

    def check(self, stage: str) -> None:
        """The cheap checks of everything that `stage` ("fit", "validate" or "test") reads, before a model is built.

        Raises:
            VLMoError: with one line for each problem found.
        """
        s = self.settings
        needed: list[tuple[str, ...]] = [("train",)] if stage == "fit" else []
        if s.get_recall_metric and any(spec.retrieval for spec in self.specs.values()):
            needed.append(RECALL_SPLITS)
        elif stage != "fit":
            needed.append(STAGE_SPLITS[stage])
        findings = check_tables(s.data_root, self.specs, self.splits(stage), needed, s, self._without_text)
        problems = findings.problems + self._option_problems()
        if problems:
            raise VLMoError("\n".join(problems))
        if stage == "fit":
            for name, data in self.beside.items():
                data.check(stage)
                if data.train_dataset.reads_on:
                    raise VLMoError(
                        f"beside.{name}: its samples are drawn here and there, which is slow in Parquet and remote "
                        "sources; convert them (python -m vlmo.utils.convert) or give local tars"
                    )
        if stage == "test":
            for spec in self.specs.values():
                findings.warnings += spec.dataset.test_warnings(split_files(self.root, spec, "test"))
        new = [warning for warning in findings.warnings if warning not in self._warned]
        self._warned += new
        if rank() == 0:
            for warning in new:
                log.warning(warning)

    def splits(self, stage: str) -> tuple[str, ...]:
        """What `stage` reads."""
        splits = STAGE_SPLITS[stage]
        recall = RECALL_SPLITS if self.settings.get_recall_metric else ()
        return tuple(dict.fromkeys(splits + recall))

    def _option_problems(self) -> list[str]:
        problems = []
        for option in ("train_transform_keys", "val_transform_keys"):
            keys = getattr(self.settings, option)
            if len(keys) > 1:
                problems.append(f"{option}={list(keys)}: the model reads one view of an image; give one transform")
            try:
                transforms = keys_to_transforms(keys, self.settings.image_size, self.settings.autocontrast)
                if option == "train_transform_keys" and self.settings.decode_at_scale:
                    CropAtScale(transforms[0])
            except VLMoError as error:
                problems += [f"{option}: {line}" for line in str(error).splitlines()]
        if self.settings.get_recall_metric and not any(spec.retrieval for spec in self.specs.values()):
            sets = ", ".join(name for name, spec in DATASETS.items() if spec.retrieval)
            problems.append(f"get_recall_metric=True: recall is measured on {sets}; none is in datasets")
        problems += [line for task in self.tasks for line in task.check_files(self.settings)]
        if self._without_text:
            return problems
        try:
            size = len(self.tokenizer)
        except VLMoError as error:
            return [*problems, str(error)]
        if size > self.settings.vocab_size:
            problems.append(f"vocab_size: the tokenizer has {size} tokens: pass vocab_size={size}")
        return problems

    def setup(self, stage: str) -> None:
        """Checks and opens the tables that `stage` reads. Raises VLMoError as `check` does."""
        self.check(stage)
        for split in self.splits(stage):
            self._open(split)

    def opened(self, split: str) -> Mapping[str, Any]:
        """The data sets of a split that has been opened, by name; none of another."""
        return self._opened.get(split, {})

    def opened_files(self) -> dict[str, list[Any]]:
        """The files of each split that has been opened, in order."""
        return {
            split: [path for each in opened.values() for path in each.tables.paths]
            for split, opened in self._opened.items()
        }

    def _open(self, split: str) -> dict[str, Any]:
        """The data sets that have samples for `split`, by name."""
        if split not in self._opened:
            s = self.settings
            keys = s.train_transform_keys if split == "train" else s.val_transform_keys
            (transform,) = keys_to_transforms(keys, s.image_size, s.autocontrast)
            if split == "train":
                transform = leave_bytes(transform)
                transform = CropAtScale(transform) if s.decode_at_scale else transform
            files = {
                name: split_tables(self.root, spec, split, s, self._without_text) for name, spec in self.specs.items()
            }
            wanted = self.wanted
            opened: dict[str, Any]
            if self._without_text:
                masker = PatchMasker.from_settings(s.image_size // PATCH_SIZE, s) if "patch_mask" in wanted else None
                opened = {
                    name: MaskedImages(
                        paths,
                        self.specs[name].dataset.image_columns,
                        masker,
                        transform,
                        s.image_decoding,
                        self.specs[name].dataset.image_targets,
                        wanted,
                    )
                    for name, paths in files.items()
                }
            else:
                tokens = TokenMasker(self.tokenizer, s.mlm_prob, s.whole_word_masking)
                opened = {
                    name: self.specs[name].dataset(
                        paths, self.tokenizer, s.max_text_len, tokens, transform, wanted, s.image_decoding
                    )
                    for name, paths in files.items()
                }
            self._opened[split] = {name: dataset for name, dataset in opened.items() if len(dataset)}
        return self._opened[split]

    def _loader(self, dataset: Dataset, retrieval: bool = False, **sampling: Any) -> DataLoader:
        s = self.settings
        finish = [] if retrieval else [task.derived for task in self.tasks]
        if isinstance(dataset, ConcatDataset) and dataset.reads_on:
            if "sampler" in sampling:
                sampling = {"batch_sampler": BatchSampler(**sampling)}
            sampling["batch_sampler"] = AnnouncedBatches(sampling["batch_sampler"], dataset, s.shuffle_window)
            dataset = ReadAhead(dataset)
        on_gpu = s.num_gpus != 0 and s.accelerator != "cpu" and torch.cuda.is_available()
        return DataLoader(
            dataset,
            num_workers=s.num_workers,
            # (lengths of a multiple of 8 suit a GPU's matrix units; a CPU gains nothing from padding)
            collate_fn=Collator(self.fields, s.max_text_len, 8 if on_gpu else 1, finish),
            pin_memory=on_gpu,
            prefetch_factor=s.prefetch_factor if s.num_workers else None,
            persistent_workers=s.num_workers > 0 and not retrieval,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else workers' seeds come from the global one, which dropout draws from
            **sampling,
        )

    def _eval_loader(self, dataset: ConcatDataset, retrieval: bool = False, mixed: bool = False) -> DataLoader:
        return self._loader(dataset, retrieval, batch_sampler=self.eval_batches(len(dataset), mixed))

    def eval_batches(self, length: int, mixed: bool) -> list[Sequence[int]]:
        """This process's batches of an evaluation of so many samples; see `eval_batches`."""
        return eval_batches(length, self.settings.evaluation_batch, rank(), world_size(), mixed)

    def resume_from(self, seen: SeenSamples) -> None:
        """The training loader will go on after these samples."""
        self._seen = seen

    @cached_property
    def train_dataset(self) -> ConcatDataset:
        """All that is trained on together."""
        return self._joined("train")

    def _joined(self, split: str) -> ConcatDataset:
        """The data sets of "train" or "val", each sample with one of those that losses have for themselves."""
        datasets = list(self._open(split).values())
        others = {name: data._joined(split) for name, data in self.beside.items() if data.has(split)}
        return Beside(datasets, others) if others else ConcatDataset(datasets)

    @cached_property
    def shares(self) -> list[Share]:
        """What `dataset_weights` makes of the training sets; none: an epoch draws every sample once."""
        weights = self.settings.dataset_weights
        return [Share.of(len(each), weights.get(name, 1)) for name, each in self._open("train").items() if weights]

    @property
    def epoch_samples(self) -> int:
        """Samples that an epoch of training draws."""
        return sum(share.number for share in self.shares) if self.shares else len(self.train_dataset)

    @cached_property
    def windowed_order(self) -> WindowedOrder | None:
        """The order of training where a source that is read from one end to the other has more than a window."""
        window = self.settings.shuffle_window
        parts = [
            part.tables.pieces(max(window // PIECES, 1))
            if getattr(part.tables, "reads_on", False) and len(part) > window
            else np.array([0, len(part)])
            for part in self.train_dataset.datasets
        ]
        return WindowedOrder(parts, window) if any(len(part) > 2 for part in parts) else None

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew each epoch (with `group_by_length`, texts of similar length together), augmented.

        Images are bytes, which become pixels on the device (the model takes both; `wire_format.with_pixels`). A
        transform of one's own that does not end with `to_tensor` gives what it gives.

        Raises:
            VLMoError: if there are fewer samples than processes.
        """
        dataset = self.train_dataset
        s = self.settings
        order = (len(dataset), s.seed, rank(), world_size())
        size = s.per_gpu_batchsize
        if s.layout_invariant:  # the steps of all processes together, of which each takes its share
            order, size = (len(dataset), s.seed, 0, 1), s.batch_size
        sampler = ShuffleSampler(*order, self.shares)
        if s.group_by_length:
            sampler = LengthGroupedSampler(*order, size, dataset.text_sizes, self.shares)
        sampler.windows = self.windowed_order
        if self._seen:
            sampler.skip(*self._seen)
        if len(sampler) == 0:
            raise VLMoError(f"{self.epoch_samples} training samples are too few for {world_size()} processes")
        if s.layout_invariant:
            if self.epoch_samples < s.batch_size:
                raise VLMoError(
                    f"batch_size={s.batch_size}: there are {self.epoch_samples} training samples, and with "
                    "layout_invariant=True every step takes as many; give at most that"
                )
            steps = StepSampler(sampler, s.batch_size, rank(), world_size())
            return self._loader(dataset, batch_sampler=steps)
        full = len(sampler) >= s.training_batch
        if not full and rank() == 0:
            size = len(sampler) * world_size()
            log.warning(f"there are only {self.epoch_samples} training samples: a batch has {size} over all devices")
        return self._loader(dataset, batch_size=s.training_batch, sampler=sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Mixed, always in the same way, not augmented; no loader if none of the data sets has validation data."""
        return self._split_loader("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """As validation, or in order where predictions are written; no loader if none of the sets has test data."""
        return self._split_loader("test")

    def has(self, split: str) -> bool:
        """Whether any of the data sets has texts for "train", "val" or "test"."""
        return bool(self._open(split))

    def _split_loader(self, split: str) -> DataLoader | list[DataLoader]:
        if not self._open(split):
            return []
        # (files of predictions are written as the data are in order)
        mixed = split == "val" or not any(task.writes_predictions for task in self.tasks)
        nothing = self.recall_measures_all(split)
        return self._eval_loader(ConcatDataset([]) if nothing else self._joined(split), mixed=mixed)

    def recall_measures_all(self, split: str) -> bool:
        """Tells whether the features that recall needs are all that the tasks need: pairs are then not read again."""
        contrast_alone = all(task.provides == "contrast" for task in self.tasks)
        retrieval = all(self.specs[name].retrieval for name in self._open(split))
        return self.settings.get_recall_metric and contrast_alone and retrieval

    def _retrieval_views(self, split: str) -> tuple[ConcatDataset, ConcatDataset]:
        datasets = [dataset for name, dataset in self._open(split).items() if self.specs[name].retrieval]
        return ConcatDataset([ImageView(d) for d in datasets]), ConcatDataset([TextView(d) for d in datasets])

    def retrieval_loaders(self, split: str) -> tuple[DataLoader, DataLoader]:
        """Images and texts apart, of all data sets that recall is measured on: each image once, each text once.

        Args:
            split: "val" or "test".

        Returns:
            loaders of {"image", "raw_index", "img_index"} and {"text_ids", "text_masks", "raw_index", "img_index"},
            beside what is skipped; a text belongs to the image of the same `img_index`. Each process gets its share,
            of both.
        """
        images, texts = (self._eval_loader(view, retrieval=True) for view in self._retrieval_views(split))
        return images, texts

    def pair_loader(self, split: str, images: np.ndarray, texts: np.ndarray) -> DataLoader:
        """This process's share of pairs, by the numbers that `retrieval_loaders` give: an image and a text each.

        Args:
            images, texts: (pairs,) their numbers, the same on all processes. Pairs of the same image should follow
                one another: it is then decoded once for all of them.

        Returns:
            loader of {"image", "text_ids", "text_masks", "raw_index"}; the last is the number of the pair.
        """
        batches = eval_batches(len(images), self.settings.per_gpu_batchsize, 0, 1)
        share = slice(rank() * len(batches) // world_size(), (rank() + 1) * len(batches) // world_size())
        pairs = PairView(*self._retrieval_views(split), images, texts)
        return self._loader(pairs, retrieval=True, batch_sampler=batches[share])

    def label_names(self) -> list[str] | None:
        """Asks the data sets for the names of the classes that labels number; None if none has any.

        Raises:
            VLMoError: if what should tell is damaged.
        """
        for kind in dict.fromkeys(spec.dataset for spec in self.specs.values()):
            specs = [spec for spec in self.specs.values() if spec.dataset is kind]
            paths = [
                path for spec in specs for split in ("train", "val") for path in split_files(self.root, spec, split)
            ]
            if (names := kind.label_names(self.root, paths)) is not None:
                return names
        return None


def _settings_beside(task: Task, settings: Settings) -> Settings:
    """The settings of a run of this loss alone on the data of its own."""
    own = {"datasets": tuple(settings.beside[task.name]), "loss_names": {task.name: 1.0}, "beside": {}}
    return settings.model_copy(update=own | {"dataset_weights": {}, "get_recall_metric": False})


def _outlive_signals(worker: int) -> None:
    """Leaves it to the main process what a signal means: they reach the whole group (Ctrl-C, `timeout`, SLURM's end of
    a job), and without its workers the main process could not finish its step and save.

    Workers end when the main process does; a second SIGTERM ends them too, as torch and Python send it to stuck ones.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
