"""The checks of a config as a whole: every problem at once, each with its remedy."""

import json
import re

import pytest

from tests.conftest import GOLDENS
from vlmo.config import resolve
from vlmo.errors import VLMoError
from vlmo.settings import Settings

KNOWN = {
    "architectures": ["vlmo_base_patch16", "vlmo_tiny_patch16"],
    "datasets": ["coco", "vg", "sbu", "gcc", "wikibk", "vqa", "nlvr2", "f30k", "images"],
    "losses": ["mlm", "textmlm", "itm", "itc", "irtr", "vqa", "nlvr2", "mim"],
}


def problems(*named, **updates):
    """The lines of the error that the config meets; none if it is valid."""
    try:
        Settings.from_config(resolve(*named) | updates, KNOWN)
    except VLMoError as error:
        return str(error).splitlines()
    return []


def losses(**weights):
    return resolve()["loss_names"] | {"itm": 0, "itc": 0, "mlm": 0} | weights


def test_published_config_without_the_options_that_are_new_here():
    published = json.loads((GOLDENS / "named_configs.json").read_text())["default"]
    settings = Settings.from_config(published, KNOWN)
    assert (settings.accelerator, settings.strategy, settings.autocontrast) == ("auto", "auto", "correct")


def test_a_config_written_as_json_is_the_same_config():
    settings = Settings.from_config(resolve("task_finetune_vqa_base_image480", num_gpus=[0, 2]))
    assert Settings.from_config(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


def test_frozen():
    settings = Settings.from_config(resolve())
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 2


def test_all_problems_at_once():
    lines = problems(
        batch_size="abc",
        image_size=230,
        per_gpu_batchsize=0,
        precision=8,
        loss_names=losses(itm=1),
        max_text_len=200,
        model_arch="vlmo_bas_patch16",
        text_only=True,
    )
    for beginning in (
        "batch_size=",
        "image_size=",
        "per_gpu_batchsize=",
        "precision=",
        "loss_names.itm",
        "max_text_len=",
    ):
        assert sum(line.startswith(beginning) for line in lines) == 1, (beginning, lines)
    assert any("model_arch: 'vlmo_bas_patch16' is unknown; did you mean vlmo_base_patch16?" in line for line in lines)
    assert any(line.startswith("text_only=True: refused") for line in lines)
    assert len(lines) == 8


def test_only_texts_alone_are_grouped_by_length():
    assert problems("task_textmlm_base", group_by_length=True) == []
    (line,) = problems("task_mlm_itm_itc_base", group_by_length=True)
    assert line.startswith("group_by_length=True: is for textmlm;")


@pytest.mark.parametrize(
    "option", ["batch_size", "seed", "image_size", "max_steps", "num_workers", "per_gpu_batchsize"]
)
@pytest.mark.parametrize("value", ["abc", "4", "", True, 1.5, float("nan"), float("inf"), [4], -1])
def test_whole_numbers(option, value):
    (line,) = problems(**{option: value})
    assert line.startswith(f"{option}={value!r}: ")


def test_whole_floats_are_whole_numbers():
    settings = Settings.from_config(resolve() | {"batch_size": 2048.0, "max_steps": 1e3})
    assert (settings.batch_size, settings.max_steps) == (2048, 1000)
    assert isinstance(settings.max_steps, int)


BAD = {
    "end": ({"max_steps": None, "max_epoch": None}, "max_steps and max_epoch: one of them"),
    "no loss": ({"loss_names": losses()}, "every loss is off; name a task"),
    "itm alone": ({"loss_names": losses(itm=1, mlm=1)}, "set loss_names.itc=1 too"),
    "itc and irtr": ({"loss_names": losses(itc=1, irtr=1)}, "switch one of them off"),
    "textmlm and mlm": ({"loss_names": losses(textmlm=1, mlm=1), "datasets": ["wikibk"]}, "no other loss can be on"),
    "negative weight": ({"loss_names": losses(mlm=-0.5)}, "greater than or equal to 0"),
    "misspelt loss": ({"loss_names": losses(mlm=1, iltc=1)}, "'iltc' is unknown; did you mean itc?"),
    "text set for pairs": ({"datasets": ["coco", "wikibk"]}, "wikibk has no images"),
    "pairs for text": ({"loss_names": losses(textmlm=1), "datasets": ["coco"]}, r"trains on \['wikibk'\] only"),
    "vqa on pairs": ({"loss_names": losses(vqa=1), "datasets": ["vqa", "coco"]}, r"trains on \['vqa'\] only"),
    "mim and itc": ({"loss_names": losses(mim=1, itc=1)}, "loss_names.mim: trains on images without texts"),
    "images for pairs": ({"datasets": ["coco", "images"]}, "images has no texts; it is for mim only"),
    "text for images": ({"loss_names": losses(mim=1), "datasets": ["wikibk"]}, "wikibk has no images"),
    "no tokenizer of images": ({"loss_names": losses(mim=1), "mim_target": "dalle"}, "with mim_tokenizer=FILE"),
    "unknown target": ({"mim_target": "vqgan"}, "input should be 'pixels' or 'dalle'"),
    "hides all": ({"mim_mask_ratio": 1}, "mim_mask_ratio=1: "),
    "betas": ({"adamw_betas": [0.9, 1.0]}, "adamw_betas="),
    "clips to nothing": ({"gradient_clip_val": 0}, "gradient_clip_val=0: "),
    "cache without contrast": ({"contrast_cache": True, "loss_names": losses(mlm=1)}, "needs loss_names.irtr or itc"),
    "cache of shards": ({"contrast_cache": True, "strategy": "fsdp"}, "use strategy=auto and no sharding"),
    "no experts to train": (
        {"loss_names": losses(textmlm=1), "datasets": ["wikibk"], "shared_ffn": True},
        "there are none",
    ),
    "cache and offload": (
        {"contrast_cache": True, "activation_checkpointing": "offload"},
        "give activation_checkpoint",
    ),
    "negatives": ({"negatives": "near"}, "input should be 'global' or 'local'"),
    "no set": ({"datasets": []}, "datasets="),
    "misspelt set": ({"datasets": ["coca"]}, "datasets: 'coca' is unknown; did you mean coco"),
    "unknown size": ({"model_arch": "resnet"}, "model_arch: 'resnet' is unknown.* Known: vlmo_base_patch16"),
    "patches": ({"image_size": 225}, "multiple of the patch size 16; the nearest is 224"),
    "text length": ({"max_text_len": 197}, "room for max_text_len_of_initckpt=196 tokens; shorten the one or raise"),
    "batch": ({"batch_size": 10}, "4 x 1 x 1 = 4; the nearest that is: batch_size=8"),
    "batch too small": ({"batch_size": 2}, "the nearest that is: batch_size=4"),
    "batch of devices": ({"batch_size": 12, "num_gpus": 8}, "4 x 8 x 1 = 32; the nearest that is: batch_size=32"),
    "single pair": ({"per_gpu_batchsize": 1, "num_gpus": 0}, "set per_gpu_batchsize=2 or more"),
    "cpu as gpu": ({"num_gpus": 0, "accelerator": "gpu"}, "num_gpus=0 is the CPU"),
    "cpus by number": ({"num_gpus": [0, 1], "accelerator": "cpu"}, "give a number of processes"),
    "two shardings": ({"use_sharded_training": True, "strategy": "fsdp"}, "strategy=fsdp is not: drop one"),
    "nothing to test": ({"test_only": True}, "give it with load_path=FILE"),
    "recall of nothing": ({"get_recall_metric": True, "loss_names": losses(mlm=1)}, "needs loss_names.irtr or itc"),
    "re-ranking of nothing": ({"get_recall_rerank_metric": True}, "get_recall_metric=True ranks; set that too"),
    "re-ranking by a new head": (
        {"get_recall_rerank_metric": True, "get_recall_metric": True, "loss_names": losses(irtr=1)},
        "needs an ITM head that has been trained; give a file with load_path=FILE",
    ),
    "false images": ({"draw_false_image": 1}, "draw_false_image=1: refused, "),
    "false texts": ({"draw_false_text": 1}, "draw_false_text=1: refused, "),
    "images only": ({"image_only": True}, "image_only=True: refused, "),
    "text only": ({"text_only": True}, "refused, text alone is trained with the named config task_textmlm_base"),
    "share of an epoch": ({"val_check_interval": 20.0}, "at most 1.0; 20 without a decimal point counts batches"),
    "never validate": ({"val_check_interval": 0}, "val_check_interval=0: "),
    "rate that rises": ({"end_lr": 1e-3}, "give less than learning_rate=0.0001"),
    "too large a seed": ({"seed": 2**32}, "seed=4294967296: "),
    "no rate": ({"learning_rate": 0}, "learning_rate=0: "),
    "rate of nan": ({"learning_rate": float("nan")}, "learning_rate=nan: "),
    "masks all": ({"mlm_prob": 1}, "mlm_prob=1: "),
    "drops all": ({"drop_path_rate": 1}, "drop_path_rate=1: "),
    "optimizer": ({"optim_type": "lamb"}, "input should be 'adamw', 'adam' or 'sgd'"),
    "decay": ({"decay_power": "linear"}, "decay_power='linear': "),
    "precision": ({"precision": 64}, "input should be 16, 32, '16', '32', 'bf16' or 'auto'"),
    "autocontrast": ({"autocontrast": "none"}, "input should be 'correct' or 'original'"),
    "name with a slash": ({"exp_name": "a/b"}, "exp_name='a/b': "),
    "no tokenizer": ({"tokenizer": ""}, "tokenizer='': "),
    "misspelt option": ({"batchsize": 8}, "batchsize: there is no such option; did you mean batch_size?"),
    "unlike any option": ({"zzz": 8}, "zzz: there is no such option"),
}


@pytest.mark.parametrize("updates, line", BAD.values(), ids=BAD)
def test_one_problem_one_line(updates, line):
    with pytest.raises(VLMoError, match=line) as error:
        Settings.from_config(resolve() | updates, KNOWN)
    assert len(str(error.value).splitlines()) == 1


GOOD = {
    "more devices than pairs": {"per_gpu_batchsize": 1, "num_gpus": 2},
    "any batch in a test": {"batch_size": 7, "test_only": True, "load_path": "x.ckpt"},
    "batches between validations": {"val_check_interval": 20},
    "part of an epoch": {"val_check_interval": 0.25},
    "no warm-up": {"warmup_steps": 0},
    "epochs only": {"max_steps": None},
    "steps only": {"max_epoch": None},
    "cosine": {"decay_power": "cosine"},
    "cpu processes": {"num_gpus": 2, "accelerator": "cpu"},
    "some batches": {"fast_dev_run": 3},
    "images of any set": {"loss_names": losses(mim=1), "datasets": ["coco", "images", "nlvr2"]},
    "clipped": {"gradient_clip_val": 3.0},
    "whole contrast": {"contrast_cache": True, "strategy": "ddp"},
    "extra pairs": {"datasets": ["coco", "vqa", "nlvr2"]},
    "re-ranking while ITM learns": {"get_recall_rerank_metric": True, "get_recall_metric": True},
    "contrast that is half as heavy": {"loss_names": losses(itc=0.5, itm=2.0)},
}


@pytest.mark.parametrize("updates", GOOD.values(), ids=GOOD)
def test_valid(updates):
    assert problems(**updates) == []


def test_missing_option():
    config = resolve()
    del config["seed"]
    with pytest.raises(VLMoError, match=r"^seed: is missing; start from vlmo.config.resolve"):
        Settings.from_config(config)


def test_derived_numbers():
    settings = Settings.from_config(resolve(batch_size=96, per_gpu_batchsize=4, num_gpus=[1, 3, 5], num_nodes=2))
    assert (settings.devices, settings.pairs_per_pass, settings.accumulation) == (3, 24, 4)
    assert Settings.from_config(resolve(num_gpus=0)).devices == 1
    assert set(Settings.from_config(resolve(loss_names={"itm": 0, "mlm": 0.1})).active) == {"itc", "mlm"}


def test_the_cache_loads_a_whole_step_at_a_time():
    config = resolve(batch_size=96, per_gpu_batchsize=4, num_gpus=2)
    plain, cached = (Settings.from_config(config | {"contrast_cache": cache}) for cache in (False, True))
    assert (plain.training_batch, plain.accumulated_batches) == (4, 12)
    assert (cached.training_batch, cached.accumulated_batches) == (48, 1)


@pytest.mark.parametrize(
    "path, name", [("", ""), ("/a/b/coco.pt", "coco"), ("coco.ckpt", "coco"), ("/a/step.1.pth", "step.1")]
)
def test_run_name_keeps_the_whole_name_of_the_file(path, name):
    settings = Settings.from_config(resolve("task_mlm_itm_itc_base", load_path=path, seed=7))
    assert settings.run_name == f"mlm_itm_itc_base_seed7_from_{name}"


@pytest.mark.parametrize(
    "updates, line",
    [
        ({"compile": True, "strategy": "fsdp"}, "compile=True: blocks whose weights strategy=fsdp shards"),
        ({"profile_steps": 2, "fast_dev_run": True}, "profile_steps: .* drop fast_dev_run"),
        ({"profile_steps": -1}, "profile_steps=-1"),
        ({"compile": "yes please"}, "compile='yes please'"),
    ],
)
def test_options_about_speed(updates, line):
    (found,) = problems(**updates)
    assert re.search(line, found)
