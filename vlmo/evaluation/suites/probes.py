"""Probes: what frozen features of any block and expert know of labelled images, without training the model.

    ROOT/SET/train/CLASS/*.jpg and test/CLASS/*.jpg, or CLIP_benchmark's format with train/ and test/, or
    ROOT/SET/train.arrow and test.arrow with the columns `image` and `label` (a number from 0), or what
    `vlmo.utils.convert labelled_images` wrote (its val is tested on)

A feature is the mean over the patches of a block's output, each dimension standardised by the training images.

    knn             the 20 nearest by cosine vote, weighted by exp(cosine / 0.07) (DINO, arXiv 2104.14294)
    linear_probe    multinomial logistic regression by L-BFGS; its weight decay is chosen on every fifth training image
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.datasets.checks import find_files
from vlmo.distributed.wire_format import from_bytes
from vlmo.errors import VLMoError
from vlmo.evaluation.chunks import Output, in_chunks
from vlmo.evaluation.measures import mean_of
from vlmo.evaluation.pair_scores import IMAGES_AT_ONCE, Scorer
from vlmo.evaluation.pictures import of_file, of_table
from vlmo.evaluation.suites.base import Context, Need, Result, Suite, sha256
from vlmo.evaluation.suites.zero_shot import Classified, read_classified
from vlmo.images import SUFFIXES
from vlmo.modules.model import VLMoModel
from vlmo.registry import SUITES
from vlmo.sources.arrow_tables import ArrowTables, open_table

NEIGHBOURS, TEMPERATURE = 20, 0.07
WEIGHT_DECAYS = (1e-6, 1e-4, 1e-2, 1.0)
HELD_OUT = 5  # one in so many training images decides upon the weight decay
QUERIES_AT_ONCE = 512

Probe = Callable[
    [Tensor, Tensor, Tensor, int], Tensor
]  # training features and labels, test features, classes -> labels


def block_features(model: VLMoModel, image: Tensor, blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """Gives the mean over the patches of some blocks' outputs, (B, D) by the names that `feature_names` lists."""
    x = model.transformer.embed_image(image)
    if hasattr(model, "token_type_embeddings"):  # (stage 1 has none)
        x = x + model.token_type_embeddings.weight[1]
    biases, _ = model.attention_masks(model.relative_position_bias_table, "image")
    vl, found = None, {}
    for number, (block, bias) in enumerate(zip(model.transformer.blocks, biases, strict=True)):
        vl = x if number == model.transformer.vl_start else vl
        x = block(x, bias, "image")
        vl = None if vl is None else block(vl, bias, "vl")
        if number in blocks:
            found[f"block {number}, image expert"] = x[:, 1:].mean(1)
            if vl is not None:
                found[f"block {number}, vl expert"] = vl[:, 1:].mean(1)
    return found


def feature_names(model: VLMoModel, blocks: tuple[int, ...]) -> list[str]:
    """Lists the features of some blocks: the vision expert's, and where there is one the vision-language expert's."""
    names = []
    for number in blocks:
        experts = ("image", "vl") if number >= model.transformer.vl_start else ("image",)
        names += [f"block {number}, {expert} expert" for expert in experts]
    return names


def extract(
    scorer: Scorer, data: Classified, blocks: tuple[int, ...], context: Context, what: str
) -> dict[str, Tensor]:
    """Computes the features of all images, (N, D) by name, over all processes."""
    outputs = {name: Output((scorer.width,)) for name in feature_names(scorer.model, blocks)}

    @torch.inference_mode()
    def compute(start: int, stop: int, prepared: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        parts = [
            block_features(scorer.model, from_bytes(batch.to(scorer.device)), blocks)
            for batch in prepared[0].split(scorer.batch_size)
        ]
        return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in outputs}

    def read(start: int, stop: int) -> Any:
        return scorer.read(data.pictures[start:stop])

    store = context.store(what, blocks, [picture.name for picture in data.pictures], sorted(data.files.values()))
    return in_chunks(f"features {what}", len(data.pictures), IMAGES_AT_ONCE, outputs, compute, read, store)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Gives both in float64 with mean 0 and deviation 1 in each dimension, by the training features."""
    mean, deviation = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    return (train.double() - mean) / deviation, (test.double() - mean) / deviation


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Gives the class that the nearest training images vote for."""
    train, votes = F.normalize(train, dim=1), F.one_hot(labels, classes).double()
    chosen = []
    for part in F.normalize(test, dim=1).split(QUERIES_AT_ONCE):
        near = (part @ train.t()).topk(min(NEIGHBOURS, len(train)), dim=1)
        weights = (near.values / TEMPERATURE).exp()
        chosen.append((weights[:, :, None] * votes[near.indices]).sum(1).argmax(1))
    return torch.cat(chosen)


def logistic_regression(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Gives the class of the largest logit."""
    held = torch.arange(len(train)) % HELD_OUT == HELD_OUT - 1
    decays = WEIGHT_DECAYS if 0 < held.sum() < len(train) else WEIGHT_DECAYS[1:2]
    shares = []
    for decay in decays:
        weight, bias = _fit(train[~held], labels[~held], classes, decay)
        shares.append(float(((train[held] @ weight + bias).argmax(1) == labels[held]).double().mean()))
    weight, bias = _fit(train, labels, classes, decays[int(np.argmax(shares))])
    return (test @ weight + bias).argmax(1)


def _fit(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Minimises the mean cross-entropy plus decay / 2 times the squared weights."""
    weight = torch.zeros(features.shape[1], classes, dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


# --- data -------------------------------------------------------------------------------------------------------------


def read_labelled(folder: Path, split: str, hashed: bool = True) -> Classified:
    """Reads a split from folders of classes, tars or tables. Raises VLMoError if there is none of these.

    Args:
        hashed: False: the hashes of tables, which take as long as reading all of them, are left empty.
    """
    if (folder / split / "nshards.txt").is_file():
        return read_classified(folder, split)
    table = folder / f"{split}.arrow"
    paths = [table] if table.is_file() else converted_tables(folder, split)
    if paths:
        labels = [label for path in paths for label in _labels(path)]
        names = [str(number) for number in range(max(labels, default=-1) + 1)]
        tables = ArrowTables(paths, None)
        pictures = [of_table(tables, row) for row in range(len(labels))]
        return Classified(pictures, labels, names, {str(path): sha256(path) if hashed else "" for path in paths})
    names = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / split / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise VLMoError(f"{folder / split}: has no folders of classes with images, no nshards.txt, and no {table.name}")
    return Classified([of_file(path) for path, _ in files], [label for _, label in files], names, {})


def converted_tables(folder: Path, split: str) -> list[Path]:
    """Lists what `vlmo.utils.convert labelled_images` wrote, whose val is what a probe is tested on."""
    (paths,) = find_files(folder, [f"labelled_images_{'val' if split == 'test' else split}_*"]).values()
    return paths


def _labels(path: Path) -> list[int]:
    """Reads the labels of a table. Raises VLMoError if it has none."""
    reader = open_table(path)
    if "label" not in reader.schema.names:
        raise VLMoError(f"{path}: has no column 'label'; it has {', '.join(reader.schema.names)}")
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    return [label for batch in batches for label in batch.column("label").to_pylist()]


class FrozenFeatures(Suite):
    """One probe, on each set of data, block and expert."""

    of_pairs = False
    needs = (
        Need(
            "*/*train*",
            "labelled images: SET/train/CLASS/*.jpg and SET/test/CLASS/*.jpg, tars, train.arrow and test.arrow, or the "
            "tables of `vlmo.utils.convert labelled_images`",
        ),
    )

    def __init__(self, meaning: str, probe: Probe) -> None:
        self.meaning, self.probe = meaning, probe

    def run(self, context: Context) -> Result:
        model, result = context.scorer.model, Result([])
        depth = model.transformer.depth
        blocks = context.blocks or (depth - 1,)
        if not all(0 <= block < depth for block in blocks):
            raise VLMoError(f"--blocks {' '.join(map(str, blocks))}: the model has {depth}, from 0")
        found = [path for name in ("train*", "labelled_images_train_*") for path in context.root.glob(f"*/{name}")]
        for folder in sorted({path.parent for path in found}):
            train, test = (read_labelled(folder, split) for split in ("train", "test"))
            result.files |= train.files | test.files
            features = [
                extract(context.scorer, data, blocks, context, f"{folder.name} {split}")
                for data, split in ((train, "train"), (test, "test"))
            ]
            labels, truth = torch.tensor(train.labels), torch.tensor(test.labels)
            for name in features[0]:
                known, asked = standardise(features[0][name], features[1][name])
                chosen = self.probe(known, labels, asked, len(train.names))
                part = f"{folder.name}: {name}"
                result.measures.append(mean_of(chosen == truth, "accuracy", "", part, majority(labels, truth)))
        return result


def majority(labels: Tensor, truth: Tensor) -> float:
    """Gives the share of the class that is most frequent in training: what always saying it gives."""
    return float((truth == labels.bincount().argmax()).double().mean())


SUITES.register("knn")(FrozenFeatures("nearest neighbours on frozen features of images", nearest_neighbours))
SUITES.register("linear_probe")(FrozenFeatures("logistic regression on frozen features of images", logistic_regression))
