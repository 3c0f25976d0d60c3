"""Every option with its meaning, and every named config, as sacred resolves them.

    python run.py with <named config> [<named config> ...] option=value ...

A named config is a set of values laid over the defaults; what is typed on the command line wins over both. The recipes
have the published values (VLMo, arXiv 2111.02358); `vlmo/settings/` checks the result.
"""

import copy
import difflib
import logging
import warnings
from typing import Any

warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # sacred 0.8 still imports it

import sacred  # noqa: E402
from sacred.initialize import create_run  # noqa: E402
from sacred.utils import ConfigAddedError, NamedConfigNotFoundError  # noqa: E402

from vlmo.errors import VLMoError  # noqa: E402

# `interactive`: sacred refuses an experiment whose source file it cannot find (notebooks, standard input).
# `save_git_info` off: a run needs no git checkout.
ex = sacred.Experiment("VLMo", interactive=True, save_git_info=False)

# sacred warns of types that change (a list for num_gpus); the settings check those, so its logger stays silent
ex.logger = logging.getLogger("sacred")  # type: ignore[assignment]
logging.getLogger("sacred").setLevel(logging.CRITICAL)


def losses(**weights: float) -> dict[str, float]:
    """All loss weights: 0 is off, anything above multiplies the loss (1 = as published)."""
    off = {"itm": 0, "itc": 0, "mlm": 0, "textmlm": 0, "vqa": 0, "nlvr2": 0, "irtr": 0, "mim": 0}
    return off | weights


ex.add_config(
    # --- the run -------------------------------------------------------------------------------------------------
    exp_name="vlmo",  # first part of the run's folder: {exp_name}_seed{seed}_from_{name of load_path}
    seed=1,  # weights, order, augmentation, masking and negatives follow from it
    loss_names=losses(itm=1, itc=1, mlm=1),
    batch_size=1024,  # pairs an optimizer step, over all devices and accumulation steps
    # --- data ----------------------------------------------------------------------------------------------------
    datasets=["coco", "vg", "sbu", "gcc"],  # trained on together
    data_root="",  # folder of the Arrow files (DATA.md says how to make them)
    train_transform_keys=["square_transform_randaug"],
    val_transform_keys=["square_transform"],
    autocontrast="correct",  # "original": AutoContrast as published, which whitens channels whose minimum is above 0
    image_size=224,  # pixels a side, a multiple of the patch (16)
    draw_false_image=0,  # refused above 0: no objective reads false images (ITM draws its negatives from the batch)
    draw_false_text=0,  # refused above 0, likewise
    image_only=False,  # refused: images alone are loss_names.mim, with any set of images
    text_only=False,  # refused: text alone is loss_names.textmlm with the set wikibk
    num_workers=8,  # loader processes a device
    prefetch_factor=2,  # batches that each of them makes ahead
    group_by_length=False,  # True: batches of texts of similar length, so that less is padded (stage 2)
    # --- text ----------------------------------------------------------------------------------------------------
    tokenizer="bert-base-uncased",  # hub name, local folder, or a vocab.txt
    vocab_size=30522,  # rows of the word embedding
    max_text_len=40,  # tokens, [CLS] and [SEP] included
    max_text_len_of_initckpt=196,  # text length that the relative position table has room for
    whole_word_masking=False,
    mlm_prob=0.15,  # share of tokens that are masked
    vqav2_label_size=3129,  # number of VQA answers
    # --- images alone (stage 1) ----------------------------------------------------------------------------------
    mim_target="pixels",  # what hidden patches are predicted as: "pixels", or "dalle": codes of DALL-E's tokenizer
    mim_tokenizer="",  # for "dalle": its encoder.pkl (https://cdn.openai.com/dall-e/encoder.pkl), a local file
    mim_mask_ratio=0.383,  # share of the patches that are hidden: 75 of 196
    # --- model ---------------------------------------------------------------------------------------------------
    model_arch="vlmo_base_patch16",
    drop_path_rate=0.1,  # stochastic depth of the last block (rises linearly from 0), and dropout of the text embedding
    shared_ffn=False,  # True: one feed-forward part for every modality instead of experts, to compare with
    load_path="",  # checkpoint to start from: VLMo or BEiT file
    activation_checkpointing=False,  # True: blocks are computed anew in the backward pass; "offload": inputs to the CPU
    contrast_gradient="own",  # "exact": over several devices, the gradient of the joint batch (published: of own rows)
    contrast_cache=False,  # ITC and retrieval contrast all of batch_size, with the memory of per_gpu_batchsize
    negatives="global",  # of matching, from all pairs that are contrasted; "local": from those of the same pass
    # --- optimizer -----------------------------------------------------------------------------------------------
    optim_type="adamw",  # adamw, adam or sgd
    learning_rate=1e-4,
    adamw_betas=[0.9, 0.98],
    weight_decay=0.01,
    decay_power=1,  # power of the polynomial decay, or "cosine"
    max_epoch=100,
    max_steps=200000,  # optimizer steps; None: max_epoch decides
    warmup_steps=0.1,  # a fraction of all steps below 1, else a number of steps
    end_lr=0,
    gradient_clip_val=None,  # longest norm of the gradient; None: it is not clipped
    lr_mult=1,  # learning rate of the VQA and NLVR2 classifiers, as a multiple
    # --- evaluation ----------------------------------------------------------------------------------------------
    test_only=False,  # evaluate load_path, train nothing
    get_recall_metric=False,  # retrieval recall on val and test at each validation
    get_recall_rerank_metric=False,  # recall also after ITM has ordered the first k_test candidates of each query anew
    k_test=32,  # candidates that re-ranking looks at
    val_check_interval=1.0,  # validate every so many batches (int), or this share of an epoch (float)
    fast_dev_run=False,  # True or n: n batches of everything, nothing saved
    # --- continuing ----------------------------------------------------------------------------------------------
    resume_from=None,  # a checkpoint of this project's: the run goes on from it exactly, also in the middle of an epoch
    resume_during_training=False,  # go on from the newest checkpoint of this run that can be read, if there is one
    checkpoint_every_n_steps=None,  # also write one every so many optimizer steps (None: after each validation only)
    checkpoint_every_n_minutes=None,  # also write one when the last is so old
    keep_last=None,  # remove all but so many of the newest; None keeps all
    max_nonfinite=10,  # steps in a row whose loss or gradient is inf or NaN, each skipped, after which the run stops
    # --- machine -------------------------------------------------------------------------------------------------
    log_dir="result",
    log_every_n_steps=50,
    per_gpu_batchsize=4,  # pairs a device a forward pass; batch_size / (this x devices) passes are accumulated
    num_gpus=1,  # devices a node: 0 is the CPU; a list picks devices
    num_nodes=1,
    accelerator="auto",  # auto, cpu, gpu
    strategy="auto",  # Lightning's name: auto (ddp on several devices), ddp, fsdp, deepspeed_stage_1, deepspeed_stage_2
    use_sharded_training=False,  # DeepSpeed ZeRO stage 1
    compile=False,  # True: torch.compile of the blocks' parts; the first steps take minutes, the others less time
    deterministic=False,  # True: the same run on a GPU gives the same bits, more slowly
    profile_steps=0,  # forward passes to profile at the start: a trace and a table in the run's folder
    precision=16,  # 16, 32, "bf16", or "auto": bf16 where the GPU has it, else 16; a CPU runs 16 and auto in 32
)


@ex.config_hook
def _check_seed(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """sacred draws from the seed before the settings are checked."""
    if type(config["seed"]) is not int or config["seed"] < 0:
        raise VLMoError(f"seed={config['seed']!r}: must be a whole number from 0 on")
    return {}


# --- presets: what a named config is composed from --------------------------------------------------------------------
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
VQA = FINETUNE | {"datasets": ["vqa"], "loss_names": losses(vqa=1), "image_size": 480, "lr_mult": 20}
RETRIEVAL = {"loss_names": losses(irtr=1.0), "batch_size": 3072, "max_epoch": 50, "get_recall_metric": True}
F30K = RETRIEVAL | {"datasets": ["f30k"], "max_steps": 1500, "warmup_steps": 150}
COCO = RETRIEVAL | {"datasets": ["coco"], "max_steps": 3000, "warmup_steps": 300}


def named(name: str, *presets: dict[str, Any], **values: Any) -> None:
    """Registers the named config `name`: the presets in order, then `values`."""
    merged: dict[str, Any] = {"exp_name": name.removeprefix("task_")}
    for preset in presets:
        merged |= preset
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

# --- NLVR2: is the sentence true of the two pictures? -----------------------------------------------------------------
named("task_finetune_nlvr2_base", NLVR2, BASE, learning_rate=5e-5)
named("task_finetune_nlvr2_base_plus", NLVR2, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.2)
named("task_finetune_nlvr2_base_image384", NLVR2, BASE, learning_rate=5e-5, image_size=384)
named(
    "task_finetune_nlvr2_base_plus_image384", NLVR2, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.2, image_size=384
)
named("task_finetune_nlvr2_large", NLVR2, LARGE, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_nlvr2_large_image384", NLVR2, LARGE, learning_rate=3e-5, drop_path_rate=0.15, image_size=384)

# --- VQA v2 -----------------------------------------------------------------------------------------------------------
named("task_finetune_vqa_base_image480", VQA, BASE, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_vqa_base_plus_image480", VQA, BASE_PLUS, learning_rate=3e-5, drop_path_rate=0.15)
named("task_finetune_vqa_large_image480", VQA, LARGE, learning_rate=1.5e-5, drop_path_rate=0.15)

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

# --- schedules, to be named after a task: `with task_... step200k` ----------------------------------------------------
ex.add_named_config("step1_5k", {"max_epoch": 100, "warmup_steps": 150, "max_steps": 1500})
ex.add_named_config("step3k", {"max_epoch": 100, "warmup_steps": 300, "max_steps": 3000})
ex.add_named_config("step200k", {"max_epoch": 200, "warmup_steps": 2500, "max_steps": 200000})
ex.add_named_config("step500k", {"max_epoch": 500, "warmup_steps": 2500, "max_steps": 500000})


def resolve(*named_configs: str, **updates: Any) -> dict[str, Any]:
    """The config that `python run.py with <named_configs> <updates>` would run with.

    `updates` are option values; a dict value (`loss_names={"itm": 0}`) changes the given keys only. Raises sacred's
    errors for a named config or an option that does not exist.
    """
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
            options = resolve()
            options |= {f"loss_names.{loss}": None for loss in options["loss_names"]}
            near = difflib.get_close_matches(name, options, 1)
            lines.append(f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else ""))
        return "\n".join(lines)
    return str(error)
