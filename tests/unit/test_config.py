"""Options and named configs as sacred resolves them."""

import subprocess
import sys

import pytest

from vlmo.config import ex, explain, named, resolve, sacred
from vlmo.errors import VLMoError
from vlmo.registry import TASKS


def test_named_configs_are_laid_over_the_defaults_and_updates_win():
    config = resolve("task_finetune_irtr_f30k_base", "step3k", learning_rate=1e-3, max_epoch=7)
    assert (config["max_steps"], config["warmup_steps"]) == (3000, 300)  # the schedule is named after the task
    assert (config["learning_rate"], config["max_epoch"]) == (1e-3, 7)
    assert config["datasets"] == ["f30k"]


def test_a_dict_changes_the_given_keys_only():
    weights = resolve("task_mlm_itm_itc_base", loss_names={"mlm": 0.5})["loss_names"]
    assert weights == dict.fromkeys(TASKS, 0) | {"itm": 1, "itc": 1, "mlm": 0.5}


def test_what_is_done_to_a_config_does_not_reach_the_next():
    config = resolve("task_mlm_itm_itc_base")
    config["datasets"].append("f30k")
    config["loss_names"]["itm"] = 0
    assert resolve("task_mlm_itm_itc_base")["datasets"] == ["coco", "vg", "sbu", "gcc"]
    assert resolve("task_mlm_itm_itc_base")["loss_names"]["itm"] == 1
    datasets = ["coco"]
    resolve(datasets=datasets)["datasets"].append("vg")
    assert datasets == ["coco"]


def test_unknown_names():
    with pytest.raises(sacred.utils.NamedConfigNotFoundError):
        resolve("task_mlm")
    with pytest.raises(sacred.utils.ConfigAddedError):
        resolve(batchsize=4)


@pytest.mark.parametrize("name", [name for name in ex.named_configs if name.startswith("task_")])
def test_runs_are_named_after_their_task(name):
    assert f"task_{resolve(name)['exp_name']}" == name


def test_importable_from_standard_input_and_without_torch():
    program = "import sys, vlmo.config\nprint('torch' in sys.modules, vlmo.config.resolve()['seed'])\n"
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]
    assert done.stderr == ""


def test_a_named_config_is_registered_once():
    named("task_of_a_test", {"batch_size": 8}, seed=3)
    try:
        named("task_of_a_test", {"batch_size": 8}, seed=3)  # (a module that is imported anew)
        assert (resolve("task_of_a_test")["batch_size"], resolve("task_of_a_test")["exp_name"]) == (8, "of_a_test")
        with pytest.raises(VLMoError, match="task_of_a_test.*registered already"):
            named("task_of_a_test", seed=4)
        assert resolve("task_of_a_test")["seed"] == 3
    finally:
        del ex.named_configs["task_of_a_test"]


def test_a_misspelt_option_of_a_task():
    with pytest.raises(sacred.utils.ConfigAddedError) as error:
        resolve(contrast_gradiant="exact")
    assert explain(error.value).endswith("did you mean contrast_gradient?")


def test_observers_record_a_run_once(monkeypatch, tmp_path):
    options = {"--file_storage": str(tmp_path)}
    assert len(ex._create_run("print_config", options=options).observers) == 1
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert ex._create_run("print_config", options=options).observers == []
    monkeypatch.setenv("RANK", "0")
    assert len(ex._create_run("print_config", options=options).observers) == 1
