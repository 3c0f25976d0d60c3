"""The set-ups of `sabotages.py`: what is tampered with, what is healthy, and the data of both."""

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer

from benchmarks import stages_worlds
from vlmo.demo.prepare import Prepared, prepare, train_vocabulary
from vlmo.demo.raw_layout import Sizes
from vlmo.demo.run_demo import COMMON
from vlmo.registry import TRANSFORMS
from vlmo.text import TokenMasker

STEPS, BATCH, EVERY = 60, 32, 5
SIZES = Sizes(600, 100, 300, 200, 300, 60, 60, 5, 60, 12, 4, 1500)
OTHER_TEXTS = ["der hund läuft über die straße und bellt", "wo ist das kleine haus am großen see geblieben"]
STAGE3 = "task_mlm_itm_itc_base"
TRAIN_TABLES = ("coco_caption_karpathy_train.arrow", "coco_caption_karpathy_restval.arrow")
VALIDATED = 100  # images of Flickr8k: a validation should take less than the training


# --- tampering with tables --------------------------------------------------------------------------------------------

Columns = dict[str, list[Any]]


def shuffled_captions(columns: Columns) -> Columns:
    order = np.random.default_rng(0).permutation(len(columns["caption"]))
    return columns | {"caption": [columns["caption"][i] for i in order]}


def shifted_captions(columns: Columns) -> Columns:
    return columns | {"caption": columns["caption"][1:] + columns["caption"][:1]}


def one_caption(columns: Columns) -> Columns:
    return columns | {"caption": [["a picture of shapes."] * len(texts) for texts in columns["caption"]]}


def unknown_words(columns: Columns) -> Columns:
    return columns | {"caption": [["\u2603 \u2602 \u2603"] * len(texts) for texts in columns["caption"]]}


def constant_images(columns: Columns) -> Columns:
    return columns | {"image": [_grey(level % 256) for level in range(len(columns["image"]))]}


def one_image(columns: Columns) -> Columns:
    return columns | {"image": columns["image"][:1] * len(columns["image"])}


def duplicated(columns: Columns) -> Columns:
    return {name: values * 3 for name, values in columns.items()}


def _grey(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def first_rows(columns: Columns) -> Columns:
    return {name: values[:VALIDATED] for name, values in columns.items()}


def write_tampered(
    source: Path, target: Path, change: Callable[[Columns], Columns], names: tuple[str, ...] = TRAIN_TABLES
) -> None:
    """Copies the tables with those of these names changed, by default COCO's of training."""
    target.mkdir(parents=True)
    for path in source.glob("*.arrow"):
        if path.name not in names:
            (target / path.name).symlink_to(path.resolve())
            continue
        table = pa.ipc.open_file(str(path)).read_all()
        columns = change({name: table.column(name).to_pylist() for name in table.column_names})
        schema = pa.schema([table.schema.field(name) for name in columns])
        with pa.ipc.new_file(str(target / path.name), schema) as writer:
            writer.write_table(pa.table(columns, schema=schema))


# --- tampering with the program ---------------------------------------------------------------------------------------


class AtStart(Callback):
    """Does something to the model when training starts."""

    def __init__(self, do: Callable[[Any], None]) -> None:
        self.do = do

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.do(pl_module)


def freeze_experts(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".mlp_" in name or ".norm2_" in name:
            parameter.requires_grad_(False)


def freeze_temperature(model: Any) -> None:
    for scale in (model.logit_scale, model.logit_vl_scale):
        scale.data.zero_()  # a temperature of 1
        scale.requires_grad_(False)


@contextmanager
def shifted_labels() -> Iterator[None]:
    """The label of each masked token is that of its neighbour."""
    right = TokenMasker.__call__

    def wrong(self: TokenMasker, ids: Any, generator: Any) -> Any:
        masked, labels = right(self, ids, generator)
        chosen = labels != -100
        labels[chosen] = np.roll(np.asarray(ids), 1)[chosen]
        return masked, labels

    with mock.patch.object(TokenMasker, "__call__", wrong):
        yield


@contextmanager
def other_normalisation() -> Iterator[None]:
    """Images in the mean and deviation of ImageNet, under the name of the usual transform."""
    usual = TRANSFORMS["square_transform"]
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def build(*arguments: Any) -> Any:
        transform = usual(*arguments)
        return lambda image: (transform(image) / 2 + 0.5 - mean) / deviation

    with mock.patch.dict(TRANSFORMS, {"square_transform": build}):
        yield


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run, and the codes one of which should name what is wrong; none: it is healthy."""

    expected: tuple[str, ...] = ()
    task: str = STAGE3
    options: dict[str, Any] = field(default_factory=dict)
    tables: Callable[[Columns], Columns] | None = None
    program: Callable[[], Any] = contextlib.nullcontext
    start: Callable[[Any], None] | None = None


SABOTAGES = {
    "shuffled captions": Case(("unrelated_pairs",), tables=shuffled_captions),
    "learning rate x 100": Case(("learning_rate_high",), options={"learning_rate": 0.15}),
    "learning rate 0": Case(("no_update",), options={"learning_rate": 1e-12}),
    "wrong mean and deviation": Case(("image_range",), program=other_normalisation),
    "one caption for all": Case(("one_caption",), tables=one_caption),
    "frozen experts": Case(("frozen",), start=freeze_experts),
    "constant images": Case(("constant_images",), tables=constant_images),
    "labels shifted by one": Case(("masked_labels",), program=shifted_labels),
    "tokenizer of another vocabulary": Case(("foreign_tokenizer", "unknown_words"), options={"tokenizer": "other"}),
    "temperature frozen high": Case(("temperature",), start=freeze_temperature),
    "all text [UNK]": Case(("unknown_words",), tables=unknown_words),
    "duplicated data": Case(("duplicates",), tables=duplicated),
    # variants beyond the twelve
    "captions shifted by one row": Case(("unrelated_pairs",), tables=shifted_captions),
    "the same image for all": Case(("constant_images",), tables=one_image),
    "a contrast of few pairs": Case(("few_negatives",), options={"per_gpu_batchsize": BATCH // 8}),
}
Kinds = Mapping[str, tuple[str, dict[str, Any]]]  # named config and options of healthy runs, by title
ON_THE_DEMO: Kinds = {
    "stage 1": ("task_mim_base", {"datasets": ["coco", "vg", "sbu", "gcc"], "learning_rate": 1.5e-3}),
    "stage 2": ("task_textmlm_base", {}),
    "stage 3": (STAGE3, {}),
    "VQA": ("task_finetune_vqa_base_image480", {"learning_rate": 5e-4}),
    "NLVR2": ("task_finetune_nlvr2_base", {"learning_rate": 5e-4}),
    "retrieval": ("task_finetune_irtr_f30k_base", {"learning_rate": 5e-4, "datasets": ["f30k"]}),
}
ON_FLICKR8K: Kinds = {
    "stage 1": ("task_mim_base", {"datasets": ["coco"], "learning_rate": 1.5e-3}),
    "stage 2": ("task_textmlm_base", {}),
    "stage 3": (STAGE3, {}),
    "retrieval": ("task_finetune_irtr_coco_base_image384", {"learning_rate": 5e-4, "datasets": ["coco"]}),
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"batch_size": 16, "per_gpu_batchsize": 8},
    {"drop_path_rate": 0.1, "train_transform_keys": ["square_transform_randaug"]},
    {"decay_power": "cosine", "gradient_clip_val": 1.0},
    {"optim_type": "adam", "image_size": 64},
]


def healthy(kinds: Kinds) -> dict[str, Case]:
    return {
        f"healthy: {name}, {number}": Case((), task, options | variant)
        for name, (task, options) in kinds.items()
        for number, variant in enumerate(VARIANTS, 1)
    }


CASES = SABOTAGES | healthy(ON_THE_DEMO)  # those of Flickr8k are among them, by name


@dataclass(frozen=True)
class World:
    """Data below a folder, the options that go with them, and the cases that there are data for."""

    folder: Path
    seed: int
    data_root: Path
    options: dict[str, Any]
    cases: Mapping[str, Case]


def make_world(folder: Path, seed: int, flickr8k: Path | None = None) -> World:
    """The demo's world, small, or Flickr8k; made once, with a vocabulary of other texts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "other.txt").exists():
        train_vocabulary([*OTHER_TEXTS, "abcdefghijklmnopqrstuvwxyz"], folder / "other.txt", 150)
    if flickr8k:
        options = stages_worlds.make(folder.parent, flickr8k, None, None, False).options
        root = folder / "tables/whole"
        if not root.exists():
            write_tampered(Path(options["data_root"]), root, first_rows, ("coco_caption_karpathy_val.arrow",))
        return World(folder, seed, root, options, SABOTAGES | healthy(ON_FLICKR8K))
    made = folder / "world.pickle"
    if not made.exists():
        made.write_bytes(pickle.dumps(prepare(folder / "world", seed, SIZES)))
    world: Prepared = pickle.loads(made.read_bytes())
    options = COMMON | {"tokenizer": str(world.vocabulary), "vocab_size": world.vocabulary_size}
    options |= {"vqav2_label_size": len(world.answers)}
    return World(folder, seed, world.data_root, options, CASES)


def options_of(name: str, world: World) -> dict[str, Any]:
    case, root = world.cases[name], world.data_root
    if case.tables:
        root = world.folder / "tables" / name.replace(" ", "_")
        if not root.exists():
            write_tampered(world.data_root, root, case.tables)
    options: dict[str, Any] = world.options | {
        "num_workers": 0,
        "learning_rate": 1.5e-3,
        "data_root": str(root),
        "batch_size": BATCH,
        "per_gpu_batchsize": BATCH,
        "max_steps": STEPS,
        "warmup_steps": 0.1,
        "val_check_interval": STEPS,
        "log_every_n_steps": EVERY,
        "learning_checks": True,
        "loggers": [],
        "log_dir": str(world.folder / "runs"),
        "exp_name": name.replace(" ", "_").replace(":", "").replace(",", ""),
        "seed": 100 * world.seed + list(world.cases).index(name),  # another one for each run
    }
    if case.task == STAGE3:
        options["datasets"] = ["coco"]
    options |= case.options
    if options["tokenizer"] == "other":
        options["tokenizer"] = str(world.folder / "other.txt")
    return options
