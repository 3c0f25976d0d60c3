"""A data set that is read where it lies, as `datasets` names it."""

from dataclasses import dataclass

from vlmo.datasets.base_dataset import DatasetSpec
from vlmo.datasets.caption_dataset import CaptionDataset
from vlmo.registry import DATASETS, SOURCES
from vlmo.sources.names import parse
from vlmo.sources.options import SourceOptions
from vlmo.sources.tables import Format, SourceTables


@dataclass(frozen=True)
class SourceSpec(DatasetSpec):
    """A data set that is read where it lies."""

    format: Format = Format()
    location: str = ""
    splits: tuple[str, ...] = ("train",)

    def open(self, split: str, options: SourceOptions, images_alone: bool = False) -> SourceTables:
        """The tables of a split; files that have no index yet are indexed first.

        Args:
            images_alone: rows without captions count too.

        Raises:
            VLMoError: if there are no files, or one cannot be read.
        """
        files = self.format.files(self.location, split, options) if split in self.splits else []
        return SourceTables(self.format, files, options, images_alone)


def source_spec(name: str) -> SourceSpec:
    """Gives what `datasets` holds of a source: images with captions."""
    kind, location, splits = parse(name)
    retrieval = splits != ("train",)
    return SourceSpec(CaptionDataset, retrieval=retrieval, format=SOURCES[kind], location=location, splits=splits)


DATASETS.of_source = source_spec
