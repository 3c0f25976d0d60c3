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
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import head_to_head_report, stages_worlds
from benchmarks.head_to_head_contest import COUNTED, STEPS, Contest, measure, train
from benchmarks.head_to_head_models import SIZES, SMALL, Contestant, makers, step_flops
from vlmo.demo.run_demo import heading
from vlmo.registry import ARCHITECTURES

RATES = {"retrieval": (3.75e-4, 7.5e-4, 1.5e-3), "vqa": (2.5e-4, 5e-4, 1e-3), "nlvr2": (2.5e-4, 5e-4, 1e-3)}
IMAGE_SIZE = {"demo": 32, "flickr8k": 64, "emoji": 64}  # pixels
BEYOND = 3  # rates that are tried outside of the grid
QUICK_STEPS = 4
TUNED_AS = {"mask": "vlmo", "positive": "vlmo"}  # the same model
PRETRAINING = ("vlmo", "vilt")


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
    """What to try next: all of the grid, then up to `BEYOND` others while the best is at an end; None: nothing more."""
    for rate in grid:
        if str(rate) not in found:
            return rate
    if len(found) >= len(grid) + BEYOND:  # (where nothing is learnt, chance decides, and could go on for ever)
        return None
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
            run_seed(contest, contest.rows, rates(contest, contest.rows), seed, contest.folder / f"seed{seed}")
            head_to_head_report.write(options.out, options.results)
    head_to_head_report.write(options.out, options.results)


if __name__ == "__main__":
    main()
