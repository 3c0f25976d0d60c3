"""The same pairs as Arrow files, tars, Parquet and what `datasets` saves."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests import tables


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, captions: Sequence[str] = ("a cat",)) -> list[tuple[str, bytes]]:
    """Files of a tar, as img2dataset names them; several captions stand in the .json."""
    about = {"caption": list(captions), "key": f"{number:05d}", "url": "http://example.org"}
    text = [(f"{number:05d}.txt", captions[0].encode())] if len(captions) == 1 else []
    return [(f"{number:05d}.png", tables.png(number)), *text, (f"{number:05d}.json", json.dumps(about).encode())]


def write_forms(root: Path, rows: int = 16, texts: int = 1) -> dict[str, list[str]]:
    """Writes pairs for training and validation in every form; returns what `datasets` is for each."""
    for split, first in (("train", 0), ("restval", 0), ("val", 100), ("test", 100)):
        tables.write_captions(root, f"coco_caption_karpathy_{split}", 0 if split == "restval" else rows, texts, first)
    for split, first in (("train", 0), ("val", 100)):
        numbers = range(first, first + rows)
        captions = tables.captions(rows, texts, first)
        pairs = list(zip(numbers, captions, strict=True))
        for shard, part in enumerate((pairs[: rows // 3], pairs[rows // 3 :])):
            files = [file for number, each in part for file in sample(number, each)]
            write_tar(root / f"{split}-{shard}.tar", files)
        images = [{"bytes": tables.png(number), "path": None} for number in numbers]
        table = pa.table({"image": images, "caption": captions})
        pq.write_table(table.slice(0, rows // 2), root / f"{split}-0.parquet", row_group_size=3)
        pq.write_table(table.slice(rows // 2), root / f"{split}-1.parquet", row_group_size=2)
        save_stream(root / "saved" / {"val": "validation"}.get(split, split), table)
    (root / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return {
        "arrow": ["coco"],
        "tar": [f"tar:{root}/train-{{0..1}}.tar", f"tar:{root}/val-*.tar@val@test"],
        "parquet": [f"parquet:{root}/train-*.parquet", f"parquet:{root}/val-*.parquet@val@test"],
        "hf": [f"hf:{root}/saved", f"hf:{root}/saved@val"],
    }


def save_stream(folder: Path, table: pa.Table, rows: int = 5) -> Path:
    """As `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    return folder / name


def texts(data: Any) -> list[str]:
    """Every caption, in order."""
    return [data.text(number).list_item("caption") for number in range(data.num_texts)]


def images(data: Any) -> list[bytes]:
    """Every image, in order."""
    return [data.row(number).scalar("image").as_py() for number in range(data.num_rows)]
