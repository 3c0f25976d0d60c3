"""What `layout_invariant` costs: time and memory of an optimizer step with and without it, and what is sent.

python -m benchmarks.invariance [--tasks stage3 vqa stage2] [--processes 1 2] [--bytes 8 128]

"as published" contrasts each pass for itself, dropout comes from the device's generator, and DDP sums the gradients.
"contrast_cache" (with a contrast) contrasts the whole batch: what it takes more is the first pass over the pairs, and
what `layout_invariant` takes more than that are its random numbers and the exchange of gradients after the last pass.
Time: forward, backward, exchange and update, in turn within the same processes, so that a busy machine is fair to all.
Memory: the peak of a process beyond weights and optimizer state, each way in processes of its own. Bytes: of the
config's own size (base), of the busiest process, from the ledger (`vlmo/planning/communication.py`), with --bytes.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import workload
from benchmarks.processes import free_port
from benchmarks.step import RESET_PEAK, peak_memory
from vlmo.config import resolve
from vlmo.modules import VLMo
from vlmo.planning.communication import ledger
from vlmo.registry import ARCHITECTURES
from vlmo.settings import Settings
from vlmo.tasks.itc import ContrastTask
from vlmo.training.optimizer import build_optimizer
from vlmo.training.unused_parameters import unused_parameters
from vlmo.training.whole_batch import chunks

TASKS = {
    "stage3": "task_mlm_itm_itc_base",
    "vqa": "task_finetune_vqa_base_image480",
    "stage2": "task_textmlm_base",
}
PUBLISHED, CACHED, INVARIANT = "as published", "contrast_cache", "layout_invariant"
OPTIONS: dict[str, dict[str, Any]] = {PUBLISHED: {}, CACHED: {CACHED: True}, INVARIANT: {INVARIANT: True}}
# a quarter of base, so that a step takes seconds on a CPU
ARCHITECTURES.register("vlmo_small_patch16")(dict(embed_dim=384, depth=12, num_heads=6, vl_start=10))


class Pass(nn.Module):
    """A training step's forward pass, where DDP calls it."""

    def __init__(self, model: VLMo) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        loss = self.model.training_step(batch, 0)
        assert loss is not None
        return loss


class Trial:
    """A model with its optimizer, and a step in one of the ways, on the CPU if there are several processes."""

    def __init__(self, config: dict[str, Any], way: str) -> None:
        torch.manual_seed(config["seed"])
        self.device = torch.device("cuda" if torch.cuda.is_available() and not dist.is_initialized() else "cpu")
        self.model = model = VLMo(config | OPTIONS[way]).to(self.device).train()
        model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
        self.optimizer = build_optimizer("adamw", model.parameter_groups(), config["learning_rate"])
        self.whole, self.forward = way != PUBLISHED, Pass(model)
        if dist.is_initialized() and not self.whole:
            names = [*unused_parameters(model), *(name for name, _ in model.named_buffers())]
            ignored = [f"model.{name}" for name in names]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.forward, ignored)
            self.forward = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)

    def step(self, batch: dict[str, Any]) -> float:
        """Takes all passes of a step and the update; the seconds of it."""
        start = time.perf_counter()
        if self.whole:
            self.model.backward(self.forward(batch))
        else:
            self._accumulate(list(chunks(batch, self.model.settings.per_gpu_batchsize)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _accumulate(self, parts: list[dict[str, Any]]) -> None:
        for number, part in enumerate(parts, 1):
            part["images_are_bytes"] = True
            for task in self.model.tasks:
                part |= task.derive(part)  # type: ignore[arg-type]
            part = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in part.items()}
            ddp = isinstance(self.forward, DistributedDataParallel) and number < len(parts)
            with self.forward.no_sync() if ddp else nullcontext():
                (self.forward(part) / len(parts)).backward()

    def memory(self, batch: dict[str, Any]) -> int:
        """Bytes that a step takes beyond the weights and the optimizer's state."""
        self.step(next(chunks(batch, 2)) | {"images_are_bytes": True})  # makes that state
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(batch)
            return torch.cuda.max_memory_allocated() - before
        before = psutil.Process().memory_info().rss
        if RESET_PEAK.exists():
            RESET_PEAK.write_text("5")
        self.step(batch)
        return peak_memory() - before


def config_of(task: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = {"model_arch": f"vlmo_{options.size}_patch16", "image_size": options.image_size, "precision": 32}
    passes = {"batch_size": options.batch, "per_gpu_batchsize": options.chunk, "num_gpus": 0}
    return resolve(TASKS[task], drop_path_rate=0.1, **sizes, **passes)


def batch_of(settings: Settings, number: int, rank: int) -> dict[str, Any]:
    """The samples of a step that a process takes, on the CPU, with images of whole bytes as the data sets give them."""
    lengths, _ = workload.text_lengths(settings, None)
    loader = workload.batches(settings.model_copy(update={"per_gpu_batchsize": number}), lengths, workers=0)
    for _ in range(rank):
        next(loader)
    batch = next(loader) | {"raw_index": torch.arange(number) + rank * number, "images_are_bytes": True}
    if "image" in batch:
        batch["image"] = (batch["image"] * 127.5 + 127.5).round() / 127.5 - 1
    return batch


def work(task: str, ways: list[str], options: argparse.Namespace, memory: bool = False) -> dict[str, Any]:
    """Seconds of each step by way, or bytes of one, of this process."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = config_of(task, options)
    batch = batch_of(Settings.from_config(config), options.batch // world, rank)
    trials = {way: Trial(config, way) for way in ways}
    if memory:
        return {way: trial.memory(batch) for way, trial in trials.items()}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.steps + 1):
        for way, trial in trials.items():
            seconds = trial.step(batch)
            if number:  # (the first makes what is made once)
                found[way].append(seconds)
    return found


def measured(world: int, *arguments: Any) -> dict[str, Any]:
    """What `work` gives in the first of so many processes, copies of this one, which has computed nothing."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    port, threads = free_port(), max(torch.get_num_threads() // world, 1)

    def run(rank: int) -> None:
        torch.set_num_threads(threads)
        if world > 1:
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        found = work(*arguments)
        if rank == 0:
            sending.send(found)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        sys.exit("a process has failed")
    finally:
        for process in processes:
            process.join()


def ways_of(task: str, options: argparse.Namespace) -> list[str]:
    with torch.device("meta"):
        contrasts = any(isinstance(each, ContrastTask) for each in VLMo(config_of(task, options)).tasks)
    return [PUBLISHED, CACHED, INVARIANT] if contrasts else [PUBLISHED, INVARIANT]


def report_step(task: str, world: int, options: argparse.Namespace) -> None:
    """Measures and prints what a step takes, with the ratio to the published way's."""
    ways = ways_of(task, options)
    seconds = measured(world, task, ways, options)
    memory = {way: measured(world, task, [way], options, True)[way] for way in ways}
    passes = f"{options.batch // world} samples in passes of {options.chunk}"
    print(f"{task}, {options.size} at {options.image_size} px, {world} process(es) with {passes}")
    for way in ways:
        ratios = [here / before for here, before in zip(seconds[way], seconds[PUBLISHED], strict=True)]
        print(
            f"  {way:<18}{statistics.median(seconds[way]):>8.2f} s ({statistics.median(ratios):.2f}, "
            f"{min(ratios):.2f} to {max(ratios):.2f}){memory[way] / 2**20:>9,.0f} MiB "
            f"({memory[way] / memory[PUBLISHED]:.2f})",
            flush=True,
        )


def report_bytes(task: str, world: int, options: argparse.Namespace) -> None:
    """Prints what the busiest process sends in a step of the config's own size, in megabytes by purpose."""
    for way in ways_of(task, options):
        batch = Settings.from_config(resolve(TASKS[task])).batch_size
        # (a whole batch sends the same in one chunk as in many, which would take longer to run)
        size = 8 if way == PUBLISHED else max(batch // world, 1)
        settings = Settings.from_config(resolve(TASKS[task], per_gpu_batchsize=size, **OPTIONS[way]))
        calls, sent = 0, Counter[str]()
        for each in ledger(settings, world):
            calls += each.count
            sent[each.what] += each.sent
        parts = "  ".join(f"{what} {value / 1e6:,.3f}" for what, value in sent.items())
        print(f"{task}, {world} processes, {way:<18}{sum(sent.values()) / 1e6:>10,.3f} MB, {calls} calls: {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--size", default="small", choices=("tiny", "small", "base", "base_plus", "large"))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, over all processes")
    parser.add_argument("--chunk", type=int, default=2, help="samples of a pass (per_gpu_batchsize)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--bytes", type=int, nargs="*", default=[], metavar="WORLD", help="also what so many send")
    options = parser.parse_args()
    print(f"medians of {options.steps} steps in turn, {torch.get_num_threads()} threads; ratios to {PUBLISHED}")
    for task in options.tasks:
        for world in options.processes:
            report_step(task, world, options)
    for task in options.tasks:
        for world in options.bytes:
            report_bytes(task, world, options)


if __name__ == "__main__":
    main()
