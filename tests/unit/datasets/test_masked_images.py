"""Images alone, each with hidden patches."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tests import tables
from vlmo.datasets.base_dataset import Skipped
from vlmo.datasets.masked_images import MaskedImages, PatchMasker
from vlmo.registry import DATASETS

TRANSFORM = v2.Compose([v2.RandomCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


SIZES = [(14, 0.383, 75), (24, 0.383, 221), (2, 0.383, 2), (1, 0.4, 1), (4, 0.99, 15)]


@pytest.mark.parametrize("window, ratio, count", SIZES)
def test_exactly_so_many_are_hidden(window, ratio, count):
    masker = PatchMasker(window, ratio)
    for seed in range(200):
        mask = masker(np.random.default_rng(seed))
        assert mask.shape == (window**2,)
        assert mask.sum() == count


def test_hidden_patches_come_in_blocks():
    masker = PatchMasker(14, 75 / 196)
    masks = np.stack([masker(np.random.default_rng(seed)).reshape(14, 14) for seed in range(200)])
    # a hidden patch's right neighbour is hidden too far more often than the 38 % of patches drawn one by one
    assert masks[:, :, 1:][masks[:, :, :-1]].mean() > 0.75
    assert masks.any(0).all() and not masks.all(0).any()  # and every patch has its turn


def masked(path, name="coco"):
    return MaskedImages([path], DATASETS[name].dataset.image_columns, PatchMasker(4, 0.4), TRANSFORM)


def test_each_image_once_whatever_its_texts(tmp_path):
    images = masked(tables.write_captions(tmp_path, "coco", rows=3, texts=5))
    samples = [images[index] for index in range(len(images))]
    assert [sample["img_index"] for sample in samples] == [0, 1, 2]
    assert {*samples[0]} == {"image", "patch_mask", "raw_index", "img_index"}
    assert samples[0]["image"].shape == (3, 16, 16)


def test_of_a_pair_both_images(tmp_path):
    tables.write_nlvr2(tmp_path)
    images = masked(tmp_path / "nlvr2_train.arrow", "nlvr2")
    assert [images[index]["img_index"] for index in range(len(images))] == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(images[0]["image"], images[1]["image"])


def test_number_and_seed_determine_image_and_mask(tmp_path):
    tables.write_images(tmp_path)
    images = masked(tmp_path / "images_train_0.arrow", "images")
    first, again, other_seed, other = images[1, 7], images[1, 7], images[1, 8], images[2, 7]
    assert torch.equal(first["image"], again["image"]) and np.array_equal(first["patch_mask"], again["patch_mask"])
    assert not torch.equal(first["image"], other_seed["image"])
    masks = np.stack([images[index, seed]["patch_mask"] for index in range(4) for seed in range(8)])
    assert len(np.unique(masks, axis=0)) > 10
    assert not np.array_equal(first["patch_mask"], other["patch_mask"])


def test_what_cannot_be_decoded_is_left_out(tmp_path):
    path = tables.write_table(tmp_path / "images.arrow", {"image": [tables.png(0), b"no image"]})
    assert isinstance(masked(path, "images")[1], Skipped)
