"""A training step: its time, throughput, share of the device's peak and memory, beside the published way's.

python -m benchmarks.step task_mlm_itm_itc_base per_gpu_batchsize=8 num_gpus=0 precision=32 [option=value ...]

Takes the options of `run.py with`. Both ways (the published one: `benchmarks/reference.py`) run on the same weights and
batches. First their losses are compared, without dropout and with the hardest negatives instead of drawn ones; then
they are timed in turn, so that the ratio holds on a busy machine. Memory is the peak of a step (the one with the
longest texts) beyond the weights and the optimizer's state, each way in a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.flops import StepFlops, peak
from benchmarks.reference import Reference, adamw_step
from vlmo.distributed.wire_format import with_pixels
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.tasks import itm
from vlmo.training import optimizer as optim
from vlmo.training.environment import choose_environment

WAYS = ("published", "here")
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # of Linux
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 3e-2, "16-mixed": 1e-2}  # relative, of the losses of the two ways


class Trial:
    """A model, its optimizer, and a step in either way.

    Args:
        config: resolved.
        published_precision: Lightning's name; None: that of the config.
    """

    def __init__(self, config: dict[str, Any], published_precision: str | None) -> None:
        torch.manual_seed(config["seed"])
        self.settings = s = Settings.from_config(config)
        environment = choose_environment(s)
        self.device = torch.device("cuda" if environment.accelerator == "gpu" else "cpu")
        self.model = VLMo(config).to(self.device).train()
        if s.compile:
            self.model.transformer.compile_steps()
        groups = optim.parameter_groups(self.model.named_parameters(), s.learning_rate, s.weight_decay, s.lr_mult)
        self.optimizer = optim.build_optimizer(s.optim_type, groups, s.learning_rate)
        self.reference = Reference(self.model)
        self.precision = {"here": environment.precision, "published": published_precision or environment.precision}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled="16-mixed" in self.precision.values())
        self.updates = 0

    def losses(self, way: str, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """By task, of a batch on the CPU."""
        moved = with_pixels(
            {
                name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
        )
        dtype = DTYPES.get(self.precision[way])
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            if way == "published":
                return self.reference.losses(moved)
            return {name: output.loss for name, output in self.model(moved).items()}

    def step(self, way: str, batch: Mapping[str, Any]) -> float:
        """Forward, backward and update; the seconds that it takes."""
        start = time.perf_counter()
        loss = torch.stack(list(self.losses(way, batch).values())).sum()
        scaled = self.precision[way] == "16-mixed"
        (self.scaler.scale(loss) if scaled else loss).backward()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        self.updates += 1
        if way == "published":
            adamw_step(self.optimizer, self.updates)
        else:
            self.optimizer.step()
        if scaled:
            self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def check(self, batch: Mapping[str, Any]) -> str:
        """The losses of both ways, without randomness, one line.

        Raises:
            SystemExit: if they differ.
        """
        self.model.eval()
        self.reference.hardest = True
        with torch.no_grad(), mock.patch.object(itm, "draw_negatives", hardest):
            published, here = ({name: loss.item() for name, loss in self.losses(way, batch).items()} for way in WAYS)
        self.reference.hardest = False
        self.model.train()
        shown = "  ".join(f"{name} {published[name]:.5f} / {here[name]:.5f}" for name in published)
        tolerance = max(TOLERANCE[precision] for precision in self.precision.values())
        if any(abs(here[name] - loss) > tolerance * abs(loss) for name, loss in published.items()):
            sys.exit(f"the two ways differ: {shown}")
        return shown


def hardest(logits: Tensor, *_: object) -> Tensor:
    """The most similar other pair of each row, in place of a drawn one."""
    return logits.detach().float().clone().fill_diagonal_(-torch.inf).argmax(dim=1)


def memory(way: str, trial: Trial, batch: Mapping[str, Any]) -> int:
    """Bytes that a step takes beyond the weights and the optimizer's state."""
    trial.step(way, {name: value[:2] for name, value in batch.items()})  # makes that state
    if trial.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trial.step(way, batch)
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    if RESET_PEAK.exists():  # (a process inherits its parent's peak)
        RESET_PEAK.write_text("5")
    trial.step(way, batch)
    return peak_memory() - before


def peak_memory() -> int:
    """Bytes of the largest resident set so far; on Linux since the last reset."""
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_process(way: str, arguments: list[str], number: int) -> int:
    """`memory` on the batch of that number, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step", *arguments, "--memory-of", way, "--batch-number", str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def timings(trial: Trial, options: argparse.Namespace, loader: Any) -> dict[str, list[float]]:
    """Seconds of each step by way, seconds of waiting for its batch ("waited"), operations of a step ("flops")."""
    found: dict[str, list[float]] = {name: [] for name in (*WAYS, "waited", "flops", "text_len")}
    count = StepFlops(trial.model)
    for number in range(options.warm_up + options.steps):
        # in turn, so that neither always has the other's caches; here first, whose optimizer makes the state
        ways = ("here",) if options.alone else WAYS[:: 1 if number % 2 else -1]
        start = time.perf_counter()
        batch = next(loader)
        waited = time.perf_counter() - start
        seconds = {way: trial.step(way, batch) for way in ways}
        if number >= options.warm_up:
            for way, value in seconds.items():
                found[way].append(value)
            found["waited"].append(waited)
            found["flops"].append(count(batch))
            found["text_len"].append(batch["text_ids"].shape[1])
    return found


def report(trial: Trial, found: dict[str, list[float]], bytes_of: dict[str, int]) -> str:
    """The table."""
    s, here = trial.settings, statistics.median(found["here"])
    attainable, source = peak(trial.device, trial.precision["here"])
    rows = [f"{'':<11}{'step s':>8}{'samples/s':>11}{'peak MiB':>10}"]
    for way in (way for way in WAYS if found[way]):
        median = statistics.median(found[way])
        size = f"{bytes_of[way] / 2**20:,.0f}" if way in bytes_of else "-"
        rows.append(f"{way:<11}{median:>8.2f}{s.per_gpu_batchsize / median:>11.2f}{size:>10}")
    rate = sum(found["flops"]) / sum(found["here"])
    share = f"{rate / attainable:.0%} of {attainable / 1e12:.3g} ({source})" if attainable else f"N/A ({source})"
    rows.append(f"here: {rate / 1e12:.3g} TFLOP/s, MFU {share}")
    rows.append(f"here: {sum(found['waited']) / (sum(found['waited']) + sum(found['here'])):.1%} waiting for data")
    if found["published"]:
        ratios = [one / other for one, other in zip(found["published"], found["here"], strict=True)]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        rows.append(f"time published / here: {statistics.median(found['published']) / here:.2f} (step by step {each})")
    if len(bytes_of) == len(WAYS):
        rows.append(f"memory here / published: {bytes_of['here'] / bytes_of['published']:.2f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=5, help="timed, of each way")
    parser.add_argument("--warm-up", type=int, default=1, help="steps of each way that are not timed")
    parser.add_argument("--published-precision", choices=sorted(TOLERANCE), help="of the published way; else the same")
    parser.add_argument("--alone", action="store_true", help="leave the published way out")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--batch-number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()

    config = workload.parse(options.config)
    settings = Settings.from_config(config)
    lengths, source = workload.text_lengths(settings, options.texts)
    loader = workload.batches(settings, lengths, options.workers)
    if options.memory_of:
        for _ in range(options.batch_number):
            next(loader)
        print(json.dumps(memory(options.memory_of, Trial(config, options.published_precision), next(loader))))
        return
    bytes_of: dict[str, int] = {}
    if not options.no_memory:  # first, while this process holds no model itself
        ahead = workload.batches(settings, lengths, options.workers)
        longest = [int(next(ahead)["text_masks"].sum(1).max()) for _ in range(1 + options.warm_up + options.steps)]
        ways = ("here",) if options.alone else WAYS
        bytes_of = {way: memory_in_process(way, sys.argv[1:], longest.index(max(longest))) for way in ways}
    trial = Trial(config, options.published_precision)
    s, place = settings, "GPU" if trial.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{s.exp_name}: {s.model_arch}, batch {s.per_gpu_batchsize}, {s.image_size} px, {place}")
    print(f"precision {trial.precision['here']} (published way {trial.precision['published']}); texts: {source}")
    first = next(loader)
    if not options.alone:
        print(f"losses published / here: {trial.check(first)}", flush=True)
    found = timings(trial, options, loader)
    print(f"texts padded to {' '.join(f'{length:.0f}' for length in found['text_len'])}, published {s.max_text_len}")
    print(report(trial, found, bytes_of))


if __name__ == "__main__":
    main()
