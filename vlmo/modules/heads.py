"""Small networks on top of the transformer; their attribute names are those of released files."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.modules.linear_cross_entropy import linear_cross_entropy

BERT_NORM_EPS = 1e-12


def init_head(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, biases 0, norms 1; embeddings likewise."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class Pooler(nn.Module):
    """tanh of a linear map of position 0."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)"""
        return torch.tanh(self.dense(hidden[:, 0]))


class ITCHead(nn.Module):
    """Projection into the contrastive space."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D) of unit length"""
        return F.normalize(self.fc(x), dim=-1)


class ITMHead(nn.Module):
    """Match or no match."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(embed_dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, 2): logits of no match, match"""
        return self.fc(x)


class _MLMTransform(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.LayerNorm = nn.LayerNorm(embed_dim, eps=BERT_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class MLMHead(nn.Module):
    """BERT's head: transform, then a decoder that is not tied to the word embedding."""

    def __init__(self, embed_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = _MLMTransform(embed_dim)
        self.decoder = nn.Linear(embed_dim, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)"""
        return F.linear(self.transform(x), self.decoder.weight, self.bias)

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy for (N, D) and (N,) labels, and the predicted words, without all logits at once."""
        return linear_cross_entropy(self.transform(x), self.decoder.weight, self.bias, labels)


def classifier(in_dim: int, hidden_dim: int, num_classes: int) -> nn.Sequential:
    """Linear, LayerNorm, GELU, Linear: VQA and NLVR2."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, num_classes)
    )
