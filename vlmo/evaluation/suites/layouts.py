"""The official files of the compositional benchmarks, brought into one form: images, captions, and which is right."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo.errors import VLMoError
from vlmo.evaluation.pictures import Picture, of_file
from vlmo.evaluation.suites.base import read_json

Box = tuple[int, int, int, int] | None


class Question(NamedTuple):
    """One item: some images, some captions, and for each image which caption is right.

    Attributes:
        images: numbers of pictures.
        captions: numbers of texts.
        right: for each image, the place of its caption.
        kind: of the item, by which results are listed.
        group: by which a mean over groups is formed, as ARO does by relation; "" for none.
    """

    images: tuple[int, ...]
    captions: tuple[int, ...]
    right: tuple[int, ...]
    kind: str
    group: str = ""


@dataclass
class Questions:
    """All items of a benchmark; images and captions that several share stand there once."""

    questions: list[Question] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # of annotations
    image_files: list[Path] = field(default_factory=list)
    least: int = 1  # items of a group that counts in the mean over groups
    _image_numbers: dict[tuple[Path, Box], int] = field(default_factory=dict)
    _text_numbers: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        images: Sequence[tuple[Path, Box] | Picture],
        captions: list[str],
        kind: str,
        group: str = "",
    ) -> None:
        """Adds an item: the captions of its images in their order, then wrong ones."""
        right = tuple(range(len(images)))
        self.questions.append(
            Question(
                tuple(map(self._image, images)), tuple(self._text(caption) for caption in captions), right, kind, group
            )
        )

    def _image(self, image: tuple[Path, Box] | Picture) -> int:
        if isinstance(image, Picture):
            self.pictures.append(image)
            return len(self.pictures) - 1
        if image not in self._image_numbers:
            self._image_numbers[image] = len(self.pictures)
            self.pictures.append(of_file(*image))
            self.image_files.append(image[0])
        return self._image_numbers[image]

    def _text(self, text: str) -> int:
        if text not in self._text_numbers:
            self._text_numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._text_numbers[text]


Reader = Callable[[Path], Questions]


def _below(root: Path, name: Any, where: Path) -> Path:
    """Gives the file of that name below a folder. Raises VLMoError if it leads out of it."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise VLMoError(f"{where}: {name!r} is not the name of an image below {root}")
    return root / name


def _field(record: Any, name: str, where: Path) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise VLMoError(f"{where}: a record lacks {name!r}; is it the official file?")
    return record[name]


def _text(record: Any, name: str, where: Path) -> str:
    value = _field(record, name, where)
    if not isinstance(value, str):
        raise VLMoError(f"{where}: {name!r} must be a text, found {value!r}")
    return value


def _records(path: Path) -> Iterator[Any]:
    """Gives the records of a JSON list or object (its values), or of a file with one a line."""
    if path.suffix != ".jsonl":
        content = read_json(path)
        yield from content.values() if isinstance(content, dict) else content
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise VLMoError(f"{path}:{number}: cannot be read as JSON ({error}); download it again") from error


def _parquet(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Gives the rows of Parquet files as the Hugging Face hub has them; `columns` hold images, read when needed."""
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                others = [name for name in file.schema_arrow.names if name not in columns]
                for row, record in enumerate(file.read_row_group(group, columns=others).to_pylist()):
                    images = {
                        name: Picture(f"{path.name}: {name} {row} of {group}", partial(_cell, path, group, row, name))
                        for name in columns
                    }
                    yield path, record | images
        except (pa.ArrowException, OSError) as error:
            raise VLMoError(f"{path}: cannot be read as Parquet ({error}); download it again") from error


def _cell(path: Path, group: int, row: int, column: str) -> bytes:
    return _cells(path, group, column)[row].as_buffer().to_pybytes()


@lru_cache(maxsize=4)  # of two columns, for the threads that read ahead
def _cells(path: Path, group: int, column: str) -> Any:
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(0).combine_chunks().field("bytes")


# --- one image, several captions --------------------------------------------------------------------------------------


def sugarcrepe(folder: Path, images: str = "val2017") -> Questions:
    """Reads {"0": {"filename", "caption", "negative_caption"}, ...}, a file a kind."""
    found = Questions(files=sorted(folder.glob("*.json")))
    for path in found.files:
        for record in _records(path):
            file = _below(folder / images, _field(record, "filename", path), path)
            captions = [_text(record, name, path) for name in ("caption", "negative_caption")]
            found.add([(file, None)], captions, path.stem)
    return found


def aro_pairs(path: Path, kind: Callable[[Any], str]) -> Questions:
    """Reads {"image_path", "bbox_x", ..., "true_caption", "false_caption"}; the box is what is meant."""
    found = Questions(files=[path])
    for record in _records(path):
        file = _below(path.parent / "images", _field(record, "image_path", path), path)
        x, y, width, height = (int(_field(record, f"bbox_{side}", path)) for side in "xywh")
        captions = [_text(record, name, path) for name in ("true_caption", "false_caption")]
        found.add([(file, (x, y, width, height))], captions, "", kind(record))
    return found


def aro_relation(folder: Path) -> Questions:
    """Reads ARO's relations; results are also averaged over relations, but for those that a file names as symmetric."""
    path, symmetric = folder / "visual_genome_relation.json", folder / "symmetric_relations.txt"
    left_out = symmetric.read_text(encoding="utf-8").splitlines() if symmetric.is_file() else []

    def group(record: Any) -> str:
        name = _text(record, "relation_name", path)
        return "" if name in left_out else name

    return aro_pairs(path, group)


def aro_attribution(folder: Path) -> Questions:
    """Reads ARO's attributes; results are also averaged over pairs of attributes that 25 items have, as published."""
    path = folder / "visual_genome_attribution.json"
    found = aro_pairs(path, lambda record: "_".join(map(str, _field(record, "attributes", path))))
    found.least = 25
    return found


def aro_order(path: Path) -> Questions:
    """Reads the test cases of ARO's orders: {"image", "caption_options"}, the first option right."""
    found = Questions(files=[path])
    for record in _records(path):
        options = _field(record, "caption_options", path)
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(each, str) for each in options):
            raise VLMoError(f"{path}: 'caption_options' must be a list of texts")
        file = _below(path.parent / "images", _field(record, "image", path), path)
        found.add([(file, None)], options, "")
    return found


SOURCES = {"vg": "vg", "vaw": "vg", "swig": "swig", "hake": "hake"}  # of VL-CheckList, by a word of the file's name


def vl_checklist(folder: Path) -> Questions:
    """Reads [[image, {"POS": [...], "NEG": [...]}], ...], a file a kind: the first of POS against the first of NEG.

    Images lie below images/{vg,swig,hake}, as in its DATASETS.md; the name of the file tells which.
    """
    found = Questions(files=sorted((folder / "data").rglob("*.json")))
    for path in found.files:
        kind = path.relative_to(folder / "data").with_suffix("").as_posix()
        source = next((SOURCES[word] for word in re.split("[/_]", kind.lower()) if word in SOURCES), "")
        for record in _records(path):
            if not isinstance(record, list) or len(record) != 2:
                raise VLMoError(f'{path}: a record must be [image, {{"POS": ..., "NEG": ...}}]')
            file = _below(folder / "images" / source, record[0], path)
            captions = [_field(record[1], name, path) for name in ("POS", "NEG")]
            if not all(isinstance(each, list) and each and isinstance(each[0], str) for each in captions):
                raise VLMoError(f"{path}: 'POS' and 'NEG' must be lists of texts")
            found.add([(file, None)], [each[0] for each in captions], kind)
    return found


# --- two images, two captions -----------------------------------------------------------------------------------------


def winoground(folder: Path) -> Questions:
    """Reads {"image_0", "image_1", "caption_0", "caption_1", "collapsed_tag"}: one a line, or Parquet with the images.

    In examples.jsonl images are named without their extension, .png.
    """
    path, names = folder / "examples.jsonl", ("image_0", "image_1")
    if not path.is_file():
        return _two_by_two(sorted(folder.glob("data/*.parquet")), names, ("caption_0", "caption_1"), ("collapsed_tag",))
    found = Questions(files=[path])
    for record in _records(path):
        named = [_field(record, name, path) for name in names]
        files = [_below(folder / "images", name if Path(str(name)).suffix else f"{name}.png", path) for name in named]
        captions = [_text(record, f"caption_{side}", path) for side in (0, 1)]
        found.add([(file, None) for file in files], captions, str(record.get("collapsed_tag", "")))
    return found


def bivlc(folder: Path) -> Questions:
    """Reads {"image", "negative_image", "caption", "negative_caption", "type", "subtype"}: Parquet with the images."""
    names, captions = ("image", "negative_image"), ("caption", "negative_caption")
    return _two_by_two(sorted(folder.glob("data/*.parquet")), names, captions, ("type", "subtype"))


def _two_by_two(paths: list[Path], images: Sequence[str], captions: Sequence[str], kinds: Sequence[str]) -> Questions:
    found = Questions(files=paths)
    for path, record in _parquet(paths, images):
        kind = "_".join(str(record[name]).lower() for name in kinds if record.get(name))
        found.add([record[name] for name in images], [_text(record, name, path) for name in captions], kind)
    return found
