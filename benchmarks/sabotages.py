"""Does the learning doctor name what is wrong? Sabotaged set-ups, each to be named, and healthy runs, to be left alone.

python -m benchmarks.sabotages [--out result/sabotages] [--only NAME ...] [--report]

The tiny model on the demo's world. A run takes seconds; those that are done are not repeated. Prints the table, and
writes it to docs/results/learning_doctor.md.
"""

import argparse
import contextlib
import io
import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
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

from vlmo.config import resolve
from vlmo.demo.prepare import Prepared, prepare, train_vocabulary
from vlmo.demo.raw_layout import Sizes
from vlmo.demo.run_demo import COMMON
from vlmo.registry import TRANSFORMS
from vlmo.text import TokenMasker
from vlmo.training.learning.callback import LearningChecks
from vlmo.training.learning.seen import LIMIT
from vlmo.training.runner import build_trainer
from vlmo.training.runner import prepare as prepare_run

STEPS, BATCH, EVERY = 60, 32, 5
SIZES = Sizes(600, 100, 300, 200, 300, 60, 60, 5, 60, 12, 4, 1500)
OTHER_TEXTS = ["der hund läuft über die straße und bellt", "wo ist das kleine haus am großen see geblieben"]
STAGE3 = "task_mlm_itm_itc_base"
TRAIN_TABLES = ("coco_caption_karpathy_train.arrow", "coco_caption_karpathy_restval.arrow")


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


def write_tampered(source: Path, target: Path, change: Callable[[Columns], Columns]) -> None:
    """Copies the tables of COCO with the training ones changed."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("coco_caption_karpathy_*.arrow"):
        if path.name not in TRAIN_TABLES:
            shutil.copy(path, target)
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
}
HEALTHY_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 1": ("task_mim_base", {"datasets": ["coco", "vg", "sbu", "gcc"], "learning_rate": 1.5e-3}),
    "stage 2": ("task_textmlm_base", {}),
    "stage 3": (STAGE3, {}),
    "VQA": ("task_finetune_vqa_base_image480", {"learning_rate": 5e-4}),
    "NLVR2": ("task_finetune_nlvr2_base", {"learning_rate": 5e-4}),
    "retrieval": ("task_finetune_irtr_f30k_base", {"learning_rate": 5e-4, "datasets": ["f30k"]}),
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"batch_size": 16, "per_gpu_batchsize": 8},
    {"drop_path_rate": 0.1, "train_transform_keys": ["square_transform_randaug"]},
    {"decay_power": "cosine", "gradient_clip_val": 1.0},
    {"optim_type": "adam", "image_size": 64},
]
HEALTHY = {
    f"healthy: {name}, {number}": Case((), task, options | variant | {"seed": number})
    for name, (task, options) in HEALTHY_TASKS.items()
    for number, variant in enumerate(VARIANTS, 1)
}
CASES = SABOTAGES | HEALTHY


def make_world(out: Path) -> Prepared:
    """The demo's world, small; made once, with a vocabulary of other texts beside it."""
    made = out / "world.pickle"
    if not made.exists():
        out.mkdir(parents=True, exist_ok=True)
        made.write_bytes(pickle.dumps(prepare(out / "world", 1, SIZES)))
    world: Prepared = pickle.loads(made.read_bytes())
    if not (out / "other.txt").exists():
        train_vocabulary([*OTHER_TEXTS, "abcdefghijklmnopqrstuvwxyz"], out / "other.txt", 150)
    return world


def options_of(case: Case, name: str, world: Prepared, out: Path) -> dict[str, Any]:
    root = world.data_root
    if case.tables:
        root = out / "tables" / name.replace(" ", "_")
        if not root.exists():
            write_tampered(world.data_root, root, case.tables)
    options: dict[str, Any] = COMMON | {
        "num_workers": 0,
        "learning_rate": 1.5e-3,
        "data_root": str(root),
        "tokenizer": str(world.vocabulary),
        "vocab_size": world.vocabulary_size,
        "vqav2_label_size": len(world.answers),
        "batch_size": BATCH,
        "per_gpu_batchsize": BATCH,
        "max_steps": STEPS,
        "warmup_steps": 0.1,
        "val_check_interval": STEPS,
        "log_every_n_steps": EVERY,
        "learning_checks": True,
        "loggers": [],
        "log_dir": str(out / "runs"),
        "exp_name": name.replace(" ", "_").replace(":", "").replace(",", ""),
    }
    if case.task == STAGE3:
        options["datasets"] = ["coco"]
    options |= case.options
    if options["tokenizer"] == "other":
        options["tokenizer"] = str(out / "other.txt")
    return options


def run_case(name: str, world: Prepared, out: Path) -> dict[str, Any]:
    """Trains; gives the findings by code, the step of each, and seconds."""
    case = CASES[name]
    start = time.monotonic()
    with case.program(), contextlib.redirect_stdout(io.StringIO()):
        prepared = prepare_run(resolve(case.task, **options_of(case, name, world, out)))
        trainer = build_trainer(prepared, [AtStart(case.start)] if case.start else [])
        checks = next(each for each in trainer.callbacks if isinstance(each, LearningChecks))  # type: ignore[attr-defined]
        trainer.fit(prepared.model, datamodule=prepared.datamodule)
    shutil.rmtree(prepared.folder, ignore_errors=True)
    return {"seconds": time.monotonic() - start, "findings": checks.findings}


def named(case: Case, findings: dict[str, Any]) -> str | None:
    """The code that names the sabotage; None if none does."""
    return next((code for code in case.expected if code in findings), None)


def table(done: dict[str, dict[str, Any]]) -> str:
    """Markdown: the sabotages, and what was said of the healthy runs."""
    lines = ["| sabotage | named | after step | also said | what the doctor says |", "|---|---|---|---|---|"]
    right = 0
    for name, case in SABOTAGES.items():
        if name not in done:
            lines.append(f"| {name} | not run | | | |")
            continue
        findings = done[name]["findings"]
        code = named(case, findings)
        right += code is not None
        step, sentence = findings[code] if code else ("", "")
        others = ", ".join(other for other in findings if other != code)
        lines.append(f"| {name} | {code or '**no**'} | {step} | {others} | {sentence} |")
    healthy = [name for name in HEALTHY if name in done]
    alarms = {name: done[name]["findings"] for name in healthy if done[name]["findings"]}
    lines += ["", f"{right} of {len(SABOTAGES)} sabotaged set-ups are named; {len(healthy)} healthy runs, "]
    lines[-1] += f"{len(alarms)} of them with a false alarm."
    lines += [f"- {name}: {', '.join(findings)}" for name, findings in alarms.items()]
    seconds = sorted(each["seconds"] for each in done.values())
    lines += ["", f"Seconds a run: {seconds[len(seconds) // 2]:.0f} (median), {seconds[-1]:.0f} at most."]
    return "\n".join(lines)


HEADING = f"""# What the learning doctor names

`python -m benchmarks.sabotages`: `vlmo_tiny_patch16` on the demo's world, {STEPS} steps of {BATCH} samples, from
nothing, a judgement every {EVERY} steps; one core. "After step" is the judgement that named it: 0 is before the first
step. A learning rate of exactly 0 is refused by the settings; here it is 1e-12. What the data show is named as soon as
enough samples were seen ({LIMIT:,} are looked at), whatever the weights do.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("result/sabotages"), help="folder for data and results")
    parser.add_argument("--results", type=Path, default=Path("docs/results/learning_doctor.md"))
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME")
    parser.add_argument("--report", action="store_true", help="run nothing, print the table of what is done")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    record = options.out / "done.json"
    done: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}
    world = make_world(options.out)
    for name in [] if options.report else options.only or CASES:
        if name not in done or options.only:
            done[name] = run_case(name, world, options.out)
            record.write_text(json.dumps(done, indent=1))
            print(
                f"{done[name]['seconds']:5.1f} s  {name}: {', '.join(done[name]['findings']) or 'nothing'}", flush=True
            )
    text = table(done)
    print(text)
    options.results.write_text(HEADING + text + "\n")


if __name__ == "__main__":
    main()
