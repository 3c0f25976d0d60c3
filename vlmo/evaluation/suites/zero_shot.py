"""Zero-shot classification and retrieval on data in CLIP_benchmark's format, by its definitions.

    ROOT/SET/classnames.txt, zeroshot_classification_templates.txt ("a photo of a {c}."), test/nshards.txt, test/0.tar
    ROOT/SET/dataset_type.txt ("retrieval"), test/nshards.txt, test/0.tar with a text of one caption a line

A class is the mean feature of its sentences; acc1, acc5 and mean_per_class_recall are CLIP_benchmark's names.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.errors import VLMoError
from vlmo.evaluation.measures import macro_mean, mean_of
from vlmo.evaluation.pair_scores import Scorer, encode_and_score, encode_texts
from vlmo.evaluation.pictures import Picture, tar_samples
from vlmo.evaluation.rankings import Statistic, first, per_query, recall
from vlmo.evaluation.suites.base import Context, Need, Result, Suite, sha256, warn_of_unknown
from vlmo.evaluation.suites.decisions import Decisions, add_decisions
from vlmo.evaluation.suites.retrieval import Captions, recalls_of_sets
from vlmo.registry import SUITES

SCALES = {"cosine": "logit_scale", "cosine_vl": "logit_vl_scale"}  # learnt inverse temperatures, as logarithms
FORMAT = "a folder in CLIP_benchmark's format, such as those of huggingface.co/datasets/clip-benchmark"
ROWS_AT_ONCE = 1024


class Classified(NamedTuple):
    """Images of named classes."""

    pictures: list[Picture]
    labels: list[int]
    names: list[str]
    files: dict[str, str]  # SHA-256 by path


def shards(folder: Path) -> list[Path]:
    """Lists the tars of a split. Raises VLMoError if some are missing."""
    try:
        number = int((folder / "nshards.txt").read_text())
    except (OSError, ValueError) as error:
        raise VLMoError(f"{folder}/nshards.txt: must hold the number of tars ({error})") from error
    paths = [folder / f"{shard}.tar" for shard in range(number)]
    if missing := [path for path in paths if not path.is_file()]:
        raise VLMoError(f"{missing[0]}: is missing; {folder}/nshards.txt says that there are {number}")
    return paths


def lines_of(path: Path) -> list[str]:
    """Reads a list of names. Raises VLMoError, naming the file."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VLMoError(f"{path}: cannot be read ({error})") from error


def is_retrieval(folder: Path) -> bool:
    kind = folder / "dataset_type.txt"
    return kind.is_file() and kind.read_text().strip().lower() == "retrieval"


def read_classified(folder: Path, split: str = "test") -> Classified:
    """Reads the samples of a split: an image and a `.cls` with the number of its class."""
    paths, names = shards(folder / split), lines_of(folder / "classnames.txt")
    pictures, labels = [], []
    for sample in tar_samples(paths):
        label = (sample.text("cls") or "").strip()
        if sample.image is None or not label.isdigit() or int(label) >= len(names):
            raise VLMoError(f"{folder}/{split}: {sample.key}: needs an image and a .cls with a number of {len(names)}")
        pictures.append(sample.image)
        labels.append(int(label))
    return Classified(pictures, labels, names, {str(path): sha256(path) for path in paths})


def class_features(
    scorer: Scorer, names: Sequence[str], templates: Sequence[str], context: Context
) -> dict[str, Tensor]:
    """Gives (classes, D) by score: of each class the mean of its sentences' features, of unit length."""
    texts = [template.format(c=name) for name in names for template in templates]
    store = context.store("classes", list(names), list(templates))
    found = encode_texts(scorer, texts, store)
    return {
        score: F.normalize(features.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)
        for score, features in found.items()
    }


class ZeroShotClassification(Suite):
    """Chooses the class whose sentences are nearest to the image."""

    meaning = "classes by their names, data in CLIP_benchmark's format: acc1, acc5, mean_per_class_recall"
    needs = (Need("*/classnames.txt", FORMAT), Need("*/test/nshards.txt", FORMAT))

    def run(self, context: Context) -> Result:
        result = Result([])
        for folder in sorted(path.parent for path in context.root.glob("*/classnames.txt")):
            if not is_retrieval(folder) and (folder / "test" / "nshards.txt").is_file():
                self.measure(context, folder, result)
        if not context.scorer.of_features:
            raise VLMoError(f"zero-shot classification needs contrastive features: {context.scorer.absent['cosine']}")
        return result

    def measure(self, context: Context, folder: Path, result: Result) -> None:
        """Adds the figures of one set of data."""
        scorer, data = context.scorer, read_classified(folder)
        templates = lines_of(folder / "zeroshot_classification_templates.txt")
        result.files |= data.files
        classes = class_features(scorer, data.names, templates, context)
        store = context.store(folder.name, sorted(data.files.values()))
        encoded = encode_and_score(scorer, data.pictures, [], np.zeros((0, 2), np.int64), store)
        warn_of_unknown(result, encoded.known, "they count as wrong")
        owned, groups = [np.array([label]) for label in data.labels], [data.names[label] for label in data.labels]
        ways: dict[str, Statistic] = {"acc1": lambda ranks, numbers: recall(ranks, 1)}
        if len(data.names) >= 5:
            ways["acc5"] = lambda ranks, numbers: recall(ranks, 5)
        for score, features in classes.items():
            found = per_query(encoded.images[score], features, owned, ways)
            for name, right in found.items():
                chance = int(name[3:]) / len(data.names)
                result.measures.append(mean_of(right, name, score, folder.name, chance))
            chance = 1 / len(data.names)
            mean = macro_mean(found["acc1"], groups, "mean_per_class_recall", score, folder.name, chance)
            result.measures.append(mean)
            chosen = first(encoded.images[score], features, 1)[:, 0]
            scale = (
                float(scorer.model.heads[SCALES[score]].detach().exp()) if hasattr(scorer.model, SCALES[score]) else 100
            )
            sure = confidences(encoded.images[score], features, scale).masked_fill(~encoded.known, torch.nan)
            made = Decisions(torch.tensor(data.labels), chosen, sure, found["acc1"])
            add_decisions(result, f"{folder.name} {score}", data.names, made, partial(_shown, data, made))


def _shown(data: Classified, made: Decisions, number: int) -> tuple[list[Picture], list[str]]:
    truth, choice = data.names[data.labels[number]], data.names[int(made.chosen[number])]
    return [data.pictures[number]], [f"{truth}, taken for {choice} with {float(made.sure[number]):.2f}"]


def confidences(images: Tensor, classes: Tensor, scale: float) -> Tensor:
    """Gives (N,) the probability of the likeliest class, by the model's own temperature."""
    parts = images.nan_to_num().split(ROWS_AT_ONCE)
    return torch.cat([(scale * part @ classes.t()).softmax(-1).amax(-1) for part in parts])


class ZeroShotRetrieval(Suite):
    """Recall both ways; CLIP_benchmark's image_retrieval_recall@k is text to image R@k."""

    meaning = "images by captions and back, data in CLIP_benchmark's format"
    needs = (Need("*/dataset_type.txt", f'{FORMAT}; it holds "retrieval"'), Need("*/test/nshards.txt", FORMAT))

    def run(self, context: Context) -> Result:
        folders = sorted(path.parent for path in context.root.glob("*/dataset_type.txt") if is_retrieval(path.parent))
        return recalls_of_sets(context, map(read_retrieval, folders))


def read_retrieval(folder: Path) -> Captions:
    """Reads the samples of the test split: an image and a `.txt` with a caption a line."""
    paths = shards(folder / "test")
    pictures: list[Picture] = []
    texts: list[str] = []
    owner: list[int] = []
    for sample in tar_samples(paths):
        if sample.image is None:
            raise VLMoError(f"{folder}/test: {sample.key}: has no image")
        own = (sample.text("txt") or "").splitlines()
        texts += own
        owner += [len(pictures)] * len(own)
        pictures.append(sample.image)
    return Captions(pictures, texts, np.array(owner, np.int64), [], folder.name, {str(p): sha256(p) for p in paths})


SUITES.register("zero_shot_classification")(ZeroShotClassification())
SUITES.register("zero_shot_retrieval")(ZeroShotRetrieval())
