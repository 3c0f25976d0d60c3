"""What can be wrong with the Arrow files of a run: found before anything is built, and reported all at once."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmo.datasets.base_dataset import DatasetSpec
from vlmo.datasets.source_spec import SourceSpec
from vlmo.errors import VLMoError
from vlmo.sources.arrow_tables import ArrowTables, is_list, is_text, open_table
from vlmo.sources.options import SourceOptions
from vlmo.sources.tables import SourceTables


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


def split_tables(
    root: Path, spec: DatasetSpec, split: str, settings: Any, images_alone: bool
) -> list[Path] | SourceTables:
    """What a data set is opened with for a split: Arrow files, or the tables of a source.

    Raises:
        VLMoError: if a source cannot be read.
    """
    if isinstance(spec, SourceSpec):
        return spec.open(split, SourceOptions.from_settings(settings), images_alone)
    return split_files(root, spec, split)


def check_tables(
    data_root: str,
    specs: Mapping[str, DatasetSpec],
    splits: Sequence[str],
    needed: Sequence[Sequence[str]],
    settings: Any,
    images_alone: bool = False,
) -> Findings:
    """Looks at every file that the splits need; sources are indexed where they are not.

    Args:
        data_root: folder of the Arrow files; sources need none.
        specs: data sets by name.
        splits: of "train", "val" and "test". A file of "train" must hold texts; one of the others may be empty.
        needed: groups of splits; the run is for nothing if all of a group are empty.
        settings: of the run, which the labels must fit.
        images_alone: whether nobody reads texts.
    """
    findings = Findings()
    for name, spec in specs.items():
        if isinstance(spec, SourceSpec):
            _check_source(name, spec, splits, settings, images_alone, findings)
    tables = {name: spec for name, spec in specs.items() if not isinstance(spec, SourceSpec)}
    if tables:
        _check_root(data_root, tables, splits, settings, findings)
    if not findings.problems:
        place = f" in {data_root}" if tables else ""
        findings.problems += [
            f"datasets={list(specs)}: none has texts for {' or '.join(group)}{place}"
            for group in needed
            if not any(findings.texts[split] for split in group)
        ]
    return findings


def _check_source(
    name: str, spec: SourceSpec, splits: Sequence[str], settings: Any, images_alone: bool, findings: Findings
) -> None:
    for split in splits:
        if split not in spec.splits:
            continue
        try:
            tables = spec.open(split, SourceOptions.from_settings(settings), images_alone)
        except VLMoError as error:
            findings.problems += [f"{name}: {line}" for line in str(error).splitlines()]
            return
        findings.texts[split] += tables.num_rows if images_alone else tables.num_texts
        lines = tables.summary()
        if not tables.num_rows:
            what = "images" if images_alone else "images with captions; name the column with text_column=NAME"
            findings.problems.append(f"{name}: has no {what}{''.join('; ' + line for line in lines)}")
        findings.warnings += [f"{name}: {line}" for line in lines if not images_alone]


def _check_root(
    data_root: str, specs: Mapping[str, DatasetSpec], splits: Sequence[str], settings: Any, findings: Findings
) -> None:
    if not data_root:
        findings.problems.append("data_root: is empty; pass data_root=FOLDER, the folder of the .arrow files")
        return
    root = Path(data_root).expanduser()
    if not root.is_dir():
        findings.problems.append(f"data_root: {root} is not a folder; pass the folder of the .arrow files")
        return
    for name, spec in specs.items():
        _check_dataset(root, name, spec, splits, settings, findings)


def _check_dataset(
    root: Path, name: str, spec: DatasetSpec, splits: Sequence[str], settings: Any, findings: Findings
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
            findings.warnings.append(f"{name}: {root / stem}.arrow is missing; continuing without it")
        else:
            findings.problems.append(f"{name}: {root / stem}.arrow is missing")
            absent = True
    findings.problems += spec.dataset.check_labels(name, root, labelled, settings)
    if absent and spec.make_arrow:
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
    return [f"{name}: {stem}.arrow: continuing without the shards {', '.join(missing)}"] if missing else []


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
    findings.warnings.append(f"{line}; continuing without it")  # such as a Karpathy JSON without a test split
    return []


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return is_text(kind) or (pa.types.is_dictionary(kind) and is_text(kind.value_type))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _list_of(is_entry: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    """Lists of such entries, or of none at all."""
    return lambda kind: is_list(kind) and (is_entry(kind.value_type) or pa.types.is_null(kind.value_type))


_KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "binary": _is_binary,
    "a whole number": pa.types.is_integer,
    "a list": is_list,
    "a list of texts": _list_of(_is_text),
    "a list of whole numbers": _list_of(pa.types.is_integer),
    "a list of lists": _list_of(is_list),
    "a list of lists of texts": _list_of(_list_of(_is_text)),
    "a list of lists of whole numbers": _list_of(_list_of(pa.types.is_integer)),
    "a list of lists of numbers": _list_of(_list_of(_is_number)),
    "anything": lambda kind: True,
}
