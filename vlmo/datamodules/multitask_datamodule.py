"""The data of a run: the configured data sets together, as loaders for training, validation, test and retrieval."""

import logging
import os
import signal
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from vlmo.datamodules.collate import Collator
from vlmo.datamodules.concat import ConcatDataset
from vlmo.datamodules.pairs import PairView
from vlmo.datamodules.samplers import LengthGroupedSampler, ShuffleSampler, eval_batches
from vlmo.datasets import DATASETS, BaseDataset, ImageView, MaskedImages, TextView
from vlmo.datasets.checks import answers_in_tables, check_tables, read_answers, split_files, unnumbered_sentences
from vlmo.datasets.masked_images import PatchMasker
from vlmo.datasets.text import TokenMasker, load_tokenizer
from vlmo.datasets.vqa_dataset import VQADataset
from vlmo.distributed.collectives import rank, world_size
from vlmo.errors import VLMoError
from vlmo.modules.image_tokenizer import DalleEncoder
from vlmo.settings import PATCH_SIZE, Settings
from vlmo.transforms import keys_to_transforms

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
        known: dict[str, Iterable[str]] = {"datasets": DATASETS}
        self.settings = config if isinstance(config, Settings) else Settings.from_config(config, known)
        unknown = [name for name in self.settings.datasets if name not in DATASETS]
        if unknown:
            raise VLMoError(f"datasets: {', '.join(unknown)} unknown; known: {', '.join(DATASETS)}")
        self.specs = {name: DATASETS[name] for name in self.settings.datasets}
        self.root = Path(self.settings.data_root).expanduser()
        self._warned: list[str] = []
        self._opened: dict[str, dict[str, BaseDataset | MaskedImages]] = {}
        self._without_text = "mim" in self.settings.active
        # of a resumed run: the arguments of `ShuffleSampler.skip`
        self.resumed_at: tuple[int, int, int, int] | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """BERT's fast tokenizer. Raises VLMoError if it cannot be had."""
        # samples are tokenised one by one in the workers; said here, tokenizers has no warning to give after the fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return load_tokenizer(self.settings.tokenizer)

    @cached_property
    def image_tokenizer(self) -> DalleEncoder | None:
        """Makes the visual tokens of stage 1; None where nothing needs them. Raises VLMoError if it cannot be read."""
        needed = self._without_text and self.settings.mim_target == "dalle"
        return DalleEncoder.from_file(self.settings.mim_tokenizer) if needed else None

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
        findings = check_tables(s.data_root, self.specs, self.splits(stage), needed, s.vqav2_label_size)
        problems = findings.problems + self._option_problems()
        if problems:
            raise VLMoError("\n".join(problems))
        if stage == "test":
            findings.warnings += unnumbered_sentences(self.root, self.specs)
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
                keys_to_transforms(keys, self.settings.image_size, self.settings.autocontrast)
            except VLMoError as error:
                problems += [f"{option}: {line}" for line in str(error).splitlines()]
        if self.settings.get_recall_metric and not any(spec.retrieval for spec in self.specs.values()):
            sets = ", ".join(name for name, spec in DATASETS.items() if spec.retrieval)
            problems.append(f"get_recall_metric=True: recall is measured on {sets}; none is in datasets")
        try:
            if self._without_text:
                self.image_tokenizer  # noqa: B018  (reads the file)
                return problems
            size = len(self.tokenizer)
        except VLMoError as error:
            return [*problems, str(error)]
        if size > self.settings.vocab_size:
            problems.append(f"vocab_size: the tokenizer has {size} words: pass vocab_size={size}")
        return problems

    def setup(self, stage: str) -> None:
        """Checks and opens the tables that `stage` reads. Raises VLMoError as `check` does."""
        self.check(stage)
        for split in self.splits(stage):
            self._open(split)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook, on the device: adds `visual_tokens` (B, patches) where stage 1 predicts them."""
        if self.image_tokenizer is None or "image" not in batch:
            return batch
        self.image_tokenizer.to(batch["image"].device)
        window = self.settings.image_size // PATCH_SIZE
        return batch | {"visual_tokens": self.image_tokenizer.visual_tokens(batch["image"], window)}

    def _open(self, split: str) -> dict[str, Any]:
        """The data sets that have samples for `split`, by name."""
        if split not in self._opened:
            s = self.settings
            keys = s.train_transform_keys if split == "train" else s.val_transform_keys
            (transform,) = keys_to_transforms(keys, s.image_size, s.autocontrast)
            files = {name: split_files(self.root, spec, split) for name, spec in self.specs.items()}
            opened: dict[str, Any]
            if self._without_text:
                hidden = PatchMasker(s.image_size // PATCH_SIZE, s.mim_mask_ratio)
                opened = {
                    name: MaskedImages(paths, self.specs[name].dataset.image_columns, hidden, transform)
                    for name, paths in files.items()
                }
            else:
                masker = TokenMasker(self.tokenizer, s.mlm_prob, s.whole_word_masking)
                opened = {
                    name: self.specs[name].dataset(paths, self.tokenizer, s.max_text_len, masker, transform)
                    for name, paths in files.items()
                }
            self._opened[split] = {name: dataset for name, dataset in opened.items() if len(dataset)}
        return self._opened[split]

    def _loader(self, dataset: Dataset, once: bool = False, **sampling: Any) -> DataLoader:
        s = self.settings
        on_gpu = s.num_gpus != 0 and s.accelerator != "cpu" and torch.cuda.is_available()
        return DataLoader(
            dataset,
            num_workers=s.num_workers,
            collate_fn=Collator(0 if self._without_text else self.tokenizer.pad_token_id, s.max_text_len),
            pin_memory=on_gpu,
            prefetch_factor=s.prefetch_factor if s.num_workers else None,
            persistent_workers=s.num_workers > 0 and not once,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else workers' seeds come from the global one, which dropout draws from
            **sampling,
        )

    def _eval_loader(self, dataset: ConcatDataset, once: bool = False) -> DataLoader:
        batches = eval_batches(len(dataset), self.settings.per_gpu_batchsize, rank(), world_size())
        return self._loader(dataset, once, batch_sampler=batches)

    @cached_property
    def train_dataset(self) -> ConcatDataset:
        """All that is trained on together."""
        return ConcatDataset(list(self._open("train").values()))

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew each epoch (with `group_by_length`, texts of similar length together), augmented.

        Raises:
            VLMoError: if there are fewer samples than processes.
        """
        dataset = self.train_dataset
        s = self.settings
        order = (len(dataset), s.seed, rank(), world_size())
        sampler = ShuffleSampler(*order)
        if s.group_by_length:
            sampler = LengthGroupedSampler(*order, s.per_gpu_batchsize, dataset.text_sizes)
        if self.resumed_at:
            sampler.skip(*self.resumed_at)
        if len(sampler) == 0:
            raise VLMoError(f"{len(dataset)} training samples are too few for {world_size()} processes")
        full = len(sampler) >= s.training_batch
        if not full and rank() == 0:
            size = len(sampler) * world_size()
            log.warning(f"there are only {len(dataset)} training samples: a batch has {size} over all devices")
        return self._loader(dataset, batch_size=s.training_batch, sampler=sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """In order, not augmented; no loader if none of the data sets has validation data."""
        return self._split_loader("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """In order, not augmented; no loader if none of the data sets has test data."""
        return self._split_loader("test")

    def has(self, split: str) -> bool:
        """Whether any of the data sets has texts for "train", "val" or "test"."""
        return bool(self._open(split))

    def _split_loader(self, split: str) -> DataLoader | list[DataLoader]:
        datasets = list(self._open(split).values())
        return self._eval_loader(ConcatDataset(datasets)) if datasets else []

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
        images, texts = (self._eval_loader(view, once=True) for view in self._retrieval_views(split))
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
        return self._loader(pairs, once=True, batch_sampler=batches[share])

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


def _outlive_signals(worker: int) -> None:
    """Leaves it to the main process what a signal means: they reach the whole group (Ctrl-C, `timeout`, SLURM's end of
    a job), and without its workers the main process could not finish its step and save.

    Workers end when the main process does; a second SIGTERM ends them too, as torch and Python send it to stuck ones.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
