"""What can be wrong with the Arrow files of a run: found before anything is built, and reported all at once."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmo.datasets import DatasetSpec
from vlmo.datasets.arrow_tables import ArrowTables, open_table
from vlmo.datasets.nlvr2_dataset import NLVR2Dataset, sentence_numbers
from vlmo.datasets.vqa_dataset import ANSWERS_FILE, VQADataset
from vlmo.errors import VLMoError


@dataclass
class Findings:
    """One line each: problems stop the run, warnings are worth a look; and the number of texts of each split."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    texts: Counter[str] = field(default_factory=Counter)


def find_files(root: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """The files there are for each of `names`, shards in the order of their numbers."""
    present = sorted(path.name for path in root.glob("*.arrow"))
    found: dict[str, list[Path]] = {}
    for name in names:
        pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"\.arrow")
        matches = [match for match in map(pattern.fullmatch, present) if match]
        matches.sort(key=lambda match: [int(number) for number in match.groups()])
        found[name] = [root / match.string for match in matches]
    return found


def split_files(root: Path, spec: DatasetSpec, split: str) -> list[Path]:
    """The files of a split, in order."""
    return [path for paths in find_files(root, spec.files(split)).values() for path in paths]


def check_tables(
    data_root: str,
    specs: Mapping[str, DatasetSpec],
    splits: Sequence[str],
    needed: Sequence[Sequence[str]],
    label_size: int,
) -> Findings:
    """Looks at every file that the splits need.

    Args:
        data_root: folder of the Arrow files.
        specs: data sets by name.
        splits: of "train", "val" and "test". A file of "train" must hold texts; one of the others may be empty.
        needed: groups of splits; the run is for nothing if all of a group are empty.
        label_size: number of VQA answers that the model has room for.
    """
    findings = Findings()
    if not data_root:
        findings.problems.append("data_root: is empty; pass data_root=FOLDER, the folder of the .arrow files")
        return findings
    root = Path(data_root).expanduser()
    if not root.is_dir():
        findings.problems.append(f"data_root: {root} is no folder; pass the folder of the .arrow files")
        return findings
    for name, spec in specs.items():
        _check_dataset(root, name, spec, splits, label_size, findings)
    if not findings.problems:
        findings.problems += [
            f"datasets={list(specs)}: none has texts for {' or '.join(group)} in {root}"
            for group in needed
            if not any(findings.texts[split] for split in group)
        ]
    return findings


def _check_dataset(
    root: Path, name: str, spec: DatasetSpec, splits: Sequence[str], label_size: int, findings: Findings
) -> None:
    names = dict.fromkeys(stem for split in splits for stem in spec.files(split))  # in order, each once
    absent = False
    labelled: list[Path] = []
    for stem, paths in find_files(root, names).items():
        optional = stem in spec.optional
        if paths:
            targets = any(stem in spec.files(split) for split in splits if split != "test")
            problems = [problem for path in paths for problem in _check_columns(path, spec, targets)]
            problems = problems or _count_texts(name, stem, paths, spec, findings)
            findings.problems += problems
            findings.warnings += _gaps(name, stem, paths)
            labelled += [] if problems or not targets else paths
        elif optional:
            findings.warnings.append(f"{name}: {root / stem}.arrow is missing; going on without it")
        else:
            findings.problems.append(f"{name}: {root / stem}.arrow is missing")
            absent = True
    if issubclass(spec.dataset, VQADataset):
        findings.problems += _check_labels(root, name, labelled, label_size)
    if absent:
        findings.problems.append(
            f"{name}: make its files with `from vlmo.utils.write_{spec.make_arrow} import make_arrow; "
            f"make_arrow(root, data_root)` or `python -m vlmo.utils.convert {spec.make_arrow} ROOT {root}`"
        )


def _gaps(name: str, stem: str, paths: Sequence[Path]) -> list[str]:
    """A warning for numbers missing between the shards."""
    if "*" not in stem:
        return []
    prefix, suffix = stem.split("*")
    numbers = {int(path.stem.removeprefix(prefix).removesuffix(suffix)) for path in paths}
    missing = [str(number) for number in range(max(numbers)) if number not in numbers]
    return [f"{name}: {stem}.arrow: going on without the shards {', '.join(missing)}"] if missing else []


def _check_columns(path: Path, spec: DatasetSpec, targets: bool) -> list[str]:
    """Can it be opened, and does it have the columns, with `targets` those of the targets too?"""
    try:
        reader = open_table(path)
        empty = not any(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
    except VLMoError as error:
        return [str(error)]
    except (pa.ArrowInvalid, OSError) as error:
        return [f"{path}: is damaged ({error}); make it again"]
    columns = spec.dataset.columns | (spec.dataset.target_columns if targets else {})
    problems = []
    for column, kind in columns.items():
        if column not in reader.schema.names:
            problems.append(f"{path}: has no column {column!r}; it has {', '.join(reader.schema.names)}")
        elif not empty and not _KINDS[kind](reader.schema.field(column).type):
            problems.append(f"{path}: column {column!r} is {reader.schema.field(column).type}, not {kind}")
    return problems


def _count_texts(name: str, stem: str, paths: Sequence[Path], spec: DatasetSpec, findings: Findings) -> list[str]:
    """Fills in `findings.texts`, and warns of an empty table; returns problems."""
    try:
        texts = ArrowTables(paths, spec.dataset.text_column).num_texts
    except VLMoError as error:
        return [str(error)]
    for split in ("train", "val", "test"):
        findings.texts[split] += texts if stem in spec.files(split) else 0
    if texts or stem in spec.optional:
        return []
    line = f"{name}: {paths[0].parent / stem}.arrow: has no {spec.dataset.text_column or 'rows'}"
    if stem in spec.train:
        return [line]
    findings.warnings.append(f"{line}; going on without it")  # such as a Karpathy JSON without a test split
    return []


def unnumbered_sentences(root: Path, specs: Mapping[str, DatasetSpec]) -> list[str]:
    """A warning for each NLVR2 table to be evaluated that does not hold the sentences' official numbers."""
    paths = [
        path
        for spec in specs.values()
        if issubclass(spec.dataset, NLVR2Dataset)
        for path in split_files(root, spec, "test")
        if sentence_numbers(path) is None
    ]
    return [
        f"{path}: does not tell the numbers of a pair's sentences, the prediction file counts them in order; for the "
        "official script make the table anew"
        for path in paths
    ]


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_list_of_lists(kind: pa.DataType) -> bool:
    return _is_list(kind) and (_is_list(kind.value_type) or pa.types.is_null(kind.value_type))


_KINDS = {"binary": _is_binary, "a list": _is_list, "a list of lists": _is_list_of_lists, "anything": lambda kind: True}


def _flat_columns(path: Path, *columns: str) -> Iterator[list[pa.Array]]:
    """The innermost values of nested list columns, a record batch at a time."""
    reader = open_table(path)
    for number in range(reader.num_record_batches):
        record = reader.get_batch(number)
        arrays = [record.column(column) for column in columns]
        try:
            for array in arrays:
                array.validate(full=True)  # all of it will be read
        except pa.ArrowInvalid as error:
            raise VLMoError(f"{path}: is damaged ({error}); make it again") from error
        while any(_is_list(array.type) for array in arrays):
            arrays = [array.flatten() for array in arrays]
        if not any(pa.types.is_null(array.type) for array in arrays):  # (nobody has answered)
            yield arrays


def _check_labels(root: Path, name: str, paths: Sequence[Path], label_size: int) -> list[str]:
    """Is there an output for every label that occurs in `paths`, and for every answer of the vocabulary?"""
    try:
        vocabulary = read_answers(root) or []
        bounds = [pc.min_max(labels) for path in paths for (labels,) in _flat_columns(path, "answer_labels")]
    except VLMoError as error:
        return [str(error)]
    known = [bound for bound in bounds if bound["max"].is_valid]
    lowest = min((bound["min"].as_py() for bound in known), default=0)
    number = max([len(vocabulary), *(bound["max"].as_py() + 1 for bound in known)])
    if lowest < 0:
        return [f"{name}: the data has the label {lowest}; labels count from 0"]
    if number > label_size:
        return [f"{name}: the data has {number} answers: pass vqav2_label_size={number}"]
    return []


def read_answers(root: Path) -> list[str] | None:
    """The answers in the order of their labels, from the file beside the tables; None if there is none.

    Raises:
        VLMoError: if it is not a list of strings.
    """
    path = root / ANSWERS_FILE
    return read_answers_file(path) if path.is_file() else None


def read_answers_file(path: Path) -> list[str]:
    """The answers in the order of their labels. Raises VLMoError if the file is not a list of strings in JSON."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VLMoError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise VLMoError(f"{path}: must be a list of answers, in the order of their labels")
    return answers


def answers_in_tables(paths: Iterable[Path]) -> list[str]:
    """The answer of each label, as far as the tables show it ("" for labels that do not occur)."""
    vocabulary: dict[int, Any] = {}
    for path in paths:
        for answers, labels in _flat_columns(path, "answers", "answer_labels"):
            numbers, first = np.unique(labels.to_numpy(zero_copy_only=False), return_index=True)
            vocabulary |= dict(zip(numbers.tolist(), answers.take(pa.array(first)).to_pylist(), strict=True))
    return [vocabulary.get(label, "") for label in range(max(vocabulary, default=-1) + 1)]
