"""Images with captions: COCO, Flickr30k, Conceptual Captions, SBU, Visual Genome."""

from vlmo.datasets.base_dataset import BaseDataset


class CaptionDataset(BaseDataset):
    """A sample is one caption with its image; columns `image` and `caption`."""
