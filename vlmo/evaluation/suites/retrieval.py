"""Retrieval: COCO 5K and 1K, Flickr30K, and tables of one's own, by the cosine of either branch, and re-ranked."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmo.errors import VLMoError
from vlmo.evaluation.measures import Measure, macro_mean
from vlmo.evaluation.pair_scores import encode_and_score, score_more_pairs
from vlmo.evaluation.pictures import Picture, of_table
from vlmo.evaluation.rankings import RECALLS, Sides, both_ways, owned_by, recall_chances, rerank_sides
from vlmo.evaluation.suites.base import Context, Need, Result, Suite, sha256, warn_of_unknown
from vlmo.registry import SUITES
from vlmo.sources.arrow_tables import ArrowTables

FOLDS = 5  # of COCO 1K


class Captions(NamedTuple):
    """A split of images and their captions.

    Attributes:
        owner: (T,) number of each text's image, ascending.
        image_ids: as the table has them.
        name: of the split.
        files: SHA-256 of what it was read from, by path.
    """

    pictures: list[Picture]
    texts: list[str]
    owner: np.ndarray
    image_ids: list[str]
    name: str
    files: dict[str, str]


def read_captions(path: Path) -> Captions:
    """Reads a table of captions (DATA.md)."""
    tables = ArrowTables([path], "caption")
    locations = [tables.text(number) for number in range(tables.num_texts)]
    rows = [tables.row(number) for number in range(tables.num_rows)]
    has_ids = bool(rows) and rows[0].record.schema.get_field_index("image_id") >= 0
    return Captions(
        [of_table(tables, row) for row in range(tables.num_rows)],
        [str(location.list_item("caption")) for location in locations],
        np.array([location.image for location in locations], np.int64),
        [row.text("image_id") for row in rows] if has_ids else [],
        path.stem,
        {str(path): sha256(path)},
    )


# --- the encodings that all of them share -----------------------------------------------------------------------------


class Split:
    """A split that is encoded once for all suites; `sides` are parts of it to be ranked."""

    def __init__(self, context: Context, captions: Captions) -> None:
        scorer = context.scorer
        if not scorer.of_features:
            raise VLMoError(f"retrieval needs contrastive features, but {scorer.absent['cosine']}")
        self.scorer, self.captions = scorer, captions
        self.rerank = context.rerank
        self.rerank_by = [name for name in context.rerank_by if name in scorer.names] if context.rerank else []
        self.store = context.store(captions.name, sorted(captions.files.values()))
        self.encoded = encode_and_score(
            scorer, captions.pictures, captions.texts, np.zeros((0, 2), np.int64), self.store, bool(self.rerank_by)
        )

    def result(self) -> Result:
        """Gives a result without figures."""
        result = Result([], dict(self.captions.files))
        warn_of_unknown(result, self.encoded.known, "their texts count as not found")
        return result

    def sides(self, images: np.ndarray, texts: np.ndarray) -> dict[str, Sides]:
        """Gives the features of some images and texts, numbers in order, by score; and with candidates re-ranked.

        All processes must ask.
        """
        made: dict[str, Sides] = {}
        for name in self.scorer.of_features:
            plain = made[name] = Sides(_rows(self.encoded.images[name], images), _rows(self.encoded.texts[name], texts))
            for by in self.rerank_by:
                made[f"{name}+{by}"] = rerank_sides(plain, self.rerank, partial(self._match, by, images, texts))
        return made

    def _match(self, by: str, images: np.ndarray, texts: np.ndarray, pairs: np.ndarray) -> Tensor:
        numbers = np.stack([images[pairs[:, 0]], texts[pairs[:, 1]]], axis=1)
        return score_more_pairs(self.scorer, self.captions.pictures, self.captions.texts, numbers, by, self.store)


def _rows(features: Tensor, numbers: np.ndarray) -> Tensor:
    """Gives some rows; all of them without a copy."""
    return features if len(numbers) == len(features) else features[numbers]


# --- the suites -------------------------------------------------------------------------------------------------------


class Retrieval(Suite):
    """Recall at 1, 5 and 10 both ways, over a whole split or as the mean of folds.

    Args:
        table: stem of the Arrow file.
        command: makes it.
        folds: parts of the images, in the order of the table, each ranked for itself.
    """

    def __init__(self, meaning: str, table: str, command: str, folds: int = 1) -> None:
        self.meaning, self.table, self.folds = meaning, table, folds
        self.needs = (Need(f"{table}.arrow", f"the table that {command} makes (DATA.md)"),)

    def run(self, context: Context) -> Result:
        captions = read_captions(context.root / f"{self.table}.arrow")
        split = Split(context, captions)
        result = split.result()
        size = -(-len(captions.pictures) // self.folds)
        folds = [
            range(start, min(start + size, len(captions.pictures))) for start in range(0, len(captions.pictures), size)
        ]
        texts = [np.flatnonzero((captions.owner >= fold[0]) & (captions.owner <= fold[-1])) for fold in folds]
        result.measures = recalls_of_folds(split, [np.array(fold) for fold in folds], texts, captions.owner)
        return result


def recalls_of_folds(
    split: Split, images: Sequence[np.ndarray], texts: Sequence[np.ndarray], owner: np.ndarray, part: str = ""
) -> list[Measure]:
    """Gives the recalls both ways, each fold ranked for itself, as the mean over folds.

    Args:
        images, texts: of each fold, numbers in order. owner: (T,) of every text.
    """
    found: dict[tuple[str, str, str], list[Tensor]] = {}
    chances: dict[str, list[float]] = {}
    for fold_images, fold_texts in zip(images, texts, strict=True):
        own = np.searchsorted(fold_images, owner[fold_texts])
        texts_of, images_of = owned_by(own, len(fold_images))
        for name, chance in recall_chances(texts_of, images_of).items():
            chances.setdefault(name, []).append(chance)
        for score, sides in split.sides(fold_images, fold_texts).items():
            for direction, values in both_ways(sides, texts_of, images_of, RECALLS).items():
                for name, queries in values.items():
                    found.setdefault((score, direction, name), []).append(queries)
    made = []
    for (score, direction, name), of_folds in found.items():
        groups = [str(number) for number, each in enumerate(of_folds) for _ in each]
        where, chance = f"{part} {direction}".strip(), float(np.mean(chances[f"{direction} {name}"]))
        made.append(macro_mean(torch.cat(of_folds), groups, name, score, where, chance))
    return made


def recalls_of_sets(context: Context, sets: Iterable[Captions]) -> Result:
    """Measures each set as a whole, under its name."""
    result = Result([])
    for captions in sets:
        split = Split(context, captions)
        one = split.result()
        result.files |= one.files
        result.notes += one.notes
        images, texts = np.arange(len(captions.pictures)), np.arange(len(captions.texts))
        result.measures += recalls_of_folds(split, [images], [texts], captions.owner, captions.name)
    return result


class OwnRetrieval(Suite):
    """Every table of a folder."""

    meaning = "recall on tables of captions of your own"
    needs = (Need("caption_retrieval/*.arrow", "tables such as `python -m vlmo.utils.convert own_captions` makes"),)

    def run(self, context: Context) -> Result:
        return recalls_of_sets(context, map(read_captions, sorted(context.root.glob(self.needs[0].path))))


SUITES.register("caption_retrieval")(OwnRetrieval())
COCO = "`python -m vlmo.utils.convert coco`"
SUITES.register("coco_5k")(Retrieval("COCO's test split, 5,000 images", "coco_caption_karpathy_test", COCO))
SUITES.register("coco_1k")(
    Retrieval("the same in five folds of 1,000 images", "coco_caption_karpathy_test", COCO, FOLDS)
)
SUITES.register("flickr30k")(
    Retrieval(
        "Flickr30K's test split, 1,000 images", "f30k_caption_karpathy_test", "`python -m vlmo.utils.convert f30k`"
    )
)
