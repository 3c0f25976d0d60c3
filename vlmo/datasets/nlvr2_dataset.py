"""Sentences about pairs of images that are true or false."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlmo.batch import FLAG, VALUES, Field
from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS
from vlmo.sources.arrow_tables import RowLocation, open_table

# In a table's metadata: JSON, the official numbers of a pair's sentences by the pair's identifier, of the pairs for
# which they are not 0, 1, ... in order. (The published tables have no room for them.)
NUMBERS_KEY = b"sentence_numbers"
IDENTIFIERS_KEY = b"sentence_identifiers"  # likewise: whole identifiers of the sentences, of one's own data


def sentence_numbers(path: str | Path) -> dict[str, list[int]] | None:
    """What a table's metadata says of the sentences' numbers; None if it says nothing.

    Raises:
        VLMoError: if that is damaged.
    """
    return _lists(path, NUMBERS_KEY, int)


def sentence_identifiers(path: str | Path) -> dict[str, list[str]]:
    """The identifiers of the sentences by that of the pair, of pairs whose sentences are not just numbered in order.

    Raises:
        VLMoError: if what the table says of them is damaged.
    """
    numbers = sentence_numbers(path) or {}
    numbered = {pair: [f"{pair}-{number}" for number in of_pair] for pair, of_pair in numbers.items()}
    return numbered | (_lists(path, IDENTIFIERS_KEY, str) or {})


def _lists(path: str | Path, key: bytes, kind: Callable[[Any], Any]) -> dict[str, list[Any]] | None:
    metadata = open_table(path).schema.metadata or {}
    if key not in metadata:
        return None
    try:
        return {pair: [kind(value) for value in values] for pair, values in json.loads(metadata[key]).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise VLMoError(f"{path}: is damaged ({key.decode()}: {error}); make it again") from error


def set_of(identifier: str) -> str | None:
    """Gives {split}-{set} of an official identifier {split}-{set}-{pair}-{sentence}; None of one of another form."""
    match = re.fullmatch(r"(.+-\d+)-\d+-\d+", identifier)
    return match[1] if match else None


class NLVR2Dataset(BaseDataset):
    """A sample is one sentence with both images; the file's name tells dev from test.

    `identifier` is that of the sentence: {split}-{set}-{pair}-{sentence}, or what one's own data call it.
    """

    text_column: ClassVar[str] = "questions"
    image_columns: ClassVar[tuple[str, ...]] = ("image_0", "image_1")
    columns: ClassVar[dict[str, str]] = {
        "image_0": "binary",
        "image_1": "binary",
        "questions": "a list of texts",
        "answers": "a list of texts",
        "identifier": "anything",
    }
    fields: ClassVar[Mapping[str, Field]] = {
        "answers": FLAG,
        "table_name": VALUES,
        "identifier": VALUES,
        "sentence": VALUES,
    }

    @cached_property
    def _identifiers(self) -> list[dict[str, list[str]]]:
        """By file."""
        return [sentence_identifiers(path) for path in self.tables.paths]

    def targets(self, location: RowLocation) -> dict[str, Any]:
        pair = location.text("identifier")
        names = self._identifiers[location.table].get(pair)
        if names is not None and location.item >= len(names):
            raise VLMoError(f"{location.path}: is damaged (sentence_numbers: too few for {pair}); make it again")
        return {
            "answers": location.list_item("answers") == "True",
            "table_name": self.tables.paths[location.table].stem,
            "identifier": f"{pair}-{location.item}" if names is None else names[location.item],
            "sentence": location.list_item(self.text_column),
        }

    @classmethod
    def test_warnings(cls, paths: Sequence[Path]) -> list[str]:
        return [
            f"{path}: does not hold the numbers of a pair's sentences, the prediction file counts them in order; for "
            "the official script re-create the table"
            for path in paths
            if sentence_numbers(path) is None
        ]


DATASETS.register("nlvr2")(
    DatasetSpec(
        NLVR2Dataset,
        make_arrow="nlvr2",
        train=("nlvr2_train",),
        val=("nlvr2_dev", "nlvr2_test1"),
        test=("nlvr2_dev", "nlvr2_test1"),
        optional=frozenset({"nlvr2_test1"}),
    )
)
