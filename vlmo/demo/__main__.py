"""A tour of everything on a generated world, in about ten minutes on two CPU cores.

python -m vlmo.demo [--out FOLDER] [--seed N] [--quick]
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmo.demo.run_demo import tour
from vlmo.errors import VLMoError, called_as, print_anything, print_error


def main(arguments: Sequence[str] | None = None) -> int:
    print_anything()
    parser = argparse.ArgumentParser(prog=called_as("vlmo.demo"), description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("result/demo"), help="folder for everything that is made")
    parser.add_argument("--seed", type=int, default=1, help="of the world and of the runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        tour(options.out, options.seed, options.quick)
    except VLMoError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
