"""Four optimizer steps give the original's losses (recorded in goldens/trajectory.json)."""

import json

import pytest

from tests.conftest import GOLDENS
from tests.parity import models
from vlmo.training import optimizer as optim

RECORDED = json.loads((GOLDENS / "trajectory.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_losses_of_four_steps(name):
    model, config = models.build(name, max_steps=10, warmup_steps=2)
    model.train()
    optimizer = optim.build_optimizer(config["optim_type"], model.parameter_groups(), config["learning_rate"])
    schedule = optim.build_schedule(optimizer, 10, 2, config["decay_power"], config["end_lr"])
    for step, expected in enumerate(RECORDED[name]):
        outputs = model(models.batch(config, salt=f"step{step}:"))
        losses = {f"{objective}_loss": output.loss.item() for objective, output in outputs.items()}
        assert losses == pytest.approx(expected, rel=1e-4), f"step {step}"
        sum(output.loss for output in outputs.values()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
