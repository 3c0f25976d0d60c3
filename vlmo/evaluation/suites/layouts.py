"""The official files of the compositional benchmarks, brought into one form: images, captions, and which is right."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
    _image_numbers: dict[tuple[Path, Box], int] = field(default_factory=dict)
    _text_numbers: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        images: list[tuple[Path, Box]],
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

    def _image(self, image: tuple[Path, Box]) -> int:
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
        raise VLMoError(f"{where}: {name!r} is no name of an image below {root}")
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
    """Reads ARO's relations; results are also averaged over relations, as published."""
    path = folder / "visual_genome_relation.json"
    return aro_pairs(path, lambda record: _text(record, "relation_name", path))


def aro_attribution(folder: Path) -> Questions:
    """Reads ARO's attributes; results are also averaged over pairs of attributes, as published."""
    path = folder / "visual_genome_attribution.json"
    return aro_pairs(path, lambda record: "_".join(map(str, _field(record, "attributes", path))))


def aro_order(path: Path) -> Questions:
    """Reads the test cases of ARO's orders: {"image_path", "caption_options"}, the first option right."""
    found = Questions(files=[path])
    for record in _records(path):
        options = _field(record, "caption_options", path)
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(each, str) for each in options):
            raise VLMoError(f"{path}: 'caption_options' must be a list of texts")
        file = _below(path.parent / "images", _field(record, "image_path", path), path)
        found.add([(file, None)], options, "")
    return found


def vl_checklist(folder: Path) -> Questions:
    """Reads [[image, {"POS": [...], "NEG": [...]}], ...], a file a kind: the k-th of POS against the k-th of NEG."""
    found = Questions(files=sorted((folder / "data").rglob("*.json")))
    for path in found.files:
        kind = path.relative_to(folder / "data").with_suffix("").as_posix()
        for record in _records(path):
            if not isinstance(record, list) or len(record) != 2:
                raise VLMoError(f'{path}: a record must be [image, {{"POS": ..., "NEG": ...}}]')
            file = _below(folder / "images", record[0], path)
            for true, false in zip(_field(record[1], "POS", path), _field(record[1], "NEG", path), strict=False):
                found.add([(file, None)], [true, false], kind)
    return found


# --- two images, two captions -----------------------------------------------------------------------------------------


def winoground(folder: Path) -> Questions:
    """Reads {"image_0", "image_1", "caption_0", "caption_1", "collapsed_tag"}, one a line."""
    path = folder / "examples.jsonl"
    found = Questions(files=[path])
    for record in _records(path):
        names = [_field(record, f"image_{side}", path) for side in (0, 1)]
        files = [_below(folder / "images", name if Path(str(name)).suffix else f"{name}.png", path) for name in names]
        captions = [_text(record, f"caption_{side}", path) for side in (0, 1)]
        found.add([(file, None) for file in files], captions, str(record.get("collapsed_tag", "")))
    return found


def bivlc(folder: Path) -> Questions:
    """Reads {"image", "negative_image", "caption", "negative_caption", "type"?, "subtype"?}, with names of images."""
    found = Questions(files=sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]))
    for path in found.files:
        for record in _records(path):
            files = [
                _below(folder / "images", _field(record, name, path), path) for name in ("image", "negative_image")
            ]
            captions = [_text(record, name, path) for name in ("caption", "negative_caption")]
            kind = "_".join(str(record[name]).lower() for name in ("type", "subtype") if record.get(name))
            found.add([(file, None) for file in files], captions, kind)
    return found
