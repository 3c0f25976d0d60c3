"""What a run will write."""

import torch

from tests import tiny
from vlmo.config import resolve
from vlmo.settings import Settings
from vlmo.training.disk_usage import checkpoint_size, num_checkpoints


def test_the_number_of_checkpoints():
    def number(train=100, val=10, **updates):
        options = {"batch_size": 10, "per_gpu_batchsize": 5, "max_epoch": 3, "max_steps": None}
        settings = Settings.from_config(resolve("task_mlm_itm_itc_base", **options | updates))
        return num_checkpoints(settings, {"train": train, "val": val})

    assert number() == 4  # one an epoch, and the last
    assert number(val_check_interval=0.5) == 7
    assert number(val_check_interval=10) == 7  # of 20 batches an epoch
    assert number(val=0, val_check_interval=0.5) == 4
    assert number(max_steps=15) == 3  # 30 batches
    assert number(max_steps=100) == 11  # of 10 steps an epoch: max_epoch is ignored
    assert number(train=3) == 4


def test_the_size_of_a_checkpoint_counts_what_the_optimizer_keeps():
    for optimizer, kept in (("adamw", 2), ("sgd", 1), ("adan", 4)):
        model = tiny.model("task_textmlm_base", optim_type=optimizer)
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        trained = sum(p.nbytes for _, p in model.trained_parameters())
        assert checkpoint_size(model, optimizer) == weights + kept * trained
        with torch.device("meta"):
            shapes = tiny.VLMo(model.settings.model_dump(mode="json"))
        assert checkpoint_size(shapes, optimizer) == checkpoint_size(model, optimizer)
