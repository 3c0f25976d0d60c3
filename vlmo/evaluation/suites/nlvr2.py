"""NLVR2: accuracy and consistency on every table that is there, by the definitions of its own script."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmo.datasets.nlvr2_dataset import sentence_identifiers, set_of
from vlmo.evaluation.chunks import Output, in_chunks
from vlmo.evaluation.measures import Measure, mean_of
from vlmo.evaluation.pair_scores import IMAGES_AT_ONCE
from vlmo.evaluation.pictures import Picture, of_table
from vlmo.evaluation.suites.base import Context, Need, Result, Suite, sha256, warn_of_unknown
from vlmo.evaluation.suites.decisions import Decisions, add_decisions, classify, require_head
from vlmo.registry import SUITES
from vlmo.sources.arrow_tables import ArrowTables

HEAD = "nlvr2_classifier"
NAMES = ("false", "true")


class Statements(NamedTuple):
    """Statements about pairs of images, pair by pair.

    Attributes:
        pictures: of each pair the left and the right one.
        starts: (pairs + 1,) where each pair's statements begin.
        truth: (S,) 0 or 1.
        identifiers: of the statements, {split}-{set}-{pair}-{sentence}.
    """

    pictures: list[tuple[Picture, Picture]]
    starts: np.ndarray
    texts: list[str]
    truth: Tensor
    identifiers: list[str]


def read_statements(path: Path) -> Statements:
    """Reads a table of statements (DATA.md)."""
    tables, named = ArrowTables([path], "questions"), sentence_identifiers(path)
    places = [tables.text(number) for number in range(tables.num_texts)]
    pairs = [place.text("identifier") for place in places]
    return Statements(
        [(of_table(tables, row, "image_0"), of_table(tables, row, "image_1")) for row in range(tables.num_rows)],
        np.searchsorted([place.image for place in places], np.arange(tables.num_rows + 1)),
        [str(place.list_item("questions")) for place in places],
        torch.tensor([int(place.list_item("answers") == "True") for place in places]),
        [
            named[pair][place.item] if pair in named else f"{pair}-{place.item}"
            for pair, place in zip(pairs, places, strict=True)
        ],
    )


def judge(context: Context, data: Statements, key: str) -> tuple[Tensor, Tensor]:
    """Gives (S,) the probability that each is true, nan where an image cannot be decoded; (pairs,) bool which can."""
    scorer = context.scorer

    def compute(start: int, stop: int, prepared: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        pixels, known = prepared[0].unflatten(0, (-1, 2)), prepared[1].unflatten(0, (-1, 2)).all(1)
        rows = np.repeat(np.arange(stop - start), np.diff(data.starts[start : stop + 1])).tolist()
        own = data.texts[data.starts[start] : data.starts[stop]]
        logits = classify(scorer, HEAD, [pixels[:, 0], pixels[:, 1]], rows, own)
        true = logits.softmax(1)[:, 1].masked_fill(~known[rows], torch.nan) if rows else torch.empty(0)
        return {"true": true, "known": known}

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return scorer.read([picture for pair in data.pictures[start:stop] for picture in pair])

    outputs, store = {"true": Output((), data.starts), "known": Output()}, context.store("nlvr2", key)
    size = IMAGES_AT_ONCE // 2
    found = in_chunks("judge statements", len(data.pictures), size, outputs, compute, read, store, torch.float64)
    return found["true"], found["known"] > 0


def consistencies(data: Statements, right: Tensor) -> list[list[bool]] | None:
    """Gives, of each sentence, which of its statements are judged rightly; None if identifiers are of another form.

    A sentence stands with several pairs of one set.
    """
    found: dict[tuple[str, str], list[bool]] = {}
    for identifier, sentence, good in zip(data.identifiers, data.texts, right.tolist(), strict=True):
        place = set_of(identifier)
        if place is None:
            return None
        found.setdefault((place, sentence), []).append(good)
    return list(found.values())


def measures(data: Statements, right: Tensor, part: str) -> list[Measure]:
    """Gives accuracy, and the share of sentences that are judged rightly with all of their pairs."""
    share = float(data.truth.double().mean())
    found = [mean_of(right, "accuracy", "", part, max(share, 1 - share))]
    if (sentences := consistencies(data, right)) is not None:
        chance = float(np.mean([0.5 ** len(each) for each in sentences]))
        found.append(mean_of(torch.tensor([all(each) for each in sentences]), "consistency", "", part, chance))
    return found


class Nlvr2Suite(Suite):
    """Every table but that of training, each for itself."""

    meaning = "NLVR2: accuracy and consistency, for checkpoints that compare two images"
    needs = (Need("nlvr2_dev.arrow", "the table that `python -m vlmo.utils.convert nlvr2` makes (DATA.md)"),)
    of_pairs = False

    def run(self, context: Context) -> Result:
        require_head(context.scorer, HEAD, "nlvr2")
        result = Result([])
        for path in sorted(context.root.glob("nlvr2_*.arrow")):
            if path.stem != "nlvr2_train":
                self.measure(context, path, result)
        return result

    def measure(self, context: Context, path: Path, result: Result) -> None:
        """Adds the figures of one table."""
        part, data = path.stem.removeprefix("nlvr2_"), read_statements(path)
        result.files[str(path)] = sha256(path)
        true, known = judge(context, data, result.files[str(path)])
        warn_of_unknown(result, known, "the statements about their pairs count as wrong", "pairs of images")
        chosen = (true > 0.5).long()
        right = (chosen == data.truth) & ~true.isnan()
        result.measures += measures(data, right, part)
        pair_of = np.repeat(np.arange(len(data.pictures)), np.diff(data.starts))

        def show(number: int) -> tuple[list[Picture], list[str]]:
            said = f"{NAMES[int(data.truth[number])]}; judged true with probability {float(true[number]):.2f}"
            return list(data.pictures[pair_of[number]]), [data.texts[number], said, data.identifiers[number]]

        made = Decisions(data.truth, chosen, torch.maximum(true, 1 - true), right.double())
        add_decisions(result, part, NAMES, made, show)


SUITES.register("nlvr2")(Nlvr2Suite())
