"""Small raw data for the tests of the converters."""

import io
import json
from pathlib import Path

import pyarrow as pa
from PIL import Image


def image_bytes(color=0, image_format="JPEG", size=(16, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (color % 256, 100, 200)).save(buffer, image_format)
    return buffer.getvalue()


def write_images(folder, number, image_format="JPEG", extension="jpg"):
    """Writes `number` different images 0.jpg, 1.jpg, ..."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index in range(number):
        Path(folder, f"{index}.{extension}").write_bytes(image_bytes(index, image_format))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_karpathy(root, number, split="train"):
    """`number` images with a caption each, and their dataset.json, for `write_own_karpathy`."""
    write_images(root, number)
    images = [
        {"filename": f"{index}.jpg", "split": split, "sentences": [{"raw": f"caption {index}"}]}
        for index in range(number)
    ]
    (root / "dataset.json").write_text(json.dumps({"images": images, "dataset": "own"}))


def read_rows(path):
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()
