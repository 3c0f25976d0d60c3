"""Rules among several options: each returns the problems it finds, one line each with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings import these rules
    from vlmo.settings import Settings

PATCH_SIZE = 16  # pixels a side
REFUSED = {
    "draw_false_image": "no objective reads false images: ITM draws its negatives from the batch",
    "draw_false_text": "no objective reads false texts: ITM draws its negatives from the batch",
    "image_only": "images alone are trained with the named config task_mim_base",
    "text_only": "text alone is trained with the named config task_textmlm_base",
}


def _losses(s: Settings) -> list[str]:
    problems = []
    if not s.active:
        problems.append("loss_names: every loss is off; name a task, for example task_mlm_itm_itc_base")
    if "itm" in s.active and "itc" not in s.active:
        problems.append(
            "loss_names.itm: hard negatives are drawn by the contrastive similarities; set loss_names.itc=1 too"
        )
    if "mim" in s.active and len(s.active) > 1:
        problems.append("loss_names.mim: trains on images without texts, so no other loss can be on beside it")
    if "textmlm" in s.active and len(s.active) > 1:
        problems.append("loss_names.textmlm: trains on text without images, so no other loss can be on beside it")
    if "textmlm" in s.active and s.shared_ffn:
        problems.append("shared_ffn=True: stage 2 trains the language experts, and without experts there are none")
    if {"itc", "irtr"} <= set(s.active):
        problems.append("loss_names: itc and irtr share their heads; switch one of them off")
    return problems


def _data(s: Settings) -> list[str]:
    fitting = {"textmlm": {"wikibk"}, "vqa": {"vqa"}, "nlvr2": {"nlvr2"}}
    problems = []
    for name in s.active:
        wrong = [d for d in s.datasets if d not in fitting[name]] if name in fitting else []
        if wrong:
            problems.append(f"datasets={list(s.datasets)}: {name} trains on {sorted(fitting[name])} only")
    if "textmlm" not in s.active and "wikibk" in s.datasets:
        problems.append(f"datasets={list(s.datasets)}: wikibk has no images; it is for textmlm only")
    if s.group_by_length and "textmlm" not in s.active:
        problems.append(
            "group_by_length=True: is for textmlm; beside an image a text's padding costs little, and contrast and "
            "negatives would come from texts of one length"
        )
    if "mim" not in s.active and "images" in s.datasets:
        problems.append(f"datasets={list(s.datasets)}: images has no texts; it is for mim only")
    return problems


def _contrast_cache(s: Settings) -> list[str]:
    if not s.contrast_cache:
        return []
    problems = []
    if not {"itc", "irtr"} & set(s.active):
        problems.append("contrast_cache=True: is for contrast; it needs loss_names.irtr or itc")
    if s.use_sharded_training or not s.strategy.startswith(("auto", "ddp")):
        problems.append("contrast_cache=True: exchanges whole gradients; with it use strategy=auto and no sharding")
    if s.activation_checkpointing == "offload":
        problems.append(
            "contrast_cache=True: needs little memory as it is; give activation_checkpointing=True or False"
        )
    return problems


def _image_size(s: Settings) -> list[str]:
    if s.image_size % PATCH_SIZE == 0:
        return []
    near = max(round(s.image_size / PATCH_SIZE), 1) * PATCH_SIZE
    return [f"image_size={s.image_size}: must be a multiple of the patch size {PATCH_SIZE}; the nearest is {near}"]


def _image_target(s: Settings) -> list[str]:
    if "mim" in s.active and s.mim_target == "dalle" and not s.mim_tokenizer:
        return ["mim_target=dalle: needs DALL-E's tokenizer; give its encoder.pkl with mim_tokenizer=FILE"]
    return []


def _text_length(s: Settings) -> list[str]:
    if s.max_text_len <= s.max_text_len_of_initckpt:
        return []
    return [
        f"max_text_len={s.max_text_len}: the relative position table has room for max_text_len_of_initckpt="
        f"{s.max_text_len_of_initckpt} tokens; shorten the one or raise the other"
    ]


def _batch(s: Settings) -> list[str]:
    if s.test_only:
        return []
    arithmetic = f"per_gpu_batchsize x devices x nodes = {s.per_gpu_batchsize} x {s.devices} x {s.num_nodes}"
    if s.batch_size % s.pairs_per_pass:
        near = max(round(s.batch_size / s.pairs_per_pass), 1) * s.pairs_per_pass
        return [
            f"batch_size={s.batch_size}: is not a multiple of {arithmetic} = {s.pairs_per_pass}; "
            f"the nearest that is: batch_size={near}"
        ]
    if "itm" in s.active and s.pairs_per_pass < 2:
        return [
            "per_gpu_batchsize=1: matching needs a second pair to draw a negative from; set per_gpu_batchsize=2 or more"
        ]
    return []


def _length(s: Settings) -> list[str]:
    if s.max_steps is None and s.max_epoch is None:
        return ["max_steps and max_epoch: one of them must say when training ends"]
    return []


def _learning_rate(s: Settings) -> list[str]:
    if s.end_lr < s.learning_rate:
        return []
    return [f"end_lr={s.end_lr}: the learning rate decays to it; give less than learning_rate={s.learning_rate}"]


def _devices(s: Settings) -> list[str]:
    problems = []
    if s.num_gpus == 0 and s.accelerator in ("gpu", "cuda"):
        problems.append(f"num_gpus=0 is the CPU, accelerator={s.accelerator} is not: change one of them")
    if isinstance(s.num_gpus, tuple) and s.accelerator == "cpu":
        problems.append("num_gpus as a list picks GPUs; with accelerator=cpu give a number of processes")
    if s.use_sharded_training and s.strategy not in ("auto", "deepspeed_stage_1"):
        problems.append(f"use_sharded_training=True is DeepSpeed ZeRO stage 1, strategy={s.strategy} is not: drop one")
    sharded = s.use_sharded_training or s.strategy.startswith(("deepspeed", "fsdp"))
    if s.activation_checkpointing == "offload" and sharded:
        problems.append("activation_checkpointing=offload: works with strategy=auto or ddp; give True with sharding")
    if s.strategy.startswith("fsdp") and (s.test_only or s.get_recall_metric):
        problems.append(f"strategy={s.strategy}: trains and validates; test and measure recall with strategy=auto")
    if s.compile and s.strategy.startswith(("fsdp", "deepspeed_stage_3")):
        problems.append(f"compile=True: blocks whose weights strategy={s.strategy} shards are not compiled; drop one")
    return problems


def _profile(s: Settings) -> list[str]:
    if s.profile_steps and (s.fast_dev_run or s.test_only):
        return ["profile_steps: looks at the training steps of a run with a folder: drop fast_dev_run and test_only"]
    return []


def _refused(s: Settings) -> list[str]:
    return [f"{name}={getattr(s, name)}: refused, {why}" for name, why in REFUSED.items() if getattr(s, name)]


def _evaluation(s: Settings) -> list[str]:
    problems = []
    if s.test_only and not s.load_path:
        problems.append("test_only=True: evaluates a checkpoint; give it with load_path=FILE")
    if s.get_recall_metric and not {"itc", "irtr"} & set(s.active):
        problems.append("get_recall_metric=True: recall ranks by contrastive features; it needs loss_names.irtr or itc")
    if s.get_recall_rerank_metric and not s.get_recall_metric:
        problems.append("get_recall_rerank_metric=True: orders anew what get_recall_metric=True ranks; set that too")
    if s.get_recall_rerank_metric and "itm" not in s.active and not s.load_path:
        problems.append(
            "get_recall_rerank_metric=True: needs an ITM head that has been trained; give a file with load_path=FILE"
        )
    if isinstance(s.val_check_interval, float) and s.val_check_interval > 1:
        problems.append(
            f"val_check_interval={s.val_check_interval}: a share of an epoch is at most 1.0; "
            f"{s.val_check_interval:.0f} without a decimal point counts batches"
        )
    return problems


_SHARDING = ("activation_checkpointing", "compile", "test_only", "get_recall_metric")
RULES: tuple[tuple[tuple[str, ...], Callable[[Settings], list[str]]], ...] = (
    (("loss_names", "shared_ffn"), _losses),
    (("loss_names", "datasets", "group_by_length"), _data),
    (("image_size",), _image_size),
    (("loss_names", "contrast_cache", "use_sharded_training", "strategy", "activation_checkpointing"), _contrast_cache),
    (("loss_names", "mim_target", "mim_tokenizer"), _image_target),
    (("max_text_len", "max_text_len_of_initckpt"), _text_length),
    (("batch_size", "per_gpu_batchsize", "num_gpus", "num_nodes", "loss_names", "test_only"), _batch),
    (("max_steps", "max_epoch"), _length),
    (("learning_rate", "end_lr"), _learning_rate),
    (("num_gpus", "accelerator", "use_sharded_training", "strategy", *_SHARDING), _devices),
    (("profile_steps", "fast_dev_run", "test_only"), _profile),
    (tuple(REFUSED), _refused),
    (
        (
            "test_only",
            "load_path",
            "get_recall_metric",
            "get_recall_rerank_metric",
            "loss_names",
            "val_check_interval",
        ),
        _evaluation,
    ),
)
