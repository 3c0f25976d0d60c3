"""What heads are made of; a task's own heads stand in its file."""

from torch import nn


def classifier(in_dim: int, hidden_dim: int, num_classes: int) -> nn.Sequential:
    """Builds Linear, LayerNorm, GELU, Linear: the head of fine-tuning tasks that choose among classes."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, num_classes)
    )
