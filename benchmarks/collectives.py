"""Every collective of an optimizer step with its bytes, beside what the published way sends in the same step.

python -m benchmarks.collectives task_mlm_itm_itc_base [option=value ...] --world 8 128 1024 [--strategy ddp fsdp2 ...]

Takes the options of `run.py with`; a world of W processes is W / 8 nodes of 8 devices. Bytes are those that the busiest
process sends and receives, recorded in one process that computes nothing (`vlmo/planning/communication.py`; of which
algorithms they are: `recording.py` beside it). ZeRO's and the published way's are computed. Texts have the greatest
length.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sacred.arg_parser import get_config_updates
from sacred.utils import SacredError

from vlmo.config import explain, resolve
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.planning.communication import STRATEGIES, Collective, laid_out, ledger
from vlmo.settings import Settings

TOGETHER = "together"  # instead of a purpose


def published(settings: Settings, world: int) -> list[Collective]:
    """What the code of 2022 sends in the step, under DDP (github.com/microsoft/unilm: vlmo/vlmo/modules/objectives.py).

    In each pass the contrast gathers the features of images and texts, those of both branches apart, and matching all
    images, token ids and masks, before any is chosen. DDP sums the gradients of whatever is not frozen once a step:
    Lightning 1.5 looked for unused parameters and summed zeros for them. What it sent beside (its map of those
    parameters, metrics) is left out.
    """
    if world == 1:
        return []
    settings = laid_out(settings, world)
    with torch.device("meta"):
        model = VLMo(settings)
    passes, size, width = settings.accumulation, settings.per_gpu_batchsize, model.transformer.embed_dim
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    summed = 2 * (world - 1) * gradients // world
    found = [Collective("all-reduce", "gradients", 1, summed, summed)]

    def gathered(what: str, tensors: int, sample_bytes: int) -> None:
        sent = passes * tensors * (world - 1) * size * sample_bytes
        found.append(Collective("all-gather", what, passes * tensors, sent, sent))

    for task in model.tasks:
        if task.provides == "contrast":
            gathered("contrast features", 4 if task.vl_branch and not settings.shared_ffn else 2, 4 * width)
        if task.provides == "matching":
            gathered("ITM images", 1, 4 * 3 * settings.image_size**2)
            gathered("ITM texts", 2, 8 * settings.max_text_len)
    return found


def total(collectives: Sequence[Collective], what: str = TOGETHER) -> Collective:
    """The sum of those for one purpose, or of all."""
    chosen = [each for each in collectives if what in (TOGETHER, each.what)]
    sums = [sum(getattr(each, name) for each in chosen) for name in ("count", "sent", "received")]
    return Collective("", what, *sums)


def table(here: Sequence[Collective], then: Sequence[Collective]) -> str:
    """A line for each collective, with the published way's bytes for the same purpose beside the first of them."""
    lines = [f"{'':<23}{'':<32}{'calls':>7}{'sent MB':>14}{'received MB':>14}{'published MB':>15}{'/ here':>8}"]
    purposes = {each.what for each in here}
    only_then = [Collective("", each.what, 0, 0, 0) for each in then if each.what not in purposes]
    shown: set[str] = set()
    for each in [*here, *only_then, total(here)]:
        line = f"{each.operation:<23}{each.what:<32}{each.count:>7}"
        line += f"{each.sent / 1e6:>14,.3f}{each.received / 1e6:>14,.3f}"
        own, before = total(here, each.what).sent, total(then, each.what).sent
        if before and each.what not in shown:
            line += f"{before / 1e6:>15,.1f}" + (f"{before / own:>8,.2f}" if own else "")
        shown.add(each.what)
        lines.append(line)
    return "\n".join(lines)


def heading(run: Settings, asked: int, world: int) -> str:
    """What is run, one line; asked: the config's `batch_size`."""
    passes = f"{run.accumulation} pass" + ("es" if run.accumulation > 1 else "")
    changed = f" (for {asked}, which they cannot share evenly)" if run.batch_size != asked else ""
    return (
        f"{run.exp_name}, {world} processes: batch {run.batch_size}{changed}, {passes} of "
        f"{run.per_gpu_batchsize} a process, {run.image_size} px, texts of {run.max_text_len} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="named configs and option=value, as after `run.py with`")
    parser.add_argument("--world", type=int, nargs="+", default=[8, 128, 1024], help="numbers of processes")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=["ddp"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    options = parser.parse_intermixed_args()
    updates, names = get_config_updates(options.config)
    results: list[dict[str, Any]] = []
    try:
        settings = Settings.from_config(resolve(*names, **updates))
        for world in options.world:
            run, then = laid_out(settings, world), published(settings, world)
            print(heading(run, settings.batch_size, world))
            for strategy in options.strategy:
                here = ledger(settings, world, strategy)
                print(f"\n{strategy}\n{table(here, then)}\n", flush=True)
                results.append(
                    {"config": options.config, "world": world, "strategy": strategy, "batch_size": run.batch_size}
                    | {"passes": run.accumulation, "here": [asdict(each) for each in here]}
                    | {"published": [asdict(each) for each in then]}
                )
    except (VLMoError, SacredError) as error:
        sys.exit(explain(error))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
