"""Annotation files are untrusted: readers that name the file and line of whatever is wrong, and file checks."""

import ast
import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from vlmo.errors import VLMoError

SHOWN_PROBLEMS = 10
CSV_FIELD_LIMIT = 1 << 24  # characters; csv's own limit of 131,072 refuses long texts

Located = tuple[str, dict[str, Any]]  # where it stands ("captions.jsonl:12"), the record


def raise_problems(problems: list[str]) -> None:
    """Raises one VLMoError with a line for each problem; does nothing without problems."""
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise VLMoError("\n".join(shown))


def require_files(root: str, needed: Iterable[str], layout: str) -> None:
    """Raises one VLMoError that names every missing file or folder and shows the expected layout."""
    if not os.path.isdir(root):
        raise VLMoError(f"{root} is not a folder. Expected there:{layout.rstrip()}")
    missing = [path for path in needed if not os.path.exists(os.path.join(root, path))]
    if missing:
        raise VLMoError(f"missing in {root}: {', '.join(missing)}\nExpected there:{layout.rstrip()}")


def inside(root: str, path: str, where: str) -> str:
    """`path` below `root`; a VLMoError if it leads out of it (judged by name: links inside are the user's own)."""
    joined = os.path.join(root, path)
    if "\0" in path:
        raise VLMoError(f"{where}: {path!r} is no path")
    if ".." in path or os.path.isabs(path):  # most are neither, and there are millions
        top = os.path.abspath(root)
        if os.path.commonpath([top, os.path.abspath(joined)]) != top:
            raise VLMoError(f"{where}: the path {path!r} leads out of {root}")
    return joined


def field(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[key]` if it is a `kind` (a bool is no int here), else a VLMoError that names `where`."""
    if not isinstance(record, dict):
        raise VLMoError(f"{where}: expected an object with {key!r}, found {_short(record)}")
    if key not in record:
        raise VLMoError(f"{where}: {key!r} is missing (found: {', '.join(map(repr, record)) or 'nothing'})")
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(each.__name__ for each in kinds)
        raise VLMoError(f"{where}: {key!r} must be {names}, found {_short(value)}")
    return value


def column(records: list[Any], key: str, kind: type, where: str) -> list[Any]:
    """`field` of every record; quick where nothing is wrong, as there are millions."""
    try:
        values = [record[key] for record in records]
    except (TypeError, KeyError):
        values = [None]
    if all(type(value) is kind for value in values):
        return values
    return [field(record, key, kind, where) for record in records]


def integer(record: Any, key: str, where: str) -> int:
    """`record[key]` as an integer of 64 bits; whole numbers such as 3.0 are accepted."""
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is int and abs(value) < 1 << 63:
        return value
    value = field(record, key, (int, float), where)
    if value != value or abs(value) >= 1 << 63 or value != int(value):
        raise VLMoError(f"{where}: {key!r} must be a whole number of at most 64 bits, found {_short(value)}")
    return int(value)


def listed(text: str) -> list[Any] | None:
    """The list that a text spells as JSON or Python does (a column of lists in a CSV); None if it is no list.

    Raises:
        VLMoError: for what looks like a list of texts and cannot be read as one, such as numpy's ['a' 'b'].
    """
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "()"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        # (Python reads 'a' 'b' as one text, and what it writes itself is spelt in one way)
        if isinstance(value, list | tuple) and (read is json.loads or str(value) == text):
            return list(value)
    if text[0] == "[" and (text[1:].lstrip()[:1] in "'\"" or text[:-1].rstrip()[-1:] in "'\""):
        raise VLMoError(f"{_short(text)} looks like a list and is none of JSON or Python: give the records as JSONL")
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_records(path: str) -> Iterator[Located]:
    """Records of a .jsonl or .json (one object a line, or one list), .csv or .tsv file, each with its place.

    Tables need a header row. In .tsv nothing is quoted: a `"` is a `"`.
    """
    extension = os.path.splitext(path)[1].lower()
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_table, ".tsv": _read_table}
    if extension not in readers:
        raise VLMoError(f"{path}: unknown kind of annotation file; known: {', '.join(readers)}")
    try:
        yield from readers[extension](path)
    except OSError as error:
        raise VLMoError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise VLMoError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_jsonl(path: str) -> Iterator[Located]:
    with open(path, encoding="utf-8-sig") as file:
        first = next((line.strip() for line in file if line.strip()), "")
        file.seek(0)
        # a whole list (of a file whose first line is one, that may be all)
        lines = [file.read()] if first.startswith("[") and not first.endswith("]") else file
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                content = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise VLMoError(f"{where}: not valid JSON ({error}); expected one object a line") from error
            records = content if isinstance(content, list) and content else [content]
            for entry, record in enumerate(records, start=1):
                place = f"{where} ({entry})" if len(records) > 1 else where
                if not isinstance(record, dict):
                    raise VLMoError(f"{place}: expected an object, found {_short(record)}")
                yield place, record


def _read_table(path: str) -> Iterator[Located]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.lower().endswith(".tsv"):
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(file, strict=True)
        try:
            double = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1 and name]
            if double:
                raise VLMoError(f"{path}: has two columns {double[0]!r}; give each its own name")
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record:
                    raise VLMoError(f"{where}: more columns than the header has")
                yield where, {key: value for key, value in record.items() if value not in (None, "")}
        except csv.Error as error:
            raise VLMoError(f"{path}:{reader.line_num}: not a valid table ({error})") from error
