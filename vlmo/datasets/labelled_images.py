"""Images with the number of their class, such as ImageNet's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.compute as pc

from vlmo.batch import NUMBER, VALUES, Field
from vlmo.datasets.base_dataset import DatasetSpec
from vlmo.datasets.masked_images import ImageDataset
from vlmo.label_names import read_label_names
from vlmo.registry import DATASETS, TASKS
from vlmo.sources.arrow_tables import RowLocation, open_table

CLASSES_FILE = "labelled_images_classes.json"  # beside the tables: list of the classes, in the order of their labels


class LabelledImages(ImageDataset):
    """Rows with an image and its label, from 0."""

    columns: ClassVar[dict[str, str]] = {"image": "binary", "label": "a whole number", "image_id": "anything"}
    fields: ClassVar[Mapping[str, Field]] = {"label": NUMBER, "image_id": VALUES}

    @classmethod
    def image_targets(cls, location: RowLocation) -> dict[str, Any]:
        return {"label": location.scalar("label").as_py(), "image_id": str(location.scalar("image_id").as_py())}

    @classmethod
    def label_names(cls, root: Path, paths: Sequence[Path]) -> list[str] | None:
        path = root / CLASSES_FILE
        return read_label_names(path) if path.is_file() else None

    @classmethod
    def check_labels(cls, name: str, root: Path, paths: Sequence[Path], settings: Any) -> list[str]:
        """If a task learns them, labels must be below `num_classes`, which is what the list of classes has, if any."""
        if not any("label" in TASKS[task].fields for task in settings.active):
            return []
        number, names = settings.num_classes, cls.label_names(root, paths)
        if names is not None and len(names) != number:
            return [
                f"{name}: {root / CLASSES_FILE} has {len(names)} classes, not {number}: pass num_classes={len(names)}"
            ]
        for path in paths:
            reader = open_table(path)
            for batch in range(reader.num_record_batches):
                labels = reader.get_batch(batch).column("label")
                found = pc.min_max(labels).as_py()
                if labels.null_count or (len(labels) and not 0 <= found["min"] <= found["max"] < number):
                    what = (
                        "an image without a label"
                        if labels.null_count
                        else f"labels from {found['min']} to {found['max']}"
                    )
                    return [f"{name}: {path} has {what}; labels count from 0 and are below num_classes={number}"]
        return []


DATASETS.register("labelled_images")(
    DatasetSpec(
        LabelledImages,
        make_arrow="labelled_images",
        train=("labelled_images_train_*",),
        val=("labelled_images_val_*",),
        test=("labelled_images_val_*",),
        optional=frozenset({"labelled_images_val_*"}),
    )
)
