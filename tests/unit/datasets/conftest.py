"""Sources that are opened in a test."""

import pytest

from vlmo.registry import DATASETS
from vlmo.sources.options import SourceOptions


@pytest.fixture
def read(tmp_path):
    """Opens a source; its cache is in a folder of its own."""

    def opened(name, split="train", images_alone=False, **columns):
        options = SourceOptions(cache=tmp_path / "cache", **columns)
        return DATASETS[name].open(split, options, images_alone)

    return opened
