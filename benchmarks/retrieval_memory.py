"""What retrieval evaluation costs at the size of COCO's test split: time and peak memory, stage by stage.

python -m benchmarks.retrieval_memory [--images 5000] [--texts 25010] [--rerank 0] [--threads 1]

Pictures and captions are made up, the model is the tiny size without training, on the CPU. Memory is that of the
process beyond what it held once the model and the tables were there; the last line ranks features as wide as the large
size's, without encoding. `--rerank 8` also matches the first 8 candidates of each query with ITM.
"""

import argparse
import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image

from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.evaluation.reranking import reranked
from vlmo.evaluation.retrieval import Encoded, best_ranks, encode, recalls
from vlmo.modules import VLMo

WORDS = [f"{first}{second}" for first in "bcdfgklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "is")]
LARGE_WIDTH = 1024


def write_data(root: Path, images: int, texts: int) -> None:
    """`images` pictures of random colours that share out `texts` captions of random words, and a vocabulary."""
    rng = np.random.default_rng(0)
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    pictures, captions = [], []
    for row in range(images):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((48, 48)).save(file, "PNG")
        pictures.append(file.getvalue())
        count = texts // images + (row < texts % images)
        captions.append([" ".join(rng.choice(WORDS, rng.integers(6, 20))) for _ in range(count)])
    columns = {"image": pictures, "caption": captions, "image_id": list(map(str, range(images)))}
    table = pa.table(columns | {"split": ["test"] * images})
    for split in ("val", "test"):
        part = table.slice(0, 4) if split == "val" else table
        with pa.ipc.new_file(str(root / f"coco_caption_karpathy_{split}.arrow"), table.schema) as writer:
            writer.write_table(part)


def peak_memory() -> int:
    """Bytes of the largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Stages:
    """Runs things and prints a line for each: seconds, and the peak of memory so far above the start."""

    def __init__(self) -> None:
        self.start = psutil.Process().memory_info().rss
        print(f"{'stage':<44}{'seconds':>10}{'peak MiB above the model':>28}")

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        before = time.perf_counter()
        found = work()
        seconds, peak = time.perf_counter() - before, (peak_memory() - self.start) / 2**20
        print(f"{name:<44}{seconds:>10.1f}{peak:>28,.0f}", flush=True)
        return found


def measure(root: Path, images: int, texts: int, k: int) -> None:
    config = resolve(
        "task_finetune_irtr_coco_base_image384",
        **{"model_arch": "vlmo_tiny_patch16", "image_size": 64, "vocab_size": len(WORDS) + 5, "num_gpus": 0},
        **{"data_root": str(root), "tokenizer": str(root / "vocab.txt"), "num_workers": 0, "per_gpu_batchsize": 64},
    )
    torch.manual_seed(0)
    model = VLMo(config | {"loss_names": {"itc": 1, "itm": 1}}).eval()
    data = MTDataModule(config)
    data.setup("validate")
    stages = Stages()
    image_loader, text_loader = data.retrieval_loaders("test")
    image_side = stages(f"encode {images:,} images", lambda: encode(model, image_loader, "image"))
    text_side = stages(f"encode {texts:,} texts", lambda: encode(model, text_loader, "text"))
    ranks = stages("rank, both ways", lambda: (best_ranks(text_side, image_side), best_ranks(image_side, text_side)))
    print(f"  text to image recall@10 {recalls(*ranks)['ir_r10']:.4f} (chance {10 / images:.4f})")
    if k:
        loader = partial(data.pair_loader, "test")
        stages(f"match {k} candidates of each", lambda: reranked(model, image_side, text_side, ranks, k, loader))
    draw = torch.Generator().manual_seed(0)
    wide = [
        Encoded(F.normalize(torch.randn(len(side.number), LARGE_WIDTH, generator=draw)), side.number, side.owner)
        for side in (image_side, text_side)
    ]
    stages(f"rank, features {LARGE_WIDTH} wide, both ways", lambda: (best_ranks(wide[1], wide[0]), best_ranks(*wide)))
    print(f"  (a full matrix of scores would be {images * texts * 4 / 2**20:,.0f} MiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25010)
    parser.add_argument("--rerank", type=int, default=0, help="candidates of each query that ITM orders anew")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), options.images, options.texts)
        measure(Path(folder), options.images, options.texts, options.rerank)


if __name__ == "__main__":
    main()
