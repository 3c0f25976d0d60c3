"""Fixtures and hygiene for all tests."""

import os
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the default tier needs no network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

# A process whose first backward pass comes after fake CUDA tensors starts a thread for that device, and what is forked
# from it cannot compute gradients.
torch.zeros((), requires_grad=True).backward()

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes is no result
hypothesis.settings.load_profile("any machine")

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def clean_torch_state():
    """Each test starts from the same seed and leaves no process group or gradient mode behind."""
    torch.manual_seed(0)
    yield
    torch.set_grad_enabled(True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
