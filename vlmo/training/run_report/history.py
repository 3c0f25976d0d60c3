"""A run as its folder tells it: settings, record, and the numbers logged since the first step, whoever took them.

A run that was stopped and gone on from has a folder for each part. What the earlier parts logged up to the checkpoint
that was gone on from belongs to the later ones, what they logged after it does not: those steps were taken again.
"""

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vlmo.errors import VLMoError
from vlmo.files import atomic_write
from vlmo.training.run_report.process import is_alive

RECORD = "record.json"  # what a run says of itself, in its folder
LEARNING = "learning.jsonl"  # findings while it trained, where there are any
RUNNING = "running"  # the status that a run begins with
LISTS = ("unreadable_images.txt", "nonfinite_steps.txt")

Curve = list[tuple[int, float]]  # steps done, and the value


@dataclass
class History:
    """One run.

    Attributes:
        record: empty, where the run is of before there were any.
        curves: by log tag.
        parts: the folders, first part first; the last is `folder`.
        findings: {"step", "code", "sentence"} each.
        lists: lines of the files of skipped samples and steps, by file.
    """

    folder: Path
    settings: dict[str, Any]
    record: dict[str, Any]
    curves: dict[str, Curve]
    parts: list[Path]
    findings: list[dict[str, Any]] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Reads a run's folder. Raises VLMoError if it is none."""
        record = _json(folder / RECORD)
        settings = _json(folder / "settings.json") or record.get("settings", {})
        if not settings:
            raise VLMoError(f"{folder}: is no folder of a run: it has neither settings.json nor {RECORD}")
        parts, began = zip(*_parts(folder), strict=True)
        curves: dict[str, Curve] = defaultdict(list)
        for part, end in zip(parts, [*began[1:], math.inf], strict=True):
            for tag, curve in read_metrics(part / "metrics.csv").items():
                curves[tag] += [(step, value) for step, value in curve if step <= end]
        findings = [each for part in parts for each in _lines_of_json(part / LEARNING)]
        lists = {name: lines for name in LISTS if (lines := _lines(folder / name))}
        return cls(folder, settings, record, dict(curves), list(parts), findings, lists)

    @property
    def name(self) -> str:
        return f"{self.settings.get('exp_name', '')} {self.folder.parent.name}/{self.folder.name}".strip()

    @property
    def latest(self) -> dict[str, float]:
        """The last value of every tag: as logged; as the run returned it, where nothing was logged to a file."""
        return {**self.record.get("metrics", {}), **{tag: curve[-1][1] for tag, curve in self.curves.items() if curve}}

    @property
    def steps(self) -> int:
        """Steps done; of a run that was killed, up to what it logged or saved last."""
        logged = max((curve[-1][0] for tag, curve in self.curves.items() if curve and "/train/" in tag), default=0)
        saved = [re.search(r"-step=(\d+)", path.name) for path in self.folder.glob("checkpoints/*.ckpt")]
        return max(self.record.get("steps") or 0, logged, *(int(found[1]) for found in saved if found))

    @property
    def status(self) -> str:
        """How the run ended, in a sentence; of one that has not said, whether its process is still there."""
        return how_it_ended(self.record)

    @property
    def last_sign(self) -> str:
        """When the run ended; of one that has not said, when it last logged something."""
        logged = self.folder / "metrics.csv"
        found = self.record.get("ended") or (time_of_day(logged.stat().st_mtime) if logged.is_file() else "?")
        return str(found)

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint of a training, what an evaluation evaluated; None if it is gone."""
        last = self.folder / "checkpoints" / "last.ckpt"
        place = Path(self.settings.get("load_path", "")) if self.settings.get("test_only") else last
        return place if place.name and place.exists() else None

    @property
    def ended_parts(self) -> list[tuple[str, str]]:
        """Name and end of each part."""
        return [(part.name, how_it_ended(_json(part / RECORD))) for part in self.parts]


def how_it_ended(record: Mapping[str, Any]) -> str:
    """Gives how a run ended by its record, in a sentence."""
    status = str(record.get("status", "unknown: of a version that kept no record"))
    if status != RUNNING:
        return status
    process = record.get("process", {})
    alive = is_alive(process)
    if alive:
        return f"still running at {now()}"
    if alive is None:
        where = f", process {process['pid']} on {process['host']}" if process else ""
        return f"unknown: has not said how it ended, and from here it cannot be told whether it still runs{where}"
    return "did not end: its process is gone, killed or out of memory"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes what a run says of itself; raises OSError if it cannot be written."""
    with atomic_write(folder / RECORD) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode("utf-8", "backslashreplace"))


def now() -> str:
    return time_of_day(datetime.now().timestamp())


def time_of_day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def read_metrics(path: Path) -> dict[str, Curve]:
    """Gives the curves of a metrics.csv, none without a file; its steps count from 0, those of a curve are done."""
    curves: dict[str, Curve] = defaultdict(list)
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row["step"]) + 1
            except (KeyError, TypeError, ValueError):
                continue  # the last line of a run that was killed may be half of one
            for tag, text in row.items():
                if text and isinstance(text, str) and tag not in ("step", "epoch"):
                    value = _number(text)
                    if value is not None:
                        curves[tag].append((step, value))
    return dict(curves)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parts(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yields the folders of a run, first part first, each with the step that it went on from."""
    chain: list[tuple[Path, int]] = []
    place: Path | None = folder
    while place and place not in (part for part, _ in chain):
        record = _json(place / RECORD)
        chain.append((place, int(record.get("resumed_at") or 0)))
        place = _folder_of(record.get("resumed_from"), place)
    yield from reversed(chain)


def _folder_of(checkpoint: str | None, beside: Path) -> Path | None:
    """The folder of the run that a checkpoint is of, also after all of them were moved together."""
    if not checkpoint:
        return None
    folder = Path(checkpoint).parent.parent
    for each in (folder, beside.parent / folder.name):
        if each.is_dir() and each != beside and ((each / RECORD).is_file() or (each / "metrics.csv").is_file()):
            return each
    return None


def find_run(given: str | Path) -> Path:
    """Gives the folder of a run; it may be given by a checkpoint in it, or by the folder of its versions (the newest).

    Raises:
        VLMoError: if there is none.
    """
    place = Path(given).expanduser()
    candidates = [
        place,
        place.parent,
        place.parent.parent,
        *sorted(place.glob("version_*"), key=_version, reverse=True),
    ]
    for each in candidates[:1] if (place / "settings.json").is_file() else candidates:
        if (each / "settings.json").is_file() or (each / RECORD).is_file():
            return each
    raise VLMoError(f"{given}: is no run; give its folder (LOG_DIR/NAME/version_K) or a checkpoint in it")


def _version(folder: Path) -> int:
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VLMoError(f"{path}: is damaged ({error}); remove it") from error
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _lines_of_json(path: Path) -> Iterator[dict[str, Any]]:
    for line in _lines(path):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if isinstance(found, dict):
            yield found
