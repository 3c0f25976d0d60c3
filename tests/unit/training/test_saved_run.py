"""Checkpoints that DeepSpeed wrote, which not every run can go on from."""

import pytest

from tests import tiny
from vlmo.errors import VLMoError
from vlmo.settings import Settings
from vlmo.training.checkpointing.saved_run import SavedRun

ZERO = {"use_sharded_training": True}


@pytest.fixture
def folder(tmp_path):
    """As two processes leave it, as far as names go."""
    for name in ("mp_rank_00_model_states", *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states" for rank in range(2))):
        file = tmp_path / "last.ckpt" / "checkpoint" / f"{name}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "last.ckpt"


def check(path, **options):
    config = tiny.config("task_textmlm_base", per_gpu_batchsize=1, **options)
    SavedRun.read(path).check(Settings.from_config(config), "")


def test_the_same_number_of_processes_goes_on(folder):
    check(folder, **ZERO, num_gpus=2)
    check(folder, strategy="deepspeed_stage_1", num_gpus=1, num_nodes=2)


def test_another_number_does_not(folder):
    with pytest.raises(VLMoError, match=r"as many processes as wrote it, 2; give num_gpus .* load_path="):
        check(folder, **ZERO, num_gpus=4)


def test_another_strategy_does_not_and_deepspeed_takes_its_own_alone(folder, tmp_path):
    with pytest.raises(VLMoError, match="is DeepSpeed's, and another strategy cannot resume it"):
        check(folder, strategy="fsdp2", num_gpus=2)
    with pytest.raises(VLMoError, match="is not DeepSpeed's, and it cannot resume it"):
        check(tmp_path / "a.ckpt", **ZERO, num_gpus=2)
