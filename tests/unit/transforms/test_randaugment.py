from collections import Counter
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from vlmo.transforms.square import (
    AUGMENTATIONS,
    Augmentation,
    RandAugment,
    _smooth,
    autocontrast_original,
    rotate,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    warp,
)


def random_picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def warp_pixel(pixels, x_from, y_from, column, row):
    """OpenCV's rule for one output pixel, written out."""
    height, width = pixels.shape[:2]

    def read(at):
        return round(at[0] * column * 1024) + round((at[1] * row + at[2]) * 1024) + 16 >> 5

    def pixel(x, y):
        return pixels[y, x].astype(int) if 0 <= x < width and 0 <= y < height else np.full(3, 128)

    x, y = read(x_from), read(y_from)
    right, down, x, y = x % 32, y % 32, floor(x / 32), floor(y / 32)
    blended = (
        (32 - right) * (32 - down) * pixel(x, y)
        + right * (32 - down) * pixel(x + 1, y)
        + (32 - right) * down * pixel(x, y + 1)
        + right * down * pixel(x + 1, y + 1)
    )
    return (blended + 512) // 1024


coefficient = st.floats(-2, 2)
row = st.tuples(coefficient, coefficient, st.floats(-20, 20))


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), row, row)
def test_warp_equals_the_rule_written_out(width, height, x_from, y_from):
    picture = random_picture(width, height)
    expected = [
        [warp_pixel(np.asarray(picture), x_from, y_from, column, row) for column in range(width)]
        for row in range(height)
    ]
    np.testing.assert_array_equal(warp(picture, x_from, y_from), expected)


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (70, 100)])  # below, at and above one strip
def test_warp_without_motion_changes_nothing(size):
    picture = random_picture(*size)
    np.testing.assert_array_equal(warp(picture, (1, 0, 0), (0, 1, 0)), picture)


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(-3, 3))
def test_shears_equal_the_general_warp(width, height, factor):
    picture = random_picture(width, height)
    np.testing.assert_array_equal(shear_x(picture, factor), warp(picture, (1, -factor, 0), (0, 1, 0)))
    np.testing.assert_array_equal(shear_y(picture, factor), warp(picture, (1, 0, 0), (-factor, 1, 0)))


def test_translations_shift_whole_pixels_and_fill_with_grey():
    pixels = np.asarray(random_picture(40, 50))
    left, up = (np.asarray(move(Image.fromarray(pixels), 7)) for move in (translate_x, translate_y))
    np.testing.assert_array_equal(left[:, :-7], pixels[:, 7:])
    np.testing.assert_array_equal(up[:-7], pixels[7:])
    assert (left[:, -7:] == 128).all() and (up[-7:] == 128).all()


def test_rotation_is_counter_clockwise():
    picture = Image.new("RGB", (40, 40))
    picture.paste("white", (30, 18, 40, 22))  # at three o'clock
    quarter = np.asarray(rotate(picture, 90)).mean(-1)
    assert np.unravel_index(quarter.argmax(), quarter.shape)[0] < 12  # now at twelve


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3), (224, 200)])
def test_smoothing_equals_pillows(size):
    picture = random_picture(*size)
    np.testing.assert_array_equal(_smooth(np.asarray(picture)), picture.filter(ImageFilter.SMOOTH))


def test_sharpness_wraps_around():
    pixels = np.full((5, 5, 3), 250, np.uint8)
    pixels[0, 0] = pixels[2, 2] = 0
    sharp = np.asarray(sharpness(Image.fromarray(pixels), 1.36))
    assert (sharp[1, 2] < 10).all()  # above 255
    assert (sharp[2, 2] > 150).all()  # below 0
    np.testing.assert_array_equal(sharp[0], pixels[0])  # the border stays


def test_autocontrast_original():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    constant = np.full_like(ramp, 9)
    result = np.asarray(autocontrast_original(Image.fromarray(np.stack([ramp, ramp + 1, constant], -1))))
    assert result[0, 0, 0] == 0 and result[-1, -1, 0] == 255  # stretched
    assert (result[..., 1] == 255).all()  # the defect
    assert (result[..., 2] == 9).all()


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (37, 20)])
def test_every_augmentation_keeps_size_and_input(name, size):
    picture = random_picture(*size)
    before = picture.tobytes()
    augmentation = AUGMENTATIONS[name]
    result = augmentation.apply(picture, *augmentation.args)
    assert result.size == size and result.mode == "RGB"
    assert picture.tobytes() == before


def test_two_of_ten_each_half_the_time_with_either_sign():
    applied = Counter()
    augment = RandAugment()
    assert len(augment.augmentations) == 10

    def spy(name):
        def apply(image, *args):
            applied[name] += 1
            applied[name, args[0] > 0 if args else None] += 1
            return image

        return apply

    augment.augmentations = {
        name: Augmentation(spy(name), augmentation.args, augmentation.signed)
        for name, augmentation in augment.augmentations.items()
    }
    torch.manual_seed(0)
    picture, calls = random_picture(4, 4), 4000
    for _ in range(calls):
        augment(picture)
    expected = calls * 2 * 0.5 / 10
    for name, augmentation in AUGMENTATIONS.items():
        assert abs(applied[name] - expected) < 5 * expected**0.5
        if augmentation.signed:
            assert abs(applied[name, True] - expected / 2) < 5 * (expected / 2) ** 0.5
        elif augmentation.args:
            assert applied[name, False] == 0
