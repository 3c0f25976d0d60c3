"""Images a second of exported image encoders beside PyTorch's fp32, in one run.

python -m benchmarks.export [--model-arch vlmo_base_patch16] [--formats openvino onnx] [--threads 2]

The model has random weights: the speed is that of any. All are measured in turn, round after round; a ratio is the
median over the rounds. INT8 is calibrated on random images, and its loss here is the distance of features alone.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from vlmo.export.__main__ import difference
from vlmo.export.formats import QUANTIZERS, WRITERS
from vlmo.export.forward_passes import ForwardPass
from vlmo.inference.exported import ENDINGS, Graph
from vlmo.modules.model import VLMoModel


def encoder(model_arch: str) -> ForwardPass:
    """Builds the image encoder of a model with random weights."""
    torch.manual_seed(0)
    model = VLMoModel(model_arch, ("itc",)).eval()
    if model.relative_position_bias_table is not None:
        torch.nn.init.normal_(model.relative_position_bias_table, std=0.1)
    return ForwardPass("embed_images", model, lambda model, batch: model.image_features(batch["image"]), ["image"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-arch", default="vlmo_base_patch16")
    parser.add_argument("--formats", nargs="+", choices=list(WRITERS), default=list(QUANTIZERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, at least")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    each = encoder(options.model_arch)
    (image,) = each.example(options.batch_size)

    @torch.inference_mode()
    def eager() -> Tensor:
        return each(image)

    runs: dict[str, Callable[[], Tensor]] = {"PyTorch fp32": eager}
    with tempfile.TemporaryDirectory() as folder:
        exported = each.graph()
        for kind in options.formats:
            path = Path(folder, f"{kind}{ENDINGS[kind]}")
            WRITERS[kind](exported, each.inputs, each.model.image_size, path)  # type: ignore[arg-type]
            graph = Graph(path, kind, each.inputs, options.threads)
            print(f"{kind} fp32: differs by {difference(each, graph):.1e}", flush=True)
            runs[f"{kind} fp32"] = lambda graph=graph: graph({"image": image})  # type: ignore[misc]
            if kind in QUANTIZERS:
                small = path.with_name(f"small_{path.name}")
                WRITERS[kind](exported, each.inputs, each.model.image_size, small)  # type: ignore[arg-type]
                QUANTIZERS[kind](small, [each.example(1) for _ in range(8)])
                graph = Graph(small, kind, each.inputs, options.threads)
                cosine = (graph({"image": image}) * eager()).sum(-1).min()
                print(f"{kind} INT8: least cosine to the features {cosine:.4f}", flush=True)
                runs[f"{kind} INT8"] = lambda graph=graph: graph({"image": image})  # type: ignore[misc]
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds):
            for name, run in runs.items():
                rates[name].append(rate(run, options.batch_size, options.seconds))
            print(
                f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:.2f}" for name, each in rates.items()),
                flush=True,
            )
    print(f"{options.model_arch}, batches of {options.batch_size}, {options.threads} threads, images a second:")
    for name, found in rates.items():
        times = median(own / eager for own, eager in zip(found, rates["PyTorch fp32"], strict=True))
        print(f"{name:16} {median(found):8.2f}   {times:5.2f} times PyTorch fp32")


def rate(run: Callable[[], Tensor], size: int, seconds: float) -> float:
    """Gives images a second, after a first run that does not count."""
    run()
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        run()
        images += size
    return images / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
