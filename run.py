"""Pre-train, fine-tune and evaluate VLMo.

python run.py with data_root=<ARROW_ROOT> num_gpus=<N> num_nodes=<M> <named config> [step200k ...]
    per_gpu_batchsize=<B> load_path=<CKPT> log_dir=<DIR> [test_only=True] [get_recall_metric=True] ...

python run.py print_config with <named config>     every option with its value, what differs from the defaults in colour
python run.py -d with ...                          the full traceback of an error
"""

import difflib
import logging
import sys
from typing import Any

from vlmo.config import ex, resolve  # before sacred itself: silences what its import warns of

# isort: split
from sacred.utils import ConfigAddedError, NamedConfigNotFoundError, SacredError

from vlmo.errors import VLMoError, tell


@ex.main
def main(_config: dict[str, Any]) -> None:
    """Trains, or evaluates with test_only=True."""
    from vlmo.training.runner import run  # after the command line is known to be right: it imports torch

    run(_config)


def explain(error: Exception) -> str:
    """What a person should read of an error of theirs: one line a problem."""
    if isinstance(error, NamedConfigNotFoundError):
        name = str(error).split('"')[1]
        near = difflib.get_close_matches(name, ex.named_configs, 3, cutoff=0.5)
        return f"{name}: there is no such named config" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if isinstance(error, ConfigAddedError):
        lines = []
        for name in error.__conflicting_configs__:
            options = resolve()
            options |= {f"loss_names.{loss}": None for loss in options["loss_names"]}
            near = difflib.get_close_matches(name, options, 1)
            lines.append(f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else ""))
        return "\n".join(lines)
    return str(error)


def command_line(argv: list[str]) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for a mistake in what was asked."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    if not argv[1:] or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    debug = "-d" in argv or "--debug" in argv
    try:
        ex.run_commandline(argv if debug else [*argv, "--debug"])  # --debug: sacred leaves exceptions to us
    except (VLMoError, SacredError) as error:
        if debug:
            raise
        return tell(explain(error))
    return 0


if __name__ == "__main__":
    sys.exit(command_line(sys.argv))
