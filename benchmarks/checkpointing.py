"""Memory that activation checkpointing saves: a training step without, with it, and with its inputs on the CPU.

python -m benchmarks.checkpointing [--named task_mlm_itm_itc_base] [--batch 2] [--set option=value ...]

On a GPU: the peak that is allocated in the step beyond what the step begins with (weights, optimizer), and the seconds
of a step. On a CPU: the bytes that the step keeps for its backward pass, each tensor once (offloaded ones count too, as
they lie in the same memory), and the growth of the process's largest resident set, each in a process of its own.
"""

import argparse
import json
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.processes import in_process
from vlmo.config import resolve
from vlmo.modules import VLMo

KINDS = ("False", "True", "offload")


def batch_of(config: dict[str, Any], size: int, device: str) -> dict[str, Any]:
    """Random pairs that fill all of the text's length."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (size, config["max_text_len"]), generator=draw)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.15, ids, -100)
    images = 2 * torch.rand(size, 3, config["image_size"], config["image_size"], generator=draw) - 1
    batch: dict[str, Any] = {"text_ids": ids, "text_ids_mlm": ids, "text_labels_mlm": labels}
    batch |= {"text_masks": torch.ones_like(ids), **dict.fromkeys(("image", "image_0", "image_1"), images)}
    batch |= {"vqa_labels": ids[:, :1] % 3129, "vqa_scores": torch.ones(size, 1), "answers": ids[:, 0] % 2 == 0}
    return {name: value.to(device) for name, value in batch.items()}


def measure(named: str, size: int, kind: str, options: dict[str, Any]) -> dict[str, float]:
    """Bytes and seconds of a step; `kind` is the value of activation_checkpointing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"False": False, "True": True}.get(kind, kind)
    torch.manual_seed(0)
    config = resolve(named, activation_checkpointing=how, load_path="", **options)
    model = VLMo(config).to(device).train()
    batch = batch_of(config, size, device)
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device, enabled=device == "cuda"):
            loss = sum(output.loss for output in model(batch).values())
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if device == "cuda":
        step()  # (the gradients are part of what the measured step begins with)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = step()
        return {
            "bytes": torch.cuda.max_memory_allocated() - before,
            "peak": torch.cuda.max_memory_allocated(),
            "seconds": seconds,
        }
    peak = resident()
    seconds = step()
    peak = resident() - peak
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(batch)
    held = sum(nbytes for pointer, (_, nbytes) in kept.items() if pointer not in weights)
    del outputs
    return {"bytes": held, "peak": peak, "seconds": seconds}


def resident() -> int:
    """Bytes of the largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--named", default="task_mlm_itm_itc_base", help="named config")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="further options, values as JSON")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in arguments.set)}
    if arguments.kind:
        print(json.dumps(measure(arguments.named, arguments.batch, arguments.kind, options)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.named}, batch {arguments.batch}, {device}")
    print(f"{'activation_checkpointing':<26}{'kept MiB':>10}{'peak MiB':>10}{'s/step':>8}{'kept less by':>14}")
    first = 0.0
    for kind in KINDS:
        found = in_process("-m", "benchmarks.checkpointing", *sys.argv[1:], "--kind", kind)
        first = first or found["bytes"]
        print(
            f"{kind:<26}{found['bytes'] / 2**20:>10,.0f}{found['peak'] / 2**20:>10,.0f}{found['seconds']:>8.1f}"
            f"{first / found['bytes']:>13.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
