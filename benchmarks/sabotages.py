"""Does the learning doctor name what is wrong? Sabotaged set-ups, each to be named, and healthy runs, to be left alone.

python -m benchmarks.sabotages [--seeds 1 ...] [--out result/sabotages] [--only NAME ...] [--report]
python -m benchmarks.sabotages --flickr8k flickr8k_128px_trainval.zip       on photos and captions

The tiny model on the demo's world, another one for each seed, or on Flickr8k. A run takes seconds; those that are done
are not repeated. Prints the tables of all that is done below --out, and writes them to docs/results/learning_doctor.md.
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.sabotages_cases import (
    BATCH,
    CASES,
    EVERY,
    SABOTAGES,
    STEPS,
    AtStart,
    Case,
    World,
    make_world,
    options_of,
)
from vlmo.config import resolve
from vlmo.training.learning.callback import LearningChecks
from vlmo.training.learning.seen import LIMIT
from vlmo.training.runner import build_trainer
from vlmo.training.runner import prepare as prepare_run


def run_case(name: str, world: World) -> dict[str, Any]:
    """Trains; gives the findings by code, the step of each, and seconds."""
    case = world.cases[name]
    start = time.monotonic()
    with case.program(), contextlib.redirect_stdout(io.StringIO()):
        prepared = prepare_run(resolve(case.task, **options_of(name, world)))
        trainer = build_trainer(prepared, [AtStart(case.start)] if case.start else [])
        checks = next(each for each in trainer.callbacks if isinstance(each, LearningChecks))  # type: ignore[attr-defined]
        trainer.fit(prepared.model, datamodule=prepared.datamodule)
    shutil.rmtree(prepared.folder, ignore_errors=True)
    return {"seconds": time.monotonic() - start, "findings": checks.findings}


def named(case: Case, findings: Mapping[str, Any]) -> str | None:
    """The code that names the sabotage; None if none does."""
    return next((code for code in case.expected if code in findings), None)


Done = dict[str, dict[str, Any]]  # what `run_case` gave, by case


def table(done: Mapping[str, Done]) -> str:
    """Markdown: the sabotages, and what was said of the healthy runs.

    Args:
        done: of the worlds of one kind, by name.
    """
    lines = ["| sabotage | named | by | after step | also said | what the doctor says |", "|---|---|---|---|---|---|"]
    right = tried = 0
    for name, case in SABOTAGES.items():
        runs = [each[name]["findings"] for each in done.values() if name in each]
        hits = [(code, *findings[code]) for findings in runs if (code := named(case, findings))]
        right, tried = right + len(hits), tried + len(runs)
        codes = Counter(code for code, _, _ in hits)
        others = Counter(code for findings in runs for code in findings if code not in case.expected)
        steps = sorted(step for _, step, _ in hits)
        after = "" if not steps else f"{steps[0]}" if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
        cells = f"{len(hits)} of {len(runs)}", _counted(codes, len(runs)), after, _counted(others, len(runs))
        lines.append(f"| {name} | {' | '.join(cells)} | {hits[0][2] if hits else ''} |")
    healthy_runs = {(world, name): run for world, runs in done.items() for name, run in runs.items() if ":" in name}
    alarms = {place: run["findings"] for place, run in healthy_runs.items() if run["findings"]}
    lines += ["", f"{right} of {tried} sabotaged runs are named; of {len(healthy_runs)} healthy runs, "]
    lines[-1] += f"{len(alarms)} have a false alarm."
    lines += [f"- {name} ({world}): {', '.join(found)}" for (world, name), found in alarms.items()]
    seconds = sorted(run["seconds"] for runs in done.values() for run in runs.values())
    return "\n".join(
        [*lines, "", f"Seconds a run: {seconds[len(seconds) // 2]:.0f} (median), {seconds[-1]:.0f} at most."]
    )


def _counted(codes: Mapping[str, int], runs: int) -> str:
    """The codes, each with how many runs it was said of unless that is all of them."""
    return ", ".join(code if count == runs else f"{code} ({count})" for code, count in codes.items())


HEADING = f"""# What the learning doctor names

`python -m benchmarks.sabotages`: `vlmo_tiny_patch16`, {STEPS} steps of {BATCH} samples, from nothing, a judgement every
{EVERY} steps; one core. "After step" is the judgement that named it: 0 is before the first step. A learning rate of
exactly 0 is refused by the settings; here it is 1e-12. What the data show is named as soon as enough samples were seen
({LIMIT:,} are looked at), whatever the weights do.
"""
TITLES = {"demo": "The demo's world", "flickr8k": "Flickr8k, photos with captions of people, at 64 px"}


def report(out: Path, results: Path) -> None:
    """Prints and writes the tables of all that is done."""
    text = HEADING
    for kind, title in TITLES.items():
        found = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob(f"{kind}_seed*/done.json"))}
        if found:
            seeds = ", ".join(name.rsplit("seed", 1)[1] for name in found)
            text += f"\n## {title}, seed{'s' * (len(found) > 1)} {seeds}\n\n{table(found)}\n"
    print(text)
    results.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("result/sabotages"), help="folder for data and results")
    parser.add_argument("--results", type=Path, default=Path("docs/results/learning_doctor.md"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the world and of the runs in it")
    parser.add_argument("--flickr8k", type=Path, metavar="ZIP")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME")
    parser.add_argument("--report", action="store_true", help="run nothing, print the tables of what is done")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    for seed in [] if options.report else options.seeds:
        folder = options.out / f"{'flickr8k' if options.flickr8k else 'demo'}_seed{seed}"
        world, record = make_world(folder, seed, options.flickr8k), folder / "done.json"
        done: Done = json.loads(record.read_text()) if record.exists() else {}
        for name in options.only or world.cases:
            if name not in done or options.only:
                done[name] = run_case(name, world)
                record.write_text(json.dumps(done, indent=1))
                said = ", ".join(done[name]["findings"]) or "nothing"
                print(f"{done[name]['seconds']:5.1f} s  seed {seed}, {name}: {said}", flush=True)
    report(options.out, options.results)


if __name__ == "__main__":
    main()
