"""What a suite is: what it needs on the disk, and what it says of a model.

To add one, register an instance of a `Suite` of yours: `SUITES.register("mine")(Mine())`, here or in a plug-in.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vlmo.errors import VLMoError
from vlmo.evaluation.chunks import Store
from vlmo.evaluation.measures import Measure
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.pictures import Picture

log = logging.getLogger(__name__)


class Need(NamedTuple):
    """A file or folder that a suite reads.

    Attributes:
        path: below the root of the data; a pattern such as "pairs/*.json" stands for one file or more.
        source: what it is, and where it is to be had.
        instead: another path that will do as well; "" for none.
    """

    path: str
    source: str
    instead: str = ""

    @property
    def where(self) -> str:
        return f"{self.path} or {self.instead}" if self.instead else self.path

    def there(self, root: Path) -> bool:
        """Tells whether something has its path below `root`."""
        return any(root.glob(self.path)) or bool(self.instead and any(root.glob(self.instead)))


@dataclass(frozen=True)
class Context:
    """What a suite works with.

    Attributes:
        scorer: the model.
        root: of the data.
        work: folder of one checkpoint for what is computed once; None: nothing is kept.
        rerank: candidates of each query that are ordered anew; 0 for none.
        rerank_by: scores of pairs that order them.
        blocks: whose features are probed, from 0; none: the last.
    """

    scorer: Scorer
    root: Path
    work: Path | None = None
    rerank: int = 0
    rerank_by: tuple[str, ...] = ("itm",)
    blocks: tuple[int, ...] = ()

    def store(self, name: str, *content: Any) -> Store:
        """Gives the store of some data: another one where the content (plain values) is another."""
        scorer = self.scorer
        options = [scorer.model.image_size, scorer.model.max_text_len, scorer.decoding, scorer.names]
        key = hashlib.sha256(json.dumps([options, *content]).encode()).hexdigest()[:16]
        return Store(None if self.work is None else self.work / f"{name}-{key}")


class Example(NamedTuple):
    """One item for the eye.

    Attributes:
        pictures: its images.
        lines: what is said of it, texts with their scores.
        margin: by how much the right answer scored above the best wrong one; or how sure the choice was.
        score: by which score of pairs, or of which part of the data.
    """

    pictures: list[Picture]
    lines: list[str]
    margin: float
    score: str


class Confusion(NamedTuple):
    """What was taken for what.

    Attributes:
        names: of the classes that are shown.
        counts: (C, C), rows the truth.
        classes: how many there are in all.
    """

    names: list[str]
    counts: Tensor
    classes: int


@dataclass
class Result:
    """What a suite says of a model.

    Attributes:
        measures: the figures.
        files: SHA-256 of the files of annotations, by path.
        notes: what the reader must know.
        best, worst: examples.
        calibration: (N,) confidences and (N,) how right, in [0, 1], by score or part.
        confusion: likewise.
    """

    measures: list[Measure]
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    calibration: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    confusion: dict[str, Confusion] = field(default_factory=dict)


class Suite:
    """Base of suites.

    Attributes:
        meaning: one line for people.
        needs: what must lie below the root of the data.
        of_pairs: whether it measures by scores of pairs, of which a model may lack some.
    """

    meaning: str = ""
    needs: tuple[Need, ...] = ()
    of_pairs: bool = True

    def check(self, name: str, root: Path) -> None:
        """Raises VLMoError if something is missing, saying what to download and where to put it."""
        if not root.is_dir():
            raise VLMoError(f"--data {root}: is not a folder; give the one that holds the data of the suites")
        missing = [need for need in self.needs if not need.there(root)]
        if missing:
            lines = [f"suite {name}: {root / need.where} is missing: {need.source}" for need in missing]
            raise VLMoError("\n".join(lines))

    def run(self, context: Context) -> Result:
        """Measures the model, in all processes; each gets the result."""
        raise NotImplementedError


def sha256(path: Path) -> str:
    """Gives the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises VLMoError, naming it, if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VLMoError(f"{path}: cannot be read as JSON ({error}); download it again") from error


def warn_of_unknown(result: Result, known: Tensor, what: str, which: str = "images") -> None:
    """Notes how many images cannot be decoded, and what becomes of their items."""
    if unknown := int((~known).sum()):
        result.notes.append(f"{unknown:,} {which} cannot be decoded: {what}")
