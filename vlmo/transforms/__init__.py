"""Image transforms by their published names. Randomness comes from torch's global generator only."""

from vlmo.registry import TRANSFORMS
from vlmo.transforms import classification as classification  # registers its own
from vlmo.transforms.square import keys_to_transforms, square_transform, square_transform_randaug, to_rgb

__all__ = ["TRANSFORMS", "keys_to_transforms", "square_transform", "square_transform_randaug", "to_rgb"]
