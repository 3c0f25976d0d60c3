"""The plugins of `examples/`, used as their readers would: copied elsewhere, named on the command line."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests import tables

REPOSITORY = Path(__file__).parents[2]
SIZES = [
    *("model_arch=vlmo_tiny_patch16", "image_size=32", "vocab_size=64", "max_text_len=24", "num_workers=0"),
    *("num_gpus=0", "precision=32", "per_gpu_batchsize=2", "batch_size=4", "max_steps=2", "warmup_steps=1"),
]


@pytest.fixture
def place(tmp_path):
    """A folder outside of the repository with the plugins, and a vocabulary."""
    shutil.copytree(REPOSITORY / "examples" / "plugins", tmp_path / "my_plugins")
    tables.write_vocabulary(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def call(place):
    """Runs Python in that folder; returns what it printed."""

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def train(call, place):
    """`run.py` with a plugin, on the tiny size."""

    def run(plugin: str, *words: str) -> str:
        options = [f"plugins=['my_plugins.{plugin}']", f"data_root={place}/data", f"tokenizer={place}/vocab.txt"]
        return call(f"{REPOSITORY}/run.py", "with", *words[:1], *SIZES, *options, f"log_dir={place}/result", *words[1:])

    return run


def newest(place: Path) -> Path:
    return max(place.glob("result/*/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)


def write_memes(root: Path) -> None:
    (root / "img").mkdir(parents=True)
    for number in range(4):
        tables.picture(number).save(root / "img" / f"{number}.png")
    for split in ("train", "dev_seen", "test_seen"):
        lines = [
            {"id": 10 * number + label, "img": f"img/{number}.png", "label": label, "text": f"the {colour} cat runs"}
            for number in range(4)
            for label, colour in ((1, "red"), (0, "blue"))
        ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_downstream_task(place, call, train):
    write_memes(place / "raw")
    call("-c", "from my_plugins.memes import make_arrow; make_arrow('raw', 'data')")
    small = ("model_arch=vlmo_tiny_patch16", "image_size=32")
    printed = train("memes", "task_finetune_memes_base", *small, "lr_mult=7")
    assert "memes accuracy" in printed and "learning rate 0.00021" in printed  # its head, at lr_mult times the rate
    checkpoint = newest(place)

    evaluated = train("memes", "task_finetune_memes_base", f"load_path={checkpoint}", "test_only=True")
    (file,) = place.glob("result/memes_test_*.csv")
    assert str(file) in evaluated
    heading, *rows = [line.split(",") for line in file.read_text().splitlines()]
    assert heading == ["id", "proba", "label"] and len(rows) == 8 and {label for *_, label in rows} <= {"0", "1"}
    # the labels are in the ids: the metric of its own, once more
    scores = {int(meme): float(score) for meme, score, _ in rows}
    pairs = [(scores[h], scores[o]) for h in scores if h % 10 for o in scores if not o % 10]
    area = sum((h > o) + (h == o) / 2 for h, o in pairs) / len(pairs)
    assert re.search(rf"memes/test/auroc +{100 * area:.2f} %", evaluated)

    words = ["-m", "vlmo.predict", "hateful", "--plugins", "my_plugins.memes", "--checkpoint", str(checkpoint)]
    answer = json.loads(call(*words, "--image", "raw/img/0.png", "--text", "the red cat runs"))
    assert answer["hateful"] == pytest.approx(scores[1], abs=1e-4)

    known = "fine-tuned for memes"
    assert known in call("-m", "vlmo.checkpoint", "show", str(checkpoint), "--plugins", "my_plugins.memes")


def test_another_contrast_in_stage_3(place, train):
    tables.write_coco(place / "data")
    options = ("datasets=['coco']", "get_recall_metric=True", "contrast_cache=True")
    printed = train("hard_negatives", "task_mlm_itm_hn_nce_base", *options)
    for tag in ("hn_nce/val/i2t_accuracy", "itm/val/accuracy", "mlm/val/accuracy", "recalls/tr_r1"):
        assert tag in printed
    state = torch.load(newest(place), weights_only=True)["state_dict"]
    assert {"itc_text_proj.fc.weight", "logit_scale", "itm_score.fc.weight"} <= state.keys()


HARD_NEGATIVES = """
import torch
from vlmo import VLMoModel, plugins
plugins.load(["my_plugins.hard_negatives"])
from my_plugins.hard_negatives import hn_nce
from vlmo.tasks.base import BatchSize, Step
model = VLMoModel("vlmo_tiny_patch16", ["hn_nce"], image_size=32, vocab_size=64, max_text_len=24)
torch.manual_seed(0)
image, text = (torch.nn.functional.normalize(torch.randn(3, 96), dim=1) for _ in range(2))
output = model.tasks[0].compare(Step({}, model.heads, True, sizes=[BatchSize(3, 8, 0)]), {"image": image, "text": text})
logits = output.outputs["i2t_logits"].detach()
torch.save((logits, output.loss.detach(), hn_nce(logits, 0), hn_nce(logits[:1, :1])), "out.pt")
"""


def test_hard_negatives_by_hand(place, call):
    call("-c", HARD_NEGATIVES)
    logits, loss, of_no_hardness, of_one_pair = torch.load(place / "out.pt", weights_only=True)
    losses = []
    for rows in (logits.tolist(), logits.t().tolist()):
        for own, row in enumerate(rows):
            others = [value for column, value in enumerate(row) if column != own]
            total = sum(math.exp(value / 2) for value in others)
            weighted = sum(2 * math.exp(value / 2) / total * math.exp(value) for value in others)
            losses.append(math.log(math.exp(row[own]) + weighted) - row[own])
    assert loss.item() == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert torch.allclose(of_no_hardness, F.cross_entropy(logits, torch.arange(3)))
    assert of_one_pair == 0


def test_a_data_set_of_ones_own(place, train):
    for split, first in (("train_0", 0), ("train_1", 10), ("val", 20)):
        tables.write_captions(place / "data", f"my_captions_{split}", first=first)
    printed = train("my_captions", "task_mlm_itm_itc_base", "datasets=['my_captions']", "get_recall_metric=True")
    assert "itc/val/loss" in printed and "recalls/val_tr_r1" in printed
