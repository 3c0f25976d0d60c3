"""What is added to the attention scores of every block: the relative position bias, and -inf on padding."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.modules import positions as relpos
from vlmo.modules.block import Modality

ALIGNED = 8  # the fused kernels on GPUs copy a mask whose rows do not start at multiples of this


class AttentionMasks(nn.Module):
    """Makes the masks of a sequence; holds the index tensors, which are derived and never saved.

    (A file of another resolution would carry wrong ones. The table itself belongs to VLMo, as in released files.)

    Args:
        window: image patches a side.
        max_text_len: longest text in tokens.
        max_text_len_of_initckpt: text length that the table has room for.
        depth: number of blocks.
        relative_positions: without, only padding is masked.
    """

    def __init__(
        self, window: int, max_text_len: int, max_text_len_of_initckpt: int, depth: int, relative_positions: bool
    ) -> None:
        super().__init__()
        self.depth = depth
        self.max_text_len = max_text_len
        self.num_image_tokens = 1 + window**2
        self.relative_positions = relative_positions
        if relative_positions:
            image = relpos.image_relative_position_index(window)
            text = relpos.text_relative_position_index(max_text_len, window, max_text_len_of_initckpt)
            joint = relpos.joint_relative_position_index(text, image, window)
            self.register_buffer("image_index", image, persistent=False)
            self.register_buffer("text_index", text, persistent=False)
            self.register_buffer("joint_index", joint, persistent=False)
        self._step: dict[tuple[str, int], list[Tensor]] | None = None

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Within it the bias is gathered once a modality and text length, whatever the number of passes."""
        self._step = {}
        try:
            yield
        finally:
            self._step = None

    def forward(
        self, table: Tensor | None, modality: Modality, text_mask: Tensor | None = None
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """The biases of the blocks, and the padding, which is the same in all; None where there is nothing to add.

        They are apart because together they are B times as large as the bias.

        Args:
            table: (rows, depth * heads), the relative position bias table.
            modality: "text", "image", or "vl" for a pair.
            text_mask: (B, T), 0 on padding; None for images.

        Returns:
            biases (1, heads, S, S'), padding (B, 1, 1, S'): S' is S rounded up to a multiple of ALIGNED, what is beyond
            S counts for nothing.
        """
        biases: list[Tensor | None] = [None] * self.depth
        if table is not None:
            biases = list(self._biases(table, modality, 0 if text_mask is None else text_mask.shape[1]))
        if text_mask is None:
            return biases, None
        after = self.num_image_tokens if modality == "vl" else 0
        after += -(text_mask.shape[1] + after) % ALIGNED
        padded = F.pad(text_mask == 0, (0, after), value=False)
        return biases, torch.zeros(padded.shape, device=padded.device).masked_fill(padded, -torch.inf)[:, None, None]

    def _biases(self, table: Tensor, modality: Modality, text_len: int) -> list[Tensor]:
        """Per block (1, heads, S, S')."""
        if self._step is not None and (modality, text_len) in self._step:
            return self._step[modality, text_len]
        index = self._index(modality, text_len)
        index = F.pad(index, (0, -len(index) % ALIGNED))
        bias = F.embedding(index, table)  # (S, S', depth * heads)
        biases = list(bias.permute(2, 0, 1).contiguous().unsqueeze(0).chunk(self.depth, dim=1))
        if self._step is not None:
            self._step[modality, text_len] = biases
        return biases

    def _index(self, modality: Modality, text_len: int) -> Tensor:
        """Rows of the table, (S, S) int64; texts shorter than the longest leave out the rows and columns they lack."""
        if modality == "image":
            return self.get_buffer("image_index")
        if modality == "text":
            return self.get_buffer("text_index")[:text_len, :text_len]
        joint = self.get_buffer("joint_index")
        tokens = torch.arange(len(joint), device=joint.device)
        kept = torch.cat([tokens[:text_len], tokens[self.max_text_len :]])
        return joint[kept][:, kept]
