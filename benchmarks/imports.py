"""What starting costs beside `import torch`, without which there is no model: imports, and a command up to its answer.

python -m benchmarks.imports [--repeat 5] [STATEMENT ...]

Each statement, and each command on a tiny model, runs in a fresh process, all of them in turn, so that a busy machine
slows all alike. The clock runs from the start of the process to the first line that it prints, which follows the
statement and is the answer of a command. Prints the median seconds of each, and the median over the rounds of how many
times as long as torch's it takes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests import tables
from vlmo.modules import VLMoModel

TORCH = "import torch"
STATEMENTS = (
    "import vlmo",
    "from vlmo import VLMoModel",
    "from vlmo.inference import Predictor",
    "from vlmo.training.runner import run",
)
COMMANDS = {
    "answer": ("--image", "a.jpg", "--question", "what is left of the red cat ?"),
    "match": ("--image", "a.jpg", "--text", "a red cat"),
    "embed": ("--image", "a.jpg", "--text", "a red cat"),
}


def write_model(folder: Path) -> None:
    """Writes what the commands use: a tiny model with BERT's number of words, and an image."""
    model = VLMoModel("vlmo_tiny_patch16", ("itc", "itm", "vqa"), vqav2_label_size=3)
    words = [*dict.fromkeys(tables.VOCABULARY)]
    model.vocabulary = words + [f"word{number}" for number in range(model.vocab_size - len(words))]
    model.answers = ["yes", "no", "red"]
    model.save_pretrained(folder / "model")
    tables.picture(0).save(folder / "a.jpg")


def seconds_to_first_line(arguments: Sequence[str], folder: Path) -> float:
    """Of `python ARGUMENTS...` in that folder. Ends this process if it fails."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.getcwd()}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        seconds = time.perf_counter() - start
        errors = process.communicate()[1].decode()
    if process.returncode:
        sys.exit(errors)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("statements", nargs="*", metavar="STATEMENT", help="instead of the usual, and of the commands")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    runs = {line: ("-c", f"{line}; print()") for line in [TORCH, *(options.statements or STATEMENTS)]}
    if not options.statements:
        runs |= {
            f"vlmo predict {command}": ("-m", "vlmo.predict", command, "--checkpoint", "model", *given)
            for command, given in COMMANDS.items()
        }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for _ in range(options.repeat):
            for name, arguments in runs.items():
                seconds[name].append(seconds_to_first_line(arguments, Path(folder)))
    for name, times in seconds.items():
        ratio = statistics.median(own / torch for own, torch in zip(times, seconds[TORCH], strict=True))
        print(f"{name:<40}{statistics.median(times):>8.2f} s{ratio:>8.2f} x torch")


if __name__ == "__main__":
    main()
