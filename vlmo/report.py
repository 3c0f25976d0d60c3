"""Write the report of a run again, or compare runs.

python -m vlmo.report RUN                 RUN/report.html, also of a run that was killed
python -m vlmo.report RUN RUN ... [--out FILE.html]

A run is its folder (LOG_DIR/NAME/version_K), a checkpoint in it, or LOG_DIR/NAME, of which the newest version is taken.
The page is one file that needs no network. See docs/report.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vlmo.errors import VLMoError, command_parser, print_anything, print_error

COMPARISON = "comparison.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a mistake."""
    print_anything()
    parser = command_parser("vlmo.report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders or checkpoints of runs")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"of the page; default: report.html in the run, {COMPARISON} for several",
    )
    options = parser.parse_args(arguments)
    try:
        print(report(options.runs, options.out))
    except VLMoError as error:
        return print_error(error)
    return 0


def report(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Writes the page and returns its path.

    Raises:
        VLMoError: if one of the runs is none, or the page cannot be written.
    """
    # (the command's --help need not wait for torch)
    from vlmo.training.run_report.comparison import write_comparison
    from vlmo.training.run_report.history import History, find_run
    from vlmo.training.run_report.page import REPORT, write_report

    histories = [History.read(find_run(run)) for run in runs]
    path = out or (histories[0].folder / REPORT if len(histories) == 1 else Path(COMPARISON))
    if path.is_dir():
        raise VLMoError(f"--out {path}: is a folder; give the name of a file")
    try:
        if len(histories) == 1:
            write_report(histories[0], path)
        else:
            write_comparison(histories, path)
    except OSError as error:
        raise VLMoError(f"--out {path}: cannot be written ({error.strerror or error})") from error
    return path


if __name__ == "__main__":
    sys.exit(main())
