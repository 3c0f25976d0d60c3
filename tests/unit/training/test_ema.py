"""Averages of weights: by hand, where they are seen, and what is saved."""

from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from vlmo.checkpoint import convert
from vlmo.checkpoints.files import AVERAGES, TRAINED, read, to_train
from vlmo.errors import VLMoError
from vlmo.settings import Settings
from vlmo.training.callbacks.ema import WeightAverages


class Model(torch.nn.Module):
    step_is_skipped = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = torch.nn.Parameter(torch.tensor([5.0]), requires_grad=False)

    def trained_parameters(self):
        return [("weight", self.weight)]


def stepped(decay=0.5, skipped=()):
    """A model that has taken five steps of +1, of which some are skipped, in two passes each."""
    model, trainer, averages = Model(), SimpleNamespace(global_step=0), WeightAverages(decay)
    averages.on_train_start(trainer, model)
    for step in range(1, 6):
        averages.on_train_batch_end(trainer, model, None, None, 0)  # accumulates
        model.step_is_skipped = step in skipped
        with torch.no_grad():
            model.weight += step not in skipped
        trainer.global_step = step
        averages.on_train_batch_end(trainer, model, None, None, 1)
    return model, trainer, averages


@pytest.mark.parametrize("skipped", [(), (2, 5)])
def test_by_hand(skipped):
    model, _, averages = stepped(0.3, skipped)
    weight = average = torch.tensor([1.0, -2.0])
    for step in range(1, 6):
        if step not in skipped:
            decay = min(0.3, (1 + step) / (10 + step))
            weight = weight + 1
            average = decay * average + (1 - decay) * weight
    assert torch.allclose(averages.averages["weight"], average, rtol=1e-6)
    assert torch.equal(model.weight, weight) and set(averages.averages) == {"weight"}


@pytest.mark.parametrize("validating", [False, True])
def test_what_is_evaluated_and_what_is_saved(validating):
    model, trainer, averages = stepped()
    weight, average = model.weight.detach().clone(), averages.averages["weight"].clone()
    if validating:
        with torch.inference_mode():
            averages.on_validation_start(trainer, model)
        assert torch.equal(model.weight, average)
    checkpoint = {"state_dict": {name: each.detach() for name, each in model.state_dict().items()}}
    averages.on_save_checkpoint(trainer, model, checkpoint)
    assert torch.equal(checkpoint["state_dict"]["weight"], average)
    assert torch.equal(checkpoint[TRAINED]["weight"], weight) and checkpoint["state_dict"]["frozen"] == 5
    if validating:
        with torch.inference_mode():
            averages.on_validation_end(trainer, model)
    assert torch.equal(model.weight, weight)
    with torch.no_grad():
        model.weight += 1  # where the optimizer's weight lies, so the next average sees it
    trainer.global_step += 1
    averages.on_train_batch_end(trainer, model, None, None, 0)
    assert torch.allclose(averages.averages["weight"], (7 * average + 9 * (weight + 1)) / 16)

    loaded = to_train(checkpoint)
    assert torch.equal(loaded["state_dict"]["weight"], checkpoint[TRAINED]["weight"]) and TRAINED not in loaded
    resumed = WeightAverages(0.5)
    resumed.on_load_checkpoint(trainer, model, loaded)
    resumed.on_train_start(trainer, model)
    assert torch.equal(resumed.averages["weight"], loaded[AVERAGES]["weight"])


def test_weights_of_a_file(tmp_path):
    model = tiny.model("task_finetune_imagenet_base")
    state, name = model.state_dict(), "image_classifier.fc.bias"
    torch.save({"state_dict": state, TRAINED: {name: state[name] + 1}}, tmp_path / "run.ckpt")
    assert torch.equal(read(tmp_path / "run.ckpt").tensors[name], state[name])
    assert torch.equal(read(tmp_path / "run.ckpt", trained=True).tensors[name], state[name] + 1)
    convert(str(tmp_path / "run.ckpt"), str(tmp_path / "plain.pt"), trained_weights=True)
    assert torch.equal(read(tmp_path / "plain.pt").tensors[name], state[name] + 1)
    with pytest.raises(VLMoError, match="no averaged weights"):
        read(tmp_path / "plain.pt", trained=True)


@pytest.mark.parametrize(
    "options", [{"strategy": "fsdp2"}, {"strategy": "deepspeed_stage_2"}, {"use_sharded_training": True}]
)
def test_weights_that_are_shared_out_are_refused(options):
    with pytest.raises(VLMoError, match="ema_decay=0.9: averages weights that are whole"):
        Settings.from_config(tiny.config(ema_decay=0.9, **options))
