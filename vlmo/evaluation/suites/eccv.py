"""COCO's test split with the false negatives corrected, through the files of the package eccv-caption."""

import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmo.errors import VLMoError
from vlmo.evaluation.measures import Measure, mean_of
from vlmo.evaluation.rankings import OF_LISTS, RECALLS, Sides, both_ways, precision_at_r, recall_chances
from vlmo.evaluation.suites.base import Context, Need, Result, Suite, read_json, sha256
from vlmo.evaluation.suites.retrieval import FOLDS, Captions, Split, read_captions, recalls_of_folds
from vlmo.registry import SUITES


class EccvCaption(Suite):
    """COCO's test split with captions and images that fit beyond the original pairs (ECCV Caption, arXiv 2204.03359).

    mAP@R, R-Precision and R@1 of ECCV Caption; recalls of CxC (arXiv 2004.15020); R-Precision by plausible matches (PM,
    arXiv 2101.05068), where its files are there; and COCO 1K in the package's own folds.
    """

    meaning = "COCO with the false negatives corrected: mAP@R, R-Precision, CxC, PMRP"
    needs = (
        Need("coco_caption_karpathy_test.arrow", "the table that `python -m vlmo.utils.convert coco` makes (DATA.md)"),
        Need("captions_val2014.json", "annotations/captions_val2014.json of COCO's annotations_trainval2014.zip"),
    )
    plausible = ("pm_image_to_caption.json", "pm_caption_to_image.json")

    def check(self, name: str, root: Path) -> None:
        super().check(name, root)
        if importlib.util.find_spec("eccv_caption") is None:
            raise VLMoError(f'suite {name}: needs the package eccv-caption: pip install "vlmo[evaluate]"')

    def run(self, context: Context) -> Result:
        truth = load_truth(context.root if all((context.root / name).is_file() for name in self.plausible) else None)
        captions = read_captions(context.root / self.needs[0].path)
        annotations = context.root / self.needs[1].path
        split = Split(context, captions)
        result = split.result()
        result.files[str(annotations)] = sha256(annotations)
        if not truth.plausible:
            where = "github.com/naver-ai/eccv-caption says where"
            result.notes.append(f"PMRP is left out: {context.root} has no {' and '.join(self.plausible)} ({where})")
        rows = rows_of_captions(captions, read_json(annotations), truth.caption_ids)
        images = np.arange(len(captions.pictures))
        texts = np.sort(np.fromiter(rows.values(), np.int64))
        numbers = Numbers(
            {image_number(name): row for row, name in enumerate(captions.image_ids)},
            {caption: int(np.searchsorted(texts, row)) for caption, row in rows.items()},
        )
        for score, sides in split.sides(images, texts).items():
            result.measures += measure_truth(sides, truth, numbers, score)
        size = len(truth.caption_ids) // FOLDS
        folds = [
            np.sort([rows[each] for each in truth.caption_ids[start : start + size]])
            for start in range(0, size * FOLDS, size)
        ]
        of_folds = [np.unique(captions.owner[fold]) for fold in folds]
        result.measures += recalls_of_folds(split, of_folds, folds, captions.owner, "COCO 1K")
        return result


class Truth(NamedTuple):
    """What fits, as eccv-caption has it: (image to captions, caption to images), by COCO's numbers."""

    eccv: tuple[dict[int, list[int]], dict[int, list[int]]]
    cxc: tuple[dict[int, list[int]], dict[int, list[int]]]
    plausible: tuple[dict[int, list[int]], dict[int, list[int]]] | None
    caption_ids: list[int]


class Numbers(NamedTuple):
    """Rows of images and captions among those that are ranked, by COCO's numbers."""

    images: dict[int, int]
    captions: dict[int, int]


def load_truth(folder: Path | None = None) -> Truth:
    """Reads the package's files. folder: with the files of plausible matches; None: without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a faster JSON is not installed
        from eccv_caption import Metrics
    known = Metrics(extra_file_dir=None if folder is None else str(folder))
    sets = [(each["i2t"], each["t2i"]) for each in (known.eccv_gts, known.cxc_gts)]
    plausible = (known.pm_gts["i2t"], known.pm_gts["t2i"]) if known.pm_gts else None
    return Truth(sets[0], sets[1], plausible, known.coco_ids.tolist())


def image_number(name: str) -> int:
    """Gives COCO's number of an image from the name of its file."""
    digits = re.findall(r"\d+", Path(name).stem)
    if not digits:
        raise VLMoError(f"image {name!r}: has no number; the table must be made of COCO's own files")
    return int(digits[-1])


def rows_of_captions(captions: Captions, annotations: Any, wanted: Sequence[int]) -> dict[int, int]:
    """Finds the row of each of COCO's captions: by image and text, as tables hold no numbers of captions.

    Raises:
        VLMoError: if some are not in the table.
    """
    rows: dict[tuple[int, str], list[int]] = {}
    for row, text in enumerate(captions.texts):
        rows.setdefault((image_number(captions.image_ids[captions.owner[row]]), _normal(text)), []).append(row)
    wanted_set, found = set(wanted), {}
    for each in annotations["annotations"]:
        if each["id"] in wanted_set and (own := rows.get((each["image_id"], _normal(each["caption"])))):
            found[each["id"]] = own.pop(0)
    if missing := len(wanted_set) - len(found):
        raise VLMoError(
            f"{captions.name}: lacks {missing:,} of the {len(wanted_set):,} captions of COCO's test split that "
            "eccv-caption judges by; make it from the Karpathy split (DATA.md)"
        )
    return found


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def measure_truth(sides: Sides, truth: Truth, numbers: Numbers, score: str) -> list[Measure]:
    """Gives the figures of ECCV Caption, CxC and plausible matches."""
    sets = [("ECCV", truth.eccv, OF_LISTS), ("CxC", truth.cxc, RECALLS)]
    if truth.plausible:
        sets.append(("PM", truth.plausible, {"R-Precision": precision_at_r}))
    found = []
    for part, (captions_of, images_of), statistics in sets:
        # (two captions of ECCV's lists are not among the 25,000 that are ranked: they count in R, and are not found)
        of_images = [np.array([numbers.captions.get(each, -1) for each in set(own)]) for own in captions_of.values()]
        of_texts = [np.array([numbers.images[each] for each in set(own)]) for own in images_of.values()]
        images = np.array([numbers.images[each] for each in captions_of])
        texts = np.array([numbers.captions[each] for each in images_of])
        totals = (len(sides.images), len(sides.texts))
        chances = recall_chances(of_images, of_texts, totals)
        for direction, values in both_ways(sides, of_images, of_texts, statistics, images, texts).items():
            for name, of_queries in values.items():
                chance = chances.get(f"{direction} {name}", float("nan"))
                found.append(mean_of(of_queries, name, score, f"{part} {direction}", chance))
    return found


SUITES.register("eccv_caption")(EccvCaption())
