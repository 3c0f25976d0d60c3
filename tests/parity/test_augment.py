"""The augmentations and the evaluation transform give the recorded pixels, every one of them."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.conftest import GOLDENS
from vlmo.transforms import square_transform
from vlmo.transforms.square import AUGMENTATIONS, AUTOCONTRASTS

RECORDED = np.load(GOLDENS / "augment.npz")
NAMES = [key.removesuffix("|args") for key in RECORDED.files if key.endswith("|args")]


@pytest.fixture
def picture():
    return Image.fromarray(RECORDED["input"])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "AutoContrast+"])
def test_augmentation(name, picture):
    args = RECORDED[f"{name}|args"]
    augmentation = AUGMENTATIONS[name[:-1]]
    np.testing.assert_allclose(np.abs(args), augmentation.args, rtol=1e-12)
    np.testing.assert_array_equal(augmentation.apply(picture, *args), RECORDED[name])


def test_both_signs_are_drawn_where_both_are_recorded():
    both = {name[:-1] for name in NAMES if name.endswith("-")}
    assert both == {name for name, augmentation in AUGMENTATIONS.items() if augmentation.signed}
    assert {name[:-1] for name in NAMES} == set(AUGMENTATIONS)


def test_autocontrast_original_wraps_around(picture):
    np.testing.assert_array_equal(AUTOCONTRASTS["original"](picture), RECORDED["AutoContrast+"])


def test_autocontrast_correct_is_pillows(picture):
    recorded = RECORDED["AutoContrast+"]
    corrected = np.asarray(AUTOCONTRASTS["correct"](picture))
    np.testing.assert_array_equal(corrected, ImageOps.autocontrast(picture))
    darkest = RECORDED["input"].min((0, 1))
    assert (recorded[..., darkest > 0] == 255).all()
    np.testing.assert_array_equal(corrected[..., darkest == 0], recorded[..., darkest == 0])


@pytest.mark.parametrize("autocontrast", AUTOCONTRASTS)
def test_autocontrasts_agree_from_zero(autocontrast):
    picture = Image.fromarray(RECORDED["input_with_zero_minimum"])
    np.testing.assert_array_equal(AUTOCONTRASTS[autocontrast](picture), RECORDED["AutoContrast_zero_minimum"])


def test_evaluation_transform(picture):
    np.testing.assert_array_equal(square_transform(32)(picture), RECORDED["square_transform_32"])
