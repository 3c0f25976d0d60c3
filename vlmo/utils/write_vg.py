"""Visual Genome's region descriptions -> vg.arrow: one row an image, each region's phrase is a caption."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from vlmo.utils.annotations import column, field, integer, require_files
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.json_stream import stream_list
from vlmo.utils.record_batches import Row, Skipped

LAYOUT = """
  annotations/region_descriptions.json
  images/VG_100K/*.jpg
  images/VG_100K_2/*.jpg
"""
BOX = ("width", "height", "x", "y")  # pixels
SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "caption": pa.list_(pa.string()),
        **{side: pa.list_(pa.int64()) for side in BOX},
        "image_id": pa.string(),
    }
)


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the Visual Genome downloads below `root` into a table in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    require_files(root, ("annotations/region_descriptions.json", "images/VG_100K", "images/VG_100K_2"), LAYOUT)
    json_path = os.path.join(root, "annotations", "region_descriptions.json")
    with Conversion(dataset_root, "vg", num_workers) as conversion:
        conversion.write({"vg": Table("vg", SCHEMA)}, partial(_rows, json_path, root))
    return conversion.report


def _rows(json_path: str, root: str) -> Iterator[tuple[str, Row | Skipped]]:
    folders = [os.path.join(root, "images", folder) for folder in ("VG_100K", "VG_100K_2")]
    for number, image in enumerate(stream_list(json_path)):
        where = f"{json_path}: [{number}]"
        image_id = integer(image, "id", where)
        paths = [os.path.join(folder, f"{image_id}.jpg") for folder in folders]
        path = next(filter(os.path.exists, paths), paths[0])
        regions, where = field(image, "regions", list, where), f"{where}: regions"
        columns: dict[str, Any] = {side: [integer(region, side, where) for region in regions] for side in BOX}
        columns |= {"caption": column(regions, "phrase", str, where), "image_id": str(image_id)}
        if regions:
            yield "vg", Row(columns, {"image": path})
        else:
            yield "vg", Skipped(path, "no caption")
