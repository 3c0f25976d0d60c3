"""What the retrieval suites cost at the size of COCO's test split, with every metric: time, memory, images decoded.

python -m benchmarks.suites [--rerank 0] [--arch vlmo_tiny_patch16] [--image-size 64] [--threads 1]

5,000 pictures and 25,000 captions are made up, under COCO's own numbers, which eccv-caption has, so that its suite
runs: COCO 5K, COCO 1K, ECCV Caption, CxC and PMRP (with 100 made-up plausible matches of each query), by features of
both branches. The model is untrained, on the CPU. Memory is that of the process beyond what it held with the model.
"""

import argparse
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.retrieval_memory import WORDS, peak_memory
from vlmo import evaluate
from vlmo.evaluation import pictures, rankings
from vlmo.evaluation.report import table
from vlmo.evaluation.suites.eccv import load_truth
from vlmo.modules.model import VLMoModel

SUITES = ("coco_5k", "coco_1k", "eccv_caption")
PLAUSIBLE = 100  # of each query
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def write_data(root: Path) -> None:
    """COCO's test table of random pictures and captions, its annotations, and plausible matches."""
    rng, truth = np.random.default_rng(0), load_truth()
    owner = {caption: own[0] for caption, own in _coco().items()}
    numbers = list(dict.fromkeys(owner[caption] for caption in truth.caption_ids))
    rows: dict[int, list[str]] = {number: [] for number in numbers}
    annotations: list[dict[str, Any]] = []
    for caption in truth.caption_ids:
        text = " ".join(rng.choice(WORDS, rng.integers(6, 20)))
        rows[owner[caption]].append(text)
        annotations.append({"id": caption, "image_id": owner[caption], "caption": text})
    files = []
    for _ in numbers:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((48, 48)).save(file, "PNG")
        files.append(file.getvalue())
    names = [f"COCO_val2014_{number:012d}.jpg" for number in numbers]
    columns = {"image": files, "caption": list(rows.values()), "image_id": names, "split": ["test"] * len(names)}
    content = pa.table(columns)
    with pa.ipc.new_file(str(root / "coco_caption_karpathy_test.arrow"), content.schema) as writer:
        writer.write_table(content)
    (root / "captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    captions = [each["id"] for each in annotations]
    for name, queries, items in (("image_to_caption", numbers, captions), ("caption_to_image", captions, numbers)):
        drawn = {query: rng.choice(items, min(PLAUSIBLE, len(items)), False).tolist() for query in queries}
        (root / f"pm_{name}.json").write_text(json.dumps(drawn))


def _coco() -> dict[int, list[int]]:
    from eccv_caption import Metrics

    return Metrics().coco_gts["t2i"]


class Watch:
    """Adds up the seconds spent in some functions, and how often they were called."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def over(self, place: Any, *names: str) -> "Watch":
        """Takes the place of functions of a module or class."""
        for name in names:
            setattr(place, name, self._watched(getattr(place, name)))
        return self

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        return watched


def measure(root: Path, rerank: int) -> None:
    encoders = Watch().over(VLMoModel, "encode_image", "encode_text", "encode", "project")
    ranking = Watch().over(rankings, "per_query", "first")
    decoded = Watch().over(pictures, "decode_image")
    began: list[float] = []
    plain = evaluate.Scorer

    def scorer(*args: Any) -> Any:
        made = plain(*args)
        began[:] = [time.perf_counter(), psutil.Process().memory_info().rss]
        return made

    evaluate.Scorer = scorer  # type: ignore[misc, assignment]
    results = evaluate.evaluate(root / "model", SUITES, root, rerank=rerank, batch_size=64)
    total, peak = time.perf_counter() - began[0], (peak_memory() - began[1]) / 2**20
    print(table(results))
    print(f"\nwithout loading the model {total:.1f} s: encoders {encoders.seconds:.1f}, rankings {ranking.seconds:.1f}")
    print(f"{total / (encoders.seconds + ranking.seconds):.3f} times as long as both take")
    print(f"peak memory above the model: {peak:,.0f} MiB; {decoded.calls:,} images were decoded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rerank", type=int, default=0, help="candidates of each query that ITM orders anew")
    parser.add_argument("--arch", default="vlmo_tiny_patch16")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        writer = multiprocessing.get_context("spawn").Process(target=write_data, args=(root,))
        writer.start()  # in a process of its own, whose memory does not count
        writer.join()
        torch.manual_seed(0)
        sizes = {"image_size": options.image_size, "vocab_size": len(VOCABULARY)}
        model = VLMoModel(options.arch, ("itc", "itm", "mlm"), **sizes)
        model.vocabulary = VOCABULARY
        model.save_pretrained(root / "model")
        del model
        measure(root, options.rerank)


if __name__ == "__main__":
    main()
