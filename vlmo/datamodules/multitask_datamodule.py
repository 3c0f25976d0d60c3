"""The data of a run: the configured data sets together, as loaders for training, validation, test and retrieval."""

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from vlmo.datamodules.collate import Collator
from vlmo.datamodules.concat import ConcatDataset
from vlmo.datamodules.samplers import ShuffleSampler, eval_sampler, even_batches
from vlmo.datasets import DATASETS, BaseDataset, ImageView, TextView
from vlmo.datasets.checks import answers_in_tables, check_tables, read_answers, split_files
from vlmo.datasets.text import TokenMasker, load_tokenizer
from vlmo.datasets.vqa_dataset import VQADataset
from vlmo.distributed import rank, world_size
from vlmo.errors import VLMoError
from vlmo.settings import Settings
from vlmo.transforms import keys_to_transforms

log = logging.getLogger(__name__)

STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class MTDataModule(LightningDataModule):
    """Loaders over all of `datasets` together; the batches are described in `Collator`.

    Every process loads its own share, so the Trainer needs `use_distributed_sampler=False`. Training leaves out the
    last incomplete batch (other samples each epoch, since the order is drawn anew): all processes take the same number
    of equal steps, and no loss among the pairs of a batch meets a lone pair. With fewer samples than a batch holds, a
    smaller batch is what there is. Evaluation takes every sample exactly once.
    """

    def __init__(self, config: Mapping[str, Any] | Settings):
        super().__init__()
        known: dict[str, Iterable[str]] = {"datasets": DATASETS}
        self.settings = config if isinstance(config, Settings) else Settings.from_config(config, known)
        unknown = [name for name in self.settings.datasets if name not in DATASETS]
        if unknown:
            raise VLMoError(f"datasets: {', '.join(unknown)} unknown; known: {', '.join(DATASETS)}")
        self.specs = {name: DATASETS[name] for name in self.settings.datasets}
        self.root = Path(self.settings.data_root).expanduser()
        self._warned: list[str] = []
        self._opened: dict[str, dict[str, BaseDataset]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """BERT's fast tokenizer. Raises VLMoError if it cannot be had."""
        # samples are tokenised one by one in the workers; said here, tokenizers has no warning to give after the fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return load_tokenizer(self.settings.tokenizer)

    def check(self, stage: str) -> None:
        """The cheap checks of everything that `stage` ("fit", "validate" or "test") reads, before a model is built.

        Raises:
            VLMoError: with one line for each problem found.
        """
        findings = check_tables(
            self.settings.data_root, self.specs, self._splits(stage), self.settings.vqav2_label_size
        )
        problems = findings.problems + self._option_problems()
        if problems:
            raise VLMoError("\n".join(problems))
        new = [warning for warning in findings.warnings if warning not in self._warned]
        self._warned += new
        if rank() == 0:
            for warning in new:
                log.warning(warning)

    def _splits(self, stage: str) -> tuple[str, ...]:
        splits = STAGE_SPLITS[stage]
        recall = ("val", "test") if self.settings.get_recall_metric else ()  # both are measured, whatever the stage
        return tuple(dict.fromkeys(splits + recall))

    def _option_problems(self) -> list[str]:
        problems = []
        for option in ("train_transform_keys", "val_transform_keys"):
            keys = getattr(self.settings, option)
            if len(keys) > 1:
                problems.append(f"{option}={list(keys)}: the model reads one view of an image; give one transform")
            try:
                keys_to_transforms(keys, self.settings.image_size, self.settings.autocontrast)
            except VLMoError as error:
                problems += [f"{option}: {line}" for line in str(error).splitlines()]
        if self.settings.get_recall_metric and not any(spec.retrieval for spec in self.specs.values()):
            sets = ", ".join(name for name, spec in DATASETS.items() if spec.retrieval)
            problems.append(f"get_recall_metric=True: recall is measured on {sets}; none is in datasets")
        try:
            size = len(self.tokenizer)
        except VLMoError as error:
            return [*problems, str(error)]
        if size > self.settings.vocab_size:
            problems.append(f"vocab_size: the tokenizer has {size} words: pass vocab_size={size}")
        return problems

    def setup(self, stage: str) -> None:
        """Checks and opens the tables that `stage` reads. Raises VLMoError as `check` does."""
        self.check(stage)
        for split in self._splits(stage):
            self._open(split)

    def _open(self, split: str) -> dict[str, BaseDataset]:
        """The data sets that have files for `split`, by name."""
        if split not in self._opened:
            s = self.settings
            keys = s.train_transform_keys if split == "train" else s.val_transform_keys
            (transform,) = keys_to_transforms(keys, s.image_size, s.autocontrast)
            masker = TokenMasker(self.tokenizer, s.mlm_prob, s.whole_word_masking)
            files = {name: split_files(self.root, spec, split) for name, spec in self.specs.items()}
            self._opened[split] = {
                name: self.specs[name].dataset(paths, self.tokenizer, s.max_text_len, masker, transform)
                for name, paths in files.items()
                if paths
            }
        return self._opened[split]

    def _loader(self, dataset: Dataset, sampler: Iterable, drop_last: bool = False, once: bool = False) -> DataLoader:
        s = self.settings
        on_gpu = s.num_gpus != 0 and s.accelerator != "cpu" and torch.cuda.is_available()
        return DataLoader(
            dataset,
            s.per_gpu_batchsize,
            sampler=sampler,
            num_workers=s.num_workers,
            collate_fn=Collator(self.tokenizer.pad_token_id, s.max_text_len),
            pin_memory=on_gpu,
            drop_last=drop_last,
            persistent_workers=s.num_workers > 0 and not once,
            generator=torch.Generator(),  # else workers' seeds come from the global one, which dropout draws from
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew each epoch, augmented.

        Raises:
            VLMoError: if there are fewer samples than processes.
        """
        dataset = ConcatDataset(list(self._open("train").values()))
        sampler = ShuffleSampler(len(dataset), self.settings.seed, rank(), world_size())
        if len(sampler) == 0:
            raise VLMoError(f"{len(dataset)} training samples are too few for {world_size()} processes")
        full = len(sampler) >= self.settings.per_gpu_batchsize
        if not full and rank() == 0:
            size = len(sampler) * world_size()
            log.warning(f"there are only {len(dataset)} training samples: a batch has {size} over all devices")
        return self._loader(dataset, sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """In order, not augmented; no loader if none of the data sets has validation data."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """In order, not augmented; no loader if none of the data sets has test data."""
        return self._eval_loader("test")

    @property
    def has_validation(self) -> bool:
        """Whether any of the data sets has validation data."""
        return any(split_files(self.root, spec, "val") for spec in self.specs.values())

    def _eval_loader(self, split: str) -> DataLoader | list[DataLoader]:
        datasets = list(self._open(split).values())
        if not datasets:
            return []
        dataset = ConcatDataset(datasets)
        loader = self._loader(dataset, eval_sampler(len(dataset), rank(), world_size()))
        if not self.settings.strategy.startswith("fsdp"):
            return loader
        # FSDP gathers weights in every step: all processes need as many
        batches = even_batches(len(dataset), rank(), world_size(), self.settings.per_gpu_batchsize)
        kept = {name: getattr(loader, name) for name in ("num_workers", "collate_fn", "pin_memory", "generator")}
        return DataLoader(dataset, batch_sampler=batches, **kept)

    def retrieval_loaders(self, split: str) -> tuple[DataLoader, DataLoader]:
        """Images and texts apart, of all data sets that recall is measured on: each image once, each text once.

        Args:
            split: "val" or "test".

        Returns:
            loaders of {"image", "img_index", "skipped"} and {"text_ids", "text_masks", "img_index", "skipped"}; a
            text belongs to the image of the same `img_index`. Each process gets its share, of both.
        """
        datasets = [dataset for name, dataset in self._open(split).items() if self.specs[name].retrieval]
        views = (ConcatDataset([ImageView(d) for d in datasets]), ConcatDataset([TextView(d) for d in datasets]))
        images, texts = (self._loader(view, eval_sampler(len(view), rank(), world_size()), once=True) for view in views)
        return images, texts

    def vqa_answers(self) -> list[str] | None:
        """The answer of each VQA label, from the file beside the tables, else as far as the tables show it.

        None if there is no VQA data set, or no table here has answers.

        Raises:
            VLMoError: if the file is not a list of strings.
        """
        specs = [spec for spec in self.specs.values() if issubclass(spec.dataset, VQADataset)]
        if not specs:
            return None
        if (answers := read_answers(self.root)) is not None:
            return answers
        files = [path for spec in specs for split in ("train", "val") for path in split_files(self.root, spec, split)]
        return answers_in_tables(files) or None
