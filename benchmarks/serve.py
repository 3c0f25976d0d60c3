"""Requests a second that `vlmo serve` answers, batched beside one at a time, over a real socket.

python -m benchmarks.serve [MODEL] [--model-arch vlmo_tiny_patch16] [--clients 1 8 32] [--threads 1]

MODEL is a checkpoint or a folder of `vlmo export`; without one a model with random weights is served. Each client asks
again as soon as it is answered; all share the machine with the server. The two servers are asked in turn, round after
round; latencies are those of all rounds together.
"""

import argparse
import base64
import io
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import httpx
import numpy as np
import torch
from PIL import Image

from vlmo.modules.model import VLMoModel

WAYS = ("batched", "one at a time")  # up to 16 requests together


def write_model(folder: Path, model_arch: str) -> None:
    """Saves a model with random weights and a vocabulary of a few words."""
    torch.manual_seed(0)
    model = VLMoModel(model_arch, ("itc", "itm"), vocab_size=64)
    model.vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "on", "the", "table"]
    model.save_pretrained(folder)


def request_body(size: int = 224) -> dict[str, str]:
    """Makes an image of noise, as JPEG, and a text."""
    noise = np.random.default_rng(0).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).resize((size, size)).save(data, "JPEG")
    return {"image": base64.b64encode(data.getvalue()).decode(), "text": "a red circle on the table"}


@contextmanager
def server(model: str, batch_size: str, threads: int) -> Iterator[str]:
    """Gives the address of a server in a process of its own."""
    words = ["--port", "0", "--batch-size", batch_size, "--queue", "1000", "--threads", str(threads)]
    command = [sys.executable, "-m", "vlmo.serve", model, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split(": ")[0]
    finally:
        process.terminate()
        process.wait()


def load(url: str, path: str, body: dict[str, str], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Gives the requests a second of that many clients, and how long each took."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as session:
            while (start := time.perf_counter()) < end:
                session.post(path, json=body).raise_for_status()
                times.append(time.perf_counter() - start)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(times) / (time.perf_counter() - start), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint or export, with the heads of contrast and matching")
    parser.add_argument("--model-arch", default="vlmo_tiny_patch16", help="of the random weights")
    parser.add_argument("--paths", nargs="+", default=["embed/image", "embed/text", "match"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1, help="that the server computes with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    options = parser.parse_args()
    body = request_body()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            write_model(Path(folder, "model"), options.model_arch)
        model = options.model or str(Path(folder, "model"))
        with server(model, "16", options.threads) as batched, server(model, "1", options.threads) as alone:
            urls = dict(zip(WAYS, (batched, alone), strict=True))
            for path in options.paths:
                given = {"image": body["image"]} if path == "embed/image" else body
                given = {"text": body["text"]} if path == "embed/text" else given
                for clients in options.clients:
                    rates: dict[str, list[float]] = {way: [] for way in WAYS}
                    times: dict[str, list[float]] = {way: [] for way in WAYS}
                    for _ in range(options.rounds):
                        for way, url in urls.items():
                            rate, each = load(url, f"/{path}", given, clients, options.seconds)
                            rates[way].append(rate)
                            times[way] += each
                    ratio = median(a / b for a, b in zip(*rates.values(), strict=True))
                    print(f"/{path}, {clients} clients: batched {ratio:.2f} times one at a time", flush=True)
                    for way in WAYS:
                        late = quantiles(times[way], n=20)[-1]
                        said = f"median {1000 * median(times[way]):.0f} ms, 95 % within {1000 * late:.0f} ms"
                        print(f"  {way:14} {median(rates[way]):8.1f} requests/s, {said}", flush=True)


if __name__ == "__main__":
    main()
