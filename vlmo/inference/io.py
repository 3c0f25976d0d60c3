"""What users hand in, images in many forms and files of many inputs; and results as files."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vlmo.errors import InputError, VLMoError
from vlmo.files import walk
from vlmo.images import SUFFIXES, UndecodableImage, decode_image, to_rgb
from vlmo.utils.annotations import read_records

Row = dict[str, Any]


def load_image(image: Any, decoding: str = "correct") -> Image.Image:
    """Gives an RGB image, by the rules of `decode_image`.

    Args:
        image: path; bytes of an image file; Pillow image; array (H, W), (H, W, 3 or 4) or tensor (3, H, W) or (H, W),
            uint8, or floats in [0, 1].
        decoding: as of `decode_image`.

    Raises:
        InputError: if it is none of these, or cannot be decoded.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image, decoding)
        except OSError as error:  # Pillow reads a file's pixels only now
            raise InputError(f"this Pillow image cannot be decoded ({error})") from error
    if not isinstance(image, str | Path | bytes):
        raise InputError(f"an image is a path, a Pillow image, an array or a tensor, not {type(image).__name__}")
    try:
        data = image if isinstance(image, bytes) else Path(image).expanduser().read_bytes()
        return decode_image(data, decoding)
    except OSError as error:
        raise InputError(f"{image!s}: cannot be read ({error.strerror or error})") from error
    except UndecodableImage as error:
        name = "these bytes" if isinstance(image, bytes) else image
        raise InputError(f"{name}: is no image that can be decoded ({error})") from error


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or not values.size:
        raise InputError(f"an array must be (H, W), (H, W, 3) or (H, W, 4), a tensor (3, H, W); not {values.shape}")
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):
            raise InputError("an image of floats must be in [0, 1]")
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise InputError(f"an image must be uint8 or floats in [0, 1], not {values.dtype}")
    return Image.fromarray(values)


# --- files ------------------------------------------------------------------------------------------------------------


def image_files(path: str) -> list[str]:
    """Lists the images of a folder and the folders in it, in order; a path that is no folder is itself.

    Raises:
        VLMoError: if there are none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [path]
    files = (os.path.join(inside, name) for inside, names in walk(folder) for name in names)
    found = sorted(file for file in files if file.lower().endswith(SUFFIXES))
    if not found:
        raise VLMoError(f"{path}: has no images ({', '.join(SUFFIXES)})")
    return found


def read_rows(path: str, image_columns: Sequence[str]) -> list[Row]:
    """Reads rows of a .jsonl, .csv or .tsv file, image paths relative to it; or makes one for each image of a folder.

    Raises:
        VLMoError: if the file cannot be read, or there is nothing in it.
    """
    if Path(path).expanduser().is_dir():
        return [{"image": file} for file in image_files(path)]
    rows = []
    for where, row in read_records(str(Path(path).expanduser())):
        for column in image_columns:
            if column in row and not isinstance(row[column], str):
                raise VLMoError(f"{where}: {column!r} must be a path")
            if column in row:
                row[column] = str(Path(path).expanduser().parent / Path(row[column]).expanduser())
        rows.append(row)
    if not rows:
        raise VLMoError(f"{path}: has no rows")
    return rows


def predict_rows(
    rows: list[Row], predict: Callable[[list[Row]], list[Row]], batch_size: int, quiet: bool = False
) -> Iterator[Row]:
    """Yields each row with its result, or with {"error": ...} if it cannot be used, under a progress bar."""
    with tqdm(total=len(rows), disable=True if quiet or len(rows) == 1 else None, file=sys.stderr) as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            for row, result in zip(batch, _results(batch, predict), strict=True):
                yield row | result
            progress.update(len(batch))


def _results(rows: list[Row], predict: Callable[[list[Row]], list[Row]]) -> list[Row]:
    try:
        return predict(rows)
    except InputError as error:
        if len(rows) == 1:
            return [{"error": str(error)}]
        return [result for row in rows for result in _results([row], predict)]  # finds the one that it was


def check_output(path: Path, option: str) -> None:
    """Makes sure that a file can be written, before the work that it is for. An older one stays as it is.

    Raises:
        VLMoError: naming `option`, if it is a folder, or cannot be written.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise VLMoError(f"{option} {path}: is a folder; give the name of a file")
    if not folder.is_dir():
        raise VLMoError(f"{option} {path}: its folder does not exist")
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # (a pipe or a device is left alone)
            tempfile.TemporaryFile(dir=folder).close()  # permissions alone say nothing of read-only disks
    except OSError as error:
        raise VLMoError(f"{option} {path}: cannot be written ({error.strerror}); give another name") from error


def plain(result: Any) -> Any:
    """Gives a result as JSON has it: named tuples are objects, floats are rounded."""
    if isinstance(result, float):
        return round(result, 6)
    if hasattr(result, "_asdict"):
        return {name: plain(value) for name, value in result._asdict().items()}
    return [plain(each) for each in result] if isinstance(result, list | tuple) else result


def write_jsonl(rows: Iterable[Row], path: str | None) -> int:
    """Writes an object a line, as they come (None: to the standard output). Returns how many have an error."""
    errors = 0
    # (names of files that are not UTF-8 come with surrogates)
    file = sys.stdout if path is None else open(path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    ascii_alone = "utf" not in (file.encoding or "").lower()  # escapes that JSON has, not those of `print_anything`
    try:
        for row in rows:
            errors += "error" in row
            print(json.dumps(row, ensure_ascii=ascii_alone, default=np.ndarray.tolist), file=file)
    finally:
        if path is not None:
            file.close()
    return errors


def write_npz(rows: Iterable[Row], path: str) -> int:
    """Writes the embeddings as arrays (N, D) beside what they are of. Returns how many rows have an error."""
    rows = list(rows)
    arrays: dict[str, Any] = {}
    for column in ("image", "text"):
        having = [row for row in rows if f"{column}_embedding" in row]
        if having:
            arrays[f"{column}_embedding"] = np.stack([row[f"{column}_embedding"] for row in having])
            arrays[column] = np.array([row[column] for row in having])
    np.savez(path, **arrays)
    for row in rows:
        if "error" in row:
            print(row["error"], file=sys.stderr)
    return sum("error" in row for row in rows)
