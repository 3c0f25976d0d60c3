"""BERT's input embedding, with its positions optional.

Own module because transformers >= 5 always adds absolute positions, which base and large must not (their positions come
from the relative bias; the parameter is kept unused, for the names and shapes of released files).
"""

import torch
from torch import Tensor, nn

PAD_ID = 0
LAYER_NORM_EPS = 1e-12


class TextEmbeddings(nn.Module):
    """Word + token type 0 (+ position), LayerNorm, dropout."""

    def __init__(
        self, vocab_size: int, embed_dim: int, max_text_len: int, absolute_positions: bool, dropout: float
    ) -> None:
        super().__init__()
        self.absolute_positions = absolute_positions
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=PAD_ID)
        self.position_embeddings = nn.Embedding(max_text_len, embed_dim)
        self.token_type_embeddings = nn.Embedding(2, embed_dim)
        self.LayerNorm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)  # BERT's name, part of the state dict's contract
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, D)"""
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        if self.absolute_positions:
            positions = torch.arange(ids.shape[1], device=ids.device)
            x = x + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))
