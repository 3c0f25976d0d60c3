"""What an import costs beside `import torch`, without which there is no model.

python -m benchmarks.imports [--repeat 5] [STATEMENT ...]

Each statement runs in a fresh process, all of them in turn, so that a busy machine slows all alike. Prints the median
seconds of each and how many times as long as torch's it takes.
"""

import argparse
import statistics

from benchmarks.processes import in_process

TORCH = "import torch"
STATEMENTS = (
    "import vlmo",
    "from vlmo import VLMoModel",
    "from vlmo.inference import Predictor",
    "from vlmo.training.runner import run",
)
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("statements", nargs="*", metavar="STATEMENT", default=STATEMENTS, help="instead of the usual")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    statements = [TORCH, *options.statements]
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(options.repeat):
        for statement in statements:
            seconds[statement].append(in_process("-c", TIMED.format(statement)))
    torch_seconds = statistics.median(seconds[TORCH])
    for statement, times in seconds.items():
        median = statistics.median(times)
        print(f"{statement:<40}{median:>8.2f} s{median / torch_seconds:>8.2f} x torch")


if __name__ == "__main__":
    main()
