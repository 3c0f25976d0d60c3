"""The resolved config, typed, checked and frozen: what all code below the entry points sees.

`Settings.from_config` reports all problems of a config at once, each with its remedy, before anything is built. Whether
an architecture, data set or loss exists is known where its table lives: the caller hands those names in.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field

from vlmo.errors import VLMoError
from vlmo.settings.rules import PATCH_SIZE, RULES

__all__ = ["PATCH_SIZE", "Settings"]


def _strict_int(value: Any) -> Any:
    """Whole floats are taken (1e3), booleans and text are not."""
    if isinstance(value, bool | str):
        raise ValueError("must be a whole number")
    return value


Int = Annotated[int, BeforeValidator(_strict_int)]
PositiveInt = Annotated[Int, Field(gt=0)]
Count = Annotated[Int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Settings(pydantic.BaseModel):
    """All options (their meaning: `vlmo/config.py`); attributes are plain values."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    exp_name: Annotated[str, Field(min_length=1, pattern=r"^[^/\\]+$")]
    seed: Annotated[Count, Field(lt=2**32)]
    loss_names: dict[str, NotNegative]
    batch_size: PositiveInt
    datasets: Annotated[tuple[str, ...], Field(min_length=1)]
    data_root: str
    train_transform_keys: Annotated[tuple[str, ...], Field(min_length=1)]
    val_transform_keys: Annotated[tuple[str, ...], Field(min_length=1)]
    autocontrast: Literal["correct", "original"] = "correct"  # (defaults: options that the published config lacks)
    image_size: PositiveInt
    draw_false_image: Count
    draw_false_text: Count
    image_only: bool
    text_only: bool
    num_workers: Count
    prefetch_factor: PositiveInt = 2
    group_by_length: bool = False
    tokenizer: Annotated[str, Field(min_length=1)]
    vocab_size: PositiveInt
    max_text_len: Annotated[Int, Field(ge=3)]
    max_text_len_of_initckpt: Annotated[Int, Field(ge=3)]
    whole_word_masking: bool
    mlm_prob: Annotated[float, Field(gt=0, lt=1)]
    vqav2_label_size: PositiveInt
    mim_target: Literal["pixels", "dalle"] = "pixels"
    mim_tokenizer: str = ""
    mim_mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.383
    model_arch: str
    drop_path_rate: Share
    shared_ffn: bool = False
    load_path: str
    optim_type: Literal["adamw", "adam", "sgd"]
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    adamw_betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: NotNegative
    decay_power: NotNegative | Literal["cosine"]
    max_epoch: PositiveInt | None
    max_steps: PositiveInt | None
    warmup_steps: NotNegative
    end_lr: NotNegative
    gradient_clip_val: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    lr_mult: NotNegative
    test_only: bool
    get_recall_metric: bool
    get_recall_rerank_metric: bool
    k_test: PositiveInt
    val_check_interval: Annotated[int | float, Field(gt=0)]
    fast_dev_run: bool | PositiveInt
    resume_from: str | None
    resume_during_training: bool
    checkpoint_every_n_steps: PositiveInt | None = None
    checkpoint_every_n_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    keep_last: PositiveInt | None = None
    max_nonfinite: PositiveInt = 10
    log_dir: Annotated[str, Field(min_length=1)]
    log_every_n_steps: PositiveInt = 50
    contrast_gradient: Literal["own", "exact"] = "own"
    activation_checkpointing: bool | Literal["offload"] = False
    contrast_cache: bool = False
    negatives: Literal["global", "local"] = "global"
    per_gpu_batchsize: PositiveInt
    num_gpus: Count | Annotated[tuple[Count, ...], Field(min_length=1)]
    num_nodes: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    strategy: Annotated[str, Field(min_length=1)] = "auto"
    use_sharded_training: bool
    compile: bool = False
    deterministic: bool = False
    profile_steps: Count = 0
    precision: Literal[16, 32, "16", "32", "bf16", "auto"]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], known: Mapping[str, Iterable[str]] | None = None) -> "Settings":
        """Checks `config` as a whole.

        Args:
            config: what sacred resolved.
            known: names that exist, for any of "architectures", "datasets" and "losses".

        Raises:
            VLMoError: with one line for each problem found.
        """
        settings, problems = cls.examine(config, known)
        if problems:
            raise VLMoError("\n".join(problems))
        return settings

    @classmethod
    def examine(
        cls, config: Mapping[str, Any], known: Mapping[str, Iterable[str]] | None = None
    ) -> tuple["Settings", list[str]]:
        """As `from_config`, for those who go on looking: the settings as far as they are right, and the problems."""
        problems: list[str] = []
        bad: set[str] = set()
        try:
            settings = cls.model_validate(config)
        except pydantic.ValidationError as error:
            problems, bad = _describe(error, config)
            # fields that are wrong take the default, so that the rules among the others are still checked
            from vlmo.config import resolve  # noqa: PLC0415  (config is a leaf; only needed to describe an error)

            settings = cls.model_validate({**resolve(), **{k: v for k, v in config.items() if k not in bad}})
        for fields, rule in RULES:
            if not bad.intersection(fields):
                problems += rule(settings)
        return settings, problems + _unknown_names(settings, known or {}, bad)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the losses that are on."""
        return tuple(name for name, weight in self.loss_names.items() if weight > 0)

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
    def accumulated_batches(self) -> int:
        """Batches of the training loader an optimizer step: with `contrast_cache` one holds all of it."""
        return 1 if self.contrast_cache else self.accumulation

    @property
    def training_batch(self) -> int:
        """Samples of a batch of a device's training loader."""
        return self.per_gpu_batchsize * self.accumulation // self.accumulated_batches

    @property
    def run_name(self) -> str:
        """Folder of the run within `log_dir`."""
        return f"{self.exp_name}_seed{self.seed}_from_{Path(self.load_path).stem}"


def _describe(error: pydantic.ValidationError, config: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """One line a field that is wrong, and the names of those fields."""
    lines: dict[str, str] = {}
    for item in error.errors():
        field = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, Settings.model_fields, 1)
            lines[field] = f"{field}: there is no such option" + (f"; did you mean {near[0]}?" if near else "")
        elif item["type"] == "missing":
            lines[field] = f"{field}: is missing; start from vlmo.config.resolve(...), which has every option"
        else:
            what = item["msg"].removeprefix("Value error, ")
            text = f"{field}={config[field]!r}: {what[0].lower()}{what[1:]}"
            lines[field] = text if field not in lines else f"{lines[field]}; or {what[0].lower()}{what[1:]}"
    return list(lines.values()), set(lines)


def _unknown_names(settings: Settings, known: Mapping[str, Iterable[str]], bad: set[str]) -> list[str]:
    asked = {
        "model_arch": ("architectures", (settings.model_arch,)),
        "datasets": ("datasets", settings.datasets),
        "loss_names": ("losses", tuple(settings.loss_names)),
    }
    problems = []
    for field, (table, names) in asked.items():
        if field in bad or table not in known:
            continue
        options = sorted(known[table])
        for name in names:
            if name not in options:
                near = difflib.get_close_matches(name, options, 1)
                hint = f"; did you mean {near[0]}?" if near else "."
                problems.append(f"{field}: {name!r} is unknown{hint} Known: {', '.join(options)}")
    return problems
