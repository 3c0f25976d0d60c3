"""The checks of a config as a whole: every problem at once, each with its remedy."""

import copy
import json
import pickle
import re

import pytest

from tests.conftest import GOLDENS
from vlmo.config import resolve
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS, TASKS
from vlmo.settings import Settings
from vlmo.settings.__main__ import page
from vlmo.settings.groups import PositiveInt
from vlmo.settings.option import OptionGroup, option
from vlmo.tasks.base import Task as Task
from vlmo.tasks.itc import ContrastTask

REPOSITORY = GOLDENS.parent.parent


def problems(*named, **updates):
    """The lines of the error that the config meets; none if it is valid."""
    try:
        Settings.from_config(resolve(*named) | updates)
    except VLMoError as error:
        return str(error).splitlines()
    return []


def losses(**weights):
    return resolve()["loss_names"] | {"itm": 0, "itc": 0, "mlm": 0} | weights


def test_published_config_without_the_options_that_are_new_here():
    published = json.loads((GOLDENS / "named_configs.json").read_text())["default"]
    settings = Settings.from_config(published)
    assert (settings.accelerator, settings.strategy, settings.autocontrast) == ("auto", "auto", "correct")


def test_a_config_written_as_json_is_the_same_config():
    settings = Settings.from_config(resolve("task_finetune_vqa_base_image480", num_gpus=[0, 2]))
    assert Settings.from_config(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


def test_home_is_expanded_in_every_path_option(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    names = {"data_root", "log_dir", "load_path", "resume_from", "tokenizer", "mim_tokenizer", "knn_data"}
    settings = Settings.from_config(resolve() | dict.fromkeys(names, "~/here"))
    assert {getattr(settings, name) for name in names} == {"/home/somebody/here"}
    paths = {name for name, text in Settings.meanings().items() if "folder of" in text or "a local file" in text}
    assert paths <= names  # one that is added is a PathText too


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
    assert any("model_arch: 'vlmo_bas_patch16' is unknown; did you mean vlmo_base_patch16" in line for line in lines)
    assert any(line.startswith("text_only=True: refused") and "loss_names.textmlm" in line for line in lines)
    assert len(lines) == 8


def test_only_texts_alone_are_grouped_by_length():
    assert problems("task_textmlm_base", group_by_length=True) == []
    (line,) = problems("task_mlm_itm_itc_base", group_by_length=True)
    assert line.startswith("group_by_length=True: ")


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
    "itm alone": ({"loss_names": losses(itm=1, mlm=1)}, "loss_names.itm: builds upon a contrast; set loss_names.itc=1"),
    "itc and irtr": ({"loss_names": losses(itc=1, irtr=1)}, "itc and irtr share the heads of the contrast"),
    "textmlm and mlm": ({"loss_names": losses(textmlm=1, mlm=1), "datasets": ["wikibk"]}, "no other loss can be on"),
    "negative weight": ({"loss_names": losses(mlm=-0.5)}, "greater than or equal to 0"),
    "misspelt loss": ({"loss_names": losses(mlm=1, iltc=1)}, "'iltc' is unknown; did you mean itc?"),
    "text set for pairs": ({"datasets": ["coco", "wikibk"]}, "wikibk has no images; it is for textmlm only"),
    "pairs for text": ({"loss_names": losses(textmlm=1), "datasets": ["coco"]}, r"trains on \['wikibk'\] only"),
    "vqa on pairs": ({"loss_names": losses(vqa=1), "datasets": ["vqa", "coco"]}, r"trains on \['vqa'\] only"),
    "mim and itc": (
        {"loss_names": losses(mim=1, itc=1)},
        "loss_names.mim: no other loss can be on for the same data; switch off itc",
    ),
    "images for pairs": ({"datasets": ["coco", "images"]}, "images has no texts; it is for mim only"),
    "text for images": ({"loss_names": losses(mim=1), "datasets": ["wikibk"]}, "wikibk has no images"),
    "no tokenizer of images": ({"loss_names": losses(mim=1), "mim_target": "dalle"}, "with mim_tokenizer=FILE"),
    "unknown target": ({"mim_target": "vqgan"}, "input should be 'pixels' or 'dalle'"),
    "hides all": ({"mim_mask_ratio": 1}, "mim_mask_ratio=1: "),
    "betas": ({"adamw_betas": [0.9, 1.0]}, "adamw_betas="),
    "clips to nothing": ({"gradient_clip_val": 0}, "gradient_clip_val=0: "),
    "cache without contrast": ({"contrast_cache": True, "loss_names": losses(mlm=1)}, "needs loss_names.irtr or itc"),
    "cache of shards": ({"contrast_cache": True, "use_sharded_training": True}, "use strategy=auto or fsdp2"),
    "smoothed sigmoid": ({"contrast_loss": "siglip", "label_smoothing": 0.1}, "label_smoothing: contrast_loss=siglip"),
    "limited shards": ({"logit_scale_max": 100, "use_sharded_training": True}, "logit_scale_max: DeepSpeed keeps"),
    "the former sharding": ({"strategy": "fsdp"}, "strategy=fsdp: FSDP2 does what FSDP1 did; give strategy=fsdp2"),
    "misspelt set of a task": (
        {"loss_names": losses(vqa=1), "datasets": ["vqaa"]},
        "'vqaa' is unknown; did you mean vqa",
    ),
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
    "two shardings": ({"use_sharded_training": True, "strategy": "fsdp2"}, "strategy=fsdp2 is not: drop one"),
    "nothing to test": ({"test_only": True}, "give it with load_path=FILE"),
    "recall of nothing": ({"get_recall_metric": True, "loss_names": losses(mlm=1)}, "needs loss_names.irtr or itc"),
    "re-ranking of nothing": ({"get_recall_rerank_metric": True}, "get_recall_metric=True ranks; set that too"),
    "re-ranking by a new head": (
        {"get_recall_rerank_metric": True, "get_recall_metric": True, "loss_names": losses(irtr=1)},
        "needs an ITM head that has been trained; give a file with load_path=FILE",
    ),
    "new heads of a test": ({"reset_heads": True, "test_only": True, "load_path": "x"}, "reset_heads=True: .*drop one"),
    "new heads of pre-training": ({"reset_heads": True}, "reset_heads=True: .*no such loss is on"),
    "false images": ({"draw_false_image": 1}, "draw_false_image=1: refused, "),
    "false texts": ({"draw_false_text": 1}, "draw_false_text=1: refused, "),
    "images only": ({"image_only": True}, "image_only=True: refused, "),
    "text only": ({"text_only": True}, "text_only=True: refused, .*loss_names.textmlm"),
    "share of an epoch": ({"val_check_interval": 20.0}, "at most 1.0; 20 without a decimal point counts batches"),
    "never validate": ({"val_check_interval": 0}, "val_check_interval=0: "),
    "rate that rises": ({"end_lr": 1e-3}, "give less than learning_rate=0.0001"),
    "too large a seed": ({"seed": 2**32}, "seed=4294967296: "),
    "no rate": ({"learning_rate": 0}, "learning_rate=0: "),
    "rate of nan": ({"learning_rate": float("nan")}, "learning_rate=nan: "),
    "masks all": ({"mlm_prob": 1}, "mlm_prob=1: "),
    "drops all": ({"drop_path_rate": 1}, "drop_path_rate=1: "),
    "optimizer": ({"optim_type": "lambc2"}, "optim_type: 'lambc2' is unknown; did you mean lambc"),
    "decay": ({"decay_power": "linear"}, "decay_power='linear': "),
    "precision": ({"precision": 64}, "input should be 16, 32, '16', '32', 'bf16' or 'auto'"),
    "autocontrast": ({"autocontrast": "none"}, "input should be 'correct' or 'original'"),
    "name with a slash": ({"exp_name": "a/b"}, "exp_name='a/b': "),
    "decay of layers": ({"layer_decay": 0}, "layer_decay=0: "),
    "logger": ({"loggers": ["csv", "tensorbord"]}, "loggers: 'tensorbord' is unknown; did you mean tensorboard"),
    "transform": ({"val_transform_keys": ["square"]}, "val_transform_keys: 'square' is unknown. Known: classification"),
    "dropped transform": ({"val_transform_keys": ["pixelbert"]}, "val_transform_keys: 'pixelbert' was dropped"),
    "plugins as text": ({"plugins": "my_task"}, "plugins='my_task': give a list"),
    "no tokenizer": ({"tokenizer": ""}, "tokenizer='': "),
    "misspelt option": ({"batchsize": 8}, "batchsize: there is no such option; did you mean batch_size?"),
    "unlike any option": ({"zzz": 8}, "zzz: there is no such option"),
}


@pytest.mark.parametrize("updates, line", BAD.values(), ids=BAD)
def test_one_problem_one_line(updates, line):
    with pytest.raises(VLMoError, match=line) as error:
        Settings.from_config(resolve() | updates)
    assert len(str(error.value).splitlines()) == 1


def test_two_contrasts_at_once_are_refused_also_one_from_outside(monkeypatch):
    monkeypatch.setitem(TASKS, "made_up", type("MadeUp", (ContrastTask,), {"name": "made_up"}))
    assert problems(loss_names={"made_up": 1, "itm": 1}) == []
    (line,) = problems(loss_names={"itc": 1, "made_up": 1, "itm": 1})
    assert "itc and made_up share the heads of the contrast" in line


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
    "optimizer of timm": {"optim_type": "lamb", "layer_decay": 0.75},
    "no logger": {"loggers": []},
    "contrast that is half as heavy": {"loss_names": losses(itc=0.5, itm=2.0)},
}


@pytest.mark.parametrize("updates", GOOD.values(), ids=GOOD)
def test_valid(updates):
    assert problems(**updates) == []


def test_what_a_config_lacks_has_its_default():
    assert Settings.from_config({}) == Settings.from_config(Settings.defaults()) == Settings.from_config(resolve())


@pytest.mark.parametrize(
    "wrong, other",
    [
        ({"num_gpus": -1}, {"batch_size": 10}),  # whether it is a multiple depends on the devices
        ({"loss_names": {"itm": -1}}, {"contrast_cache": True}),
        ({"strategy": ""}, {"use_sharded_training": True}),
        ({"max_text_len": 2}, {"max_text_len_of_initckpt": 3}),
    ],
)
def test_rules_that_read_a_wrong_option_are_passed_over(wrong, other):
    lines = problems(**wrong, **other, image_size=225)
    assert [line.split("=")[0] for line in lines] == [*wrong, "image_size"]


def test_settings_can_be_pickled():
    settings = Settings.from_config(resolve("task_finetune_vqa_base_image480", vqav2_label_size=7))
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert copy.deepcopy(settings) == settings


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    """Registers tasks for the time of a test."""
    names = []

    def register(name, base=Task, **attributes):
        TASKS.register(name)(type(name.title(), (base,), {"name": name, **attributes}))
        names.append(name)

    yield register
    for name in names:
        del TASKS[name]


class Probing(OptionGroup):
    """Probing"""

    probe_depth: PositiveInt = option(3, "layers of the probe")


def test_every_task_has_a_weight_and_fits_what_the_rules_ask():
    assert set(Settings.defaults()["loss_names"]) == set(TASKS)
    for name, task in TASKS.items():
        assert task.datasets is None or set(task.datasets) <= set(DATASETS), name
        assert not task.requires or any(other.provides == task.requires for other in TASKS.values()), name


def test_a_new_task_has_a_weight_options_and_rules_by_itself(registered):
    def check(cls, settings):
        return ["probe_depth: deeper than the model"] if settings.probe_depth > 12 else []

    registered("probe", Options=Probing, check=classmethod(check), datasets=frozenset({"coco"}))
    config = resolve("task_mlm_itm_itc_base", loss_names={"probe": 1}, datasets=["coco"], probe_depth=4)
    settings = Settings.from_config(config)
    assert settings.active == ("itm", "itc", "mlm", "probe")
    assert (settings.probe_depth, Settings.defaults()["probe_depth"]) == (4, 3)
    assert problems(**config | {"probe_depth": 0})[0].startswith("probe_depth=0: ")
    assert problems(**config | {"probe_depth": 13}) == ["probe_depth: deeper than the model"]
    assert "probe trains on ['coco'] only" in problems(**config | {"datasets": ["vg"]})[0]
    assert "probe" not in resolve("task_mlm_itm_itc_base", loss_names={"probe": 0})["datasets"]


def test_options_of_a_task_go_with_it():
    assert "probe_depth" not in Settings.defaults()
    (line,) = problems(probe_depth=4)
    assert line.startswith("probe_depth: there is no such option")


def test_another_contrast_takes_the_place_of_the_first(registered):
    itc = TASKS["itc"]
    registered("siglip", itc, stage=3)  # (with the same options)
    base = {"get_recall_metric": True, "contrast_cache": True}
    assert problems(loss_names=losses(itm=1, siglip=1), **base) == []
    (line,) = problems(loss_names=losses(siglip=1, itc=1), **base)
    assert "itc and siglip share" in line
    (line,) = problems(loss_names=losses(itm=1))
    assert line.startswith("loss_names.itm: ") and "siglip" in line


def test_two_tasks_cannot_declare_one_option(registered):
    registered("probe", Options=Probing)
    registered(
        "other", Options=type("Other", (OptionGroup,), {"__annotations__": {"probe_depth": int}, "probe_depth": 1})
    )
    with pytest.raises(VLMoError, match="option probe_depth: .*Other declares what .*Probing has"):
        Settings.from_config({})


def test_nor_one_that_all_have(registered):
    registered("probe", Options=type("Probing", (OptionGroup,), {"__annotations__": {"seed": int}, "seed": 1}))
    with pytest.raises(VLMoError, match="option seed: "):
        Settings.defaults()


# --- the reference page -----------------------------------------------------------------------------------------------


def test_the_reference_page_is_up_to_date():
    written = (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m vlmo.settings > docs/options.md"
    assert all(f"| `{name}` |" in written for name in Settings.defaults())


def test_every_option_says_what_it_means():
    assert all(len(meaning) > 5 for meaning in Settings.meanings().values())
    assert set(Settings.meanings()) == set(Settings.defaults())


# --- derived ----------------------------------------------------------------------------------------------------------


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
        ({"compile": True, "strategy": "deepspeed_stage_3"}, "blocks whose weights strategy=deepspeed_stage_3 shards"),
        ({"profile_steps": 2, "fast_dev_run": True}, "profile_steps: .* drop fast_dev_run"),
        ({"profile_steps": -1}, "profile_steps=-1"),
        ({"compile": "yes please"}, "compile='yes please'"),
    ],
)
def test_options_about_speed(updates, line):
    (found,) = problems(**updates)
    assert re.search(line, found)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("datasets", "coco", """'datasets=["coco"]'"""),
        ("datasets", "[coco, vg]", """'datasets=["coco", "vg"]'"""),
        ("adamw_betas", "0.9,0.98", "'adamw_betas=[0.9, 0.98]'"),
        ("loggers", "csv", """'loggers=["csv"]'"""),
    ],
)
def test_a_list_that_is_none_is_shown_as_it_is_typed(name, value, remedy):
    assert any(remedy in line for line in problems(**{name: value}))
