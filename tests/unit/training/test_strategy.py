"""Parameters without dimensions, which sharding does not take."""

import torch
from torch import nn

from vlmo.training.strategy import ScalarsAsVectors


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.weight = nn.Parameter(torch.ones(3))


def test_scalars_are_vectors_in_memory_alone():
    module = Scaled()
    ScalarsAsVectors(module)
    assert module.scale.shape == (1,) and module.weight.shape == (3,)
    saved = module.state_dict()
    assert saved["scale"].shape == () and saved["scale"] == 2
    module.load_state_dict({"scale": torch.tensor(5.0), "weight": torch.zeros(3)})
    assert module.scale.shape == (1,) and module.scale.item() == 5


def test_without_scalars_nothing_is_changed():
    module = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ScalarsAsVectors(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
