"""Index tensors against the table's layout, written out; tables and embeddings of another image size."""

import pytest
import torch

from vlmo.errors import VLMoError
from vlmo.modules import positions as relpos


@pytest.mark.parametrize(("window", "rows", "all_rows"), [(14, 732, 1126), (24, 2212, 2606), (30, 3484, 3878)])
def test_number_of_rows(window, rows, all_rows):
    assert relpos.num_relative_distance(window) == rows
    assert relpos.num_table_rows(window) == all_rows


@pytest.mark.parametrize("window", [1, 2, 3])
def test_image_index(window):
    n = relpos.num_relative_distance(window)
    index = relpos.image_relative_position_index(window)
    assert index.dtype == torch.int64 and index.shape == (1 + window**2, 1 + window**2)
    for i in range(window**2):
        for j in range(window**2):
            offset_h, offset_w = i // window - j // window, i % window - j % window
            row = (offset_h + window - 1) * (2 * window - 1) + (offset_w + window - 1)
            assert index[1 + i, 1 + j] == row < n - 3
    assert (index[0, 1:] == n - 3).all() and (index[1:, 0] == n - 2).all() and index[0, 0] == n - 1


@pytest.mark.parametrize("length", [1, 2, 40, 196])
def test_text_index(length):
    n, rows = relpos.num_relative_distance(3), relpos.num_table_rows(3)
    index = relpos.text_relative_position_index(length, 3)
    assert index.dtype == torch.int64 and index.shape == (length, length)
    for i in range(0, length - 1, 13):
        for j in range(length - 1):
            assert index[1 + i, 1 + j] == (j - i) + 194 + n + 2
    assert (index[0, 1:] == rows - 3).all() and (index[1:, 0] == rows - 2).all() and index[0, 0] == rows - 1
    if length == 196:  # the words use every row between the two across the modalities and the last three
        assert set(index[1:, 1:].flatten().tolist()) == set(range(n + 2, rows - 3))


def test_short_texts_are_the_corner_of_long_ones():
    long = relpos.text_relative_position_index(196, 14)
    assert torch.equal(relpos.text_relative_position_index(40, 14), long[:40, :40])


def test_text_longer_than_the_table():
    with pytest.raises(VLMoError, match="max_text_len=200.*max_text_len=196 or less"):
        relpos.text_relative_position_index(200, 14)


def test_joint_index():
    text, image = relpos.text_relative_position_index(5, 2), relpos.image_relative_position_index(2)
    joint = relpos.joint_relative_position_index(text, image, 2)
    n = relpos.num_relative_distance(2)
    assert joint.dtype == torch.int64 and joint.shape == (10, 10)
    assert torch.equal(joint[:5, :5], text) and torch.equal(joint[5:, 5:], image)
    assert (joint[:5, 5:] == n).all() and (joint[5:, :5] == n + 1).all()


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 6), (14, 24), (6, 4), (3, 1)])
def test_table_of_another_size(old, new):
    table = torch.randn(relpos.num_table_rows(old), 3)
    resized = relpos.resize_relative_position_bias_table(table, old, new)
    assert resized.shape == (relpos.num_table_rows(new), 3) and resized.dtype == table.dtype
    assert torch.equal(resized[(2 * new - 1) ** 2 :], table[(2 * old - 1) ** 2 :])
    before = table[: (2 * old - 1) ** 2].unflatten(0, (2 * old - 1, 2 * old - 1))
    after = resized[: (2 * new - 1) ** 2].unflatten(0, (2 * new - 1, 2 * new - 1))
    torch.testing.assert_close(after[new - 1, new - 1], before[old - 1, old - 1])  # no offset stays no offset
    if new > old:  # the neighbours stay neighbours, and the largest offsets fall on the largest
        torch.testing.assert_close(after[new - 1, new], before[old - 1, old])
        torch.testing.assert_close(after[0, 0], before[0, 0], atol=1e-3, rtol=0)


def test_table_of_the_same_size_is_kept():
    table = torch.randn(relpos.num_table_rows(3), 2)
    assert relpos.resize_relative_position_bias_table(table, 3, 3) is table


def test_table_of_half_precision():
    table = torch.ones(relpos.num_table_rows(3), 2, dtype=torch.bfloat16)
    assert (relpos.resize_relative_position_bias_table(table, 3, 5) == 1).all()


@pytest.mark.parametrize(
    ("table", "message"), [(torch.zeros(398, 2), "single patch"), (torch.full((422, 2), torch.nan), "nan")]
)
def test_table_that_cannot_be_resized(table, message):
    window = 1 if len(table) == 398 else 3
    with pytest.raises(VLMoError, match=message):
        relpos.resize_relative_position_bias_table(table, window, 4)


def test_absolute_positions():
    embedding = torch.randn(1, 10, 4)
    assert relpos.resize_absolute_position_embedding(embedding, 3) is embedding
    larger = relpos.resize_absolute_position_embedding(embedding, 5)
    assert larger.shape == (1, 26, 4) and torch.equal(larger[:, 0], embedding[:, 0])
    torch.testing.assert_close(larger[:, 13], embedding[:, 5])  # the centre


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_absolute_positions_of_no_square(tokens):
    with pytest.raises(VLMoError, match="square"):
        relpos.resize_absolute_position_embedding(torch.zeros(1, tokens, 4), 3)
