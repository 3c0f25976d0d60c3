"""Which steps are skipped and counted."""

import math
from types import SimpleNamespace

import pytest
import torch

from vlmo.errors import VLMoError
from vlmo.training.callbacks.skipping import NonFinite


def step(callback, losses, gradient, scale=None, numbers=((3, 4), (5, 6))):
    """One optimizer step after passes of these losses; returns whether it would be taken."""
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    strategy, precision = SimpleNamespace(root_device=torch.device("cpu")), SimpleNamespace(scaler=scaler)
    trainer = SimpleNamespace(strategy=strategy, precision_plugin=precision, global_step=7)
    module = SimpleNamespace(log=callback.__dict__.setdefault("logged", {}).__setitem__)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([0.5, gradient])
    for loss, samples in zip(losses, numbers, strict=False):
        callback.on_train_batch_start(trainer, None, {"raw_index": torch.tensor(samples)}, 0)
        callback.on_before_backward(trainer, None, torch.tensor(loss))
    callback.on_before_optimizer_step(trainer, module, torch.optim.SGD([weight], 0.1))
    return weight.grad is not None


def test_only_numbers_are_taken(caplog):
    callback = NonFinite(10)
    assert step(callback, [1.0, 2.0], 1e18)
    assert callback.skipped == 0
    assert not step(callback, [1.0, math.nan], 1.0)
    assert "step 7, rank 0: the loss is inf or NaN, the step is skipped; samples 5, 6 (1 skipped so far)" in caplog.text
    assert not step(callback, [1.0, 2.0], math.inf)
    assert "the gradient is inf or NaN, the step is skipped; samples 3, 4, 5, 6 (2 skipped so far)" in caplog.text
    assert not step(callback, [math.inf, math.nan], math.nan)
    assert callback.skipped == 3


def test_the_norm_of_the_gradient_is_logged():
    callback = NonFinite(10)
    step(callback, [1.0, 2.0], 1.2)
    assert callback.logged["train/grad_norm"] == pytest.approx(1.3)


def test_the_count_in_a_row_begins_anew():
    callback = NonFinite(2)
    for loss in (math.nan, 1.0, math.nan, 1.0):
        step(callback, [loss], 1.0)
    assert callback.skipped == 2
    step(callback, [math.nan], 1.0)
    with pytest.raises(VLMoError, match="2 steps in a row .*max_nonfinite=2"):
        step(callback, [math.nan], 1.0)


def test_the_count_survives_a_resume():
    first, then = NonFinite(2), NonFinite(2)
    step(first, [math.nan], 1.0)
    then.load_state_dict(first.state_dict())
    with pytest.raises(VLMoError):
        step(then, [math.nan], 1.0)


def test_overflow_of_a_scaled_loss_is_the_scalers_affair():
    callback = NonFinite(2)
    for _ in range(3):
        assert step(callback, [1.0], math.inf, scale=2.0**16)
    assert callback.skipped == 0
    assert not step(callback, [math.nan], math.nan, scale=2.0**16)
    with pytest.raises(VLMoError):  # nothing is left to scale down
        step(callback, [1.0], math.nan, scale=1.0)


def test_many_samples_are_shortened_on_the_console(caplog):
    step(NonFinite(2), [math.nan], 1.0, numbers=(range(20),))
    assert "samples 0, 1, 2, 3, 4, 5, 6, 7, ... (1 skipped" in caplog.text
