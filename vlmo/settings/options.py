"""All general options together: what follows from them, and the rules across groups and about tasks in general.

Rules about tasks ask the contract (`vlmo.tasks.base.Task`): roles, data, what of a run is for some tasks only.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmo.registry import ARCHITECTURES, DATASETS, TASKS
from vlmo.settings.groups import (
    ContinuingOptions,
    DataOptions,
    EvaluationOptions,
    ImageOptions,
    MachineOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TextOptions,
)
from vlmo.settings.option import rule

PATCH_SIZE = 16  # pixels a side, of an architecture that does not say it
LAYOUT_INVARIANT_EVALUATION = 32  # samples of a batch, whatever per_gpu_batchsize is


class Options(
    MachineOptions,
    ContinuingOptions,
    EvaluationOptions,
    OptimizerOptions,
    ModelOptions,
    ImageOptions,
    TextOptions,
    DataOptions,
    RunOptions,
):  # (pydantic collects the fields of the last base first)
    """All options but those of tasks, and what follows from them; attributes are plain values."""

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the losses that are on."""
        return tuple(name for name, weight in self.loss_names.items() if weight > 0)

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return ARCHITECTURES.get(self.model_arch, {}).get("patch_size", PATCH_SIZE)

    @property
    def devices(self) -> int:
        """Number of processes a node."""
        return len(self.num_gpus) if isinstance(self.num_gpus, tuple) else max(self.num_gpus, 1)

    @property
    def pairs_per_pass(self) -> int:
        """Samples that one forward pass takes over all devices."""
        return self.per_gpu_batchsize * self.devices * self.num_nodes

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step."""
        return max(self.batch_size // self.pairs_per_pass, 1)

    @property
    def loads_whole_batch(self) -> bool:
        """Whether a batch of the training loader holds all that an optimizer step takes of a device's samples."""
        return self.contrast_cache or self.layout_invariant

    @property
    def accumulated_batches(self) -> int:
        """Batches of the training loader an optimizer step."""
        return 1 if self.loads_whole_batch else self.accumulation

    @property
    def training_batch(self) -> int:
        """Samples of a batch of a device's training loader; with `layout_invariant` some may have one less."""
        if self.layout_invariant:
            return -(-self.batch_size // (self.devices * self.num_nodes))
        return self.per_gpu_batchsize * self.accumulation // self.accumulated_batches

    @property
    def joint_batch(self) -> int:
        """Samples that the batches of all devices' training loaders hold together."""
        return self.batch_size if self.layout_invariant else self.training_batch * self.devices * self.num_nodes

    @property
    def evaluation_batch(self) -> int:
        """Samples that a device evaluates at a time: losses among the pairs of a batch depend on it."""
        return min(self.batch_size, LAYOUT_INVARIANT_EVALUATION) if self.layout_invariant else self.per_gpu_batchsize

    @property
    def run_name(self) -> str:
        """Folder of the run within `log_dir`."""
        return f"{self.exp_name}_seed{self.seed}_from_{Path(self.load_path).stem}"


@rule
def _image_size(s: Options) -> Iterator[str]:
    if s.image_size % s.patch_size:
        near = max(round(s.image_size / s.patch_size), 1) * s.patch_size
        yield f"image_size={s.image_size}: must be a multiple of the patch size {s.patch_size}; the nearest is {near}"


@rule
def _contrast_cache(s: Options) -> Iterator[str]:
    if not s.contrast_cache:
        return
    if s.use_sharded_training or not s.strategy.startswith(("auto", "ddp", "fsdp2")):
        yield "contrast_cache=True: has backward passes of its own; with it use strategy=auto or fsdp2"
    if s.activation_checkpointing == "offload":
        yield "contrast_cache=True: needs little memory as it is; give activation_checkpointing=True or False"


@rule
def _layout_invariant(s: Options) -> Iterator[str]:
    if not s.layout_invariant:
        return
    if s.use_sharded_training or not s.strategy.startswith(("auto", "ddp", "fsdp2")):
        yield "layout_invariant=True: has backward passes of its own; with it use strategy=auto or fsdp2"
    if getattr(s, "negatives", "global") != "global":
        yield "negatives=local: depends on per_gpu_batchsize, which layout_invariant=True must not; drop one"
    if s.activation_checkpointing == "offload":
        yield "layout_invariant=True: needs little memory as it is; give activation_checkpointing=True or False"


@rule
def _evaluation(s: Options) -> Iterator[str]:
    if s.test_only and not s.load_path:
        yield "test_only=True: evaluates a checkpoint; give it with load_path=FILE"
    if s.get_recall_rerank_metric and not s.get_recall_metric:
        yield "get_recall_rerank_metric=True: re-orders what get_recall_metric=True ranks; set that too"
    if s.get_recall_rerank_metric and not provides(s, "matching") and not s.load_path:
        yield "get_recall_rerank_metric=True: needs an ITM head that has been trained; give a file with load_path=FILE"


@rule
def _reset_heads(s: Options) -> Iterator[str]:
    if s.reset_heads is True and s.test_only:
        yield "reset_heads=True: test_only=True evaluates the heads of load_path; drop one"
    elif s.reset_heads is True and not any(task.head_group for task in active_tasks(s).values()):
        yield "reset_heads=True: is for the heads of downstream classification, and no such loss is on; drop it"


@rule
def _batch(s: Options) -> Iterator[str]:
    if s.layout_invariant:
        if not s.test_only and s.batch_size < s.devices * s.num_nodes:
            yield f"batch_size={s.batch_size}: is less than a sample for each of the {s.devices * s.num_nodes} devices"
    elif not s.test_only and s.batch_size % s.pairs_per_pass:
        near = max(round(s.batch_size / s.pairs_per_pass), 1) * s.pairs_per_pass
        yield (
            f"batch_size={s.batch_size}: is not a multiple of per_gpu_batchsize x devices x nodes = "
            f"{s.per_gpu_batchsize} x {s.devices} x {s.num_nodes} = {s.pairs_per_pass}; "
            f"the nearest that is: batch_size={near}"
        )


@rule
def _sharding(s: Options) -> Iterator[str]:
    if s.use_sharded_training and s.strategy not in ("auto", "deepspeed_stage_1"):
        yield f"use_sharded_training=True is DeepSpeed ZeRO stage 1, strategy={s.strategy} is not: drop one"
    sharded = s.use_sharded_training or s.strategy.startswith(("deepspeed", "fsdp"))
    if s.activation_checkpointing == "offload" and sharded:
        yield "activation_checkpointing=offload: works with strategy=auto or ddp; give True with sharding"
    if s.strategy in ("fsdp", "fsdp_cpu_offload"):
        yield f"strategy={s.strategy}: FSDP2 does what FSDP1 did; give strategy={s.strategy.replace('fsdp', 'fsdp2')}"
    if s.compile and s.strategy.startswith("deepspeed_stage_3"):
        yield f"compile=True: blocks whose weights strategy={s.strategy} shards are not compiled; drop one"


@rule
def _adapters(s: Options) -> Iterator[str]:
    if not s.lora_rank or s.test_only:
        return
    if importlib.util.find_spec("peft") is None:
        yield f"lora_rank={s.lora_rank}: needs a package that is not here: pip install peft"
    if s.use_sharded_training or not s.strategy.startswith(("auto", "ddp")):
        yield f"lora_rank={s.lora_rank}: adapters are small; with them use strategy=auto or ddp"
    for name in (name for name, task in active_tasks(s).items() if task.trains is not None):
        yield f"lora_rank={s.lora_rank}: is for fine-tuning, and {name} says itself what it trains; drop it"


@rule
def _averages(s: Options) -> Iterator[str]:
    if s.ema_decay and not s.test_only and (s.use_sharded_training or not s.strategy.startswith(("auto", "ddp"))):
        yield f"ema_decay={s.ema_decay}: averages weights that are whole; give strategy=auto or ddp, or ema_decay=0"


@rule
def _knn(s: Options) -> Iterator[str]:
    if s.knn_data and s.test_only:
        yield "knn_data: is measured in training; `python -m vlmo.evaluate CKPT --suite knn` measures a checkpoint"
    elif s.knn_data and not any("image" in task.reads for task in active_tasks(s).values()):
        yield "knn_data: looks at how images are represented, and no loss that is on learns from images; drop it"


@rule
def _profile(s: Options) -> Iterator[str]:
    if s.profile_steps and (s.fast_dev_run or s.test_only):
        yield "profile_steps: looks at the training steps of a run with a folder: drop fast_dev_run and test_only"


# --- tasks -----------------------------------------------------------------------------------------------------------


def active_tasks(s: Options) -> dict[str, Any]:
    """The tasks that are on, without names that do not exist."""
    return {name: TASKS[name] for name in s.active if name in TASKS}


def provides(s: Options, role: str) -> bool:
    """Whether one of the tasks that are on provides the role."""
    return any(task.provides == role for task in active_tasks(s).values())


def providers(role: str, stage: int | None = None) -> list[str]:
    """Names of the tasks that provide a role, those of the stage first."""
    names = sorted(name for name, task in TASKS.items() if task.provides == role)
    return sorted(names, key=lambda name: TASKS[name].stage != stage)


def readers(dataset: str, has: set[str]) -> list[str]:
    """Names of the tasks that can be trained on a data set with images, texts, or both (`has`)."""
    fitting = {name: task for name, task in TASKS.items() if task.reads <= has}
    return sorted(name for name, task in fitting.items() if task.datasets is None or dataset in task.datasets)


@rule
def _tasks(s: Options) -> Iterator[str]:
    if not s.active:
        yield "loss_names: every loss is off; name a task, for example task_mlm_itm_itc_base"
    tasks = active_tasks(s)
    roles: dict[str, list[str]] = {}
    for name, task in tasks.items():
        others = [other for other in tasks if other != name]
        if task.alone and others and name not in s.beside:
            yield (
                f"loss_names.{name}: no other loss can be on for the same data; switch off {' and '.join(others)}, or "
                f"give it data of its own with beside.{name}=[DATA SET]"
            )
        if task.requires and not provides(s, task.requires):
            options = [f"loss_names.{other}=1" for other in providers(task.requires, task.stage)]
            remedy = f"set {' or '.join(options)} too" if options else "no task provides it: is a plugin missing?"
            yield f"loss_names.{name}: builds upon a {task.requires}; {remedy}"
        if task.provides:
            roles.setdefault(task.provides, []).append(name)
    for role, names in roles.items():
        if len(names) > 1:
            yield f"loss_names: {' and '.join(names)} share the heads of the {role}; leave one of them on"


@rule
def _data_of_tasks(s: Options) -> Iterator[str]:
    tasks = {name: task for name, task in active_tasks(s).items() if name not in s.beside}
    alone = {name: task for name, task in tasks.items() if task.alone}  # (others are refused beside it)
    problems: dict[str, None] = {}  # (several tasks can lack the same)
    for name, task in (alone or tasks).items():
        problems |= dict.fromkeys(_unfit(name, task, s.datasets))
    yield from (f"datasets={list(s.datasets)}: {problem}" for problem in problems)


@rule
def _beside(s: Options) -> Iterator[str]:
    if s.beside and not set(s.active) - set(s.beside):
        yield f"beside: leaves no loss for datasets={list(s.datasets)}; name the data of one loss there"
    for name, datasets in s.beside.items():
        yield from (f"beside.{name}: {DATASETS.near(each)}" for each in datasets if each not in DATASETS)
        task = active_tasks(s).get(name)
        if task is None:
            yield f"beside.{name}: this loss is off; set loss_names.{name}=1, or drop it here"
        elif task.requires or task.provides or task.named_classes:
            why = "has the classes of datasets" if task.named_classes else "is about the pairs of a batch together"
            yield f"beside.{name}: {name} {why}; drop it here"
        elif not datasets:
            yield f"beside.{name}: name at least one data set"
        else:
            yield from (f"beside.{name}={datasets}: {problem}" for problem in _unfit(name, task, datasets))


def _unfit(name: str, task: Any, datasets: Sequence[str]) -> list[str]:
    """Why a task cannot be trained on these data sets, each reason once; unknown ones are reported elsewhere."""
    known = [dataset for dataset in datasets if dataset in DATASETS]
    if task.datasets is None:
        return list(dict.fromkeys(filter(None, (_lacking(dataset, task.reads) for dataset in known))))
    return [] if task.datasets.issuperset(known) else [f"{name} trains on {sorted(task.datasets)} only"]


def _lacking(dataset: str, reads: frozenset[str]) -> str:
    """What is to be said of a data set that has not all that a task reads, images or texts; else nothing."""
    rows = DATASETS[dataset].dataset
    has = ({"image"} if rows.image_columns else set()) | ({"text"} if rows.text_column else set())
    missing = " and ".join(f"{what}s" for what in sorted(reads - has))
    return f"{dataset} has no {missing}; it is for {' and '.join(readers(dataset, has))} only" if missing else ""


@rule
def _refused(s: Options) -> Iterator[str]:
    for name, what in (("draw_false_image", "images"), ("draw_false_text", "texts")):
        if getattr(s, name):
            yield f"{name}={getattr(s, name)}: refused, no task reads false {what}: ITM draws negatives from the batch"
    for name, what in (("image_only", "image"), ("text_only", "text")):
        if getattr(s, name):
            losses = " or ".join(f"loss_names.{loss}" for loss, task in TASKS.items() if task.reads == {what})
            yield f"{name}=True: refused, {what}s alone are trained on by {losses}: start from its named config"


@rule
def _group_by_length(s: Options) -> Iterator[str]:
    if s.group_by_length and (s.beside or any("image" in task.reads for task in active_tasks(s).values())):
        yield (
            "group_by_length=True: is for texts alone; beside an image a text's padding costs little, and contrast and "
            "negatives would come from texts of one length"
        )


@rule
def _needs_contrast(s: Options) -> Iterator[str]:
    why = {
        "contrast_cache": "is for contrast",
        "get_recall_metric": "recall ranks by contrastive features",
    }
    for name, reason in why.items():
        if getattr(s, name) and not provides(s, "contrast"):
            yield f"{name}=True: {reason}; it needs loss_names.{' or '.join(providers('contrast'))}"
