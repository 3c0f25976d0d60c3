"""SBU captions -> sbu_{0..}.arrow, 100,000 rows a file."""

from vlmo.utils.annotations import require_files
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.karpathy import CAPTION_SCHEMA
from vlmo.utils.write_conceptual_caption import SHARD_ROWS, annotated_rows

LAYOUT = """
  annot.json          [["images_train/0000/0000000", "a caption"], ...]
  images_train/*/*
"""


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the SBU downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    require_files(root, ("annot.json", "images_train"), LAYOUT)
    tables = {"train": Table("sbu_{shard}", CAPTION_SCHEMA, SHARD_ROWS)}
    with Conversion(dataset_root, "sbu", num_workers) as conversion:
        conversion.write(tables, lambda: annotated_rows(root, "annot.json", "train"))
    return conversion.report
