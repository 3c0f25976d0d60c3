"""Images a second of exported image encoders beside PyTorch's fp32, in one run.

python -m benchmarks.export [--model-arch vlmo_base_patch16] [--formats openvino onnx] [--threads 2]

The model has random weights: the speed is that of any. All are measured in turn, round after round; a ratio is the
median over the rounds. INT8 is calibrated on random images, and its loss here is the distance of features alone. The
linear layers alone, of the experts' sizes and with nothing between them, say how near to what the cores can do it is.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

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


def linear_layers(model: VLMoModel, batch_size: int) -> tuple[nn.Module, Tensor]:
    """Builds the linear layers of all experts of images, one after the other, and their input."""
    width, tokens = model.transformer.embed_dim, 1 + model.transformer.window**2
    pairs = [(nn.Linear(width, 4 * width), nn.Linear(4 * width, width)) for _ in range(model.transformer.depth)]
    return nn.Sequential(*(layer for pair in pairs for layer in pair)).eval(), torch.randn(batch_size, tokens, width)


def gflop(module: nn.Module, batch: Tensor) -> float:
    """Counts the operations of an image's matrix products (attention's, 4 % of base, are not among them)."""
    with FlopCounterMode(display=False) as counter:
        module(batch)
    return counter.get_total_flops() / len(batch) / 1e9


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

    layers, tokens = linear_layers(each.model, options.batch_size)  # type: ignore[arg-type]

    @torch.inference_mode()
    def alone() -> Tensor:
        return layers(tokens)

    runs: dict[str, Callable[[], Tensor]] = {"PyTorch fp32": eager, "PyTorch linear layers": alone}
    encoder_gflop, layers_gflop = gflop(each, image), gflop(layers, tokens)
    with tempfile.TemporaryDirectory() as folder:
        exported = each.graph()
        with torch.no_grad():
            chain = export(layers, (tokens,), dynamic_shapes=({0: Dim("samples", min=1)},))
        for kind in options.formats:
            path = Path(folder, f"{kind}{ENDINGS[kind]}")
            WRITERS[kind](exported, each.inputs, each.model.image_size, path)  # type: ignore[arg-type]
            graph = Graph(path, kind, each.inputs, options.threads)
            print(f"{kind} fp32: differs by {difference(each, graph):.1e}", flush=True)
            runs[f"{kind} fp32"] = lambda graph=graph: graph({"image": image})  # type: ignore[misc]
            path = path.with_name(f"layers_{path.name}")
            WRITERS[kind](chain, ["tokens"], 0, path)
            plain = Graph(path, kind, ["tokens"], options.threads)
            runs[f"{kind} linear layers"] = lambda plain=plain: plain({"tokens": tokens})  # type: ignore[misc]
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
    print(f"{options.model_arch}, batches of {options.batch_size}, {options.threads} threads:")
    for name, found in rates.items():
        times = median(own / eager for own, eager in zip(found, rates["PyTorch fp32"], strict=True))
        if "linear" in name:
            print(f"{name:24} {median(found) * layers_gflop:8.1f} GFLOP/s")
        else:
            speed = f"{median(found) * encoder_gflop:8.1f} G{'FL' if 'fp32' in name else ''}OP/s"
            print(f"{name:24} {speed}, {median(found):8.2f} images/s, {times:5.2f} times PyTorch fp32")


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
