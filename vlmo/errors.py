"""What is meant for the person at the keyboard, and how a command tells it."""

import argparse
import sys
from pathlib import Path


class VLMoError(ValueError):
    """A mistake in what the user gave (options, files, devices); the message names the remedy.

    `run.py` and the other commands print it without a traceback and exit with 2.

    Attributes:
        field: the option that is wrong, where it is one.
    """

    def __init__(self, message: object = "", field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InputError(VLMoError):
    """One input of a prediction cannot be used; others may be."""


class Stopped(Exception):
    """A signal has ended the run. The message says where it stands (one process has it, the others' is empty); `status`
    is the exit status, 128 + signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


def called_as(module: str) -> str:
    """Gives what a command was called by: `vlmo convert`, or `python -m vlmo.utils.convert`.

    Args:
        module: as `python -m` takes it; its last part is the command's name.
    """
    program = Path(sys.argv[0])
    under_one_name = program.stem == "vlmo" or program.parts[-2:] == ("vlmo", "__main__.py")
    return f"vlmo {module.rpartition('.')[2]}" if under_one_name else f"python -m {module}"


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a command, which names itself as it was called.

    Args:
        module: see `called_as`.
        description: of the module, in which the command stands as `python -m` runs it.
    """
    called = called_as(module)
    return argparse.ArgumentParser(
        called,
        description=(description or "").replace(f"python -m {module}", called),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def print_anything() -> None:
    """Makes a command's output take every character: what its encoding lacks is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # (not what a notebook or a test has put in its place)
            stream.reconfigure(errors="backslashreplace")


def print_error(message: object) -> int:
    """Prints a mistake of the person's, each line as one error; returns the exit status of a command that meets it."""
    for line in str(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2
