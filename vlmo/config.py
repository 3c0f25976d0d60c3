"""The experiment and every named config, as sacred resolves them.

    python run.py with <named config> [<named config> ...] option=value ...

A named config is a set of values laid over the defaults; what is typed on the command line wins over both. The recipes
have the published values (VLMo, arXiv 2111.02358). Options, defaults and checks: `vlmo/settings/`, docs/options.md.
"""

import copy
import difflib
import logging
import warnings
from typing import Any

warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # sacred 0.8 still imports it

import sacred  # noqa: E402
from sacred.arg_parser import get_config_updates  # noqa: E402
from sacred.config.config_dict import ConfigDict  # noqa: E402
from sacred.config.config_summary import ConfigSummary  # noqa: E402
from sacred.initialize import create_run  # noqa: E402
from sacred.utils import ConfigAddedError, NamedConfigNotFoundError  # noqa: E402

from vlmo import plugins  # noqa: E402
from vlmo.distributed.first_process import is_first_process  # noqa: E402
from vlmo.errors import VLMoError  # noqa: E402
from vlmo.settings import Settings  # noqa: E402


class _Experiment(sacred.Experiment):
    """Observers (-F, -m, ...) record a run once, whatever the number of its processes."""

    def _create_run(self, *arguments: Any, **options: Any) -> Any:
        run = super()._create_run(*arguments, **options)
        if not is_first_process():
            run.observers = []
        return run


# `interactive`: sacred refuses an experiment whose source file it cannot find (notebooks, standard input).
# `save_git_info` off: a run needs no git checkout.
ex = _Experiment("VLMo", interactive=True, save_git_info=False)

# sacred warns of types that change (a list for num_gpus); the settings check those, so its logger stays silent
ex.logger = logging.getLogger("sacred")  # type: ignore[assignment]
logging.getLogger("sacred").setLevel(logging.CRITICAL)


class _Defaults:
    """What sacred lays a config over: the default of every option of `vlmo.settings`, those of plugins' tasks included.

    They are looked up when a config is resolved, not when this module is imported, as tasks import torch.
    """

    def __call__(self, *layers: Any, **named_layers: Any) -> ConfigSummary:
        config = ConfigDict(Settings.defaults())(*layers, **named_layers)
        config.docs.update(Settings.meanings())  # `print_config` shows them
        return config


ex.configurations.append(_Defaults())


@ex.option_hook
def _load_plugins(options: dict[str, Any]) -> None:
    """Before a command line is resolved: named configs and options of its plugins can be on the same line."""
    plugins.load(get_config_updates(options.get("UPDATE", []))[0].get("plugins", ()))


@ex.config_hook
def _check_seed(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """sacred draws from the seed before the settings are checked."""
    if type(config["seed"]) is not int or config["seed"] < 0:
        raise VLMoError(f"seed={config['seed']!r}: must be a whole number from 0 on", field="seed")
    return {}


# --- presets: what a named config is composed from --------------------------------------------------------------------


def losses(**weights: float) -> dict[str, float]:
    """Loss weights of a named config: those that are on by default are off, unless given."""
    return {"itm": 0, "itc": 0, "mlm": 0} | weights


BASE = {"model_arch": "vlmo_base_patch16"}
BASE_PLUS = {"model_arch": "vlmo_base_plus_patch16"}
LARGE = {"model_arch": "vlmo_large_patch16"}

STAGE1 = {  # as BEiT
    "datasets": ["images"],
    "loss_names": losses(mim=1),
    "batch_size": 2048,
    "adamw_betas": [0.9, 0.999],
    "weight_decay": 0.05,
    "learning_rate": 1.5e-3,
    "decay_power": "cosine",
    "warmup_steps": 10000,
    "max_epoch": 800,
    "max_steps": 500000,
    "gradient_clip_val": 3.0,
}
STAGE2 = {
    "datasets": ["wikibk"],
    "loss_names": losses(textmlm=1),
    "batch_size": 1024,
    "max_text_len": 196,
    "whole_word_masking": True,
}
STAGE3 = {
    "datasets": ["coco", "vg", "sbu", "gcc"],
    "loss_names": losses(itm=1, itc=1, mlm=1),
    "batch_size": 1024,
    "whole_word_masking": True,
}
FINETUNE = {"max_epoch": 10, "max_steps": None, "warmup_steps": 0.1, "batch_size": 128}
NLVR2 = FINETUNE | {"datasets": ["nlvr2"], "loss_names": losses(nlvr2=1)}
SNLI_VE = FINETUNE | {"datasets": ["snli_ve"], "loss_names": losses(snli_ve=1), "image_size": 384}
VQA = FINETUNE | {"datasets": ["vqa"], "loss_names": losses(vqa=1), "image_size": 480, "lr_mult": 20}
GQA = VQA | {"datasets": ["gqa"], "loss_names": losses(gqa=1)}
RETRIEVAL = {"loss_names": losses(irtr=1.0), "batch_size": 3072, "max_epoch": 50, "get_recall_metric": True}
F30K = RETRIEVAL | {"datasets": ["f30k"], "max_steps": 1500, "warmup_steps": 150}
COCO = RETRIEVAL | {"datasets": ["coco"], "max_steps": 3000, "warmup_steps": 300}

CLASSIFICATION = {  # as BEiT after self-supervised pre-training (100 epochs, 20 of warm-up)
    "datasets": ["labelled_images"],
    "loss_names": losses(image_classification=1),
    "batch_size": 1024,
    "train_transform_keys": ["classification_randaug"],
    "val_transform_keys": ["classification"],
    "adamw_betas": [0.9, 0.999],
    "weight_decay": 0.05,
    "decay_power": "cosine",
    "max_epoch": 100,
    "max_steps": None,
    "warmup_steps": 0.2,
    "label_smoothing": 0.1,
    "ema_decay": 0.9999,
}


def named(name: str, *presets: dict[str, Any], **values: Any) -> None:
    """Registers the named config `name`: the presets in order, then `values`. Plugins can call it too.

    Raises:
        VLMoError: if another named config has the name.
    """
    merged: dict[str, Any] = {"exp_name": name.removeprefix("task_")}
    for preset in presets:
        merged |= preset
    known = ex.named_configs.pop(name, None)
    if known is not None and getattr(known, "_conf", None) != ConfigDict(merged | values)._conf:
        ex.named_configs[name] = known
        raise VLMoError(f"named config {name!r}: is registered already; take another name")
    # deep copy: presets share lists and dicts, and sacred changes what it is given
    ex.add_named_config(name, copy.deepcopy(merged | values))


# --- stage 1: masked image modelling on images alone; a BEiT file is the same, ready made -----------------------------
named("task_mim_base", STAGE1, BASE)
named("task_mim_base_plus", STAGE1, BASE_PLUS)
named("task_mim_large", STAGE1, LARGE)

# --- stage 2: masked language modelling on text, attention frozen -----------------------------------------------------
named("task_textmlm_base", STAGE2, BASE, learning_rate=2e-4)
named("task_textmlm_base_plus", STAGE2, BASE_PLUS, learning_rate=2e-4)
named("task_textmlm_large", STAGE2, LARGE, learning_rate=5e-5)

# --- stage 3: contrast, matching and masked language modelling on image-text pairs ------------------------------------
named("task_mlm_itm_itc_base", STAGE3, BASE, learning_rate=2e-4)
named("task_mlm_itm_itc_base_plus", STAGE3, BASE_PLUS, learning_rate=1e-4)
named("task_mlm_itm_itc_large", STAGE3, LARGE, learning_rate=5e-5)

# --- NLVR2: is the sentence true of the two images? -----------------------------------------------------------------
named("task_finetune_nlvr2_base", NLVR2, BASE, learning_rate=5e-5)
named("task_finetune_nlvr2_base_plus", NLVR2, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.2)
named("task_finetune_nlvr2_base_image384", NLVR2, BASE, learning_rate=5e-5, image_size=384)
named(
    "task_finetune_nlvr2_base_plus_image384", NLVR2, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.2, image_size=384
)
named("task_finetune_nlvr2_large", NLVR2, LARGE, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_nlvr2_large_image384", NLVR2, LARGE, learning_rate=3e-5, drop_path_rate=0.15, image_size=384)

# --- SNLI-VE: does the image entail the sentence? With NLVR2's hyper-parameters: the paper has none -------------------
named("task_finetune_snli_ve_base_image384", SNLI_VE, BASE, learning_rate=5e-5)
named("task_finetune_snli_ve_base_plus_image384", SNLI_VE, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.2)
named("task_finetune_snli_ve_large_image384", SNLI_VE, LARGE, learning_rate=3e-5, drop_path_rate=0.15)

# --- VQA v2 -----------------------------------------------------------------------------------------------------------
named("task_finetune_vqa_base_image480", VQA, BASE, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_vqa_base_plus_image480", VQA, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_vqa_large_image480", VQA, LARGE, learning_rate=1.5e-5, drop_path_rate=0.15)

# --- GQA, with VQA's hyper-parameters: the paper has none -------------------------------------------------------------
named("task_finetune_gqa_base_image480", GQA, BASE, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_gqa_base_plus_image480", GQA, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_gqa_large_image480", GQA, LARGE, learning_rate=1.5e-5, drop_path_rate=0.15)

# --- retrieval, Flickr30K (base and large start from the COCO-fine-tuned file) ----------------------------------------
named("task_finetune_irtr_f30k_base", F30K, BASE, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_irtr_f30k_base_image384", F30K, BASE, learning_rate=3e-5, drop_path_rate=0.15, image_size=384)
named(
    "task_finetune_irtr_f30k_base_plus_image384",
    F30K,
    BASE_PLUS,
    learning_rate=3e-5,
    drop_path_rate=0.2,
    image_size=384,
)
named("task_finetune_irtr_f30k_large_image384", F30K, LARGE, learning_rate=2e-5, drop_path_rate=0.2, image_size=384)

# --- retrieval, COCO --------------------------------------------------------------------------------------------------
named("task_finetune_irtr_coco_base_image384", COCO, BASE, learning_rate=3e-5, drop_path_rate=0.2, image_size=384)
named(
    "task_finetune_irtr_coco_base_plus_image384",
    COCO,
    BASE_PLUS,
    learning_rate=3e-5,
    drop_path_rate=0.2,
    image_size=384,
)
named("task_finetune_irtr_coco_large_image384", COCO, LARGE, learning_rate=2e-5, drop_path_rate=0.2, image_size=384)

# --- ImageNet (the paper has base alone; base_plus and large with BEiT's values for 24 blocks) -----------------------
DEEP = {"learning_rate": 1e-3, "layer_decay": 0.75, "drop_path_rate": 0.2, "max_epoch": 50, "warmup_steps": 0.1}
named("task_finetune_imagenet_base", CLASSIFICATION, BASE, learning_rate=4e-3, layer_decay=0.65)
named("task_finetune_imagenet_base_plus", CLASSIFICATION, BASE_PLUS, DEEP)
named("task_finetune_imagenet_large", CLASSIFICATION, LARGE, DEEP)

# --- schedules, to be named after a task: `with task_... step200k` ----------------------------------------------------
ex.add_named_config("step1_5k", {"max_epoch": 100, "warmup_steps": 150, "max_steps": 1500})
ex.add_named_config("step3k", {"max_epoch": 100, "warmup_steps": 300, "max_steps": 3000})
ex.add_named_config("step200k", {"max_epoch": 200, "warmup_steps": 2500, "max_steps": 200000})
ex.add_named_config("step500k", {"max_epoch": 500, "warmup_steps": 2500, "max_steps": 500000})


@ex.capture
def _open_ended(dataset_weights: dict[str, float], beside: dict[str, list[str]]) -> None:
    """Its arguments are options whose keys are the user's: sacred refuses new keys of what no function captures."""


def resolve(*named_configs: str, **updates: Any) -> dict[str, Any]:
    """The config that `python run.py with <named_configs> <updates>` would run with.

    `updates` are option values; a dict value (`loss_names={"itm": 0}`) changes the given keys only. Raises sacred's
    errors for a named config or an option that does not exist, and VLMoError for a plugin that cannot be imported.
    """
    plugins.load(updates.get("plugins", ()))
    run = create_run(ex, "print_config", copy.deepcopy(updates), named_configs)
    return copy.deepcopy(dict(run.config))


def explain(error: Exception) -> str:
    """What a person should read of an error of theirs, sacred's or ours: one line a problem."""
    if isinstance(error, NamedConfigNotFoundError):
        name = str(error).split('"')[1]
        near = difflib.get_close_matches(name, ex.named_configs, 3, cutoff=0.5)
        return f"{name}: there is no such named config" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if isinstance(error, ConfigAddedError):
        lines = []
        for name in error.__conflicting_configs__:
            options = Settings.defaults()
            options |= {f"loss_names.{loss}": None for loss in options["loss_names"]}
            near = difflib.get_close_matches(name, options, 1)
            lines.append(f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else ""))
        return "\n".join(lines)
    return str(error)
