"""The data of `stages.py` and how it is trained on: the demo's world, Flickr8k, emoji, and NLVR v1."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import stages_emoji
from vlmo.demo.prepare import Prepared, prepare, train_vocabulary
from vlmo.demo.raw_layout import Sizes
from vlmo.demo.run_demo import COMMON
from vlmo.utils import write_own_captions, write_own_karpathy, write_own_vqa, write_wikibk

PRETRAIN_RATE = 1.5e-3
STAGE1_RATE = 3e-3  # hidden patches are predicted from their surroundings only after a plateau, which is long at 1.5e-3
STAGES = ("none", "3", "2+3", "1+3", "1+2+3", "3 itc", "3 shared", "3 local")
SAME_IMAGE = ("3 mask", "3 positive")


@dataclass(frozen=True)
class Recipe:
    """A named config with its steps (0: evaluation only), learning rate and other options."""

    task: str
    steps: int
    learning_rate: float = PRETRAIN_RATE
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """Data and recipes.

    Attributes:
        options: of every run.
        recipes: by kind of run.
        measured_by: kinds of the runs that measure a row.
        measures: title -> (kind of the run that logs it, its log tag).
        baselines: title of a measure -> what needs no model, with its name.
        rows: those that are of interest here.
    """

    name: str
    options: dict[str, Any]
    recipes: Mapping[str, Recipe]
    measured_by: tuple[str, ...]
    measures: Mapping[str, tuple[str, str]]
    baselines: Mapping[str, tuple[str, float]]
    rows: tuple[str, ...] = (*STAGES, *SAME_IMAGE)


def make(out: Path, flickr8k: Path | None, nlvr1: Path | None, emoji: Path | None, quick: bool) -> World:
    """The world asked for, its data below `out`; made once."""
    if flickr8k:
        return _flickr8k(out / "flickr8k_data", flickr8k)
    if nlvr1:
        return _nlvr1(out / "nlvr1_data", nlvr1)
    if emoji:
        return _emoji(out / "emoji_data", emoji)
    return _demo(out / ("demo_quick_data" if quick else "demo_data"), quick)


def _options(root: Path, vocabulary: Path, words: int, **options: Any) -> dict[str, Any]:
    paths = {"data_root": str(root), "tokenizer": str(vocabulary), "vocab_size": words}
    return COMMON | {"num_workers": 0} | paths | options


def _pretraining(sets: list[str], images: list[str], steps: tuple[int, int, int]) -> dict[str, Recipe]:
    return {
        "stage1": Recipe("task_mim_base", steps[0], STAGE1_RATE, {"datasets": images, "mim_mask_ratio": 0.4}),
        "stage2": Recipe("task_textmlm_base", steps[1]),
        "stage3": Recipe("task_mlm_itm_itc_base", steps[2], options={"datasets": sets}),
    }


# --- the demo's world -------------------------------------------------------------------------------------------------


def _demo(folder: Path, quick: bool) -> World:
    made = folder / "prepared.pickle"
    if not made.exists():
        world = prepare(folder, 1, Sizes.quick() if quick else Sizes())
        made.write_bytes(pickle.dumps(world))
    world: Prepared = pickle.loads(made.read_bytes())
    sets = ["coco", "vg", "sbu", "gcc"]
    # 64 px, a thing is 2 x 2 patches: at the demo's 32 it is one, of which the others say nothing
    options = {"vqav2_label_size": len(world.answers), "image_size": 64}
    recall = {"get_recall_metric": True}
    return World(
        "demo",
        _options(world.data_root, world.vocabulary, world.vocabulary_size, **options),
        _pretraining(sets, sets, (1000, 250, 200))
        | {
            "vqa": Recipe("task_finetune_vqa_base_image480", 150, 5e-4),
            "recall": Recipe("task_finetune_irtr_f30k_base", 0, options=recall),
        },
        ("vqa", "recall"),
        {
            "VQA score": ("vqa", "vqa/val/score"),
            "text to image R@1": ("recall", "recalls/ir_r1"),
            "image to text R@1": ("recall", "recalls/tr_r1"),
        },
        {name: ("chance", 1 / 300) for name in ("text to image R@1", "image to text R@1")},
    )


# --- Flickr8k ---------------------------------------------------------------------------------------------------------


def _flickr8k(folder: Path, archive: Path) -> World:
    raw, arrow, vocabulary = folder / "raw", folder / "arrow", folder / "vocab.txt"
    annotations = raw / "karpathy/dataset_flickr8k.json"
    if not vocabulary.exists():
        with zipfile.ZipFile(archive) as file:
            file.extractall(raw)
        write_own_karpathy.make_arrow(str(raw), str(arrow), annotations=str(annotations), images="images")
        images = json.loads(annotations.read_text())["images"]
        texts = [sentence["raw"] for image in images if image["split"] == "train" for sentence in image["sentences"]]
        _write_text(folder / "text", texts, arrow)
        train_vocabulary(texts, vocabulary, size=3000)
    words = len(vocabulary.read_text().splitlines())
    augmented = {"train_transform_keys": ["square_transform_randaug"], "max_text_len": 24, "image_size": 64}
    recall = {"get_recall_metric": True, "datasets": ["coco"]}
    # test_only measures test, and val of a copy that lacks test
    splits = {image["split"] for image in json.loads(annotations.read_text())["images"]}
    tags = "recalls/" if "test" in splits else "recalls/val_"
    return World(
        "flickr8k",
        _options(arrow, vocabulary, words, **augmented),
        _pretraining(["coco"], ["coco"], (1000, 300, 500))
        | {"recall": Recipe("task_finetune_irtr_coco_base_image384", 0, options=recall)},
        ("recall",),
        {
            "text to image R@10": ("recall", f"{tags}ir_r10"),
            "image to text R@10": ("recall", f"{tags}tr_r10"),
        },
        {"text to image R@10": ("chance", 0.01), "image to text R@10": ("chance", 0.01)},
        rows=tuple(row for row in (*STAGES, *SAME_IMAGE) if row != "none"),
    )


def _write_text(folder: Path, texts: list[str], arrow: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.txt").write_text("".join(" ".join(text.split()) + "\n" for text in texts))
    write_wikibk.make_arrow(str(folder), str(arrow), val_share=0.02)


# --- emoji ------------------------------------------------------------------------------------------------------------


def _emoji(folder: Path, packages: Path) -> World:
    arrow, vocabulary = folder / "arrow", folder / "vocab.txt"
    if not vocabulary.exists():
        texts = stages_emoji.make_arrow(packages, folder / "raw", arrow)
        train_vocabulary(texts, vocabulary, size=2000)
    words = len(vocabulary.read_text().splitlines())
    augmented = {"train_transform_keys": ["square_transform_randaug"], "max_text_len": 24, "image_size": 64}
    recall = {"get_recall_metric": True, "datasets": ["coco"]}
    return World(
        "emoji",
        _options(arrow, vocabulary, words, **augmented),
        {
            "stage3": Recipe("task_mlm_itm_itc_base", 300, options={"datasets": ["coco"]}),
            # test_only measures test; validation is measured by the run that trains
            "recall": Recipe("task_finetune_irtr_coco_base_image384", 0, options=recall),
        },
        ("recall",),
        {
            "text to image R@10, new style": ("recall", "recalls/ir_r10"),
            "image to text R@10, new style": ("recall", "recalls/tr_r10"),
        },
        dict.fromkeys(("text to image R@10, new style", "image to text R@10, new style"), ("chance", 10 / 174)),
        rows=("3", "3 shared", *SAME_IMAGE),
    )


# --- NLVR v1 ----------------------------------------------------------------------------------------------------------


def _nlvr1(folder: Path, archive: Path) -> World:
    """Is the statement true? as a question with two answers; pre-trained on the training split alone.

    Stage 3's captions are the true statements.
    """
    raw, arrow, vocabulary = folder / "raw", folder / "arrow", folder / "vocab.txt"
    lines: dict[str, list[dict[str, Any]]] = {}
    with zipfile.ZipFile(archive) as file:
        for split in ("train", "dev"):
            lines[split] = [json.loads(line) for line in file.read(f"{split}.json").splitlines()]
        if not vocabulary.exists():
            _write_nlvr1(raw, arrow, file, lines)
            train_vocabulary([line["sentence"] for line in lines["train"]], vocabulary, size=600)
    words = len(vocabulary.read_text().splitlines())
    true = sum(str(line["label"]).lower() == "true" for line in lines["dev"]) / len(lines["dev"])
    rows = ("none", "3", "2+3", "1+3", "1+2+3")
    return World(
        "nlvr1",
        _options(arrow, vocabulary, words, image_size=96, max_text_len=32, vqav2_label_size=2),
        _pretraining(["coco"], ["coco"], (1000, 250, 300))
        | {"vqa": Recipe("task_finetune_vqa_base_image480", 500, 5e-4)},
        ("vqa",),
        {"NLVR v1 dev accuracy": ("vqa", "vqa/val/score")},
        {"NLVR v1 dev accuracy": ("majority class", max(true, 1 - true))},
        rows,
    )


def _write_nlvr1(raw: Path, arrow: Path, archive: zipfile.ZipFile, lines: dict[str, list[dict[str, Any]]]) -> None:
    questions, captions = [], []
    for split, shown in (("train", "train"), ("dev", "val")):
        for line in lines[split]:
            target = raw / split / Path(line["image"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(line["image"]) as file:
                _in_a_square(Image.open(file)).save(target)
            truth = str(line["label"]).lower()
            record = {"image": f"{split}/{target.name}", "split": shown}
            questions.append(record | {"question": line["sentence"], "answers": truth})
            if truth == "true":
                captions.append(record | {"caption": line["sentence"]})
    for name, records in (("questions", questions), ("captions", captions)):
        (raw / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_own_vqa.make_arrow(str(raw), str(arrow))
    write_own_captions.make_arrow(str(raw), str(arrow))
    _write_text(raw / "text", [line["sentence"] for line in lines["train"]], arrow)


def _in_a_square(picture: Image.Image) -> Image.Image:
    """The three boxes (100 x 100 at x = 0, 150, 300) as three quarters of a square: the model takes squares."""
    square = Image.new("RGB", (200, 200), "white")
    for number in range(3):
        box = picture.convert("RGB").crop((150 * number, 0, 150 * number + 100, 100))
        square.paste(box, (number % 2 * 100, number // 2 * 100))
    return square
