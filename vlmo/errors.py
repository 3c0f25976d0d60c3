"""The one error that is meant for the person at the keyboard, and how a command tells it."""

import sys


class VLMoError(ValueError):
    """A mistake in what the user gave (options, files, devices); the message names the remedy.

    `run.py` and the other commands print it without a traceback and exit with 2.
    """


def tell(message: object) -> int:
    """Prints a mistake of the person's, each line as one error; returns the exit status of a command that meets it."""
    for line in str(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2
