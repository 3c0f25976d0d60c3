"""What is added to the attention scores: the bias of every pair of tokens, written out, and padding."""

import pytest
import torch

from vlmo.modules.attention import AttentionMasks
from vlmo.modules.positions import num_table_rows

WINDOW, LONGEST, ROOM, DEPTH, HEADS = 3, 6, 10, 2, 4


@pytest.fixture
def masks():
    return AttentionMasks(WINDOW, LONGEST, ROOM, DEPTH, relative_positions=True)


@pytest.fixture
def table():
    return torch.randn(num_table_rows(WINDOW, ROOM), DEPTH * HEADS)


def row(query, key):
    """Row of the table for two tokens ("text" or "image", position), position 0 being [CLS]."""
    image_rows = (2 * WINDOW - 1) ** 2 + 3
    (side, i), (other_side, j) = query, key
    if side != other_side:
        return image_rows + (side == "image")
    first_cls_row = image_rows - 3 if side == "image" else image_rows + 2 + 2 * ROOM - 3
    if i == 0 or j == 0:
        return first_cls_row + (2 if i == j else 0 if i == 0 else 1)
    if side == "text":
        return (j - i) + ROOM - 2 + image_rows + 2
    (h_i, w_i), (h_j, w_j) = divmod(i - 1, WINDOW), divmod(j - 1, WINDOW)
    return (h_i - h_j + WINDOW - 1) * (2 * WINDOW - 1) + (w_i - w_j + WINDOW - 1)


TEXT = [("text", position) for position in range(LONGEST)]
IMAGE = [("image", position) for position in range(1 + WINDOW**2)]


@pytest.mark.parametrize(
    "modality, length, tokens",
    [
        ("image", None, IMAGE),
        ("text", LONGEST, TEXT),
        ("text", 4, TEXT[:4]),
        ("vl", LONGEST, TEXT + IMAGE),
        ("vl", 4, TEXT[:4] + IMAGE),
    ],
)
def test_bias_of_every_pair_of_tokens(masks, table, modality, length, tokens):
    text_mask = None if length is None else torch.ones(1, length, dtype=torch.long)
    expected = torch.stack([table[[row(query, key) for key in tokens]] for query in tokens])  # (S, S, layers * heads)
    biases, _ = masks(table, modality, text_mask)
    assert len(biases) == DEPTH
    for layer, bias in enumerate(biases):
        assert bias.shape == (1, HEADS, len(tokens), -(-len(tokens) // 8) * 8)  # rows start at multiples of 8
        bias = bias[0, ..., : len(tokens)].permute(1, 2, 0)
        assert torch.equal(bias, expected[..., layer * HEADS : (layer + 1) * HEADS])


@pytest.mark.parametrize("modality", ["text", "vl"])
def test_padding_is_minus_infinity_for_every_query(masks, table, modality):
    text_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    biases, padding = masks(table, modality, text_mask)
    assert padding.shape == (2, 1, 1, biases[0].shape[-1])
    length = 4 + (masks.num_image_tokens if modality == "vl" else 0)
    assert padding[:, 0, 0, :length].nonzero().tolist() == [[0, 3]]
    assert padding[0, 0, 0, 3] == -torch.inf


def test_without_relative_positions_only_padding_is_masked():
    masks = AttentionMasks(WINDOW, LONGEST, ROOM, DEPTH, relative_positions=False)
    assert masks(None, "image") == ([None, None], None)
    biases, padding = masks(None, "vl", torch.tensor([[1, 1, 0]]))
    assert biases == [None, None]
    assert padding.flatten().tolist() == [0, 0, -torch.inf] + [0] * 13


def test_indices_are_derived_and_never_saved(masks):
    assert masks.state_dict() == {}
    buffers = dict(masks.named_buffers())
    assert len(buffers) == 3
    assert {buffer.dtype for buffer in buffers.values()} == {torch.int64}
    assert {buffer.dtype for buffer in masks.half().buffers()} == {torch.int64}
    assert {buffer.device.type for buffer in masks.to("meta").buffers()} == {"meta"}
