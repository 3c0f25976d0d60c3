"""Models and batches of the recordings: weights and inputs drawn by `goldens/recipe.py`."""

import numpy as np
import torch

from tests.goldens import recipe
from vlmo.config import resolve
from vlmo.modules import VLMo


def fill(model, salt=""):
    """Sets every state-dict entry to the recipe's value."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.as_tensor(recipe.weight(name, tuple(tensor.shape), salt)))
    return model


def build(name, **updates):
    """The model of the named config `name` with the recipe's weights, everything trainable, no stochastic depth."""
    config = resolve(name, drop_path_rate=0.0, **updates)
    model = VLMo(config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return fill(model), config


def batch(config, salt=""):
    """The recipe's batch of two as tensors."""
    arrays = recipe.batch(config, salt=salt)
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


def gradient_digest(gradient):
    """Norm, sum, and sum of every (n // 7)-th element, as recorded."""
    flat = gradient.flatten().double()
    return np.array([flat.norm(), flat.sum(), flat[:: max(flat.numel() // 7, 1)].sum()], dtype=np.float64)
