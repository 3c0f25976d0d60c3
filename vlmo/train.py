"""Pre-train, fine-tune and evaluate VLMo.

python run.py with data_root=<ARROW_ROOT> num_gpus=<N> num_nodes=<M> <named config> [step200k ...]
    per_gpu_batchsize=<B> load_path=<CKPT> log_dir=<DIR> [test_only=True] [get_recall_metric=True] ...

    A config can also be a file of values: `with options.yaml` or `options.json`, laid over what stands before it.

python run.py print_config with <named config>     every option with its value, what differs from the defaults in colour
python run.py -d with ...                          the full traceback of an error

`vlmo train` and `python -m vlmo.train` are the same, wherever the package is installed.
"""

import logging
import sys
from typing import Any

from vlmo.config import ex, explain  # before sacred itself: silences what its import warns of

# isort: split
from sacred.utils import SacredError

from vlmo.errors import Stopped, VLMoError, called_as, print_anything, print_error


@ex.main
def run(_config: dict[str, Any]) -> None:
    """Trains, or evaluates with test_only=True."""
    from vlmo.training import runner  # after the command line is known to be right: it imports torch

    runner.run(_config)


def command_line(argv: list[str]) -> int:
    """Runs the command line; returns the exit code: 0, 2 for a mistake in what was asked, 128 + signal if stopped."""
    print_anything()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    if not argv[1:] or {"-h", "--help"} & set(argv):
        called = called_as("vlmo.train")
        print(__doc__ if called.startswith("python") else (__doc__ or "").replace("python run.py", called))
        return 0
    debug = "-d" in argv or "--debug" in argv
    ex.current_run = None  # one that this process had before would decide how errors are shown
    try:
        ex.run_commandline(argv if debug else [*argv, "--debug"])  # --debug: sacred leaves exceptions to us
    except (VLMoError, SacredError) as error:
        if debug:
            raise
        return print_error(explain(error))
    except Stopped as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr)
        return stopped.status
    return 0


def main(arguments: list[str]) -> int:
    """`vlmo train`: `run.py`, for an installation without the checkout."""
    return command_line(["run.py", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
