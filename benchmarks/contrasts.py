"""What the contrast of a step costs with each loss and each way to treat captions of one image, beside the published.

python -m benchmarks.contrasts [--pairs 1024] [--width 768] [--rounds 20]

Forward and backward pass of `ContrastTask.compare` on random features, in one process, all ways in turn. The encoders,
which are nearly all of a step, are left out: what they cost says `python -m benchmarks.step`.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from vlmo.registry import TASKS
from vlmo.tasks.base import BatchSize, Step

PUBLISHED = ("softmax", "published")
WAYS = [(loss, same) for loss in ("softmax", "decoupled", "siglip") for same in ("published", "mask", "positive")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    draw = torch.Generator().manual_seed(0)
    shape = (2, options.pairs, options.width)
    image, text = (each.requires_grad_() for each in F.normalize(torch.randn(shape, generator=draw), dim=-1).unbind(0))
    # an image in two pairs of a hundred
    batch = {"image_key": torch.arange(options.pairs) % (options.pairs - options.pairs // 100)}
    tasks = {way: TASKS["irtr"](contrast_loss=way[0], same_image=way[1], shared_ffn=False) for way in WAYS}
    heads = {way: task.heads(8) for way, task in tasks.items()}
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds + 1):
        for way, task in tasks.items():
            step = Step(batch, heads[way], True, sizes=[BatchSize(options.pairs, 0, 0)])
            start = time.perf_counter()
            task.compare(step, {"image": image, "text": text}).loss.backward()
            seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(each[1:]) for way, each in seconds.items()}  # (the first warms up)
    print(
        f"{options.pairs} pairs, width {options.width}, {torch.get_num_threads()} threads, median of {options.rounds}"
    )
    for way, median in medians.items():
        print(f"{way[0]:<10} same_image={way[1]:<10}{1e3 * median:>8.1f} ms  x {median / medians[PUBLISHED]:.2f}")


if __name__ == "__main__":
    main()
