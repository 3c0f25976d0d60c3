"""What the cached contrast costs: time and memory of an optimizer step over a whole batch against those of its chunks.

python -m benchmarks.contrast_cache [--size base] [--image-size 224] [--batch 64] [--chunk 4] [--losses irtr]

"accumulated" is the ordinary step: the same chunks, forward and backward, each contrasted for itself. Time: both steps
in turn within one process, so that a busy machine is fair to both. Memory: the peak of a process of its own for each,
beyond what the model, its gradients and the batch take before the step; on a GPU, of what torch has allocated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from vlmo.config import resolve
from vlmo.modules import VLMo
from vlmo.training.whole_batch import chunks

TASKS = {"irtr": "task_finetune_irtr_coco_{}_image384", "itc": "task_mlm_itm_itc_{}", "stage3": "task_mlm_itm_itc_{}"}
TEXT_LENGTH = 40
POLL = 0.002  # seconds between two looks at the memory


def build(options: argparse.Namespace, device: torch.device) -> VLMo:
    tuned = {"itc": {"itm": 0, "mlm": 0}}.get(options.losses, {})
    sizes = {"image_size": options.image_size, "batch_size": options.batch, "per_gpu_batchsize": options.chunk}
    size = "base" if options.size == "tiny" else options.size
    arch = {"model_arch": f"vlmo_{options.size}_patch16"}
    config = resolve(TASKS[options.losses].format(size), contrast_cache=True, loss_names=tuned, **sizes, **arch)
    model = VLMo(config | {"num_gpus": 0}).to(device).train()
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
    return model


def make_batch(number: int, image_size: int) -> dict[str, Tensor]:
    """On the CPU, as a loader gives it."""
    ids = torch.randint(1000, 30000, (number, TEXT_LENGTH))
    masked = torch.rand(ids.shape) < 0.15
    return {
        "image": 2 * torch.rand(number, 3, image_size, image_size) - 1,
        "text_ids": ids,
        "text_ids_mlm": torch.where(masked, 103, ids),
        "text_labels_mlm": torch.where(masked, ids, -100),
        "text_masks": torch.ones_like(ids),
    }


def accumulated(model: VLMo, batch: dict[str, Tensor]) -> None:
    for chunk in chunks(batch, model.settings.per_gpu_batchsize):
        outputs = model({name: value.to(model.device) for name, value in chunk.items()})
        sum(output.loss for output in outputs.values()).backward()  # type: ignore[union-attr]


def cached(model: VLMo, batch: dict[str, Tensor]) -> None:
    loss = model.training_step(batch, 0)
    assert loss is not None
    model.backward(loss)


STEPS: dict[str, Callable[[VLMo, dict[str, Tensor]], None]] = {"accumulated": accumulated, "cached": cached}


class Peak:
    """Bytes by which memory rises while this is open."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _used(self) -> int:
        return psutil.Process().memory_info().rss

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.before = self.most = self._used()
        self.open = True
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()
        return self

    def _watch(self) -> None:
        while self.open:
            self.most = max(self.most, self._used())
            time.sleep(POLL)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.open = False
        self.watch.join()
        self.bytes = self.most - self.before


def measure_memory(options: argparse.Namespace, device: torch.device) -> float:
    """MiB of a step, after a step of one chunk that makes the gradients and warms up."""
    model, batch = build(options, device), make_batch(options.batch, options.image_size)
    accumulated(model, {name: value[: options.chunk] for name, value in batch.items()})
    with Peak(device) as peak:
        STEPS[options.memory](model, batch)
    return peak.bytes / 2**20


def measure_time(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, in turn."""
    model, batch = build(options, device), make_batch(options.batch, options.image_size)
    for step in STEPS.values():
        step(model, {name: value[: 2 * options.chunk] for name, value in batch.items()})
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(options.repeat):
        for name, step in STEPS.items():
            start = time.perf_counter()
            step(model, batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base", "base_plus", "large"))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--losses", choices=TASKS, default="irtr")
    parser.add_argument("--memory", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory:
        print(json.dumps(measure_memory(options, device)))
        return
    pairs = f"{options.batch} pairs in chunks of {options.chunk}"
    print(f"{options.losses}, {options.size} at {options.image_size} px, {pairs}")
    print(f"on {device.type}, {torch.get_num_threads()} threads; medians of {options.repeat}")
    seconds = measure_time(options, device)
    memory = {}
    for name in STEPS:
        command = [sys.executable, "-m", "benchmarks.contrast_cache", *sys.argv[1:], "--memory", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        memory[name] = float(json.loads(done.stdout.splitlines()[-1]))
    for name in STEPS:
        print(f"  {name:<12}{statistics.median(seconds[name]):>10.2f} s{memory[name]:>10.0f} MiB")
    ratios = [c / a for a, c in zip(seconds["accumulated"], seconds["cached"], strict=True)]
    print(f"  {'ratio':<12}{statistics.median(ratios):>10.2f}  {memory['cached'] / memory['accumulated']:>10.2f}")


if __name__ == "__main__":
    main()
