"""What loading a checkpoint costs: its time over that of reading the file and building the model, its memory over the
weights'.

python -m benchmarks.load_checkpoint [--size base] [--repeat 3]

Each measurement runs in a process of its own, on a file that the system has in its cache. The memory is the peak beyond
what the imports take, and counts the pages of the file that are mapped.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from vlmo.checkpoint import convert
from vlmo.config import resolve
from vlmo.modules import VLMo

NAMED_CONFIG = "task_mlm_itm_itc_{size}"
READ_AT_ONCE = 1 << 24  # bytes


def peak_memory() -> int:
    """Bytes of the largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read(path: Path) -> None:
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as content:
            while content.read(READ_AT_ONCE):
                pass


def measure(what: str, size: str, path: str) -> dict[str, float]:
    """Seconds and bytes of one of "read", "build" and "load", which is to build and load."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    if what == "read":
        read(Path(path))
    else:
        VLMo(resolve(NAMED_CONFIG.format(size=size), load_path=path if what == "load" else ""))
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory() - before}


def in_process(what: str, size: str, path: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.load_checkpoint",
        "--measure",
        what,
        "--size",
        size,
        "--path",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(size: str, path: Path, repeat: int) -> dict[str, float]:
    """Medians over `repeat` rounds of reading, building and loading in turn, so that a busy machine is fair to all."""
    rounds = []
    for _ in range(repeat):
        reading, build, load = (in_process(what, size, path) for what in ("read", "build", "load"))
        seconds = {"read": reading["seconds"], "build": build["seconds"], "load": load["seconds"]}
        rounds.append(
            seconds | {"ratio": seconds["load"] / (seconds["read"] + seconds["build"]), "bytes": load["bytes"]}
        )
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def report(size: str, repeat: int) -> None:
    """Prints a line for each form of a file."""
    with tempfile.TemporaryDirectory() as folder:
        model = VLMo(resolve(NAMED_CONFIG.format(size=size)))
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        lightning, plain, safetensors = (Path(folder) / name for name in ("last.ckpt", "plain.pt", "safetensors"))
        content: dict[str, Any] = {"state_dict": model.state_dict()}
        model.on_save_checkpoint(content)
        torch.save(content, lightning)
        del model, content
        convert(str(lightning), str(plain))
        convert(str(lightning), str(safetensors))
        print(f"{size}: weights {weights / 2**20:,.0f} MiB, {torch.get_num_threads()} threads, median of {repeat}")
        print(f"{'form':<12}{'read s':>8}{'build s':>9}{'load s':>8}{'load/(read+build)':>19}{'peak/weights':>14}")
        for name, path in {"Lightning": lightning, "plain": plain, "safetensors": safetensors}.items():
            found = compare(size, path, repeat)
            seconds = f"{found['read']:>8.2f}{found['build']:>9.2f}{found['load']:>8.2f}"
            print(f"{name:<12}{seconds}{found['ratio']:>19.2f}{found['bytes'] / weights:>14.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("base", "base_plus", "large"), default="base")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", choices=("read", "build", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.size, options.path)))
    else:
        report(options.size, options.repeat)


if __name__ == "__main__":
    main()
