"""On a GPU: CUDA itself refuses to wait for the device within a step, of every task; see unit/test_no_host_reads.py."""

import pytest
import torch

from tests.unit.test_no_host_reads import CONFIGS, batch_of, model_of, optimizer_of, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture
def refused():
    """Makes CUDA refuse; what a test does before it calls this is free to wait."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(name):
    model = model_of(name)
    batch = {key: value.cuda() if torch.is_tensor(value) else value for key, value in batch_of(model).items()}
    return model.cuda(), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_backward_and_optimizer(name, dtype, refused):
    model, batch = on_gpu(name)
    optimizer = optimizer_of(model)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        step(model, batch, optimizer)  # (what is made once is made)
        refused()
        step(model, batch, optimizer)


def test_a_read_is_refused(refused):
    value = torch.ones((), device="cuda")
    refused()
    with pytest.raises(RuntimeError, match="synchroniz"):
        value.item()
