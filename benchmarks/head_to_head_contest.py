"""One contest of `head_to_head.py`: its batches and its widths, how a model is trained in it and measured."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.head_to_head_models import Batch, Contestant, makers, matched_width, step_flops
from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.distributed.wire_format import with_pixels
from vlmo.evaluation.retrieval import Encoded, best_ranks, recalls, to_device
from vlmo.training.optimizer import build_optimizer, build_schedule, parameter_groups

WEIGHT_DECAY = 0.01
HEAD_RATE = 10  # a new classifier's learning rate over the model's
COUNTED = 4  # batches on which operations are counted
PAIRS = {"datasets": ["coco"]}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "retrieval": ("task_mlm_itm_itc_base", PAIRS | {"get_recall_metric": True}),
    "vqa": ("task_finetune_vqa_base_image480", {}),
    "nlvr2": ("task_finetune_nlvr2_base", {}),
}
ROWS = {
    "retrieval": ("vlmo", "shared", "separate", "open_clip", "mask", "positive"),
    "vqa": ("vlmo", "shared", "separate", "vilt", "vlmo pre-trained", "vilt pre-trained"),
    "nlvr2": ("vlmo", "shared", "separate", "vilt", "vlmo pre-trained", "vilt pre-trained"),
}
STEPS = {
    "demo": {"retrieval": 300, "vqa": 600, "nlvr2": 400},
    "flickr8k": {"retrieval": 200},
    "emoji": {"retrieval": 250},
}
WIDENED = ("shared", "open_clip", "itc", "vilt")  # until a step costs what VLMo's does


@dataclass(frozen=True)
class Contest:
    """One task on one world.

    Attributes:
        kind: of `TASKS`.
        steps: of training.
        tested_on: the split whose measures count.
        options: of every run on the world.
        withheld: right answers to VQA's test questions, by question id.
        folder: where results of all seeds lie.
    """

    world: str
    kind: str
    steps: int
    tested_on: str
    options: Mapping[str, Any]
    withheld: Mapping[int, str]
    folder: Path
    device: torch.device

    def config(self, seed: int, steps: int, load_path: str = "") -> dict[str, Any]:
        task, own = TASKS[self.kind]
        given = {"seed": seed, "max_steps": steps, "load_path": load_path, "learning_checks": False}
        return resolve(task, **{**self.options, **own, **given})

    @cached_property
    def data(self) -> MTDataModule:
        """What is evaluated on: the same for all seeds."""
        data = MTDataModule(self.config(0, self.steps))
        data.setup("fit")
        data.setup("test")
        return data

    @property
    def rows(self) -> list[str]:
        """What is compared; on the quickest world also the contrast alone, and what fine-tuned ViLTs start from."""
        more = ["itc", "vilt"] if self.kind == "retrieval" and "vqa" in STEPS[self.world] else []
        return [*ROWS[self.kind], *more]

    @cached_property
    def separator(self) -> int:
        return self.data.tokenizer.sep_token_id

    @cached_property
    def widths(self) -> dict[str, int]:
        """Of the rows that have one, found once and kept; ViLT's is that of VQA, for which it is pre-trained."""
        path = self.folder / f"{self.kind}_widths.json"
        found: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        own = [row for row in WIDENED if row in self.rows and (row != "vilt" or self.kind == "vqa")]
        rows = [row for row in own if row not in found]
        if rows:
            batches = [self.to_device(batch) for batch in self.batches(0, COUNTED)]
            build = makers(self.config(0, self.steps), self.kind, self.separator)
            reference = self.made(build["vlmo"])()
            flops = step_flops(reference, batches)
            step = reference.model.transformer.num_heads  # type: ignore[union-attr]
            found |= {row: matched_width(self.made(build[row]), flops, batches, step) for row in rows}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found) + "\n")
        if "vqa" in STEPS[self.world] and self.kind != "vqa":
            found["vilt"] = replace(self, kind="vqa").widths["vilt"]
        return found

    def made(self, make: Callable[..., Contestant]) -> Callable[..., Contestant]:
        return lambda *width: make(*width).to(self.device).train()

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Any]]:
        """The training batches of a seed, images as bytes, over as many epochs as it takes."""
        data = MTDataModule(self.config(seed, steps))
        data.setup("fit")
        loader, epoch = data.train_dataloader(), 0
        while steps:
            loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            for batch, _ in zip(loader, range(steps), strict=False):
                yield dict(batch)
                steps -= 1
            epoch += 1

    def to_device(self, batch: Batch) -> dict[str, Any]:
        """Moves a batch; images that are bytes (those of `batches`, not of an evaluation) become pixels."""
        return with_pixels(to_device(dict(batch), self.device))


def train(contest: Contest, contestant: Contestant, batches: list[dict[str, Any]], rate: float) -> None:
    """One step a batch."""
    steps = len(batches)
    groups = parameter_groups(contestant.named_parameters(), rate, WEIGHT_DECAY, HEAD_RATE, contestant.heads)
    groups = [group for group in groups if group["params"]]
    optimizer = build_optimizer("adamw", groups, rate)
    schedule = build_schedule(optimizer, steps, steps // 10, 1, 0)
    contestant.train()
    for number, batch in enumerate(batches):
        loss = contestant.loss(contest.to_device(batch))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if number % max(steps // 4, 1) == 0:
            print(f"  step {number}: loss {loss.item():.3f}", flush=True)
    if not math.isfinite(loss.item()):
        print("  the loss is not finite: the measures are what such a model gives", flush=True)


@torch.inference_mode()
def measure(contest: Contest, contestant: Contestant, split: str) -> dict[str, float]:
    """Measures on "val" or "test", as shares."""
    contestant.eval()
    if contest.kind == "retrieval":
        images, texts = (_encoded(contest, contestant, loader) for loader in contest.data.retrieval_loaders(split))
        return recalls(best_ranks(texts, images), best_ranks(images, texts))
    right = asked = 0.0
    withheld = contest.withheld if split == "test" else {}
    names = contest.data.label_names()
    for batch in contest.data.test_dataloader() if withheld else contest.data.val_dataloader():
        best = contestant.logits(contest.to_device(batch)).argmax(-1).cpu()
        if contest.kind == "nlvr2":  # one loader for both tables
            part = torch.tensor([("test" in name) == (split == "test") for name in batch["table_name"]])
            right += float((best == torch.as_tensor(batch["answers"]).long())[part].sum())
            asked += int(part.sum())
        elif withheld:
            assert names is not None
            questions = [int(each) for each in batch["qid"]]
            right += sum(names[label] == withheld[each] for label, each in zip(best.tolist(), questions, strict=True))
            asked += len(questions)
        else:
            scores = batch["vqa_scores"] * (batch["vqa_labels"] == best[:, None])
            right, asked = right + float(scores.sum()), asked + len(best)
    return {"accuracy": right / asked}


def _encoded(contest: Contest, contestant: Contestant, loader: Any) -> Encoded:
    features, numbers = [], []
    for batch in loader:
        batch = to_device(batch, contest.device)
        if "image" in batch:
            features.append(contestant.image_features(batch["image"]).float())
        else:
            features.append(contestant.text_features(batch["text_ids"], batch["text_masks"]).float())
        numbers.append(torch.stack([batch["raw_index"], batch["img_index"]], dim=1))
    number, owner = torch.cat(numbers).unbind(1)
    order = number.argsort()
    return Encoded(torch.cat(features)[order], number[order], owner[order])
