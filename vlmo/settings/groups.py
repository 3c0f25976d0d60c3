"""The options by group, each with its type, default and meaning, and beside them the rules within a group.

Rules across groups, and about tasks in general: `options.py`. What a single task needs stands with that task: its
options in `Task.Options`, its rules in `Task.check`.
"""

import difflib
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vlmo.registry import ARCHITECTURES, DATASETS, LOGGERS, TASKS, TRANSFORMS
from vlmo.settings.option import NamesOf, OptionGroup, option, rule

# --- types ------------------------------------------------------------------------------------------------------------


def _strict_int(value: Any) -> Any:
    """Whole floats are taken (1e3), booleans and text are not."""
    if isinstance(value, bool | str):
        raise ValueError("must be a whole number")
    return value


def _launched_nodes(value: Any) -> Any:
    """Takes "auto" for the number of nodes that torchrun has joined, which may be another after a restart."""
    if value != "auto":
        return value
    return int(os.environ["GROUP_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


WHOLE = BeforeValidator(_strict_int)
PositiveInt = Annotated[int, Field(gt=0), WHOLE]
Nodes = Annotated[PositiveInt, BeforeValidator(_launched_nodes, json_schema_input_type=PositiveInt | Literal["auto"])]
Count = Annotated[int, Field(ge=0), WHOLE]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # from 0 to below 1
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[str, ...], Field(min_length=1)]
# A path, or a name that may be one: ~ is expanded here, once for all who read it. A shell leaves it where it is quoted.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]

# --- groups -----------------------------------------------------------------------------------------------------------


def _losses() -> dict[str, float]:
    on: dict[str, float] = {"itm": 1, "itc": 1, "mlm": 1}
    return on | {name: 0 for name in TASKS if name not in on}


class RunOptions(OptionGroup):
    """The run"""

    exp_name: Annotated[str, Field(min_length=1, pattern=r"^[^/\\]+$")] = option(
        "vlmo", "first part of the run's folder: {exp_name}_seed{seed}_from_{name of load_path}"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), WHOLE] = option(
        1, "weights, order, augmentation, masking and negatives follow from it"
    )
    loss_names: Annotated[dict[str, NotNegative], NamesOf(TASKS)] = option(
        _losses, "weight of each loss: 0 is off, anything above multiplies the loss (1: as published)"
    )
    batch_size: PositiveInt = option(1024, "pairs an optimizer step, over all devices and accumulation steps")
    layout_invariant: bool = option(
        False,
        "True: what is learnt does not depend on the numbers of devices, samples a pass and workers; the contrast "
        "spans all of batch_size, as with contrast_cache",
    )
    plugins: tuple[str, ...] = option(
        (), "modules to import before the config is resolved: they register tasks, data sets, named configs, ..."
    )


class DataOptions(OptionGroup):
    """Data"""

    datasets: Annotated[Texts, NamesOf(DATASETS)] = option(
        ("coco", "vg", "sbu", "gcc"),
        "trained on together; also sources: tar:FILES, parquet:FILES, hf:FOLDER (DATA.md)",
    )
    data_root: PathText = option("", "folder of the Arrow files (DATA.md says how to make them)")
    image_column: str = option("", 'column with the images of sources; "": the first that looks like it')
    text_column: str = option(
        "", 'column, or entry of the .json, with the captions of sources; "": the .txt, caption, text'
    )
    data_cache: PathText = option(
        "", 'folder on a local disk, for what is fetched or unpacked of sources; "": ~/.cache/vlmo'
    )
    data_cache_gb: Positive = option(50, "what it holds at most, in GB; what was not used longest is removed")
    draw_false_image: Count = option(0, "refused above 0: no task reads false images (ITM draws them from the batch)")
    draw_false_text: Count = option(0, "refused above 0: no task reads false texts (ITM draws them from the batch)")
    image_only: bool = option(False, "refused: images alone are trained on by a loss that reads nothing else")
    text_only: bool = option(False, "refused: texts alone are trained on by a loss that reads nothing else")
    dataset_weights: dict[str, Positive] = option(
        dict,
        "how often an epoch draws each sample of a data set: 2 is twice, each time augmented and masked anew, 0.5 is "
        "half of them, the others in the next epoch; {}, as published, and sets that are not named: once",
    )
    beside: dict[str, list[str]] = option(
        dict,
        "losses with data of their own, by name their data sets: each sample of datasets is drawn with one of theirs, "
        'so that a batch of pairs also has images or texts alone: {"mim": ["images"], "textmlm": ["wikibk"]}',
    )
    shuffle_window: PositiveInt = option(
        8192,
        "samples that are shuffled among each other where Parquet or remote sources have more: what is read at once",
    )
    num_workers: Count = option(8, "loader processes a device")
    prefetch_factor: PositiveInt = option(2, "batches that each of them makes ahead")
    group_by_length: bool = option(False, "True: batches of texts of similar length, so that less is padded (stage 2)")


@rule
def _dataset_weights(s: DataOptions) -> Iterator[str]:
    for name in s.dataset_weights:
        if name not in s.datasets:
            yield f"dataset_weights: {name} is not among datasets={list(s.datasets)}; add it there or drop it here"


class TextOptions(OptionGroup):
    """Text"""

    tokenizer: Annotated[PathText, Field(min_length=1)] = option(
        "bert-base-uncased", "hub name, local folder, or a vocab.txt"
    )
    vocab_size: PositiveInt = option(30522, "rows of the word embedding")
    max_text_len: Annotated[int, Field(ge=3), WHOLE] = option(40, "tokens, [CLS] and [SEP] included")
    max_text_len_of_initckpt: Annotated[int, Field(ge=3), WHOLE] = option(
        196, "text length that the relative position table has room for"
    )
    whole_word_masking: bool = option(False, "True: all tokens of a word are masked together")
    mlm_prob: Annotated[float, Field(gt=0, lt=1)] = option(0.15, "share of tokens that are masked")


@rule
def _text_length(s: TextOptions) -> Iterator[str]:
    if s.max_text_len > s.max_text_len_of_initckpt:
        yield (
            f"max_text_len={s.max_text_len}: the relative position table has room for max_text_len_of_initckpt="
            f"{s.max_text_len_of_initckpt} tokens; shorten the one or raise the other"
        )


class ImageOptions(OptionGroup):
    """Images"""

    train_transform_keys: Annotated[Texts, NamesOf(TRANSFORMS)] = option(("square_transform_randaug",), "of training")
    val_transform_keys: Annotated[Texts, NamesOf(TRANSFORMS)] = option(("square_transform",), "of validation and test")
    autocontrast: Literal["correct", "original"] = option(
        "correct", '"original": AutoContrast as published, which whitens channels whose least value is above 0'
    )
    image_decoding: Literal["correct", "original"] = option(
        "correct",
        '"original": EXIF orientation, transparency, 16-bit grey as released weights saw them, for evaluating those',
    )
    decode_at_scale: bool = option(
        False,
        "True: training decodes a JPEG at 1/2, 1/4 or 1/8 where its crop is scaled down as much: faster, with another "
        "low-pass filter (1.6 grey levels apart on average); evaluation stays exact. "
        "Faster still, to the same pixels, where simplejpeg is installed",
    )
    image_size: PositiveInt = option(224, "pixels a side, a multiple of the architecture's patch size")


class ModelOptions(OptionGroup):
    """Model"""

    model_arch: Annotated[str, NamesOf(ARCHITECTURES)] = option("vlmo_base_patch16", "the architecture")
    drop_path_rate: Share = option(
        0.1, "stochastic depth of the last block (rises linearly from 0), and dropout of the text embedding"
    )
    shared_ffn: bool = option(
        False, "True: one feed-forward part for every modality instead of experts, to compare with"
    )
    load_path: PathText = option("", "checkpoint to start from: a VLMo or BEiT file")
    reset_heads: bool | Literal["auto"] = option(
        "auto",
        "whether heads of downstream tasks are initialised anew although in load_path: True: always (as published), "
        '"auto": where they are for other classes, False: never',
    )
    freeze: tuple[str, ...] = option(
        (), 'parameters that are not trained, as patterns of their names: "transformer.blocks.[0-5].*", "*.mlp_imag.*"'
    )
    lora_rank: Count = option(
        0, "rank of the adapters (LoRA) that are trained in place of the transformer and embeddings, beside the heads"
    )
    lora_alpha: PositiveInt = option(16, "scales the adapters, by lora_alpha / lora_rank")
    lora_targets: Texts = option(
        ("*.attn.qkv", "*.attn.proj"), 'linear layers of the blocks with adapters, as patterns: "*.mlp_*" are experts'
    )
    activation_checkpointing: bool | Literal["offload"] = option(
        False, 'True: blocks are computed again in the backward pass; "offload": and their inputs wait in CPU memory'
    )
    contrast_cache: bool = option(
        False, "True: the contrast sees all of batch_size, with the memory of per_gpu_batchsize"
    )


class OptimizerOptions(OptionGroup):
    """Optimizer"""

    optim_type: Text = option(
        "adamw", "adamw (as published), adam, sgd, or any name of timm.optim: lamb, lion, muon, ..."
    )
    learning_rate: Positive = option(1e-4, "the highest, after the warm-up")
    adamw_betas: tuple[Share, Share] = option((0.9, 0.98), "Adam's, of the mean gradient and of the mean square")
    weight_decay: NotNegative = option(0.01, "of weight matrices; biases and norms have none")
    decay_power: NotNegative | Literal["cosine"] = option(1, 'power of the polynomial decay, or "cosine"')
    max_epoch: PositiveInt | None = option(100, "passes over the data, where max_steps is None; else it is ignored")
    max_steps: PositiveInt | None = option(200000, "optimizer steps; None: max_epoch decides")
    warmup_steps: NotNegative = option(0.1, "a fraction of all steps below 1, else a number of steps")
    end_lr: NotNegative = option(0, "learning rate at the end of the decay")
    gradient_clip_val: Positive | None = option(None, "largest norm of the gradient; None: it is not clipped")
    lr_mult: NotNegative = option(1, "learning rate of the heads of downstream classification, as a multiple")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = option(
        1.0, "learning rate of a block relative to that of the block above it; 1: all alike"
    )
    ema_decay: Share = option(
        0.0,
        "weights are averaged over the steps, with this share of the average so far; the averages are what is "
        "evaluated and loaded. 0: off",
    )


@rule
def _optimizer(s: OptimizerOptions) -> Iterator[str]:
    if s.optim_type in ("adamw", "adam", "sgd"):
        return
    from timm.optim import list_optimizers  # (torch is imported with it)

    known = [str(name) for name in list_optimizers()]
    if s.optim_type not in known:
        near = difflib.get_close_matches(s.optim_type, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.optim.list_optimizers() lists what there is"
        yield f"optim_type: {s.optim_type!r} is unknown; {hint}"


@rule
def _end_of_training(s: OptimizerOptions) -> Iterator[str]:
    if s.max_steps is None and s.max_epoch is None:
        yield "max_steps and max_epoch: one of them must say when training ends"


@rule
def _learning_rate(s: OptimizerOptions) -> Iterator[str]:
    if s.end_lr >= s.learning_rate:
        yield f"end_lr={s.end_lr}: the learning rate decays to it; give less than learning_rate={s.learning_rate}"


class EvaluationOptions(OptionGroup):
    """Evaluation"""

    test_only: bool = option(False, "evaluate load_path, train nothing")
    get_recall_metric: bool = option(False, "retrieval recall on val and test at each validation")
    get_recall_rerank_metric: bool = option(
        False, "recall also after ITM has re-ordered the first k_test candidates of each query"
    )
    k_test: PositiveInt = option(32, "candidates that re-ranking looks at")
    rerank_by: Literal["published", "match"] = option(
        "published",
        'what orders them: "published" is the logit of a match plus the cosine, "match" the log-odds of a match',
    )
    val_check_interval: Annotated[int | float, Field(gt=0)] = option(
        1.0,
        "validate every so many batches (int, counted on from epoch to epoch), or this share of an epoch (float)",
    )
    knn_data: PathText = option(
        "",
        "folder of labelled images (docs/evaluation.md): each validation also measures nearest neighbours on frozen "
        "features of the vision expert, with at most 1 % as many images as samples are trained on between two",
    )
    fast_dev_run: bool | PositiveInt = option(False, "True or n: n batches of everything, nothing saved")


@rule
def _validation(s: EvaluationOptions) -> Iterator[str]:
    if isinstance(s.val_check_interval, float) and s.val_check_interval > 1:
        yield (
            f"val_check_interval={s.val_check_interval}: a share of an epoch is at most 1.0; "
            f"{s.val_check_interval:.0f} without a decimal point counts batches"
        )


class ContinuingOptions(OptionGroup):
    """Continuing"""

    resume_from: PathText | None = option(
        None, "a checkpoint of this project's: the run continues from it exactly, also in the middle of an epoch"
    )
    resume_during_training: bool = option(
        False, "continue from the newest checkpoint of this run that can be read, if there is one"
    )
    checkpoint_every_n_steps: PositiveInt | None = option(
        None, "also write one every so many optimizer steps; None: after each validation only"
    )
    checkpoint_every_n_minutes: Positive | None = option(None, "also write one when the last is so old")
    checkpoint_in_background: bool = option(
        True, "training goes on while one is written, from a copy in the CPU's memory; False: it waits"
    )
    keep_last: PositiveInt | None = option(None, "remove all but so many of the newest; None: keep all")
    max_nonfinite: PositiveInt = option(
        10, "steps in a row whose loss or gradient is inf or NaN, each skipped, after which the run stops"
    )


class MachineOptions(OptionGroup):
    """Machine"""

    log_dir: Annotated[PathText, Field(min_length=1)] = option("result", "folder of the runs' folders")
    log_every_n_steps: PositiveInt = option(50, "optimizer steps between two logged ones")
    loggers: Annotated[tuple[str, ...], NamesOf(LOGGERS)] = option(("tensorboard", "csv"), "where numbers are logged")
    per_gpu_batchsize: PositiveInt = option(
        4, "pairs a device a forward pass; batch_size / (this x devices) passes are accumulated"
    )
    num_gpus: Count | Annotated[tuple[Count, ...], Field(min_length=1)] = option(
        1, "devices a node: 0 is the CPU; a list picks devices"
    )
    num_nodes: Nodes = option(
        1, 'machines that train together; "auto": as many as torchrun has joined, which may change at each restart'
    )
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = option("auto", "what kind of device to run on")
    strategy: Text = option(
        "auto", "auto (ddp on several devices), ddp, fsdp2, fsdp2_cpu_offload, deepspeed_stage_1, deepspeed_stage_2"
    )
    use_sharded_training: bool = option(False, "True: DeepSpeed ZeRO stage 1")
    compile: bool = option(
        False, "True: torch.compile of the blocks' parts; the first steps take minutes, the others less time"
    )
    deterministic: bool = option(False, "True: the same run on a GPU gives the same bits, more slowly")
    learning_checks: bool = option(
        False,
        "True: training says in plain sentences why it does not learn, and what chance is (docs/learning_doctor.md)",
    )
    peak_teraflops: Positive | None = option(
        None, "1e12 operations a second of a device at most, of which the console shows the share (MFU); None: known"
    )
    profile_steps: Count = option(0, "forward passes to profile at the start: a trace and a table in the run's folder")
    precision: Literal[16, 32, "16", "32", "bf16", "auto"] = option(
        16, '"auto": bf16 where the GPU has it, else 16; a CPU runs 16 and auto in 32'
    )


@rule
def _devices(s: MachineOptions) -> Iterator[str]:
    if s.num_gpus == 0 and s.accelerator in ("gpu", "cuda"):
        yield f"num_gpus=0 is the CPU, accelerator={s.accelerator} is not: change one of them"
    if isinstance(s.num_gpus, tuple) and s.accelerator == "cpu":
        yield "num_gpus as a list picks GPUs; with accelerator=cpu give a number of processes"
