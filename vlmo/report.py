"""Write the report of a run again, or compare runs.

python -m vlmo.report RUN                 RUN/report.html, also of a run that was killed
python -m vlmo.report RUN --samples       with what its last checkpoint says of a dozen samples, made now
python -m vlmo.report RUN RUN ... [--out FILE.html]

A run is its folder (LOG_DIR/NAME/version_K), a checkpoint in it, or LOG_DIR/NAME, of which the newest version is taken.
The page is one file that needs no network. See docs/report.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    parser.add_argument(
        "--samples",
        action="store_true",
        help="make the samples with the last checkpoint, for a run that made none; needs its data, on this machine",
    )
    options = parser.parse_args(arguments)
    try:
        print(report(options.runs, options.out, options.samples))
    except VLMoError as error:
        return print_error(error)
    return 0


def report(runs: Sequence[str | Path], out: Path | None = None, samples: bool = False) -> Path:
    """Writes the page and returns its path.

    Args:
        samples: has them made with the last checkpoint of a run, and kept in its record.

    Raises:
        VLMoError: if one of the runs is none, or the page cannot be written.
    """
    # (the command's --help need not wait for torch)
    from vlmo.training.run_report.comparison import write_comparison
    from vlmo.training.run_report.history import History, find_run
    from vlmo.training.run_report.page import REPORT, write_report

    histories = [History.read(find_run(run)) for run in runs]
    if samples and len(histories) > 1:
        raise VLMoError("--samples: is for the report of one run")
    path = out or (histories[0].folder / REPORT if len(histories) == 1 else Path(COMPARISON))
    if path.is_dir():
        raise VLMoError(f"--out {path}: is a folder; give the name of a file")
    try:
        if samples:
            _make_samples(histories[0])
        if len(histories) == 1:
            write_report(histories[0], path)
        else:
            write_comparison(histories, path)
    except OSError as error:
        raise VLMoError(f"--out {path}: cannot be written ({error.strerror or error})") from error
    return path


def _make_samples(history: Any) -> None:
    """Has the samples of a run made, and keeps them in its record."""
    from vlmo.settings import Settings
    from vlmo.training.run_report.history import write_record
    from vlmo.training.run_report.samples import samples_of_checkpoint

    if history.checkpoint is None:
        raise VLMoError(f"--samples: {history.folder} has no checkpoint to make them with")
    settings = Settings.from_config({**history.settings, "num_workers": 0})
    history.record["samples"] = samples_of_checkpoint(history.checkpoint, settings)
    write_record(history.folder, history.record)


if __name__ == "__main__":
    sys.exit(main())
