"""VLMo beside what it is compared with, at equal operations, samples and tokens: its own variants, open_clip, ViLT.

python -m benchmarks.head_to_head [--out result/head_to_head] [--seeds 1 2 3 4 5] [--worlds demo ...] [--quick]
    --flickr8k flickr8k_128px_trainval.zip      also on photos
    --emoji FOLDER                              also on emoji (`stages_emoji.py` says how to get them)
    --size small --image-size 128 --device cuda     another size, on a GPU

Every model of a seed sees the same batches, bit for bit, in one loop: AdamW as published, linear warm-up and decay.
Widths are such that a training step costs as many operations as VLMo's (torch's FlopCounterMode; the table prints the
ratio). A model's learning rate is the best by validation, on half the steps with seed 0, which is not in the
table.

On all worlds: stage 3 from nothing on pairs with up to five captions an image, then recall among held-out images
without fine-tuning. On the demo's world also VQA and NLVR2, from nothing and from that stage 3 (ViLT: from its own
pre-training on the same batches). What is done is not repeated, so a stopped benchmark goes on where it was; tables of
whatever is done so far go to --results. Needs open_clip_torch.
"""

import argparse
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import head_to_head_report, stages_worlds
from benchmarks.head_to_head_models import SIZES, SMALL, Batch, Contestant, makers, matched_width, step_flops
from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.demo.run_demo import heading
from vlmo.distributed.wire_format import from_bytes, to_bytes
from vlmo.evaluation.retrieval import Encoded, best_ranks, recalls
from vlmo.registry import ARCHITECTURES
from vlmo.training.optimizer import build_optimizer, build_schedule, parameter_groups

WEIGHT_DECAY = 0.01
HEAD_RATE = 10  # a new classifier's learning rate over the model's
COUNTED = 4  # batches on which operations are counted
IMAGES = ("image", "image_0", "image_1")
PAIRS = {"datasets": ["coco"]}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "retrieval": ("task_mlm_itm_itc_base", PAIRS | {"get_recall_metric": True}),
    "vqa": ("task_finetune_vqa_base_image480", {}),
    "nlvr2": ("task_finetune_nlvr2_base", {}),
}
RATES = {"retrieval": (3.75e-4, 7.5e-4, 1.5e-3), "vqa": (2.5e-4, 5e-4, 1e-3), "nlvr2": (2.5e-4, 5e-4, 1e-3)}
ROWS = {
    "retrieval": ("vlmo", "shared", "separate", "open_clip", "mask", "positive", "itc"),
    "vqa": ("vlmo", "shared", "separate", "vilt", "vlmo pre-trained", "vilt pre-trained"),
    "nlvr2": ("vlmo", "shared", "separate", "vilt", "vlmo pre-trained", "vilt pre-trained"),
}
IMAGE_SIZE = {"demo": 32, "flickr8k": 64, "emoji": 64}  # pixels
STEPS = {
    "demo": {"retrieval": 300, "vqa": 1000, "nlvr2": 400},
    "flickr8k": {"retrieval": 300},
    "emoji": {"retrieval": 250},
}
QUICK_STEPS = 4
WIDENED = ("shared", "open_clip", "itc", "vilt")  # until a step costs what VLMo's does
TUNED_AS = {"mask": "vlmo", "positive": "vlmo"}  # the same model
PRETRAINING = ("vlmo", "vilt")


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

    @cached_property
    def separator(self) -> int:
        return self.data.tokenizer.sep_token_id

    @cached_property
    def widths(self) -> dict[str, int]:
        """Of the rows that have one, found once and kept; ViLT's is that of VQA, for which it is pre-trained."""
        path = self.folder / f"{self.kind}_widths.json"
        found: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        own = [row for row in WIDENED if row in ROWS[self.kind] and (row != "vilt" or self.kind == "vqa")]
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
                yield {name: to_bytes(value) if name in IMAGES else value for name, value in batch.items()}
                steps -= 1
            epoch += 1

    def to_device(self, batch: Batch) -> dict[str, Any]:
        moved = {name: each.to(self.device) if isinstance(each, Tensor) else each for name, each in batch.items()}
        return {name: from_bytes(each) if name in IMAGES else each for name, each in moved.items()}


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
        batch = {name: each.to(contest.device) if isinstance(each, Tensor) else each for name, each in batch.items()}
        if "image" in batch:
            features.append(contestant.image_features(batch["image"]).float())
        else:
            features.append(contestant.text_features(batch["text_ids"], batch["text_masks"]).float())
        numbers.append(torch.stack([batch["raw_index"], batch["img_index"]], dim=1))
    number, owner = torch.cat(numbers).unbind(1)
    order = number.argsort()
    return Encoded(torch.cat(features)[order], number[order], owner[order])


# --- what is run ------------------------------------------------------------------------------------------------------


def make(contest: Contest, row: str, seed: int, folder: Path | None, steps: int) -> Contestant:
    """Builds a row's model with the first weights of a seed.

    Args:
        folder: of the pre-trained weights; None: from nothing.
    """
    name = row.removesuffix(" pre-trained")
    load_path = str(folder / name) if folder and name == "vlmo" else ""
    width = [contest.widths[name]] if name in contest.widths else []
    torch.manual_seed(seed)
    build = makers(contest.config(seed, steps, load_path), contest.kind, contest.separator)[name]
    contestant = contest.made(build)(*width)
    if folder and name == "vilt":
        own, given = contestant.state_dict(), torch.load(folder / "vilt.pt", weights_only=True)
        fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
        assert fitting, "nothing of the pre-trained weights fits"
        contestant.load_state_dict(fitting, strict=False)
    return contestant


def keep(contestant: Contestant, row: str, folder: Path) -> None:
    """Saves the weights that fine-tuning starts from."""
    if row == "vlmo":
        contestant.model.save_pretrained(folder / row)  # type: ignore[union-attr,operator]
    else:
        torch.save(contestant.state_dict(), folder / f"{row}.pt")


def rates(contest: Contest, rows: list[str]) -> dict[str, float]:
    """The best learning rate of each row by validation, on half the steps with seed 0; what is known is kept.

    Of three rates, and of lower or higher ones while the best is at an end.
    """
    path = contest.folder / f"{contest.kind}_rates.json"
    tried: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    wanted = list(dict.fromkeys(TUNED_AS.get(row, row).removesuffix(" pre-trained") for row in rows))
    best: dict[str, float] = {}
    batches: list[dict[str, Any]] = []
    for row in wanted:
        found = tried.setdefault(row, {})
        while rate := next_rate(found, RATES[contest.kind]):
            steps = contest.steps // 2
            batches = batches or list(contest.batches(0, steps))
            heading(f"{contest.world}, {contest.kind}, {row}: learning rate {rate:g}")
            contestant = make(contest, row, 0, None, steps)
            train(contest, contestant, batches, rate)
            if contest.kind == "retrieval" and row == "vilt":
                found[str(rate)] = -loss_on_others(contest, contestant)
            else:
                measured = measure(contest, contestant, "val")
                found[str(rate)] = sum(measured.get(name, 0.0) for name in head_to_head_report.MEASURES)
            path.write_text(json.dumps(tried, indent=1) + "\n")
        best[row] = float(max(found, key=lambda rate: found[rate]))
    return {row: best[TUNED_AS.get(row, row).removesuffix(" pre-trained")] for row in rows}


def next_rate(found: Mapping[str, float], grid: Sequence[float]) -> float | None:
    """What to try next: all of the grid, then what is beyond it while the best is at an end; None: nothing more."""
    for rate in grid:
        if str(rate) not in found:
            return rate
    lowest, *_, highest = sorted(map(float, found))
    best = float(max(found, key=lambda rate: found[rate]))
    return best / 2 if best == lowest else best * 2 if best == highest else None


@torch.inference_mode()
def loss_on_others(contest: Contest, contestant: Contestant) -> float:
    """Mean loss of batches that are no seed's: what chooses where there is nothing to measure yet."""
    contestant.eval()
    torch.manual_seed(0)
    losses = [contestant.loss(contest.to_device(batch)).item() for batch in contest.batches(1000, 8)]
    return sum(losses) / len(losses)


def run_seed(contest: Contest, rows: list[str], rate_of: Mapping[str, float], seed: int, start: Path | None) -> None:
    """Does the rows that are not done; each leaves `seed<seed>/<kind>_<row>.json`.

    Args:
        start: folder of pre-trained weights.
    """
    folder = contest.folder / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    batches: list[dict[str, Any]] = []
    for row in rows:
        done = folder / f"{contest.kind}_{row.replace(' ', '_')}.json"
        if done.exists():
            continue
        began = time.monotonic()
        batches = batches or list(contest.batches(seed, contest.steps))
        heading(f"{contest.world}, {contest.kind}, seed {seed}: {row}")
        contestant = make(contest, row, seed, start if row.endswith("pre-trained") else None, contest.steps)
        flops = step_flops(contestant, [contest.to_device(batch) for batch in batches[:COUNTED]])
        torch.manual_seed(seed)
        train(contest, contestant, batches, rate_of[row])
        only_pretrains = contest.kind == "retrieval" and row == "vilt"
        found = {} if only_pretrains else measure(contest, contestant, contest.tested_on)
        if contest.kind == "retrieval" and row in PRETRAINING:
            keep(contestant, row, folder)
        about = {
            "rate": rate_of[row],
            "flops": flops,
            "parameters": sum(each.numel() for each in contestant.parameters()),
            "samples": sum(len(batch["text_ids"]) for batch in batches),
            "tokens": sum(int(batch["text_masks"].sum()) for batch in batches),
            "seconds": time.monotonic() - began,
        }
        print(f"  {found} in {about['seconds']:.0f} s", flush=True)
        done.write_text(json.dumps(found | about, indent=1) + "\n")


def contests(options: argparse.Namespace) -> list[Contest]:
    """All that are asked for, pre-training before what starts from it."""
    found = []
    device = torch.device(options.device)
    ARCHITECTURES[SIZES["small"]] = SMALL
    given = {"demo": {}, "flickr8k": {"flickr8k": options.flickr8k}, "emoji": {"emoji": options.emoji}}
    for name, source in given.items():
        if name not in options.worlds or not all(source.values()):
            continue
        sources = {"flickr8k": None, "nlvr1": None, "emoji": None} | source
        world = stages_worlds.make(options.out, **sources, quick=options.quick)
        size = options.image_size or IMAGE_SIZE[name]
        own = {"model_arch": SIZES[options.size], "image_size": size, "num_workers": 0}
        withheld: Mapping[int, str] = {}
        if name == "demo":
            data = "demo_quick_data" if options.quick else "demo_data"
            withheld = pickle.loads((options.out / data / "prepared.pickle").read_bytes()).withheld
        for kind, steps in STEPS[name].items():
            steps = QUICK_STEPS if options.quick else steps
            asked = withheld if kind == "vqa" else {}
            # (the archive of Flickr8k has no test images: the learning rate is chosen on those that are measured)
            tested_on = "val" if name == "flickr8k" else "test"
            folder = options.out / f"{name}_{options.size}_{size}px"
            found.append(Contest(name, kind, steps, tested_on, world.options | own, asked, folder, device))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("result/head_to_head"), help="folder for data and results")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder for the table and its CSV")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--worlds", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--flickr8k", type=Path, metavar="ZIP")
    parser.add_argument("--emoji", type=Path, metavar="FOLDER")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--image-size", type=int, help="pixels; default: 32 for the demo's world, else 64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--report", action="store_true", help="run nothing, write the table of what is done")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)  # the sizes are too small for more
    asked = [] if options.report else contests(options)
    for contest in asked:
        for seed in options.seeds:
            rows = list(ROWS[contest.kind])
            if contest.kind == "retrieval" and "vqa" in STEPS[contest.world]:
                rows.append("vilt")  # what its fine-tuning starts from
            run_seed(contest, rows, rates(contest, rows), seed, contest.folder / f"seed{seed}")
            head_to_head_report.write(options.out, options.results)
    head_to_head_report.write(options.out, options.results)


if __name__ == "__main__":
    main()
