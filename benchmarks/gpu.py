"""A day with a GPU in nine minutes: tests, waits, step times and MFU, largest batches, data, the planner's memory.

python -m benchmarks.gpu [--minutes 9] [--out docs/results/gpu.md]
python -m benchmarks.gpu --cpu-rehearsal          # the same program at tiny size on a CPU: its figures mean nothing

Each part is a process of its own with a budget of seconds: what it has printed when that is over counts, the rest is
named as cut off. What lacks a package is named as skipped. Writes a Markdown file and, beside it, the numbers as JSON.
MFU: operations of a step here, by torch's FlopCounterMode, for both ways, over the data sheet's peak.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import overhead, workload
from benchmarks.flops import peak
from benchmarks.step import WAYS, Trial, memory
from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.planning.compute import counter
from vlmo.planning.step import step_cost
from vlmo.settings import Settings

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "gpu.md"
PACKAGES = ("torch", "pytorch-lightning", "transformers", "timm", "triton", "deepspeed", "fairscale", "tensorboard")
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
Row = dict[str, Any]


def config_of(rehearse: bool, size: str = "base", **options: Any) -> dict[str, Any]:
    """Stage 3 on one device, one pass an optimizer step."""
    small: dict[str, Any] = {"image_size": 32, "vocab_size": 2000, "num_gpus": 0} if rehearse else {"num_gpus": 1}
    arch = {"model_arch": f"vlmo_{'tiny' if rehearse else size}_patch16"}
    number = options.setdefault("per_gpu_batchsize", 2)
    return resolve("task_mlm_itm_itc_base", batch_size=number, **small, **arch, **options)


def batches(settings: Settings, workers: int = 0) -> Iterator[Any]:
    return workload.batches(settings, workload.text_lengths(settings, None)[0], workers)


# --- the parts: each gives its rows one by one -----------------------------------------------------------------------


def steps(rehearse: bool) -> Iterator[Row]:
    """Times a step: the published way and ours in turn, by size, precision and with compiled blocks."""
    for size, number in (("base", 32), ("large", 16)):
        operations = None
        for precision in ("bf16", "16"):
            for compiled in (False,) if rehearse else (False, True):
                options: Row = {"precision": precision, "compile": compiled}
                options["per_gpu_batchsize"] = 2 if rehearse else number
                row = {"size": size, **options}
                try:
                    operations = operations or step_operations(rehearse, size, options)
                    yield row | timed_step(rehearse, size, options, operations)
                except Exception as error:  # (one combination that fails is a result, and not the end of the others)
                    yield row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}


def step_operations(rehearse: bool, size: str, options: Row) -> float:
    """Floating-point operations of a step, forward and backward, as torch counts them."""
    config = config_of(rehearse, size, **options | {"compile": False})
    trial, batch = Trial(config, None), next(batches(Settings.from_config(config)))
    with counter() as counted:
        trial.step("here", batch)
    return counted.get_total_flops()


def timed_step(rehearse: bool, size: str, options: Row, operations: float) -> Row:
    config = config_of(rehearse, size, **options)
    trial, loader = Trial(config, None), batches(Settings.from_config(config))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    warm_up, counted = (1, 1) if rehearse else (6 if options["compile"] else 3, 10)  # (compiles for a few text lengths)
    for number in range(warm_up + counted):
        batch = next(loader)
        for way in WAYS[:: 1 if number % 2 else -1]:  # (here first: its optimizer makes the state)
            taken = trial.step(way, batch)
            if number >= warm_up:
                seconds[way].append(taken)
    here, published = (statistics.median(seconds[way]) for way in ("here", "published"))
    attainable, _ = peak(trial.device, trial.precision["here"])
    found: Row = {"here s": here, "published s": published, "published / here": published / here}
    found |= {"samples/s": options["per_gpu_batchsize"] / here, "TFLOP/s": operations / here / 1e12}
    if attainable:
        found |= {"MFU": operations / here / attainable, "MFU published": operations / published / attainable}
    return found


def batch(rehearse: bool) -> Iterator[Row]:
    """Finds the largest batch that a step fits with, by size, each way."""
    for size in ("base", "large"):
        for way in reversed(WAYS):
            row: Row = {"size": size, "way": way, "precision": "bf16"}
            yield row | {"largest batch": largest(lambda number, s=size, w=way: fits(rehearse, s, w, number))}


def fits(rehearse: bool, size: str, way: str, number: int) -> bool:
    """Whether two steps of so many samples fit the device; in a rehearsal, up to 5 do."""
    if rehearse and number > 5:
        return False
    config = config_of(rehearse, size, precision="bf16", per_gpu_batchsize=number)
    try:
        trial, loaded = Trial(config, None), next(batches(Settings.from_config(config)))
        for _ in range(2):  # (the first makes the optimizer's state)
            trial.step(way, loaded)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        trial = None  # type: ignore[assignment]
        torch.cuda.empty_cache()


def largest(fits: Callable[[int], bool], most: int = 4096) -> int:
    """The largest number from 2 to `most` that fits, within an eighth: doubled, then bisected; 0 if none does.

    (A single pair has no negative.)
    """
    low, high = 0, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    while low and high - low > max(low // 8, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def data(rehearse: bool) -> Iterator[Row]:
    """Takes steps on what the loader reads from tables, with several numbers of workers: how long each waits for it."""
    number, count = (2, 3) if rehearse else (32, 20)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        overhead.write_tables(folder, number * (count + 4))
        tables = {"datasets": ["coco"], "data_root": str(folder / "tables"), "tokenizer": str(folder / "vocab.txt")}
        for workers in (0, 2) if rehearse else (0, 4, 8, 15):
            options = tables | {"num_workers": workers, "precision": "bf16", "per_gpu_batchsize": number}
            config = config_of(rehearse, **options)
            trial, module = Trial(config, None), MTDataModule(Settings.from_config(config))
            module.setup("fit")
            waited = total = 0.0
            loader, start = iter(module.train_dataloader()), time.perf_counter()
            for step in range(count):
                before = time.perf_counter()
                loaded = next(loader)
                if step == 2:  # (from here on it counts)
                    waited, start = 0.0, before
                waited += time.perf_counter() - before
                trial.step("here", loaded)
                total = time.perf_counter() - start
            yield {"workers": workers, "batch": number, "waiting for data": waited / total}


def planner(rehearse: bool) -> Iterator[Row]:
    """Compares the memory that the planner foresees for a step with what it takes."""
    for number in (2,) if rehearse else (8, 32):
        config = config_of(rehearse, precision=32 if rehearse else "bf16", per_gpu_batchsize=number)
        settings = Settings.from_config(config)
        cost = step_cost(settings, number)
        found = memory("here", Trial(config, None), next(batches(settings)))
        planned = cost.activations + cost.gradients
        row: Row = {"batch": number, "planned MiB": planned / 2**20, "measured MiB": found / 2**20}
        yield row | {"ratio": planned / max(found, 1)}


MEASURED = {"steps": steps, "batch": batch, "data": data, "planner": planner}
# in this order, with seconds; what is left is for the last, which starts some eighteen runs
BUDGETS = {"syncs": 70, "speed tests": 60, "steps": 190, "batch": 70, "data": 50, "planner": 40, "strategies": 600}
TESTS = {"syncs": "test_no_syncs.py", "speed tests": "test_speed.py", "strategies": "test_strategies.py"}


# --- the whole -------------------------------------------------------------------------------------------------------


def run_part(name: str, seconds: float, rehearse: bool) -> Row:
    """What a part printed within its time, and how it ended."""
    if name in TESTS:
        command = [*PYTEST, f"tests/gpu/{TESTS[name]}"]
    else:
        command = ["-m", "benchmarks.gpu", "--part", name, *(["--cpu-rehearsal"] if rehearse else [])]
    start = time.monotonic()
    output, code = run_within(seconds, [sys.executable, *command])
    found: Row = {"seconds": time.monotonic() - start, "ended": "in time" if code is not None else "cut off"}
    if name in TESTS:
        return found | {"said": [line for line in output.splitlines() if line.strip()][-12:]}
    lines = [line for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    found["rows"] = [json.loads(line) for line in lines]
    if code:
        found |= {"ended": f"failed, status {code}", "said": output.splitlines()[-6:]}
    return found


def run_within(seconds: float, command: list[str]) -> tuple[str, int | None]:
    """Output and status of a command; None: it took longer, and was ended with all that it had started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=max(seconds, 0.1))[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], None


def machine() -> Row:
    """What the figures are of."""
    versions: Row = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    found: Row = {"device": "CPU", "driver": "-", "cores": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1)}
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = "unknown: there is no nvidia-smi"
    return found | versions


def markdown(results: Row) -> str:
    """The page."""
    lines = ["# One GPU", "", "`python -m benchmarks.gpu`, " + results["when"], ""]
    if results["rehearsal"]:
        lines += ["**A rehearsal on a CPU at tiny size: its figures say nothing about a GPU.**", ""]
    lines += [", ".join(f"{name} {value}" for name, value in results["machine"].items()), ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", "", f"{part['ended']}, {part['seconds']:.0f} s", ""]
        rows = part.get("rows", [])
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(shown(row.get(column, "-")) for column in columns) + " |" for row in rows]
            lines += [""]
        lines += ["```", *part["said"], "```", ""] if part.get("said") else []
    return "\n".join(lines)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, help=f"the Markdown file; default {OUT.relative_to(ROOT)}")
    parser.add_argument("--parts", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="some of them alone")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny size on a CPU; printed, written with --out")
    parser.add_argument("--part", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.cpu_rehearsal:
        sys.exit("benchmarks.gpu: there is no GPU here; --cpu-rehearsal runs the program at tiny size on the CPU")
    if options.part:
        for row in MEASURED[options.part](options.cpu_rehearsal):
            print(json.dumps(row), flush=True)
        return
    deadline = time.monotonic() + 60 * options.minutes - 5
    results: Row = {"when": time.strftime("%Y-%m-%d"), "rehearsal": options.cpu_rehearsal, "machine": machine()}
    results["parts"] = {}
    out = options.out or (None if options.cpu_rehearsal else OUT)
    for name in BUDGETS:
        if name not in options.parts:
            continue
        left = deadline - time.monotonic()
        if left < 5:
            part: Row = {"seconds": 0.0, "ended": "not started: the time was up"}
        else:
            part = run_part(name, min(BUDGETS[name], left), options.cpu_rehearsal)
        results["parts"][name] = part
        print(f"{name}: {part['ended']}, {part['seconds']:.0f} s", flush=True)
        if out:  # after each part: what there is counts
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(markdown(results))
            out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
